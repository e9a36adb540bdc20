"""Which parameters of a model train: all of them, LoRA adapters beside frozen weights (in 4 bits if asked for), or less by name.

PEFT makes the adapters and its format is what is written; the same code runs over a model without weights first, so that a
target or pattern that matches nothing is told before any weight is read. LoRA: https://arxiv.org/abs/2106.09685.
"""

import contextlib
import copy
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hone.learner.config import DeepSpeedConfig, LoraConfig
from hone.learner.errors import ModelError
from hone.learner.published import ADAPTER, Layer, Named, is_adapter

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What is made of a model's weights as it is loaded."""

    lora: LoraConfig | None = None
    four_bit: bool = False
    freeze: tuple[str, ...] = ()
    """Patterns of parameter names that do not train."""

    @property
    def needs_names(self) -> bool:
        """Whether it speaks of parts of the model by name, which can be looked up before weights are read."""
        return self.lora is not None or bool(self.freeze)


PLAIN = Adaptation()


def adaptation(ds: DeepSpeedConfig, *, freeze: str | None, trained: bool) -> Adaptation:
    """The settings of one role. Adapters are for what trains."""
    patterns = tuple(pattern.strip() for pattern in freeze.split(",")) if freeze else ()
    return Adaptation(lora=ds.lora if trained and ds.lora.rank else None, four_bit=ds.load_in_4bit, freeze=patterns)


def check_settings(ds: DeepSpeedConfig) -> None:
    """Raises ValueError for 4 bits where they cannot be trained over or sharded; ModelError where bitsandbytes is missing."""
    if not ds.load_in_4bit:
        return
    if not ds.lora.rank:
        raise ValueError("--ds.load-in-4bit freezes the weights, so nothing would train; add adapters, --ds.lora.rank 16, or drop it")
    if ds.zero_stage == 3:
        raise ValueError("--ds.zero-stage 3 cuts parameters anywhere, and 4-bit weights only make sense whole; --ds.zero-stage 2")
    try:
        import bitsandbytes  # noqa: F401  # pyright: ignore[reportUnusedImport] - transformers uses it, and would say less
    except ImportError as error:
        raise ModelError(f"--ds.load-in-4bit needs bitsandbytes ({error}); install hone-learner[qlora], or drop the flag") from error


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """What an adaptation made of a model."""

    frozen: frozenset[str] = frozenset()
    """Parameters that never train."""
    config: Any = None
    """PEFT's configuration of the adapters; None without."""
    head: str | None = None
    """Name of the module that trains, and is saved, beside the adapters."""
    identity: Mapping[str, str | int] = field(default_factory=dict)
    """What a checkpoint must agree on besides names and shapes."""


Task = Literal["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"]
"""What PEFT calls a language model, a reward model (or critic), a process model."""
MODEL_TYPE = "model_type"
"""In `auto_mapping` of an adapter's configuration, which PEFT reads only where no task is named: the architecture of its model, by
transformers' name. Not in the metadata of the file: safetensors writes several of those in any order, and exports are equal to the bit."""


@runtime_checkable
class Adaptable(Protocol):
    """The part of a model that is looked at here."""

    adapted: Adapted

    def named_weights(self) -> list[Named]:
        """Every parameter, by the model's own name."""
        ...

    def adaptable(self) -> tuple[nn.Module, str | None, Task]:
        """The transformer below; the name of a head that trains with the adapters; PEFT's name of the task."""
        ...


Model = TypeVar("Model", bound=Adaptable)


def adapt(model: Model, adaptation: Adaptation, name: str) -> Model:
    """Adapters beside every targeted linear layer, in place, and a note of what does not train.

    Raises ModelError for a target or a pattern that matches nothing, naming what there is, and where nothing would train.
    """
    transformer, head, task = model.adaptable()
    lora, config, dtype = adaptation.lora, None, next(one.dtype for _, one in model.named_weights() if one.is_floating_point())
    if lora is not None:
        config = _attach(transformer, lora, task=task, name=name)
    named = model.named_weights()
    for one, parameter in named:
        if is_adapter(one):
            parameter.data = parameter.data.to(dtype)  # beside 4-bit weights PEFT makes it fp32
    trained = [one for one, _ in named if config is None or is_adapter(one) or one.startswith(f"{head}.")]
    frozen = _frozen([one for one, _ in named], adaptation.freeze, trained=trained, name=name)
    identity: dict[str, str | int] = {} if lora is None else {"lora.alpha": lora.alpha}
    still = [parameter for one, parameter in named if one in frozen]
    if still and not still[0].is_meta:
        identity["frozen weights"] = hash_of(still)
    model.adapted = Adapted(frozen=frozen, config=config, head=head, identity=identity)
    return model


def mark_trained(model: Adaptable, trained: bool) -> None:
    """Gradients for what trains, and for nothing in a model that is not `trained`."""
    for name, parameter in model.named_weights():
        parameter.requires_grad_(trained and name not in model.adapted.frozen)


def adapter_of(model: Adaptable) -> list[Layer]:
    """The adapters' own parameters and the head's that trains with them, as they are."""
    head = f"{model.adapted.head}."
    named = [(name, parameter) for name, parameter in model.named_weights() if is_adapter(name) or name.startswith(head)]
    return [Layer(parameters=[parameter for _, parameter in named], named=named)]


def _attach(transformer: Any, lora: LoraConfig, *, task: str, name: str) -> Any:
    import peft

    config = peft.LoraConfig(
        task_type=task,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(transformer, lora.target_modules, name=name),
    )
    peft.inject_adapter_in_model(config, transformer, adapter_name=ADAPTER, low_cpu_mem_usage=next(transformer.parameters()).is_meta)
    return config


def _frozen(names: Sequence[str], patterns: Sequence[str], *, trained: Collection[str], name: str) -> frozenset[str]:
    for pattern in patterns:
        if not any(fnmatchcase(one, pattern) for one in names):
            raise ModelError(
                f"{name} has no parameter that matches {pattern!r}, which was to be frozen; * stands for any text, and its parameters "
                f"are called like {', '.join(_examples(names))}"
            )
    left = {one for one in trained if not any(fnmatchcase(one, pattern) for pattern in patterns)}
    if not left:
        raise ModelError(f"{name} would have nothing left to train: {', '.join(patterns)} match all of it; freeze less")
    return frozenset(names) - left


def save_adapter(directory: Path, adapted: Adapted, tensors: Mapping[str, Tensor], *, base: str, model_type: str) -> None:
    """Writes `tensors` (named as `adapter_of`) as PEFT does; `base` is the model they belong to, `model_type` its architecture."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    config = copy.copy(adapted.config)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.modules_to_save = adapted.head and [adapted.head]
    config.save_pretrained(str(directory), auto_mapping_dict={MODEL_TYPE: model_type})
    named = {peft_name(name): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def peft_name(name: str) -> str:
    """The name in PEFT's files of a tensor of `adapter_of`."""
    return f"base_model.model.{name}"


def served_config(adapted: Adapted) -> dict[str, Any]:
    """PEFT's configuration of the adapter, as far as whoever serves it reads it."""
    config = adapted.config
    read = ("r", "lora_alpha", "bias", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
    return {"peft_type": "LORA", "target_modules": sorted(config.target_modules)} | {name: getattr(config, name) for name in read}


@contextlib.contextmanager
def dropout_awake(module: nn.Module) -> Iterator[None]:
    """The adapters' dropout, and no other, is at work inside."""
    sleeping = [one for name, one in module.named_modules() if ".lora_dropout." in name and isinstance(one, nn.Dropout)]
    for one in sleeping:
        one.train()
    try:
        yield
    finally:
        for one in sleeping:
            one.eval()


def _targets(transformer: Any, wanted: str, *, name: str) -> list[str]:
    """The linear layers that `wanted` means: "all-linear", or names or ends of names with commas between.

    Last parts of names where these say it, as adapters' configurations usually have it; else full names.
    """
    output = transformer.get_output_embeddings() if transformer.can_generate() else None
    modules = dict(transformer.named_modules())
    # The output embedding's weight is read without its module.
    linear = [one for one, layer in modules.items() if isinstance(layer, nn.Linear | Conv1D) and layer is not output]
    chosen = dict.fromkeys(linear if wanted == ALL_LINEAR else ())
    for target in () if wanted == ALL_LINEAR else (part.strip() for part in wanted.split(",")):
        found = [one for one in linear if one == target or one.endswith(f".{target}")]
        if not found:
            known = ", ".join(dict.fromkeys(one.rpartition(".")[2] for one in linear))
            raise ModelError(
                f"--ds.lora.target-modules {target} matches none of the linear layers of {name} below its output head; they are "
                f"called {known}, and {ALL_LINEAR} means all of them"
            )
        chosen.update(dict.fromkeys(found))
    short = {one.rpartition(".")[2] for one in chosen}
    meant = {one for one in modules if one.rpartition(".")[2] in short}
    return sorted(short) if meant == set(chosen) else list(chosen)


def _examples(names: Sequence[str]) -> list[str]:
    """Names of the model's ends and middle, one of each kind."""
    kinds = {".".join("0" if part.isdigit() else part for part in one.split(".")): one for one in reversed(names)}
    return list(kinds.values())[::-1][:16]


def hash_of(parameters: Sequence[nn.Parameter]) -> str:
    """A fingerprint of these values, in this order; of each, all elements are combined by exclusive or, on its device."""
    values = torch.stack([torch.hash_tensor(parameter.detach()).view(torch.int64) for parameter in parameters])
    return hashlib.sha256(values.cpu().numpy().tobytes()).hexdigest()[:16]
