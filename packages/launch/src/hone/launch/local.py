"""The run's parts in this process: the learner, an engine on transformers, no Ray, no vLLM, no DeepSpeed.

For a debugger, for tests, and for machines where vLLM does not run. The same loop, packing, judging and verification.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from hone.algos.batch import Attachment, Batch, Packed, Scored
from hone.algos.offline import Offline
from hone.algos.protocol import ActorCritic, Algorithm
from hone.datasets.tokenizer import load_tokenizer
from hone.launch.observe.progress import READY
from hone.launch.parts import Assembly, Plan
from hone.launch.publish import Publisher, Standing
from hone.learner.checkpoint.snapshot import Outcome
from hone.learner.learner import Learner
from hone.learner.model_files import resolve
from hone.learner.packing import Shard, shards, unshard, unshard_rows
from hone.learner.roles import DTYPES, StepResult
from hone.learner.vision import sees
from hone.rollout.engines.transformers import TransformersEngine
from hone.rollout.sampling import reads_text
from hone.rollout.types import PauseMode
from hone.rollout.weight_sync.source import FingerprintedSource, fingerprint
from hone.rollout.weight_sync.verify import tolerance

PROMPTS_PER_CALL = 64
"""Prompts the engine decodes together; it batches what one call brings."""


class LocalGroup:
    """A learner in this process behind the RoleGroup protocol."""

    def __init__(self, learner: Learner, *, cut: Mapping[str, Any]) -> None:
        self.learner, self._cut = learner, cut

    def _shard(self, batch: Packed) -> Shard:
        return shards(batch, ranks=1, **self._cut)[0]

    def logp(self, role: str, batch: Packed) -> Tensor:
        """Log-probabilities [nats] of every action token, [T]."""
        shard = self._shard(batch)
        return unshard([shard], [self.learner.logp(role, shard)], cu_seqlens=batch.cu_seqlens)

    def values(self, role: str, batch: Batch) -> Tensor:
        """Values of the state before every token, [T]."""
        shard = self._shard(batch)
        return unshard([shard], [self.learner.values(role, shard)], cu_seqlens=batch.cu_seqlens)

    def update_policy(self, role: str, scored: Scored, algo: Algorithm) -> StepResult:
        """One optimiser step of a policy."""
        return self.learner.update_policy(role, self._shard(scored), algo)

    def update_critic(self, role: str, scored: Scored, algo: ActorCritic) -> StepResult:
        """One optimiser step of a critic."""
        return self.learner.update_critic(role, self._shard(scored), algo)

    def update_offline(self, role: str, rows: Packed, algo: Offline) -> StepResult:
        """One optimiser step over labelled rows."""
        return self.learner.update_offline(role, self._shard(rows), algo)

    def evaluate_offline(self, role: str, rows: Packed, algo: Offline) -> dict[str, float]:
        """The figures of such a step, without one."""
        return self.learner.evaluate_offline(role, self._shard(rows), algo)

    def scores(self, role: str, rows: Packed) -> Tensor:
        """A reward model's score of every row [reward], [N]."""
        shard = self._shard(rows)
        return unshard_rows([shard], [self.learner.scores(role, shard)])

    def keep_statistics(self, role: str, scores: Tensor) -> None:
        """Let a reward model's configuration have the mean and deviation of its scores."""
        self.learner.keep_statistics(role, scores)

    def top_logp(self, role: str, rows: Packed, *, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """A teacher's likeliest tokens and their log-probabilities [nats] at every action token, [T, K] each."""
        shard = self._shard(rows)
        found = self.learner.top_logp(role, shard, k=k, temperature=temperature)
        tokens, logp = (unshard([shard], [one], cu_seqlens=rows.cu_seqlens) for one in found)
        return tokens, logp

    def export(self, role: str, directory: str, *, average: bool = False) -> None:
        """Write a role's model in the Hugging Face layout, or the moving average of its weights."""
        self.learner.export(role, directory, average=average)

    def sleep(self) -> int:
        """Give up the memory of every role until a call needs it."""
        return self.learner.sleep()

    def save(self, directory: str) -> None:
        """Copy the state and go on."""
        self.learner.save(directory)

    def saved(self, wait: bool) -> list[Outcome] | None:
        """What became of the last save."""
        outcome = self.learner.saved(wait)
        return None if outcome is None else [outcome]

    def restore(self, directory: str) -> None:
        """Take up a checkpoint."""
        self.learner.restore(directory)

    def close(self) -> None:
        """Release the models."""
        self.learner.close()


class ServedHere:
    """The in-process engine as the weight sync sees it; there is nobody to pause, for the loop does one thing at a time."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.name, self._engine = engine.name, engine
        self._received: dict[str, str] = {}

    def receive(self, source: FingerprintedSource) -> dict[str, str]:
        """Copy the weights over; the fingerprints of what was sent. What arrived is read back from the engine's own memory."""
        self._engine.load_weights(source, version=self._engine.version)
        held = self._engine.held()
        self._received = {name: fingerprint(held[name]) for name in source.fingerprints}
        return source.fingerprints

    async def pause(self, mode: PauseMode) -> None:
        """Nothing is in flight."""

    async def resume(self) -> None:
        """Nothing was held back."""

    async def set_version(self, version: int) -> None:
        """Label the weights served from now on."""
        self._engine.version = version

    async def version(self) -> int:
        """The label of the weights served now."""
        return self._engine.version

    async def fingerprints(self) -> dict[str, str]:
        """What the last update left in the engine, by name."""
        return self._received

    async def suspects(self) -> list[str]:
        """Every byte can be read back here."""
        return []

    async def prompt_logp(self, tokens: Sequence[int], images: Sequence[Attachment] = ()) -> list[float]:
        """Log-probabilities [nats] of `tokens[1:]` under the weights served now."""
        return await self._engine.prompt_logp(tokens, images)


class _Weights:
    """The policy's weights as a stream that starts afresh on every pass."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._learner.weights("policy")


def build(plan: Plan) -> Assembly:
    """Load the models and connect them, all in this process."""
    config = plan.config
    dtype = DTYPES[config.ds.param_dtype]
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    plan.on_start("learner", "loading models")
    learner = Learner(
        roles=plan.roles(),
        ds=config.ds,
        backend="single",
        rank=0,
        world_size=1,
        master_addr="127.0.0.1",
        master_port=0,
        seed=config.train.seed,
        max_tokens=config.train.max_tokens_per_gpu,
    )
    plan.on_start("learner", READY)
    plan.on_start("engine", "loading model")
    tokenizer: Any = load_tokenizer(plan.models["policy"]) if reads_text(config.rollout) else None
    engine = TransformersEngine(**loaded(resolve(plan.models["policy"]), dtype), eos_ids=plan.eos_token_ids, tokenizer=tokenizer)
    plan.on_start("engine", READY)
    served, group = ServedHere(engine), LocalGroup(learner, cut=plan.cut())
    source = FingerprintedSource(_Weights(learner))
    runner = asyncio.Runner()
    publisher = Publisher(
        served=lambda: Standing([served]),
        policy=group,
        send=lambda: served.receive(source),
        connect=lambda engines: None,
        runner=runner,
        vocabulary=plan.vocabulary,
        tolerance=tolerance(str(dtype).removeprefix("torch."), config.vllm.sync_tolerance),
        seed=config.train.seed,
        timeout_s=config.vllm.sync_timeout_s,
        shown=plan.canary_images,
    )
    return Assembly(
        host=dict.fromkeys(plan.models, group),
        executor=plan.executor(engine, f"transformers {transformers.__version__}", PROMPTS_PER_CALL),
        source=plan.source,
        publisher=publisher,
        runner=runner,
        on_phase=plan.on_phase,
        closers=[group.close],
        sleeps=config.ds.enable_sleep,
    )


def loaded(directory: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The engine's own model, and the image processor of one that sees."""
    if not sees(transformers.AutoConfig.from_pretrained(directory)):
        return {"model": transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)}
    model = transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype=dtype)
    return {"model": model, "image_processor": transformers.AutoImageProcessor.from_pretrained(directory)}
