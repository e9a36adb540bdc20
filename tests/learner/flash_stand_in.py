"""What ring-flash-attn calls of flash-attn, by the definition of attention and torch's autograd: the two kernels need a GPU."""

import sys
import warnings
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool, left: int) -> tuple[Tensor, Tensor]:
    """One row, its last query and its last key the same token; query [Tq, h, d] -> the same, and log-sum-exps [h, Tq]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    scores = scale * torch.einsum("qhd,khd->hqk", query, key)
    ages = (torch.arange(len(query)) + len(key) - len(query))[:, None] - torch.arange(len(key))[None]
    assert causal, "nothing here asks for another mask"
    seen = (ages >= 0) & ((ages <= left) if left >= 0 else torch.ones_like(ages, dtype=torch.bool))
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value), scores.logsumexp(-1)


def by_row(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    rows = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    parts = [attention(q[slice(*queries)], k[slice(*keys)], v[slice(*keys)], **how) for queries, keys in rows]
    return torch.cat([out for out, _ in parts]), torch.cat([sums for _, sums in parts], 1)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, None, None]:
    out, sums = by_row(q, k, v, cu_seqlens_q, cu_seqlens_k, scale=softmax_scale, causal=causal, left=window_size_left)
    return out, sums, None, None


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
) -> None:
    with torch.enable_grad():
        states = [one.detach().requires_grad_() for one in (q, k, v)]
        how = {"scale": softmax_scale, "causal": causal, "left": window_size_left}
        again, sums = by_row(*states, cu_seqlens_q, cu_seqlens_k, **how)
        torch.testing.assert_close((again, sums), (out, softmax_lse))  # of the same queries and keys as forward's
        gradients = torch.autograd.grad(again, states, dout)
    for target, gradient in zip((dq, dk, dv), gradients, strict=True):
        target.copy_(gradient)


def enter() -> None:
    """Stands in for flash-attn in this process, where the package may use what torch deprecates."""
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
    package, interface = (ModuleType(name) for name in ("flash_attn", "flash_attn.flash_attn_interface"))
    package.__spec__, package.__path__ = ModuleSpec("flash_attn", None, is_package=True), []
    interface._flash_attn_varlen_forward = _flash_attn_varlen_forward  # type: ignore[attr-defined]
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward  # type: ignore[attr-defined]
    sys.modules |= {"flash_attn": package, "flash_attn.flash_attn_interface": interface}
