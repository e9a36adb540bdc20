"""Process reward models: cross-entropy at the end of every step of a solution. T packed tokens, C label columns, V vocabulary.

`logits[t]` answer "was the step that ends at token t good?": a classifier's at the step's last token, or a language model's
prediction after the separator, cut down to the reward tokens (`reward_token_logits`). Unlike log-probabilities they stand at the
token they are read from: nobody shifts. `step_mask` is True where a step ends; nothing off it changes a result.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.checks import checked
from hone.algos.masking import upcast
from hone.algos.protocol import Loss
from hone.algos.reduce import weighted_sum


@checked
def reward_token_logits(logits: Float[Tensor, "T V"], reward_tokens: Int[Tensor, " C"]) -> Float[Tensor, "T C"]:
    """The columns of the chosen reward tokens, in their order; the rest of the vocabulary then has no say in the softmax.

    Raises ValueError for fewer than two tokens, one given twice, or one outside the vocabulary.
    """
    ascending = reward_tokens.sort().values
    if reward_tokens.numel() < 2 or bool((ascending.diff() == 0).any()):
        raise ValueError(f"reward_tokens are {reward_tokens}; a step's label needs at least 2 different tokens")
    if int(ascending[0]) < 0 or int(ascending[-1]) >= logits.shape[1]:
        raise ValueError(f"reward_tokens are {reward_tokens}; the vocabulary ends at {logits.shape[1] - 1}: give the ids of its own tokens")
    return logits.index_select(-1, reward_tokens)


@checked
def reward_token_columns(labels: Int[Tensor, " T"], reward_tokens: Int[Tensor, " C"], step_mask: Bool[Tensor, " T"]) -> Int[Tensor, " T"]:
    """Labels given as token ids turned into columns of `reward_token_logits`; zero off the mask.

    Raises ValueError for a label on the mask that is none of the reward tokens.
    """
    matches = labels[:, None] == reward_tokens
    strange = labels[step_mask & ~matches.any(-1)]
    if strange.numel():
        raise ValueError(f"labels: {strange.numel()} steps have labels such as {int(strange[0])}, not in {reward_tokens}")
    return torch.where(step_mask, matches.long().argmax(-1), 0)


@checked
def hard_process_loss(
    logits: Float[Tensor, "T C"], columns: Int[Tensor, " T"], weights: Float[Tensor, " T"], step_mask: Bool[Tensor, " T"]
) -> Loss:
    """sum_t w_t -log softmax(logits_t)[columns_t] [nats] over the steps; Math-Shepherd's hard estimation.

    Figures "prm_loss" and "accuracy" (weighted share of steps whose column has the largest logit). Off the mask `columns` may be
    anything, such as -100. Reference: arXiv 2312.08935 eq 2 (loss), 3 (label); 2305.20050.
    """
    logp = _log_softmax(logits, step_mask)
    columns = torch.where(step_mask, columns, 0)
    picked = logp.gather(-1, columns[:, None])[:, 0]
    return _loss(-picked, logp.argmax(-1) == columns, weights, step_mask)


@checked
def soft_process_loss(
    logits: Float[Tensor, "T C"], targets: Float[Tensor, "T C"], weights: Float[Tensor, " T"], step_mask: Bool[Tensor, " T"]
) -> Loss:
    """sum_t w_t -sum_c q_tc log softmax(logits_t)[c] [nats]; q the targets, shares that add up to one.

    For the share q of completions that came out right, Math-Shepherd's soft estimation, give `torch.stack([1 - q, q], -1)` where
    column 1 means good, `torch.stack([q, 1 - q], -1)` where column 0 does (OpenRLHF). "accuracy" compares the two largest columns.
    Reference: arXiv 2312.08935 eq 2 (loss), 4 (label).
    """
    logp = _log_softmax(logits, step_mask)
    targets = torch.where(step_mask[:, None], upcast(targets.detach()), 0.0)
    # A logit of -inf rules a column out; with no share on it that costs nothing, and 0 * inf must not say otherwise.
    cross_entropy = -(targets * torch.where(targets == 0, 0.0, logp)).sum(-1)
    return _loss(cross_entropy, logp.argmax(-1) == targets.argmax(-1), weights, step_mask)


def _log_softmax(logits: Float[Tensor, "T C"], step_mask: Bool[Tensor, " T"]) -> Float[Tensor, "T C"]:
    return torch.where(step_mask[:, None], upcast(logits), 0.0).log_softmax(-1)


def _loss(per_step: Float[Tensor, " T"], right: Bool[Tensor, " T"], weights: Float[Tensor, " T"], step_mask: Bool[Tensor, " T"]) -> Loss:
    total = weighted_sum(per_step, weights, step_mask)
    return Loss(total=total, metrics={"prm_loss": total.detach(), "accuracy": weighted_sum(right.to(per_step.dtype), weights, step_mask)})
