"""Our receivers in the engine's workers: weights from shared memory and from files. They know how vLLM loads a model anew.

Flow: what was announced --(fingerprints)--> held back until all of it agrees --(vLLM's layerwise reload)--> the model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo

from hone.rollout.weight_sync.shared_memory import Mapping
from hone.rollout.weight_sync.source import fingerprint


class CheckedReceiver(WeightTransferEngine[Any, Any]):
    """Checks every tensor it is told of against its fingerprint, and begins to load when it is told that these were all.

    `received` holds fingerprints by checkpoint name, `loaded` the model's own names of the parameters it filled.
    """

    model: Any
    received: dict[str, str]
    loaded: set[str]
    _held: dict[str, str]

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.received, self._waiting, self._held = {}, {}, {}
        self.loaded, self._unchanged = set(), set[str]()

    def read(self, update_info: Any) -> tuple[Sequence[tuple[str, Tensor]], dict[str, str], set[str]]:
        """The tensors of one announcement, the fingerprints of all it should hold, and the names of those that are as they were."""
        raise NotImplementedError

    def fingerprint(self, tensor: Tensor) -> str:
        """Of one of the tensors read."""
        return fingerprint(tensor)

    def start_weight_update(self) -> None:
        """Begin an update with nothing received, and nothing left of one that failed."""
        self.received, self._waiting, self._unchanged = {}, {}, set[str]()
        abandon(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive; the base class would synchronise an accelerator that need not be there."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Any) -> None:
        """Check and keep; ValueError names the tensors whose bytes are not what was sent. The model is as it was."""
        weights, expected, unchanged = self.read(update_info)
        found = {name: self._held.get(name, "missing") if name in unchanged else self.fingerprint(tensor) for name, tensor in weights}
        altered = [name for name in expected if found.get(name) != expected[name]]
        if altered:
            raise ValueError(f"{len(altered)} of {len(expected)} tensors that came are not what was sent: {', '.join(altered[:8])}")
        self.received |= found
        self._waiting |= dict(weights)
        self._unchanged |= unchanged

    def finish_weight_update(self) -> None:
        """Load what came: all of it, or the layers in which anything changed; then the tied heads that the reload leaves behind."""
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        self._held = {}  # until all is well: after a failure nothing can be left out of an update
        if not self._unchanged:
            self.loaded = set()
        if weights := _of_changed_layers(self._waiting, self._unchanged):
            initialize_layerwise_reload(self.model)
            with disable_mtp_completeness_check():
                self.loaded |= self.model.load_weights(weights)
            finalize_layerwise_reload(self.model, self.model_config)
            self.mend_tied_heads()
        self._waiting = {}
        self._held = dict(self.received)

    def mend_tied_heads(self) -> None:
        """Pack every tied head anew from the embedding's new bytes.

        On the CPU a head multiplies by a packed copy of its weight, made when it is loaded. A tied head is never loaded
        (the checkpoint does not name it), so after a reload its copy is still the old one and every log-probability is wrong.
        """
        for head in tied_heads(self.model).values():
            head.quant_method.process_weights_after_loading(head)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue] - vLLM's layer

    def shutdown(self) -> None:
        """Nothing is held open."""


def _of_changed_layers(weights: dict[str, Tensor], unchanged: Iterable[str]) -> list[tuple[str, Tensor]]:
    """Those of layers in which anything changed, whole: the engine keeps several tensors of a layer as one, and loads that as one."""
    changed = {_layer(name) for name in weights.keys() - set(unchanged)}
    return [(name, tensor) for name, tensor in weights.items() if _layer(name) in changed]


def _layer(name: str) -> str:
    """A numbered layer ("model.layers.3"), else the module ("model.embed_tokens")."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1])


def abandon(model: nn.Module, model_config: Any) -> None:
    """Forget a reload that was begun and not ended: layers it had not finished have their old weights back.

    What such a layer had been given would count as a part of the next reload, which would then take it for complete too early.
    """
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    begun = [info for info in map(get_layerwise_info, model.modules()) if info.can_load()]
    for info in begun:
        info.load_numel, info.loaded_weights = 0, []
    if begun:
        finalize_layerwise_reload(model, model_config)


def tied_heads(model: nn.Module) -> dict[str, nn.Module]:
    """Output heads whose weight is also the weight of another module, by name."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    modules = dict(model.named_modules())
    owners: dict[int, int] = {}
    for module in modules.values():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    return {name: head for name, head in modules.items() if isinstance(head, ParallelLMHead) and owners.get(id(head.weight), 0) > 1}


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Where the file lies while the handshake lasts."""

    path: str


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """What a region of the file holds: names, dtypes (torch's names), shapes, byte offsets and fingerprints, in one order.

    `unchanged` are the names among them that are what the last update brought. Or, before that, how far a tensor larger than a
    region is written: `ahead` is where it begins and how many of its bytes are there.
    """

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    offsets: list[int]
    fingerprints: list[str]
    unchanged: list[str] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)


class SharedMemoryReceiver(CheckedReceiver):
    """Maps the trainer's file."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo
    _mapping: Mapping | None = None

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        """Open the file; it is unlinked right after."""
        self.shutdown()
        self._mapping, self._held = Mapping(init_info.path), {}

    def start_weight_update(self) -> None:
        """Begin an update with nothing received or taken ahead."""
        super().start_weight_update()
        self._open().begin()

    def read(self, update_info: SharedMemoryUpdateInfo) -> tuple[Sequence[tuple[str, Tensor]], dict[str, str], set[str]]:
        """The tensors, as views of the mapped file; they are copied when they are loaded."""
        mapping = self._open()
        expected = dict(zip(update_info.names, update_info.fingerprints, strict=True))
        if update_info.ahead:
            mapping.ahead(*update_info.ahead)
        return mapping.tensors(update_info), expected, set(update_info.unchanged)

    def fingerprint(self, tensor: Tensor) -> str:
        """Of one of the tensors read, a part of it perhaps before."""
        return self._open().fingerprint(tensor)

    def _open(self) -> Mapping:
        if self._mapping is None:
            raise RuntimeError("weights were sent before the handshake; call init_weight_transfer_engine first")
        return self._mapping

    def shutdown(self) -> None:
        """Let go of the file."""
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Nothing is agreed on beforehand."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """A safetensors file, and the fingerprints of what it should hold, by name."""

    path: str
    fingerprints: dict[str, str]


class FileReceiver(CheckedReceiver):
    """Reads a safetensors file."""

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        """Nothing to open yet."""

    def read(self, update_info: FileUpdateInfo) -> tuple[Sequence[tuple[str, Tensor]], dict[str, str], set[str]]:
        """All of the file's tensors that were announced."""
        with safe_open(update_info.path, framework="pt") as file:
            present = set(file.keys())
            weights = [(name, file.get_tensor(name)) for name in update_info.fingerprints if name in present]
        return weights, update_info.fingerprints, set()
