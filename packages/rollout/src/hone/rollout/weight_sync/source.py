"""Weights on their way out: a re-iterable stream of (name, tensor) pairs, fingerprinted as it flows.

Flow: learner's gathered parameters -> FingerprintedSource -> a trainer (shared_memory.py, or vLLM's nccl or ipc).
"""

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from hone.algos.kernels import PLAIN_VARIABLE
from hone.rollout.errors import StaleWeights

# Words summed into one entry of a fingerprint: 8 KiB, so that they and their multipliers stay in a core's first cache. With longer
# chunks the multipliers come from the second, and a pass over weights takes half as long again; with shorter ones the digest of sums does.
_WORDS = 1 << 10
PIECE = 8 * _WORDS
"""Bytes that a piece of a running fingerprint is a multiple of."""
# Bytes handled at a time: on the CPU what the last-level cache holds, on a GPU what keeps it busy without a second copy of the model.
_CPU_SLICE, _GPU_SLICE = 1 << 20, 1 << 26
COMPILED_WORDS = 1 << 20
"""Words of a tensor from which compiled loops sum them on a CPU: below, a millisecond; compiling takes half a second. Compiled loops
that are there already sum every tensor."""
_COMPILED = "hone.rollout.weight_sync.compiled_sums"

_LAYOUT = "a policy's tensors do not change during a run, so its weights are being read wrongly"


@functools.cache
def _multipliers(device: torch.device) -> Tensor:
    """One fixed odd 64-bit multiplier per word of a chunk: odd, so that no change of a single word is lost."""
    index = torch.arange(1, _WORDS + 1, dtype=torch.int64, device=device)
    mixed = index * -7046029254386353131
    mixed = (mixed ^ ((mixed >> 29) & ((1 << 35) - 1))) * -4658895280553007687
    return mixed | 1


class RunningFingerprint:
    """A fingerprint that is taken piece by piece: every piece of the bytes but the last is a multiple of `PIECE` long."""

    def __init__(self) -> None:
        self._sums, self._last = list[Tensor](), b""

    def add(self, data: UInt8[Tensor, " B"], target: UInt8[Tensor, " B"] | None = None) -> None:
        """Take the next bytes (their address a multiple of 8), and copy them to `target` on the way."""
        words = data[: data.numel() // 8 * 8]
        sums = _sums(
            words.view(torch.int64), _multipliers(data.device), None if target is None else target[: words.numel()].view(torch.int64)
        )
        self._sums.append(sums)
        if words.numel() < data.numel():
            self._last = data[words.numel() :].cpu().numpy().tobytes()
            if target is not None:
                target[words.numel() :].copy_(data[words.numel() :])

    def of(self, tensor: Tensor) -> str:
        """That of the tensor whose bytes the pieces were."""
        digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=8)
        for sums in self._sums:
            digest.update(sums.cpu().numpy().data)
        digest.update(self._last)
        return digest.hexdigest()


def fingerprint(tensor: Tensor) -> str:
    """64-bit digest [hex] of a tensor's dtype, shape and bytes; the same on every device.

    h = blake2b(dtype, shape, s_0, s_1, ..., last bytes), s_c = sum_i w_i x_{c,i} mod 2^64 over the 64-bit words x of chunk c with
    odd multipliers w. Integer sums do not depend on their order, so threads and GPUs agree to the bit. It guards against
    accidents (a lost, stale, swapped or transposed tensor), not against an adversary.
    """
    running = RunningFingerprint()
    running.add(bytes_of(tensor))
    return running.of(tensor)


def copied(tensor: Tensor, target: UInt8[Tensor, " B"], piece: int | None = None, tell: Callable[[int], None] | None = None) -> str:
    """The tensor's fingerprint, its bytes copied to `target` (on the CPU) on the way: they are read from memory once for both.

    `tell` hears how many bytes stand in `target` after every `piece` [bytes, a multiple of `PIECE`] but the last.
    """
    data = bytes_of(tensor).cpu()
    if target.storage_offset() % 8:
        raise ValueError(f"weights are copied to addresses that 8 divides, not to byte {target.storage_offset()}")
    running = RunningFingerprint()
    for begin in range(0, data.numel(), piece or max(1, data.numel())):
        if begin and tell is not None:
            tell(begin)
        end = min(data.numel(), begin + (piece or data.numel()))
        running.add(data[begin:end], target[begin:end])
    return running.of(tensor)


def bytes_of(tensor: Tensor) -> UInt8[Tensor, " B"]:
    """A tensor's bytes in order, at an address that 8 divides: its own memory where that will do."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return data.clone() if data.storage_offset() % 8 else data


def _sums(words: Int64[Tensor, " W"], multipliers: Int64[Tensor, " c"], target: Int64[Tensor, " W"] | None) -> Int64[Tensor, " C"]:
    """Of every chunk, the last perhaps short, copied to `target` where there is one; whole numbers, so compiled loops agree to the bit."""
    if not words.is_cuda and _compiled(words.numel()):
        from hone.rollout.weight_sync.compiled_sums import sums_of_chunks

        return sums_of_chunks(words, multipliers, target)
    if target is not None:
        target.copy_(words)
    step = (_GPU_SLICE if words.is_cuda else _CPU_SLICE) // 8 // _WORDS
    whole = words.numel() // _WORDS * _WORDS
    sums = [(rows * multipliers).sum(1) for rows in words[:whole].view(-1, _WORDS).split(step)]
    rest = words[whole:]
    return torch.cat([*sums, (rest * multipliers[: rest.numel()]).sum(0, keepdim=True)]) if rest.numel() else torch.cat(sums or [rest])


def _compiled(words: int) -> bool:
    if os.environ.get(PLAIN_VARIABLE):
        return False
    return _COMPILED in sys.modules or (words >= COMPILED_WORDS and find_spec("numba") is not None)


@dataclass(frozen=True, kw_only=True)
class Meta:
    """Name, dtype on the wire and full shape of one tensor, as vLLM's trainers ask for them before a transfer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class FingerprintedSource:
    """A re-iterable stream of full (name, tensor) pairs that remembers the fingerprints of its last pass.

    `weights` yields a fresh pass on every `iter`; gathering may be a collective, so all ranks iterate in the same order. `dtype`
    is what numbers with a fraction are turned into on their way (the engines' number format); None leaves them as they are.
    Every pass has the names, dtypes and shapes of the first, or StaleWeights names the tensor that is dropped, new or another.
    Carries the part of vLLM's `WeightSource` that its nccl and ipc trainers use.
    """

    def __init__(self, weights: Iterable[tuple[str, Tensor]], *, dtype: torch.dtype | None = None) -> None:
        self._weights, self._dtype = weights, dtype
        self._metadata: list[Meta] | None = None
        self.fingerprints: dict[str, str] = {}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        fingerprints: dict[str, str] = {}
        self.fingerprints = {}
        for name, tensor in self.plain():
            fingerprints[name] = fingerprint(tensor)
            yield name, tensor
        self.fingerprints = fingerprints

    def plain(self) -> Iterator[tuple[str, Tensor]]:
        """A pass without fingerprints, for whoever takes them itself."""
        found: list[Meta] = []
        names: set[str] = set()
        for name, tensor in self._weights:
            if name in names:
                raise ValueError(f"the weights hold {name!r} twice; an engine would keep only one of them")
            names.add(name)
            sent = tensor if self._dtype is None or not tensor.is_floating_point() else tensor.to(self._dtype)
            found.append(Meta(name=name, dtype=sent.dtype, shape=tuple(sent.shape)))
            if self._metadata is not None:
                self._check(found[-1], len(found) - 1)
            yield name, sent
        if self._metadata is not None and len(found) < len(self._metadata):
            raise StaleWeights(f"the weights have lost {self._metadata[len(found)].name!r}, which was sent before; {_LAYOUT}")
        self._metadata = found

    def _check(self, found: Meta, index: int) -> None:
        """Raises StaleWeights where a tensor is not the one that stood in this place before."""
        assert self._metadata is not None
        if index == len(self._metadata):
            raise StaleWeights(f"the weights have a new tensor {found.name!r}, which was not sent before; {_LAYOUT}")
        before = self._metadata[index]
        if found.name != before.name:
            lost = found.name in {one.name for one in self._metadata}
            what = f"lost {before.name!r}, which was sent before" if lost else f"a new tensor {found.name!r}, which was not sent before"
            raise StaleWeights(f"the weights have {what}; {_LAYOUT}")
        if found != before:
            raise StaleWeights(
                f"{found.name!r} is {found.dtype} {list(found.shape)} now and was {before.dtype} {list(before.shape)} before; {_LAYOUT}"
            )

    def metadata(self) -> list[Meta]:
        """Names, dtypes and shapes in order; the first call costs a pass (a collective), later ones nothing."""
        if self._metadata is None:
            for _ in self.plain():
                pass
        assert self._metadata is not None
        return self._metadata
