"""Rows on a ring by the ring-flash-attn package: each rank has an equal run of the micro-batch's tokens and gathers all keys.

The only file that imports the package, of which it takes the all-gather form (`llama3_flash_attn_varlen`, gradients scattered
back in the states' own format). T tokens of this rank, h heads, g key heads, d head size.
"""

import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hone.learner.attention.blocks import check_states
from hone.learner.attention.ring_forms import key_heads_at_once
from hone.learner.attention.wire import GroupWire
from hone.learner.errors import ModelError

PACKAGE = "ring_flash_attn"
ALIAS = "hone_ring_flash_attn"
"""Under this name the package's modules are imported; see `_llama3`."""


@dataclass(frozen=True, kw_only=True)
class FlashRing:
    """One rank's run of a micro-batch: bounds of the rows in it, and of the keys they see, rows' beginnings on other ranks included.

    `seen` is where those keys stand among the gathered ones; lengths are of the longest row [tokens].
    """

    wire: GroupWire
    query_bounds: Int[Tensor, " R_plus_1"]
    key_bounds: Int[Tensor, " R_plus_1"]
    longest_query: int
    longest_key: int
    seen: slice
    head_stride: int | None


def check_ring_flash(device: torch.device, param_dtype: str) -> None:
    """Raises ModelError where the package cannot run: without CUDA, in fp32, or without it or flash-attn being installed."""
    mend = "choose --ds.ring-attn-impl own, or"
    if device.type != "cuda":
        raise ModelError(f"ring-flash-attn runs on CUDA only, and this rank computes on the {device.type}; {mend} give it a GPU")
    if param_dtype == "fp32":
        raise ModelError(f"ring-flash-attn computes in bf16 and fp16 only, not in fp32; {mend} --ds.param-dtype bf16")
    installs = {PACKAGE: "the extra hone-learner[ring-flash]", "flash_attn": "pip install flash-attn --no-build-isolation"}
    if missing := [name for name in installs if find_spec(name) is None]:
        told = " and ".join(name.replace("_", "-") for name in missing)
        raise ModelError(f"{told} not installed; {mend} install: {', '.join(installs[name] for name in missing)}")


def flash_ring(bounds: Int[Tensor, " N_plus_1"], *, wire: GroupWire, head_stride: int | None, device: torch.device) -> FlashRing:
    """The calling rank's share of rows with `bounds`, whose tokens the ring's size divides."""
    prepared = _llama3().llama3_flash_attn_prepare_cu_seqlens(bounds, True, wire.rank, wire.size)
    query_bounds, key_bounds, longest_query, longest_key, seen = prepared
    return FlashRing(
        wire=wire,
        query_bounds=query_bounds.to(device),
        key_bounds=key_bounds.to(device),
        longest_query=longest_query,
        longest_key=longest_key,
        seen=seen,
        head_stride=head_stride,
    )


@torch._disable_dynamo  # see `varlen.row_arguments` # pyright: ignore[reportPrivateImportUsage]
def flash_ring_attention(
    query: Float[Tensor, "T h d"],
    key: Float[Tensor, "T g d"],
    value: Float[Tensor, "T g e"],
    ring: FlashRing,
    *,
    scale: float,
    window: int | None,
) -> Float[Tensor, "T h d"]:
    """Causal attention of this rank's tokens, collective over the ring; `window` counts the tokens a query sees, itself included.

    Raises ValueError as `check_states` and `key_heads_at_once`, and for a head size that the kernels do not take.
    """
    check_states(query, value)
    if query.shape[-1] % 8:
        raise ValueError(f"ring-flash-attn takes head sizes that 8 divides, not {query.shape[-1]}; --ds.ring-attn-impl own")
    return _llama3().llama3_flash_attn_varlen_func(
        *(states.contiguous() for states in (query, key, value)),
        ring.query_bounds,
        ring.key_bounds,
        ring.longest_query,
        ring.longest_key,
        heads_k_stride=key_heads_at_once(key.shape[1], ring.head_stride),
        local_k_slice=ring.seen,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        group=ring.wire.group,
    )


@cache
def _llama3() -> Any:
    """The package's one module that is needed.

    Under a name of ours, so that the package's `__init__` does not run: its adapter to transformers (0.1.8) imports a name that
    transformers 5 has no longer, and ends in an ImportError.
    """
    found = find_spec(PACKAGE)
    assert found is not None and found.submodule_search_locations is not None, "`check_ring_flash` has found it"
    package = ModuleType(ALIAS)
    package.__path__ = list(found.submodule_search_locations)
    sys.modules[ALIAS] = package
    return import_module(f"{ALIAS}.llama3_flash_attn_varlen")
