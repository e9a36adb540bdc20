"""A model loaded whole on every rank becomes one over a tensor-parallel group: each rank keeps its part of every matrix.

Which layers are cut how stands in transformers' own plan of the architecture (`base_model_tp_plan`): "colwise" by outputs,
"rowwise" by inputs, "replicated_with_grad_allreduce" whole, but read by each rank's heads alone. Embedding and output embedding are
cut by words, tied or not; all else is whole on every rank, and stays the same on all of them.
"""

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hone.learner.attention.wire import TensorWire
from hone.learner.errors import ModelError
from hone.learner.kernels.vocabulary import Vocabulary
from hone.learner.model import CriticModel, PolicyModel
from hone.learner.tensor_parallel.cut import Cut, cut_parameter, summed
from hone.learner.tensor_parallel.layers import ByInputs, ByOutputs, Entrance, OwnWords
from hone.learner.tensor_parallel.probe import check_split, probed

STYLES = ("colwise", "rowwise", "replicated_with_grad_allreduce")


def split(model: PolicyModel | CriticModel, name: str, *, wire: TensorWire) -> None:
    """Cuts `model` over the group, in place. Collective; every rank has loaded the same weights.

    Raises ModelError, on all ranks, for an architecture without a plan or with layers that are not cut here, and where the parts
    together do not say what the whole model did.
    """
    backbone: Any = model.causal_lm.base_model if isinstance(model, PolicyModel) else model.backbone
    styles = styles_of(backbone, name)
    partly_read = [
        parameter
        for module_name, style in styles.items()
        if style == "replicated_with_grad_allreduce"
        for parameter in backbone.get_submodule(module_name).parameters()
    ]
    before = probed(backbone)
    entrances: dict[str, Entrance] = {}
    for module_name, style in styles.items():
        parent_name, _, own_name = module_name.rpartition(".")
        parent, layer = backbone.get_submodule(parent_name), backbone.get_submodule(module_name)
        if style == "colwise":
            setattr(parent, own_name, ByOutputs(layer, entrances.setdefault(parent_name, Entrance(wire))))
        elif style == "rowwise":
            setattr(parent, own_name, ByInputs(layer, wire))
    for parameter in partly_read:
        if parameter.requires_grad:
            parameter.register_hook(_summing(wire))
    _cut_words(model, backbone, wire)
    check_split(backbone, before, name, wire=wire)


def styles_of(backbone: nn.Module, name: str) -> dict[str, str]:
    """How each layer of the architecture's plan is cut, by its name in the backbone. Raises ModelError for what is not cut here."""
    config: Any = backbone.config
    plan: dict[str, str] = config.get_text_config().base_model_tp_plan or {}
    found = {
        one: plan[pattern]
        for one, module in backbone.named_modules()
        # Words are cut in any case; a plan names them only where they are tied.
        if (pattern := re.sub(r"\.\d+(?=\.)", ".*", one)) in plan and not isinstance(module, nn.Embedding)
    }
    kind = type(backbone).__name__
    if not found:
        raise ModelError(f"{name}: transformers has no tensor-parallel plan for {kind}; --ds.tensor-parallel-size 1")
    for one, style in found.items():
        layer = backbone.get_submodule(one)
        fits = style in STYLES and (style == STYLES[2] or type(layer) is nn.Linear)
        if not fits:
            raise ModelError(
                f"{name}: {one} of {kind}, a {type(layer).__name__}, would be cut {style!r}, which is not there yet (dense linear layers "
                "by heads and by MLP columns are); --ds.tensor-parallel-size 1"
            )
    return found


def _cut_words(model: PolicyModel | CriticModel, backbone: Any, wire: TensorWire) -> None:
    embedding: nn.Embedding = backbone.get_input_embeddings()
    whole, words = embedding.weight, cut_parameter(embedding.weight, wire, dim=0)
    OwnWords(embedding, words, Cut(wire=wire, shape=tuple(whole.shape), dim=0))
    if isinstance(model, CriticModel):
        return
    output: Any = model.causal_lm.get_output_embeddings()
    rows = output.weight.shape[0]
    output.weight = words if output.weight is whole else cut_parameter(output.weight, wire, dim=0)
    output.bias = None if output.bias is None else cut_parameter(output.bias, wire, dim=0)
    output.out_features = output.weight.shape[0]
    model.head.cut(output.weight, output.bias, Vocabulary(cut=Cut(wire=wire, shape=(rows, whole.shape[1]), dim=0)))


def _summing(wire: TensorWire) -> Callable[[Tensor], Tensor]:
    return lambda gradient: summed(gradient, wire)
