"""Settings that do not go together, said before a model is touched."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from hone.learner.adapters import check_settings
from hone.learner.config import DeepSpeedConfig, RefConfig
from hone.learner.model_files import check_ring, check_tensor_parallel
from hone.learner.roles import RoleSpec


def check_combinations(
    roles: Mapping[str, RoleSpec], ds: DeepSpeedConfig, *, backend: Literal["deepspeed", "single"], world_size: int
) -> None:
    """Raises ValueError for what the backend, or a model over several ranks, cannot do."""
    if backend == "single" and world_size != 1:
        raise ValueError(f"the single-process engine has one rank, not {world_size}; choose the deepspeed backend for more")
    if backend == "single" and (ds.adam_offload or ds.param_offload or ds.zpg > 1 or ds.overlap_comm or ds.deepcompile):
        raise ValueError("offload, --ds.zpg, --ds.overlap-comm and --ds.deepcompile are DeepSpeed's; choose the deepspeed backend")
    check_settings(ds)
    if ds.tensor_parallel_size > 1:
        _check_tensor_parallel(roles, ds, backend=backend, world_size=world_size)


def check_heads(directories: Iterable[Path], ds: DeepSpeedConfig, *, world_size: int) -> None:
    """Raises ValueError for models whose heads do not fall into as many parts as they are to be cut into."""
    for directory in directories:
        check_tensor_parallel(str(directory), size=ds.tensor_parallel_size)
        check_ring(
            str(directory),
            world_size=world_size,
            size=ds.ring_attn_size,
            head_stride=ds.ring_attn_head_stride,
            tensor_parallel_size=ds.tensor_parallel_size,
        )


def _check_tensor_parallel(roles: Mapping[str, RoleSpec], ds: DeepSpeedConfig, *, backend: str, world_size: int) -> None:
    size = ds.tensor_parallel_size
    if backend == "single" or world_size % size:
        raise ValueError(
            f"{world_size} ranks do not fall into groups of {size}; --ds.tensor-parallel-size must divide the ranks of every group of roles"
        )
    if world_size % (size * ds.ring_attn_size):
        raise ValueError(
            f"{world_size} ranks do not fall into rings of {ds.ring_attn_size} times {size}; --ds.ring-attn-size times "
            "--ds.tensor-parallel-size must divide the ranks of every group of roles"
        )
    muon = any(not isinstance(spec.config, RefConfig) and spec.config.optim == "muon" for spec in roles.values())
    for wanted, setting in (
        (ds.lora.rank > 0, "--ds.lora.rank 0"),
        (ds.load_in_4bit, "no --ds.load-in-4bit"),
        (ds.use_liger_kernel, "no --ds.use-liger-kernel"),
        (ds.zpg > 1, "--ds.zpg 1"),
        (ds.deepcompile, "no --ds.deepcompile"),
        (muon, "--*.optim adam, for Muon orthogonalises whole matrices"),
    ):
        if wanted:
            raise ValueError(f"not there yet together with --ds.tensor-parallel-size {size}: choose {setting}, or ranks with whole models")
