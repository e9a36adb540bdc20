"""From hidden states to log-probabilities and entropies of the tokens, a chunk at a time; the only place that shifts.

T packed tokens, S of them run here (all of them, but for a ring), M scored tokens, H hidden size, V vocabulary. The state after
token t - 1 predicts token t, so results are aligned with their own token: `logp[t]` belongs to `tokens[t]`, and a row's first
token, which nothing precedes, gets 0.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


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
) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"] | None]:
    """(log softmax(z / temperature)[token], entropy of that distribution) [nats], z = softcap tanh(head(hidden) / softcap).

    Only tokens in the mask meet the head, `chunk_tokens` at a time, so at most [chunk_tokens, V] logits exist, in forward and
    in backward (which computes them again). Results are fp32, zero off the mask, and where the state is another rank's
    (`places`, see `predicting_states`).
    """
    positions, states = predicting_states(scored_positions(cu_seqlens, action_mask), places)
    logp, entropy = _ChunkedHead.apply(
        hidden.index_select(0, states), head_weight, head_bias, tokens[positions], temperature, softcap, chunk_tokens, with_entropy
    )
    empty = torch.zeros(tokens.shape[0], dtype=torch.float32, device=hidden.device)
    return empty.index_copy(0, positions, logp), empty.index_copy(0, positions, entropy) if with_entropy else None


def state_values(
    hidden: Float[Tensor, "S H"],
    head: torch.nn.Module,
    cu_seqlens: Int[Tensor, " N_plus_1"],
    action_mask: Bool[Tensor, " T"],
    places: Int[Tensor, " T"] | None = None,
) -> Float[Tensor, " T"]:
    """Value of the state before each token in the mask, head(hidden[t - 1]) in fp32; zero as `token_logprobs`."""
    positions, states = predicting_states(scored_positions(cu_seqlens, action_mask), places)
    empty = torch.zeros(action_mask.shape[0], dtype=torch.float32, device=hidden.device)
    return empty.index_copy(0, positions, head(hidden.index_select(0, states)).squeeze(-1).float())


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None) -> Tensor:
    """Tempered logits [chunk, V] in fp32. The product is taken in the weights' own format, as engines take it."""
    logits = linear(hidden, weight, bias).float()
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits.div_(temperature)


class _ChunkedHead(torch.autograd.Function):
    """Head, log-softmax, gather and entropy over [M, H] hidden states, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        chunk_tokens: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.temperature, ctx.softcap, ctx.chunk_tokens = temperature, softcap, chunk_tokens
        ctx.set_materialize_grads(False)
        logp = torch.empty(targets.shape[0], dtype=torch.float32, device=hidden.device)
        log_norm, entropy = torch.empty_like(logp), torch.empty_like(logp)
        for start in range(0, targets.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = _logits(hidden[part], weight, bias, temperature, softcap)
            log_norm[part] = logits.logsumexp(-1)
            log_probabilities = logits.sub_(log_norm[part, None])
            logp[part] = log_probabilities.gather(1, targets[part, None]).squeeze(1)
            if with_entropy:
                # Not log_norm - sum(p z), which loses digits to cancellation where logits are large.
                entropy[part] = log_probabilities.exp().mul_(log_probabilities).sum(-1).neg_()
        ctx.save_for_backward(hidden, weight, bias, targets, log_norm, entropy if with_entropy else None)
        return logp, entropy if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] - torch types it loosely
        logp_gradient, entropy_gradient = gradients
        hidden, weight, bias, targets, log_norm, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        # Summed over chunks in fp32: in bf16 every chunk after the first few would be rounded away.
        weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        bias_gradient = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if needs_bias else None
        for start in range(0, targets.shape[0], ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            logits = _logits(hidden[part], weight, bias, ctx.temperature, ctx.softcap)
            capped = None if ctx.softcap is None else logits * (ctx.temperature / ctx.softcap)
            log_probabilities = logits.sub_(log_norm[part, None])
            probabilities = log_probabilities.exp()
            # d entropy / d z_v = -p_v (log p_v + entropy); d logp / d z_v = [v = token] - p_v
            slope = torch.zeros_like(log_norm[part]) if logp_gradient is None else logp_gradient[part]
            if entropy_gradient is None:
                logits_gradient = probabilities.mul_(-slope[:, None])
            else:
                pull = log_probabilities.add_(entropy[part, None]).mul_(entropy_gradient[part, None]).add_(slope[:, None])
                logits_gradient = probabilities.mul_(pull.neg_())
            logits_gradient.scatter_add_(1, targets[part, None], slope[:, None]).div_(ctx.temperature)
            if capped is not None:
                logits_gradient.mul_(capped.square_().neg_().add_(1))
            if bias_gradient is not None:
                bias_gradient += logits_gradient.sum(0)
            logits_gradient = logits_gradient.to(weight.dtype)
            if hidden_gradient is not None:
                torch.matmul(logits_gradient, weight, out=hidden_gradient[part])
            if weight_gradient is not None and weight.dtype == torch.float32:
                weight_gradient.addmm_(logits_gradient.T, hidden[part])
            elif weight_gradient is not None:
                weight_gradient += logits_gradient.T @ hidden[part]
        cast = [None if total is None else total.to(weight.dtype) for total in (weight_gradient, bias_gradient)]
        return hidden_gradient, *cast, None, None, None, None, None
