"""What the loop needs (`Parts`), and the one way to put it together (`Assembly`) from roles that learn and engines that act.

Where the roles run is not known here: `cluster.py` hands in groups of Ray actors, `local.py` a learner in this process.
"""

import dataclasses
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor

from hone.algos.batch import Batch, Packed, Scored
from hone.algos.protocol import ActorCritic, Algorithm
from hone.launch.config import PolicyGradientConfig
from hone.launch.publish import Runner
from hone.learner.checkpoint.snapshot import Outcome
from hone.learner.roles import RoleSpec, StepResult
from hone.rollout.executor import Executor, Group
from hone.rollout.filtering import Filtering
from hone.rollout.types import Engine, Prompt


@runtime_checkable
class Parts(Protocol):
    """Everything `train` calls."""

    def prompts(self) -> Iterator[list[Prompt]]:
        """The prompts of one step after another."""
        ...

    def act(self, prompts: Sequence[Prompt], *, step: int) -> list[Group]:
        """Sample and judge; groups in the order of the prompts."""
        ...

    def recompute(self, batch: Batch, needs: frozenset[str]) -> Batch:
        """Fill the per-token fields the algorithm needs, under the policy as it stands."""
        ...

    def learn(self, scored: Scored, algo: Algorithm, *, policy_too: bool) -> dict[str, float]:
        """One optimiser step of every role that trains."""
        ...

    def publish(self, *, version: int) -> dict[str, float]:
        """Bring the policy to the engines and prove that it arrived; raises StaleWeights."""
        ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Times what happens inside as `timing/<name>`."""
        ...

    def measured(self, batch: Batch) -> dict[str, float]:
        """Times and rates since the last call."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the parts of a run are built from, settled before anything is started.

    `models` maps role -> model directory or hub id, for the roles this run has; `scratch` is a short path for Ray's own files, there
    until every process has ended; `optimiser_steps` is the length of the
    learning-rate schedule; `vocabulary` the number of token ids the tokenizer knows, `hidden_size` the policy's;
    `on_start(role, state)` hears of what is being brought up, `on_event(kind, **fields)` of what must be written down.
    `canary_images` is a prompt with images that engines are asked about after every update, where prompts have any.
    """

    config: PolicyGradientConfig
    models: Mapping[str, str]
    optimiser_steps: int
    vocabulary: int
    hidden_size: int
    eos_token_ids: tuple[int, ...]
    executor: Callable[[Engine, str, int], Executor]
    source: Callable[[], Iterator[list[Prompt]]]
    logs: Path
    scratch: Path
    canary_images: Prompt | None
    on_start: Callable[[str, str], None]
    on_phase: Callable[[str, float | None], None]
    on_event: Callable[..., None]

    def cut(self) -> dict[str, int | None]:
        """How batches are cut into micro-batches: what `packing.shards` takes."""
        train = self.config.train
        return {"max_tokens": train.max_tokens_per_gpu, "max_rows": train.micro_batch_size, "hidden_size": self.hidden_size}

    def roles(self) -> dict[str, RoleSpec]:
        """What the learner needs to know of each role."""
        configs = {"policy": self.config.actor, "critic": self.config.critic, "reference": self.config.ref}
        steps, averages = self.optimiser_steps, {"policy": self.config.train.ema_beta} if self.config.train.enable_ema else {}
        return {
            role: RoleSpec(kind=role, model=model, config=configs[role], total_steps=steps, ema_beta=averages.get(role))  # pyright: ignore[reportArgumentType] - the keys are the kinds
            for role, model in self.models.items()
        }


@runtime_checkable
class RoleGroup(Protocol):
    """The processes that host one or more roles; per-token results come back in the batch's own order."""

    def logp(self, role: str, batch: Packed) -> Tensor:
        """Log-probabilities [nats] of every action token, [T]."""
        ...

    def values(self, role: str, batch: Batch) -> Tensor:
        """Values of the state before every token, [T]."""
        ...

    def update_policy(self, role: str, scored: Scored, algo: Algorithm) -> StepResult:
        """One optimiser step of a policy."""
        ...

    def update_critic(self, role: str, scored: Scored, algo: ActorCritic) -> StepResult:
        """One optimiser step of a critic."""
        ...

    def export(self, role: str, directory: str, *, average: bool = False) -> None:
        """Write a role's model in the Hugging Face layout, or the moving average of its weights."""
        ...

    def sleep(self) -> int:
        """Give up the device's memory of every role until a call needs it; the bytes that were moved."""
        ...

    def save(self, directory: str) -> None:
        """Every rank copies its share of all roles and goes on; a thread of its own writes it into `directory`."""
        ...

    def saved(self, wait: bool) -> list[Outcome] | None:
        """What became of the last save on every rank, once; None while one of them is writing and `wait` is False."""
        ...

    def restore(self, directory: str) -> None:
        """Take up a checkpoint. Raises CheckpointError."""
        ...

    def close(self) -> None:
        """End the group's processes."""
        ...


@dataclasses.dataclass(kw_only=True)
class Assembly:
    """`Parts` made of role groups, an executor and a publisher.

    `host` maps a role (policy, critic, reference) to the group it lives in; `publisher(version)` returns the sync's
    figures; `on_phase(name, seconds)` hears of every phase as it begins (None) and ends (seconds). With `sleeps`, roles give
    up their memory while the engines act, and `rest` has the engines give up theirs when they have. `overlaps`: they act all the time;
    `hold` and `free` then tell the publisher when the learner is at work and when at rest.
    """

    host: Mapping[str, RoleGroup]
    executor: Executor
    source: Callable[[], Iterator[list[Prompt]]]
    publisher: Callable[[int], dict[str, float]]
    runner: Runner
    on_phase: Callable[[str, float | None], None]
    closers: Sequence[Callable[[], None]]
    sleeps: bool = False
    overlaps: bool = False
    rest: Callable[[], Coroutine[Any, Any, None]] | None = None
    hold: Callable[[], None] = lambda: None
    free: Callable[[], None] = lambda: None
    _seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def prompts(self) -> Iterator[list[Prompt]]:
        """The prompts of one step after another."""
        return self.source()

    def act(self, prompts: Sequence[Prompt], *, step: int) -> list[Group]:
        """Sample and judge."""
        if self.sleeps:
            for group in self.role_groups:
                group.sleep()
        groups = self.runner.run(self.executor.collect(prompts, step=step))
        if self.rest is not None:
            self.runner.run(self.rest())
        return groups

    def recompute(self, batch: Batch, needs: frozenset[str]) -> Batch:
        """Fill old_logp, ref_logp and values as asked; old_logp always, for the gap to the engine is measured at every step."""
        fields = {"old_logp": self.host["policy"].logp("policy", batch)}
        if "ref_logp" in needs:
            fields["ref_logp"] = self.host["reference"].logp("reference", batch)
        if "values" in needs:
            fields["values"] = self.host["critic"].values("critic", batch)
        return dataclasses.replace(batch, **fields)

    def learn(self, scored: Scored, algo: Algorithm, *, policy_too: bool) -> dict[str, float]:
        """One optimiser step: the critic's, if there is one, and the policy's."""
        metrics: dict[str, float] = {}
        if "values" in algo.needs:
            critic = self.host["critic"].update_critic("critic", scored, cast(ActorCritic, algo))
            metrics |= {**critic.metrics, "critic_grad_norm": critic.grad_norm, "critic_lr": critic.lr}
            metrics["critic_skipped"] = float(not critic.applied)
        if policy_too:
            policy = self.host["policy"].update_policy("policy", scored, algo)
            metrics |= {**policy.metrics, "actor_grad_norm": policy.grad_norm, "actor_lr": policy.lr}
            metrics["actor_skipped"] = float(not policy.applied)
        return metrics

    def publish(self, *, version: int) -> dict[str, float]:
        """Bring the policy to the engines and prove that it arrived."""
        return self.publisher(version)

    @property
    def role_groups(self) -> list[RoleGroup]:
        """Every group once."""
        return list({id(group): group for group in self.host.values()}.values())

    def export(self, role: str, directory: str, *, average: bool = False) -> None:
        """Write a role's model in the Hugging Face layout, or the moving average of its weights."""
        self.host[role].export(role, directory, average=average)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        self.on_phase(name, None)
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = time.monotonic() - start
            self.on_phase(name, self._seconds[name])

    def measured(self, batch: Batch) -> dict[str, float]:
        """`timing/<phase>` [s] and token rates of the step that ends here."""
        seconds, self._seconds = self._seconds, {}
        metrics = {f"timing/{name}": value for name, value in seconds.items()} | {"timing/step_total": sum(seconds.values())}
        if "generation" in seconds:
            sampling = sum(seconds.values()) if self.overlaps else seconds["generation"]
            metrics["perf/rollout_tokens_per_second"] = int(batch.action_mask.sum()) / sampling
        if "ppo_train" in seconds:
            metrics["perf/train_tokens_per_second"] = batch.tokens.numel() / seconds["ppo_train"]
        if isinstance(self.executor, Filtering):
            metrics |= self.executor.figures()
        return metrics

    def close(self) -> None:
        """End everything that was started, in order; the first error is raised after all were tried."""
        errors: list[Exception] = []
        for closer in self.closers:
            try:
                closer()
            except Exception as error:  # every part gets its chance to end; nothing is dropped: raised below
                errors.append(error)
        self.runner.close()
        if errors:
            raise ExceptionGroup("ending the run's parts failed", errors)
