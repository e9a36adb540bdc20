"""Optional fast paths behind the plain functions: numba on the CPU, Triton on CUDA (`hone-algos[fast]` brings the first).

`kernels_for` chooses; nothing is imported, and nothing compiled, before a large input asks for it. The plain functions in
torch are always there and are the reference: what a kernel answers may differ from them as its docstring says, no further.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FEWEST_TOKENS = 2**16
"""Below this plain torch needs a millisecond, and compiling a kernel a second."""

PLAIN_VARIABLE = "HONE_ALGOS_PLAIN"
"""Environment variable: any value but the empty one keeps a process, and those it starts, to plain torch."""

_HOMES = {"cpu": ("numba", "hone.algos.kernels.cpu"), "cuda": ("triton", "hone.algos.kernels.cuda")}
_plain_only: ContextVar[bool] = ContextVar("plain_only", default=False)


@runtime_checkable
class Kernels(Protocol):
    """What each device's file offers. Per-token tensors are fp32, contiguous or not, and carry no gradient in."""

    def gae(
        self,
        rewards: Float[Tensor, " T"],
        values: Float[Tensor, " T"],
        action_mask: Bool[Tensor, " T"],
        cu_seqlens: Int[Tensor, " N_plus_1"],
        *,
        gamma: float,
        lambd: float | Float[Tensor, " N"],
        bootstrap: Float[Tensor, " N"],
    ) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"], bool]:
        """(advantages, returns, whether all advantages are finite); `bootstrap` in fp64."""
        ...

    def surrogate(
        self,
        logp: Float[Tensor, " T"],
        old_logp: Float[Tensor, " T"],
        advantages: Float[Tensor, " T"],
        weights: Float[Tensor, " T"],
        action_mask: Bool[Tensor, " T"],
        *,
        lowest: float,
        highest: float,
        dual_clip: float,
    ) -> tuple[Float[Tensor, " 3"], Float[Tensor, " T"]]:
        """((total, weight of the tokens at a bound, weighted old_logp - logp) in fp64, gradient of the total by logp)."""
        ...


@contextmanager
def plain_only() -> Generator[None]:
    """Within it every function takes its plain path: for comparing, and under torch.func, which a native path refuses."""
    token = _plain_only.set(True)
    try:
        yield
    finally:
        _plain_only.reset(token)


def kernels_for(*per_token: Float[Tensor, " T"]) -> Kernels | None:
    """The kernels of the device that these tensors share, or None where the plain path is to be taken.

    None for fewer tokens than pay for compiling, for anything but fp32, under `plain_only` or the environment variable,
    while torch compiles or traces, and where the device's compiler is not installed.
    """
    first = per_token[0]
    suited = all(tensor.dtype == torch.float32 and tensor.device == first.device for tensor in per_token)
    if first.numel() < FEWEST_TOKENS or not suited or first.device.type not in _HOMES:
        return None
    if _plain_only.get() or os.environ.get(PLAIN_VARIABLE) or torch.compiler.is_compiling():
        return None
    compiler, home = _HOMES[first.device.type]
    return cast(Kernels, import_module(home)) if _installed(compiler) else None


@cache
def _installed(compiler: str) -> bool:
    return find_spec(compiler) is not None
