"""Memory given up between phases: tensors' bytes go to the host, their storage shrinks to nothing, and grows again at the same place.

It is the storage that sleeps and not the tensor, so every view of it (a parameter within DeepSpeed's flat buffer, a shard, a state of
the optimiser) sleeps and wakes with it, whatever engine or ZeRO stage laid it out. Without a GPU the host is where they were already.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, UntypedStorage, nn

ALIGNMENT = 64
"""Between two storages on the host [bytes]: more than any number format needs."""


class Nap:
    """What is asleep, and its copy on the host: one buffer, pinned beside a GPU and kept from nap to nap."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._asleep: dict[int, tuple[UntypedStorage, int, int]] = {}
        self._scratch: list[tuple[UntypedStorage, int]] = []

    def __bool__(self) -> bool:
        return bool(self._asleep)

    def lay_down(self, tensors: Iterable[Tensor], scratch: Iterable[Tensor] = ()) -> int:
        """Puts the storages of `tensors` to sleep, those on the device; returns the bytes that were moved.

        `scratch` gives up its memory, too, but has nothing to keep. Nothing may use a tensor of either until `wake`.
        """
        assert not self._asleep, "wake up first"
        found, places, end = self._storages(tensors), {}, 0
        self._scratch = [(one, one.nbytes()) for key, one in self._storages(scratch).items() if key not in found and one.resizable()]
        for key, storage in found.items():
            places[key], end = end, end + storage.nbytes() + -storage.nbytes() % ALIGNMENT
        if self._buffer.numel() < end:
            self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        for key, storage in found.items():
            size = storage.nbytes()
            self._buffer[places[key] : places[key] + size].copy_(_bytes(storage), non_blocking=True)
            self._asleep[key] = (storage, places[key], size)
        self._wait()
        for storage in (*found.values(), *(one for one, _ in self._scratch)):
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # else torch keeps what was freed, and no other process could have it
        return sum(size for _, _, size in self._asleep.values())

    def wake(self) -> int:
        """Every storage as it was, bit for bit; returns the bytes that were moved."""
        for storage, size in self._scratch:
            storage.resize_(size)
        self._scratch = []
        for storage, place, size in self._asleep.values():
            storage.resize_(size)
            _bytes(storage).copy_(self._buffer[place : place + size], non_blocking=True)
        self._wait()
        moved = sum(size for _, _, size in self._asleep.values())
        self._asleep = {}
        return moved

    def copy_of(self, tensor: Tensor) -> Tensor:
        """Where to read a tensor: on the host while it sleeps, else itself."""
        entry = self._asleep.get(tensor.untyped_storage()._cdata)
        if entry is None:
            return tensor
        _, place, size = entry
        host = self._buffer[place : place + size].view(tensor.dtype)
        return host.as_strided(tensor.shape, tensor.stride(), host.storage_offset() + tensor.storage_offset())

    def _storages(self, tensors: Iterable[Tensor]) -> dict[int, UntypedStorage]:
        storages = [tensor.untyped_storage() for tensor in tensors]
        # On the CPU NumPy may share it (a weight that was fingerprinted): then it stays, where giving it up would free nothing anyway.
        return {one._cdata: one for one in storages if one.device.type == self._device.type and one.nbytes() and one.resizable()}

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Sleeper:
    """An engine's two naps: its parameters, and what only training needs (masters, optimiser state, gradients, averages)."""

    def __init__(self, device: torch.device) -> None:
        self._parameters, self._training = Nap(device), Nap(device)
        self._asleep = (False, False)

    @property
    def idle(self) -> bool:
        """Whether the parameters sleep: no forward pass is possible."""
        return self._asleep[0]

    def sleep(self, parameters: Iterable[Tensor], training: Iterable[Tensor], scratch: Iterable[Tensor] = ()) -> int:
        """Puts away what is awake, `scratch` with what is only for training; the bytes that were moved."""
        parameters_asleep, training_asleep = self._asleep
        moved = 0
        if not training_asleep:
            # Where a parameter is its own master it goes with the parameters, which wake first.
            parameters = list(parameters)
            theirs = {one.untyped_storage()._cdata for one in parameters}
            moved += self._training.lay_down((one for one in training if one.untyped_storage()._cdata not in theirs), scratch)
        if not parameters_asleep:
            moved += self._parameters.lay_down(parameters)
        self._asleep = (True, True)
        return moved

    def wake(self, *, training: bool) -> int:
        """The parameters, and all else if `training`; the bytes that were moved."""
        moved = self._parameters.wake() + (self._training.wake() if training else 0)
        self._asleep = (False, self._asleep[1] and not training)
        return moved

    def copy_of(self, tensor: Tensor) -> Tensor:
        """Where to read a tensor, awake or asleep."""
        return self._training.copy_of(self._parameters.copy_of(tensor))


def own_memory(module: nn.Module) -> None:
    """Copies what lies in a file's mapped memory, as safetensors leaves it on the CPU, into memory that can be given up.

    Before an engine is made of the module: DeepSpeed's flat buffer of a single parameter is that parameter's own memory.
    """
    for parameter in module.parameters():
        storage = parameter.untyped_storage()
        if storage.nbytes() and not storage.resizable():
            parameter.data = parameter.data.clone()


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def tensors_in(thing: object, *, depth: int = 5) -> Iterator[Tensor]:
    """Every tensor of at least one dimension in containers; numbers stay where they are."""
    if isinstance(thing, Tensor):
        if thing.dim():
            yield thing
        if thing.is_leaf and thing.grad is not None:
            yield thing.grad
    elif depth and isinstance(thing, dict):
        yield from (found for value in thing.values() for found in tensors_in(value, depth=depth - 1))
    elif depth and isinstance(thing, (list, tuple, set)):
        yield from (found for value in thing for found in tensors_in(value, depth=depth - 1))
