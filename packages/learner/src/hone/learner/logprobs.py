"""From hidden states to log-probabilities and entropies of the tokens, a chunk at a time; the only place that shifts.

T packed tokens, S of them run here (all of them, but for a ring), M scored tokens, H hidden size, V vocabulary. The state after
token t - 1 predicts token t, so results are aligned with their own token: `logp[t]` belongs to `tokens[t]`, and a row's first
token, which nothing precedes, gets 0.

Matrix products, in units of M H V multiply-adds: 1 for results alone; 4 with gradients, where backward takes the logits
again; 3 where the forward pass is told the loss's derivatives (`slopes`) and takes the gradients while it has the logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from hone.learner.kernels.tiles import Gradients, Projection, Statistics, keep, statistics
from hone.learner.kernels.vocabulary import Vocabulary

Slopes = Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, Tensor | None]]
"""(logp, entropy, positions) of some scored tokens -> the loss's derivatives by logp and, if it has any, by entropy."""
TILE_TOKENS, TILE_WIDTH = 512, 2048
"""Tokens of a tile at most, and vocabulary entries at least, when backward takes the logits again."""
SLOPE_ROUNDING = 1e-5
"""Largest difference, relative to the largest slope, between slopes told in forward and met in backward that is called rounding."""


def scored_positions(cu_seqlens: Int[Tensor, " N_plus_1"], action_mask: Bool[Tensor, " T"]) -> Int[Tensor, " M"]:
    """Positions of the tokens in the mask that have a predecessor in their row; the state that predicts one is at position - 1."""
    mask = action_mask.clone()
    mask[cu_seqlens[:-1][cu_seqlens.diff() > 0].long()] = False
    return mask.nonzero().squeeze(1)


def predicting_states(
    positions: Int[Tensor, " M"], places: Int[Tensor, " T"] | None
) -> tuple[Int[Tensor, " M_here"], Int[Tensor, " M_here"]]:
    """Those scored positions whose predicting state is here, and where among the hidden states it stands.

    Without `places` all states are here, in order. Over a ring, `places[t]` is where token t's state stands among this rank's,
    -1 where another rank has it: that rank then scores token t + 1, wherever that one's own state is.
    """
    if places is None:
        return positions, positions - 1
    states = places[positions - 1]
    return positions[states >= 0], states[states >= 0]


def states_at(positions: Int[Tensor, " M"], places: Int[Tensor, " T"] | None) -> tuple[Int[Tensor, " M_here"], Int[Tensor, " M_here"]]:
    """As `predicting_states`, of the tokens' own states: what stands after them."""
    states = positions if places is None else places[positions]
    return positions[states >= 0], states[states >= 0]


def token_logprobs(
    hidden: Float[Tensor, "S H"],
    head_weight: Float[Tensor, "V H"],
    tokens: Int[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    action_mask: Bool[Tensor, " T"],
    *,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool,
    head_bias: Float[Tensor, " V"] | None = None,
    softcap: float | None = None,
    places: Int[Tensor, " T"] | None = None,
    slopes: Slopes | None = None,
    vocabulary: Vocabulary | None = None,
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"] | None]:
    """(log softmax(z / temperature)[token], entropy of that distribution) [nats], z = softcap tanh(head(hidden) / softcap).

    Only tokens in the mask meet the head, `chunk_tokens` at a time, so at most [chunk_tokens, V] logits exist, in forward and
    in backward. Results are fp32 (fp64 from fp64 weights), zero off the mask, and where the state is another rank's (`places`,
    see `predicting_states`). `slopes` saves backward a product (see above) if the loss's derivatives turn out as it says, up to
    a common factor; gradients are exact either way. With a `vocabulary`, weight and bias are a rank's rows of it.
    """
    positions, states = predicting_states(scored_positions(cu_seqlens, action_mask), places)
    projection = Projection(weight=head_weight, bias=head_bias, temperature=temperature, softcap=softcap, vocabulary=vocabulary)
    work = _Work(projection=projection, positions=positions, chunk_tokens=chunk_tokens, with_entropy=with_entropy, slopes=slopes)
    own, targets = hidden.index_select(0, states), tokens[positions]
    if vocabulary is not None:
        own, targets = vocabulary.entered(own), targets - vocabulary.cut.low
    logp, entropy = _Head.apply(own, head_weight, head_bias, targets, work)
    empty = torch.zeros(tokens.shape[0], dtype=projection.precision, device=hidden.device)
    return empty.index_copy(0, positions, logp), empty.index_copy(0, positions, entropy) if with_entropy else None


def state_values(
    hidden: Float[Tensor, "S H"],
    head: Callable[[Float[Tensor, "M H"]], Float[Tensor, "M 1"]],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    action_mask: Bool[Tensor, " T"],
    places: Int[Tensor, " T"] | None = None,
) -> Float[Tensor, " T"]:
    """Value of the state before each token in the mask, head(hidden[t - 1]) in fp32; zero as `token_logprobs`."""
    positions, states = predicting_states(scored_positions(cu_seqlens, action_mask), places)
    empty = torch.zeros(action_mask.shape[0], dtype=torch.float32, device=hidden.device)
    return empty.index_copy(0, positions, head(hidden.index_select(0, states)).squeeze(-1).float())


@dataclass(frozen=True, kw_only=True)
class _Work:
    projection: Projection
    positions: Int[Tensor, " M"]
    chunk_tokens: int
    with_entropy: bool
    slopes: Slopes | None

    def chunks(self, *, again: bool = False) -> list[slice]:
        """Chunks as even as their number allows, since a short last one would use the products badly.

        The same whether gradients will be wanted or not, so that results are the same to the last bit. When backward takes the
        logits `again`, tile by tile, a chunk may be longer: every chunk reads all weights, and adds to all of their gradient.
        """
        size = self.chunk_tokens
        if again:
            size = max(size, min(TILE_TOKENS, size * self.projection.weight.shape[0] // TILE_WIDTH))
        tokens = len(self.positions)
        count = -(-tokens // size)
        return [slice(tokens * index // count, tokens * (index + 1) // count) for index in range(count)]


class _Head(torch.autograd.Function):
    """Head, log-softmax, gather and entropy over [M, H] hidden states, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, work: _Work
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        logp = torch.empty(targets.shape[0], dtype=work.projection.precision, device=hidden.device)
        log_norm, entropy = torch.empty_like(logp), torch.empty_like(logp) if work.with_entropy else None
        needs = ctx.needs_input_grad[:3]
        chunks, told = work.chunks(), list[Tensor]()
        gradients = None
        if work.slopes is not None and any(needs):
            gradients = Gradients(work.projection, hidden, needs=needs, alone=len(chunks) == 1)
        for part in chunks:
            own, wanted = hidden[part], targets[part]
            kept = None if gradients is None else keep(work.projection, len(wanted))
            found = statistics(work.projection, own, wanted, with_entropy=work.with_entropy, kept=kept)
            logp[part], log_norm[part] = found.logp, found.log_norm
            if entropy is not None and found.entropy is not None:
                entropy[part] = found.entropy
            if gradients is not None:
                assert work.slopes is not None
                by_logp, by_entropy = work.slopes(found.logp, found.entropy, work.positions[part])
                gradients.add(part, own, wanted, found, logp_slope=by_logp, entropy_slope=by_entropy, kept=kept)
                told.append(_side_by_side(by_logp, by_entropy, found.logp))
            del kept
        ctx.work = work
        ready = (None, None, None) if gradients is None else gradients.finish()
        ctx.told = torch.cat(told, 1) if told else None
        ctx.save_for_backward(hidden, weight, bias, targets, logp, log_norm, entropy, *ready)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] - torch types it loosely
        hidden, weight, bias, targets, logp, log_norm, entropy, *ready = ctx.saved_tensors
        by_logp, by_entropy = slopes
        factor = None if ctx.told is None else _common_factor(ctx.told, _side_by_side(by_logp, by_entropy, logp))
        if factor is not None:
            return *(None if total is None else total.mul_(factor) for total in ready), None, None
        projection = Projection(weight=weight, bias=bias, temperature=ctx.work.projection.temperature, softcap=ctx.work.projection.softcap)
        chunks = ctx.work.chunks(again=True)
        gradients = Gradients(projection, hidden, needs=ctx.needs_input_grad[:3], alone=len(chunks) == 1)
        for part in chunks:
            found = Statistics(logp=logp[part], log_norm=log_norm[part], entropy=None if entropy is None else entropy[part])
            gradients.add(
                part,
                hidden[part],
                targets[part],
                found,
                logp_slope=None if by_logp is None else by_logp[part],
                entropy_slope=None if by_entropy is None else by_entropy[part],
            )
        return *gradients.finish(), None, None


def _side_by_side(by_logp: Tensor | None, by_entropy: Tensor | None, like: Tensor) -> Float[Tensor, "2 M"]:
    return torch.stack([torch.zeros_like(like) if slope is None else slope.to(like.dtype) for slope in (by_logp, by_entropy)])


def _common_factor(told: Float[Tensor, "2 M"], met: Float[Tensor, "2 M"]) -> Float[Tensor, ""] | None:
    """The c with met = c told up to rounding (an engine multiplies its losses by a constant), else None. Waits for the device."""
    square = (told * told).sum()
    factor = torch.where(square > 0, (met * told).sum() / square, 1.0)
    close = (met - factor * told).abs().amax() <= SLOPE_ROUNDING * met.abs().amax() if met.numel() else torch.ones((), dtype=torch.bool)
    return factor if bool(close) else None
