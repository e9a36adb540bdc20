"""How the policy's weights travel to the engines of a run."""

from dataclasses import dataclass
from pathlib import Path

import torch

from hone.launch.config import PolicyGradientConfig
from hone.launch.placement import sync_backend
from hone.learner.roles import DTYPES


@dataclass(frozen=True, kw_only=True)
class Transport:
    """Settings of both ends; what they mean is said at `rollout.weight_sync.trainer`.

    `dtype` is the engines' number format, `lora_rank` that of an adapter that travels alone, 0 where weights do; `timeout_s` [s] is the
    deadline of each phase.
    """

    backend: str
    directory: Path
    ranks_per_engine: int
    dtype: torch.dtype
    delta: bool
    lora_rank: int
    timeout_s: float

    @property
    def engine_dtype(self) -> str:
        """The number format as vLLM calls it."""
        return str(self.dtype).removeprefix("torch.")


def transport(config: PolicyGradientConfig, *, gpus: int, directory: Path) -> Transport:
    """As configured, for a machine or cluster with so many GPUs; files go below `directory`."""
    vllm, placement = config.vllm, config.placement
    return Transport(
        backend=sync_backend(vllm.sync_backend, gpus=gpus, engine_group=placement.engine, policy_group=placement.policy),
        directory=directory,
        ranks_per_engine=vllm.devices,
        dtype=DTYPES[config.ds.param_dtype if vllm.dtype == "auto" else vllm.dtype],
        delta=vllm.sync_delta,
        lora_rank=config.ds.lora.rank if vllm.sync_adapters_only else 0,
        timeout_s=vllm.sync_timeout_s,
    )
