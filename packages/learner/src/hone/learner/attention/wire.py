"""What ranks that share micro-batches need of their connection: tensors from one to another, and sums over all."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable


@runtime_checkable
class Wire(Protocol):
    """One rank's end. Every method is collective over the ring: all ranks call the same ones in the same order."""

    rank: int
    size: int

    def exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Callable[[], None]:
        """Starts sending to, and receiving from, ranks of the ring; what it returns waits until all of it has happened.

        The tensors are contiguous and must be left alone until then.
        """
        ...

    def add_up(self, tensor: Tensor) -> None:
        """The sum over the ring's ranks, in place."""
        ...


@runtime_checkable
class TensorWire(Wire, Protocol):
    """What the ranks of one model need besides: see `Wire`."""

    def take_highest(self, tensor: Tensor) -> None:
        """The largest of every entry over the group's ranks, in place."""
        ...

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, all of one shape, in the order of ranks."""
        ...


class GroupWire:
    """A ring, or any other group of ranks, as a process group of its own: gloo, nccl, whatever it was made with."""

    def __init__(self, group: distributed.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, distributed.get_rank(group), distributed.get_world_size(group)

    def exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Callable[[], None]:
        """See `Wire`."""
        operations = [
            *(distributed.P2POp(distributed.isend, tensor, group=self.group, group_peer=peer) for peer, tensor in sends.items()),
            *(distributed.P2POp(distributed.irecv, tensor, group=self.group, group_peer=peer) for peer, tensor in receives.items()),
        ]
        works = distributed.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            for work in works:
                work.wait()
            operations.clear()  # which kept the tensors alive

        return wait

    def add_up(self, tensor: Tensor) -> None:
        """See `Wire`."""
        distributed.all_reduce(tensor, group=self.group)

    def take_highest(self, tensor: Tensor) -> None:
        """See `TensorWire`."""
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX, group=self.group)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """See `TensorWire`."""
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(parts, tensor, group=self.group)
        return parts


def group_of(*, rank: int, world_size: int, size: int, stride: int = 1) -> GroupWire | None:
    """One end, the calling rank's, of its group of `size` ranks, `stride` apart; None for groups of one.

    `size` times `stride` divides the job's ranks. Collective over the whole job.
    """
    if size == 1:
        return None
    # Everybody makes every group: that is how torch.distributed agrees on their names.
    firsts = [start + offset for start in range(0, world_size, size * stride) for offset in range(stride)]
    groups = {first: distributed.new_group(list(range(first, first + size * stride, stride))) for first in firsts}
    own = groups[rank - rank % (size * stride) + rank % stride]
    assert isinstance(own, distributed.ProcessGroup)
    return GroupWire(own)


def add_over_ring(part: Tensor, wire: Wire) -> Tensor:
    """Every rank's `part` added up, for all to see; backward hands each rank the gradient of its own part.

    For parts that are zero where another rank's is not: each rank then computes the same loss over the whole, and the
    gradients that the ranks send back are the slices of one.
    """
    return _AddOverRing.apply(part, wire)


class _AddOverRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, wire: Wire) -> Tensor:
        whole = part.clone()
        wire.add_up(whole)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride] - torch types it loosely
        return gradients[0], None
