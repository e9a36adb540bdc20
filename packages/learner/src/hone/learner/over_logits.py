"""What reads whole distributions of a language model: losses over logits, and a teacher's top tokens; a chunk of tokens at a time.

M tokens read here, V vocabulary, c tokens of a chunk, K top tokens. At most [c, V] logits exist, in fp32: a loss is asked for its
derivatives while they do (three matrix products in all), so it must be a sum over tokens, as `LogitsLoss` says.
"""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from hone.algos.batch import Packed
from hone.algos.offline import LogitsLoss, Steps
from hone.algos.protocol import Loss
from hone.learner.kernels.tiles import Projection
from hone.learner.per_token import tokens_of


@runtime_checkable
class OverLogits(Protocol):
    """What `TokenHead` does with logits in place of taking log-probabilities."""

    at_token: bool
    """Whether a token's logits are read from its own state, so after it, or from the one that predicted it."""

    def run(
        self, projection: Projection, hidden: Float[Tensor, "M H"], positions: Int[Tensor, " M"], chunk_tokens: int
    ) -> tuple[Tensor, ...]:
        """What comes of the logits of these states, which belong to the tokens at `positions`."""
        ...


class LossOverLogits:
    """A `LogitsLoss` over one micro-batch: runs to (total, figures [F]), whose names are in `names`.

    Labels of `Steps` stand where a step ends and are read there; everything else is read from the state that predicted the token.
    """

    def __init__(self, part: Packed, algo: LogitsLoss[Any]) -> None:
        self.part, self.algo, self.at_token = part, algo, isinstance(part, Steps)
        self.names: list[str] = []

    def run(
        self, projection: Projection, hidden: Float[Tensor, "M H"], positions: Int[Tensor, " M"], chunk_tokens: int
    ) -> tuple[Tensor, ...]:
        """See `OverLogits`."""
        return _LossOverLogits.apply(hidden, projection.weight, projection.bias, (self, projection, positions, chunk_tokens))

    def loss(self, logits: Float[Tensor, "c V"], positions: Int[Tensor, " c"]) -> Loss:
        """The algorithm's, of these tokens alone."""
        return self.algo.logits_loss(logits, tokens_of(self.part, positions))


class TopLogp:
    """The `k` likeliest tokens at each position and their log-probabilities at a temperature: runs to (tokens [T, K], logp [T, K])."""

    at_token = False

    def __init__(self, part: Packed, *, k: int, temperature: float) -> None:
        self.part, self.k, self.temperature = part, k, temperature

    def run(
        self, projection: Projection, hidden: Float[Tensor, "M H"], positions: Int[Tensor, " M"], chunk_tokens: int
    ) -> tuple[Tensor, ...]:
        """See `OverLogits`."""
        tokens = torch.zeros(self.part.tokens.shape[0], self.k, dtype=torch.long, device=hidden.device)
        logp = torch.zeros(tokens.shape, dtype=projection.precision, device=hidden.device)
        for part in _chunks(len(positions), chunk_tokens):
            logits = _capped(projection, _whole(projection, hidden[part]))
            best = (logits / self.temperature).log_softmax(-1).topk(self.k, -1)
            tokens[positions[part]], logp[positions[part]] = best.indices, best.values
        return tokens, logp


class _LossOverLogits(torch.autograd.Function):
    """A loss and, where they are wanted, its gradients, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        reader, projection, positions, chunk_tokens = work
        precision, needs = projection.precision, ctx.needs_input_grad[:3]
        by_hidden = torch.empty_like(hidden) if needs[0] else None
        by_weight = torch.zeros(weight.shape, dtype=precision, device=weight.device) if needs[1] else None
        by_bias = torch.zeros(weight.shape[0], dtype=precision, device=weight.device) if needs[2] else None
        whole: Loss | None = None
        for part in _chunks(len(positions), chunk_tokens):
            raw = _whole(projection, hidden[part]).detach().requires_grad_(any(needs))
            with torch.set_grad_enabled(any(needs)):
                loss = reader.loss(_capped(projection, raw), positions[part])
            if any(needs):
                (pull,) = torch.autograd.grad(loss.total, raw, allow_unused=True, materialize_grads=True)
                pull = pull if projection.vocabulary is None else projection.vocabulary.own(pull)
                if by_hidden is not None:
                    by_hidden[part] = pull @ weight
                if by_weight is not None:
                    by_weight += pull.T @ hidden[part]
                if by_bias is not None:
                    by_bias += pull.sum(0, dtype=precision)
            loss = Loss(total=loss.total.detach(), metrics=loss.metrics)
            whole = loss if whole is None else whole + loss
        assert whole is not None
        ctx.save_for_backward(by_hidden, *(None if one is None else one.to(weight.dtype) for one in (by_weight, by_bias)))
        reader.names = list(whole.metrics)
        figures = torch.stack(list(whole.metrics.values())) if whole.metrics else whole.total.new_zeros(0)
        ctx.mark_non_differentiable(figures)
        return whole.total, figures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] - torch types it loosely
        return *(None if one is None else one.mul_(slope) for one in ctx.saved_tensors), None


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    """At least one, so that a loss names its figures over no tokens, too."""
    count = max(1, -(-tokens // size))
    for index in range(count):
        yield slice(tokens * index // count, tokens * (index + 1) // count)


def _whole(projection: Projection, hidden: Float[Tensor, "c H"]) -> Float[Tensor, "c V"]:
    """Raw logits of all words, wherever their rows are."""
    logits = projection.logits(hidden, slice(None))
    return logits if projection.vocabulary is None else projection.vocabulary.whole(logits)


def _capped(projection: Projection, raw: Float[Tensor, "c V"]) -> Float[Tensor, "c V"]:
    """Logits as the model has them, in fp32: no temperature, which is the reader's to apply."""
    logits = raw.to(projection.precision)
    return logits if projection.softcap is None else projection.softcap * torch.tanh(logits / projection.softcap)
