"""Groups of learner ranks for labelled rows: in this process without Ray or DeepSpeed, or as Ray actors with both."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from hone.launch.local import LocalGroup
from hone.launch.observe.progress import READY
from hone.launch.offline_config import OfflineConfig
from hone.launch.offline_parts import MODEL, REFERENCE, TEACHER, OfflineGroup
from hone.learner.config import RefConfig
from hone.learner.learner import Learner
from hone.learner.roles import RoleSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflinePlan:
    """What the parts of a run are built from, settled before anything is started.

    `models` maps role -> model directory or hub id; `optimiser_steps` is the length of the learning-rate schedule; `hidden_size` and
    `vocabulary` are those of the model that is trained; `on_start(role, state)` hears of what is being brought up; `reference_stays`
    says that the reference lives beside the model.
    """

    config: OfflineConfig
    models: Mapping[str, str]
    optimiser_steps: int
    hidden_size: int
    vocabulary: int
    logs: Path
    scratch: Path
    on_start: Callable[[str, str], None]
    reference_stays: bool = False

    def cut(self) -> dict[str, int | None]:
        """How rows are cut into micro-batches: what `packing.shards` takes."""
        train = self.config.train
        return {"max_tokens": train.max_tokens_per_gpu, "max_rows": train.micro_batch_size, "hidden_size": self.hidden_size}

    def roles(self) -> dict[str, RoleSpec]:
        """The model that is trained, and beside it a teacher where there is one, and the reference where it stays."""
        config = self.config
        trained = RoleSpec(
            kind=config.trained_kind,
            model=self.models[MODEL],
            config=config.model,
            total_steps=self.optimiser_steps,
            ema_beta=config.train.ema_beta if config.train.enable_ema else None,
        )
        beside = [TEACHER] * (TEACHER in self.models) + [REFERENCE] * self.reference_stays
        return {MODEL: trained, **{role: self.frozen(role) for role in beside}}

    def frozen(self, role: str) -> RoleSpec:
        """A model that only answers, of the size and in the places of the one that is trained."""
        own = self.config.model
        config = RefConfig(num_nodes=own.num_nodes, num_gpus_per_node=own.num_gpus_per_node)
        return RoleSpec(kind="reference", model=self.models[role], config=config, total_steps=0)


@runtime_checkable
class Ranks(Protocol):
    """Where groups of learner ranks come from."""

    def group(self, name: str, specs: Mapping[str, RoleSpec]) -> OfflineGroup:
        """A group that has loaded its models."""
        ...

    def close(self) -> None:
        """End what the groups stood on."""
        ...


class LocalRanks:
    """One rank in this process."""

    def __init__(self, plan: OfflinePlan) -> None:
        self._plan = plan
        if plan.config.run.threads is not None:
            torch.set_num_threads(plan.config.run.threads)

    def group(self, name: str, specs: Mapping[str, RoleSpec]) -> LocalGroup:
        """A learner in this process."""
        config = self._plan.config
        learner = Learner(
            roles=specs,
            ds=config.ds,
            backend="single",
            rank=0,
            world_size=1,
            master_addr="127.0.0.1",
            master_port=0,
            seed=config.train.seed,
            max_tokens=config.train.max_tokens_per_gpu,
        )
        return LocalGroup(learner, cut=self._plan.cut())

    def close(self) -> None:
        """Nothing was started."""


def ranks_of(plan: OfflinePlan) -> Ranks:
    """As `run.backend` says."""
    if plan.config.run.backend == "local":
        return LocalRanks(plan)
    from hone.launch.processes import prepare_environment

    prepare_environment()
    from hone.launch.cluster import RayRanks

    return RayRanks(plan)


@contextmanager
def reference_of(plan: OfflinePlan, ranks: Ranks) -> Iterator[OfflineGroup]:
    """The reference model, for as long as the block runs."""
    plan.on_start(REFERENCE, "loading the model")
    group = ranks.group(REFERENCE, {REFERENCE: plan.frozen(REFERENCE)})
    try:
        yield group
    finally:
        group.close()
    plan.on_start(REFERENCE, READY)
