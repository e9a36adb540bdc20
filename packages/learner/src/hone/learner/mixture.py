"""Mixtures of experts: the load-balancing loss of an optimiser step, whatever its cut into micro-batches and ranks.

Over all tokens and layers of a step, E experts of which k are chosen for a token: coef E sum_e f_e P_e, with f_e the mean number
of times a token chose expert e (at most k in all, not differentiated) and P_e its mean router probability. Switch Transformer,
https://arxiv.org/abs/2101.03961 eq. 4 to 6, as transformers' `load_balancing_loss_func` has it; over a whole step, not over each
micro-batch, since a product of means is not the mean of products: https://arxiv.org/abs/2501.11873.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hone.algos.protocol import Loss
from hone.learner.attention.wire import Wire
from hone.learner.errors import ModelError

FIGURES = {"policy": ("aux_loss", "max_expert_load"), "critic": ("critic_aux_loss", "critic_max_expert_load")}
"""What a role's figures are called."""
Hear = Callable[[tuple[Tensor, ...]], None]
"""Takes the router logits [tokens, E] of every layer."""


@runtime_checkable
class Routed(Protocol):
    """A model whose forward tells its router logits to whoever hears."""

    hear_routing: Hear | None


class Balance:
    """The balancing loss of one optimiser step: `count` every token, then `close` over all ranks, then take `loss` part by part.

    The ranks of a ring hear of other tokens each, and so have other parts.
    """

    def __init__(self, config: Any, *, coef: float, figures: tuple[str, str], device: torch.device, wire: Wire | None = None) -> None:
        self.figures, self.wire = figures, wire
        self.coef, self.experts_per_token = coef, int(config.num_experts_per_tok)
        self.experts = int(getattr(config, "num_local_experts", None) or config.num_experts)
        self.chosen = torch.zeros(self.experts + 1, dtype=torch.float64, device=device)  # and, last, the tokens
        self.heard: tuple[Tensor, ...] = ()

    def count(self, router_logits: tuple[Tensor, ...]) -> None:
        """Adds up the choices in these logits."""
        for logits in router_logits:
            best = logits.softmax(-1).topk(self.experts_per_token).indices.flatten()
            self.chosen[:-1] += torch.bincount(best, minlength=self.experts)
            self.chosen[-1] += len(logits)

    def close(self, add_over_ranks: Callable[[Tensor], object] | None) -> None:
        """Every rank has counted."""
        if add_over_ranks is not None:
            add_over_ranks(self.chosen)
        self.chosen = self.chosen.float()

    def hear(self, router_logits: tuple[Tensor, ...]) -> None:
        """Keeps the logits of a forward pass until `loss` takes them."""
        self.heard = router_logits

    def loss(self, *, filler: bool) -> Loss:
        """Part of the loss that the micro-batch just heard has, and as a figure what it is before its coefficient; a filler's is 0."""
        frequencies, tokens = self.chosen[:-1] / self.chosen[-1], self.chosen[-1]
        assert self.heard, "a forward pass without a router"
        probabilities = torch.stack([logits.float().softmax(-1).sum(0) for logits in self.heard]).sum(0) / tokens
        self.heard = ()
        part = self.experts * (frequencies * probabilities).sum() * (0.0 if filler else 1.0)
        told = part.detach().clone()
        if self.wire is not None:
            self.wire.add_up(told)  # one rank of a ring tells for all
        return Loss(total=self.coef * part, metrics={self.figures[0]: told})

    def busiest(self) -> dict[str, Float[Tensor, ""]]:
        """As a figure, the load of the expert that is chosen most, over an even share: 1 is balanced, E / k the worst there can be."""
        return {self.figures[1]: self.chosen[:-1].max() / self.chosen[-1] * self.experts / self.experts_per_token}


def check_mixture(backbone: Any, name: str, *, coef: float) -> None:
    """Raises ModelError where a balancing loss is asked of a model that has no routers, or whose own loss is another."""
    recorded = getattr(backbone, "_can_record_outputs", None) or {}
    if coef and not ("router_logits" in recorded and hasattr(backbone.config, "router_aux_loss_coef")):
        raise ModelError(
            f"{name} ({type(backbone).__name__}) has no routers whose load could be balanced by the usual loss; set aux-loss-coef to 0, "
            "or name a mixture of experts such as Qwen3-MoE or Mixtral"
        )


def expert_blocks(model: nn.Module) -> list[type[nn.Module]]:
    """The classes of modules that route tokens to experts: which parameters these use may differ from rank to rank."""
    return list({type(module) for module in model.modules() if isinstance(getattr(module, "experts", None), nn.Module)})


@contextlib.contextmanager
def heard_by(model: Routed, hear: Hear) -> Iterator[None]:
    """Forward passes inside tell their router logits."""
    model.hear_routing = hear
    try:
        yield
    finally:
        model.hear_routing = None
