"""A model's weights as its checkpoint has them, a layer at a time: adapters merged, 4-bit weights in full, experts one by one.

Parameters as they train --(gathered by the engine)--> values: base + scaling B A --> names and shapes of the checkpoint. The
training state is only read. Names on the left are the module's own, without PEFT's ("q_proj.weight", "q_proj.lora_A.weight").
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from hone.learner.tensor_parallel.cut import cut_of

ADAPTER = "default"
"""The one adapter a model has, as PEFT calls it."""

Named = tuple[str, nn.Parameter]
Entry = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, number format and full shape of a weight."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What is gathered together: `parameters` of one layer, and from them the weights to hand out."""

    parameters: Sequence[nn.Parameter]
    named: Sequence[Named]
    adapters: Mapping[str, Any] = field(default_factory=dict)
    """PEFT's layer of each weight that has an adapter."""
    model: PreTrainedModel | None = None
    """The model whose checkpoint has other weights than its parameters; None where they are the same."""

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight in full; the parameters must be."""
        if self.model is None:
            for name, parameter in self.named:
                yield name, self._value(name, parameter)
            return
        as_stored = revert_weight_conversion(self.model, {name: self._value(name, parameter) for name, parameter in self.named})
        for name, tensor in as_stored.items():
            yield name, tensor.contiguous()

    def layout(self) -> list[Entry]:
        """Of every weight, in the order of `values`; reads no parameter."""
        entries = [(name, *_format(parameter)) for name, parameter in self.named]
        if self.model is None:
            return entries
        shapes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype, shape in entries}
        as_stored = revert_weight_conversion(self.model, shapes)
        return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in as_stored.items()]

    @torch.no_grad()
    def _value(self, name: str, parameter: nn.Parameter) -> Tensor:
        base = _whole(parameter)
        layer = self.adapters.get(name)
        return base if layer is None else base + layer.get_delta_weight(ADAPTER).to(base.dtype)


def layers(named: Sequence[Named], adapters: Mapping[str, Any], model: PreTrainedModel) -> list[Layer]:
    """All of a model's weights, layer by layer; `named` are its parameters, adapters' own included, in the module's order."""
    # A backbone read from a causal model's checkpoint may also have renamings of a prefix, which `named` has already.
    converters = any(isinstance(one, WeightConverter) for one in getattr(model, "_weight_conversions", None) or ())
    result = []
    for _, part in groupby(named, key=lambda one: layer_of(one[0])):
        group = list(part)
        handed_out = [(name, parameter) for name, parameter in group if not is_adapter(name)]
        result.append(
            Layer(
                parameters=[parameter for _, parameter in group],
                named=handed_out,
                adapters={name: adapters[name] for name, _ in handed_out if name in adapters},
                model=model if converters else None,
            )
        )
    return result


def parameters_of(module: nn.Module) -> list[Named]:
    """Every parameter once, under its name without PEFT's additions."""
    return [(_plain(name), parameter) for name, parameter in module.named_parameters()]


def adapted(module: nn.Module) -> dict[str, Any]:
    """PEFT's layer of every weight that has an adapter, by the weight's plain name."""
    return {f"{_plain(name)}.weight": layer for name, layer in module.named_modules() if hasattr(layer, "get_delta_weight")}


def is_adapter(name: str) -> bool:
    """Whether a plain name is of an adapter's own parameter."""
    return ".lora_" in name


def layer_of(name: str) -> str:
    """A numbered layer ("model.layers.3"), or "" for everything between two of them."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter as it trains, wherever its elements are."""
    if (cut := cut_of(parameter)) is not None:
        return cut.shape
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _plain(name: str) -> str:
    return name.replace(".base_layer", "").replace(f".{ADAPTER}", "")


def _whole(parameter: nn.Parameter) -> Tensor:
    if (cut := cut_of(parameter)) is not None:
        return cut.whole(parameter.detach())
    if getattr(parameter, "quant_state", None) is None:
        return parameter.detach()
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(parameter)


def _format(parameter: nn.Parameter) -> tuple[torch.dtype, tuple[int, ...]]:
    quantised = getattr(parameter, "quant_state", None)
    return (parameter.dtype, full_shape(parameter)) if quantised is None else (quantised.dtype, tuple(quantised.shape))
