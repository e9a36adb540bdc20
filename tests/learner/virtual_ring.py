"""A ring in one process: a thread per rank, queues for wires; counts what travels."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class QueueWire:
    """One rank's end of a virtual ring; `sent` counts bytes sent to others by `exchange`."""

    def __init__(self, rank: int, size: int, shared: "Shared") -> None:
        self.rank, self.size, self.shared, self.sent = rank, size, shared, 0
        self.posted: Counter[tuple[str, int]] = Counter()

    def exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Callable[[], None]:
        for peer, tensor in sends.items():
            assert tensor.is_contiguous() and tensor.numel()
            self.sent += tensor.numel() * tensor.element_size()
            self.shared.box(self.rank, peer, self.posted["to", peer]).put(tensor.clone())
            self.posted["to", peer] += 1
        # The n-th receive from a rank gets its n-th message, in the order of posting, whenever it is waited for.
        boxes = {peer: self.shared.box(peer, self.rank, self.posted["from", peer]) for peer in receives}
        self.posted.update(("from", peer) for peer in receives)

        def wait() -> None:
            for peer, tensor in receives.items():
                message = boxes[peer].get(timeout=30)
                assert message.shape == tensor.shape
                tensor.copy_(message)

        return wait

    def add_up(self, tensor: Tensor) -> None:
        self.shared.parts[self.rank] = tensor.clone()
        self.shared.barrier.wait(timeout=30)
        tensor.copy_(torch.stack(self.shared.parts).sum(0))
        self.shared.barrier.wait(timeout=30)

    def take_highest(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self.gather(tensor)).amax(0))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        self.shared.parts[self.rank] = tensor.clone()
        self.shared.barrier.wait(timeout=30)
        parts = [part.clone() for part in self.shared.parts]
        self.shared.barrier.wait(timeout=30)
        return parts


class Shared:
    def __init__(self, size: int) -> None:
        self.boxes: dict[tuple[int, int, int], SimpleQueue[Tensor]] = {}
        self.parts: list[Tensor] = [torch.zeros(0)] * size
        self.barrier = threading.Barrier(size)

    def box(self, sender: int, receiver: int, number: int) -> "SimpleQueue[Tensor]":
        return self.boxes.setdefault((sender, receiver, number), SimpleQueue())


def on_ring(size: int, rank_of: Callable[[QueueWire], Result]) -> tuple[list[Result], list[int]]:
    """What each rank returns, and the bytes it sent, in rank order."""
    shared = Shared(size)
    wires = [QueueWire(rank, size, shared) for rank in range(size)]
    with ThreadPoolExecutor(size) as threads:
        results = list(threads.map(rank_of, wires))
    return results, [wire.sent for wire in wires]
