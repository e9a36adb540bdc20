"""Weights on their way out: a re-iterable stream of (name, tensor) pairs, fingerprinted as it flows.

Flow: learner's gathered parameters -> FingerprintedSource -> a trainer (shared_memory.py, or vLLM's nccl or ipc).
"""

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from jaxtyping import Int64
from torch import Tensor

from hone.algos.kernels import PLAIN_VARIABLE

# Words summed into one entry of a fingerprint; 128 KiB of data, so the products stay in a core's cache.
_WORDS = 1 << 14
# Bytes handled at a time: on the CPU what the last-level cache holds, on a GPU what keeps it busy without a second copy of the model.
_CPU_SLICE, _GPU_SLICE = 1 << 20, 1 << 26
COMPILED_WORDS = 1 << 20
"""Words of a tensor from which compiled loops sum them on a CPU: below, a millisecond; compiling takes half a second."""


@functools.cache
def _multipliers(device: torch.device) -> Tensor:
    """One fixed odd 64-bit multiplier per word of a chunk: odd, so that no change of a single word is lost."""
    index = torch.arange(1, _WORDS + 1, dtype=torch.int64, device=device)
    mixed = index * -7046029254386353131
    mixed = (mixed ^ ((mixed >> 29) & ((1 << 35) - 1))) * -4658895280553007687
    return mixed | 1


def fingerprint(tensor: Tensor) -> str:
    """64-bit digest [hex] of a tensor's dtype, shape and bytes; the same on every device.

    h = blake2b(dtype, shape, s_0, s_1, ...), s_c = sum_i w_i x_{c,i} mod 2^64 over the 64-bit words x of chunk c with
    odd multipliers w. Integer sums do not depend on their order, so threads and GPUs agree to the bit. It guards against
    accidents (a lost, stale, swapped or transposed tensor), not against an adversary.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    words = data[: data.numel() // 8 * 8].view(torch.int64)
    multipliers = _multipliers(data.device)
    whole = words.numel() // _WORDS * _WORDS
    sums = [_sums(words[:whole], multipliers)] if whole else []
    rest = words[whole:]
    sums.append((rest * multipliers[: rest.numel()]).sum().view(1))
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=8)
    digest.update(torch.cat(sums).cpu().numpy().data)
    digest.update(data[words.numel() * 8 :].cpu().numpy().data)
    return digest.hexdigest()


def _sums(words: Int64[Tensor, " W"], multipliers: Int64[Tensor, " c"]) -> Int64[Tensor, " C"]:
    """Of every chunk; whole numbers, so compiled loops and plain torch agree to the bit."""
    plain = words.is_cuda or words.numel() < COMPILED_WORDS or os.environ.get(PLAIN_VARIABLE) or find_spec("numba") is None
    if not plain:
        from hone.rollout.weight_sync.compiled_sums import sums_of_chunks

        return sums_of_chunks(words, multipliers)
    step = (_GPU_SLICE if words.is_cuda else _CPU_SLICE) // 8 // _WORDS
    return torch.cat([(rows * multipliers).sum(1) for rows in words.view(-1, _WORDS).split(step)])


@dataclass(frozen=True, kw_only=True)
class Meta:
    """Name, dtype on the wire and full shape of one tensor, as vLLM's trainers ask for them before a transfer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class FingerprintedSource:
    """A re-iterable stream of full (name, tensor) pairs that remembers the fingerprints of its last pass.

    `weights` yields a fresh pass on every `iter`; gathering may be a collective, so all ranks iterate in the same order.
    Carries the part of vLLM's `WeightSource` that its nccl and ipc trainers use.
    """

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._weights = weights
        self._metadata: list[Meta] | None = None
        self.fingerprints: dict[str, str] = {}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        fingerprints: dict[str, str] = {}
        self.fingerprints = {}
        for name, tensor in self._weights:
            if name in fingerprints:
                raise ValueError(f"the weights hold {name!r} twice; an engine would keep only one of them")
            fingerprints[name] = fingerprint(tensor)
            yield name, tensor
        self.fingerprints = fingerprints

    def metadata(self) -> list[Meta]:
        """Names, dtypes and shapes in order; the first call costs a pass (a collective), later ones nothing."""
        if self._metadata is None:
            self._metadata = [Meta(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape)) for name, tensor in self._weights]
        return self._metadata
