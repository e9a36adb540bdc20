"""Linear layers and embeddings of which a rank holds a part: cut by outputs, by inputs, by words.

A pair of cut layers with anything elementwise, or attention by heads, between them costs one sum forward and one backward.
"""

import weakref

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hone.learner.attention.wire import TensorWire, add_over_ring
from hone.learner.tensor_parallel.cut import Cut, cut_parameter, entered


class Entrance:
    """Where states enter the layers of one module: those that read the same states share one sum of their gradient."""

    def __init__(self, wire: TensorWire) -> None:
        self.wire = wire
        self._outside: weakref.ref[Tensor] | None = None
        self._inside: weakref.ref[Tensor] | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """The states, fit for layers cut by outputs."""
        inside = None if self._inside is None else self._inside()
        # The caller holds `states` from its first layer to its last, so every rank finds the same ones alive here.
        if inside is None or self._outside is None or self._outside() is not states or inside.requires_grad != _graded(states):
            inside = entered(states, self.wire)
            self._outside, self._inside = weakref.ref(states), weakref.ref(inside)
        return inside


def _graded(states: Tensor) -> bool:
    return torch.is_grad_enabled() and states.requires_grad


class ByOutputs(nn.Module):
    """Some of a linear layer's outputs [..., own], of states that every rank has."""

    def __init__(self, whole: nn.Linear, entrance: Entrance) -> None:
        super().__init__()
        self.weight = cut_parameter(whole.weight, entrance.wire, dim=0)
        self.bias = None if whole.bias is None else cut_parameter(whole.bias, entrance.wire, dim=0)
        self.entrance = entrance

    def forward(self, states: Tensor) -> Tensor:
        """The own outputs."""
        return linear(self.entrance(states), self.weight, self.bias)


class ByInputs(nn.Module):
    """All outputs of a linear layer, from some of its inputs [..., own] on every rank; the bias is whole, and added once."""

    def __init__(self, whole: nn.Linear, wire: TensorWire) -> None:
        super().__init__()
        self.weight = cut_parameter(whole.weight, wire, dim=1)
        self.bias = whole.bias
        self.wire = wire

    def forward(self, states: Tensor) -> Tensor:
        """The outputs, which every rank gets."""
        outputs = add_over_ring(linear(states, self.weight), self.wire)
        return outputs if self.bias is None else outputs + self.bias


class OwnWords:
    """Makes an embedding look up the words it has a row for in `weight`, and add up over the ranks, of which one has each word."""

    def __init__(self, embedding: nn.Embedding, weight: nn.Parameter, cut: Cut) -> None:
        self.cut, self.own = cut, torch.empty(0)
        if embedding.padding_idx is not None:  # the one word whose row gets no gradient
            embedding.padding_idx = embedding.padding_idx - cut.low if cut.low <= embedding.padding_idx < cut.high else None
        embedding.weight, embedding.num_embeddings = weight, weight.shape[0]
        embedding.register_forward_pre_hook(self._before)
        embedding.register_forward_hook(self._after)

    def _before(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        tokens = inputs[0]
        self.own = (tokens >= self.cut.low) & (tokens < self.cut.high)
        return (tokens - self.cut.low).clamp(0, self.cut.high - self.cut.low - 1)

    def _after(self, _: nn.Module, __: tuple[Tensor, ...], states: Tensor) -> Tensor:
        return add_over_ring(torch.where(self.own[..., None], states, 0.0), self.cut.wire)
