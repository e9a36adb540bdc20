"""Losses on pairs of answers: weighted sums over pairs, to be minimised. P pairs; log-probabilities in nats.

`chosen` and `rejected` are log-ratios, a row's sum of logp - ref_logp (`pairs.py`); sums of logp alone make a loss
reference-free. Names that end in `_mean` are means per token. Pairs off `pair_mask` may hold anything and change nothing.
Figures of all: "preference_loss", "chosen_reward", "rejected_reward" (beta times what was compared), "accuracy".
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from hone.algos.checks import checked
from hone.algos.masking import on_mask
from hone.algos.pairs import paired_loss
from hone.algos.protocol import Loss
from hone.algos.reduce import weighted_sum


@checked
def dpo(
    chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], weights: Float[Tensor, " P"], pair_mask: Bool[Tensor, " P"], *, beta: float
) -> Loss:
    """sum_i w_i -log sigmoid(beta h), h = chosen - rejected. Equal answers cost log 2. Reference: arXiv 2305.18290 eq 7."""
    return conservative_dpo(chosen, rejected, weights, pair_mask, beta=beta, flip=0.0)


@checked
def conservative_dpo(
    chosen: Float[Tensor, " P"],
    rejected: Float[Tensor, " P"],
    weights: Float[Tensor, " P"],
    pair_mask: Bool[Tensor, " P"],
    *,
    beta: float,
    flip: float,
) -> Loss:
    """cDPO: sum_i w_i [-(1 - a) log sigmoid(beta h) - a log sigmoid(-beta h)], a = `flip`, the labels' error rate in [0, 1/2].

    Reference: E. Mitchell, "A note on DPO with noisy preferences", eq 3. Raises ValueError for a flip out of range.
    """
    if not 0 <= flip <= 0.5:
        raise ValueError(f"flip is {flip}; a label's error rate lies in [0, 0.5] (beyond it, swap chosen and rejected)")
    rewards = beta * on_mask(chosen, pair_mask), beta * on_mask(rejected, pair_mask)
    margin = rewards[0] - rewards[1]
    # A term of weight zero is left out: gradients meet 0 * inf nowhere, and dpo pays for one logarithm.
    swapped = flip * logsigmoid(-margin) if flip > 0 else 0.0
    return paired_loss(-(1 - flip) * logsigmoid(margin) - swapped, *rewards, weights, pair_mask, name="preference_loss")


@checked
def robust_dpo(
    chosen: Float[Tensor, " P"],
    rejected: Float[Tensor, " P"],
    weights: Float[Tensor, " P"],
    pair_mask: Bool[Tensor, " P"],
    *,
    beta: float,
    flip: float,
) -> Loss:
    """Unbiased under flipped labels: sum_i w_i [-(1 - a) log sigmoid(beta h) + a log sigmoid(-beta h)] / (1 - 2 a), a = `flip`.

    May be negative. Reference: arXiv 2403.00409. Raises ValueError unless 0 <= flip < 1/2.
    """
    if not 0 <= flip < 0.5:
        raise ValueError(f"flip is {flip}; robust DPO needs an error rate in [0, 0.5)")
    rewards = beta * on_mask(chosen, pair_mask), beta * on_mask(rejected, pair_mask)
    margin = rewards[0] - rewards[1]
    per_pair = (flip * logsigmoid(-margin) - (1 - flip) * logsigmoid(margin)) / (1 - 2 * flip)
    return paired_loss(per_pair, *rewards, weights, pair_mask, name="preference_loss")


@checked
def ipo(
    chosen_mean: Float[Tensor, " P"],
    rejected_mean: Float[Tensor, " P"],
    weights: Float[Tensor, " P"],
    pair_mask: Bool[Tensor, " P"],
    *,
    beta: float,
) -> Loss:
    """sum_i w_i (h - 1 / (2 beta))^2, h the difference of the log-ratios' means per token (`row_mean_logp` of logp - ref_logp).

    Reference: arXiv 2310.12036 eq 17 (which writes tau for beta), with log-ratios averaged as its authors confirmed their code does;
    `ipo_summed` is the equation to the letter. Raises ValueError unless beta > 0.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}; IPO's target 1 / (2 beta) needs one above 0")
    chosen_mean, rejected_mean = on_mask(chosen_mean, pair_mask), on_mask(rejected_mean, pair_mask)
    per_pair = (chosen_mean - rejected_mean - 1 / (2 * beta)).square()
    return paired_loss(per_pair, beta * chosen_mean, beta * rejected_mean, weights, pair_mask, name="preference_loss")


@checked
def ipo_summed(
    chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"], weights: Float[Tensor, " P"], pair_mask: Bool[Tensor, " P"], *, beta: float
) -> Loss:
    """IPO on summed log-ratios, as DPO's repository and OpenRLHF have it: long answers overshoot 1 / (2 beta) soon. See `ipo`."""
    return ipo(chosen, rejected, weights, pair_mask, beta=beta)


@checked
def rpo(
    chosen: Float[Tensor, " P"],
    rejected: Float[Tensor, " P"],
    chosen_logp: Float[Tensor, " P"],
    weights: Float[Tensor, " P"],
    pair_mask: Bool[Tensor, " P"],
    *,
    beta: float,
    nll_coef: float,
) -> Loss:
    """DPO + nll_coef * sum_i w_i (-chosen_logp_i), which holds the chosen answers' likelihood up; the figure is "nll".

    `chosen_logp` is the policy's own: the row sum for arXiv 2405.16436 eq 4.5 (RPO), the row mean for 2404.19733 (IRPO) and OpenRLHF. TRL's
    mean over all chosen tokens is `dpo` plus `nll` with token weights; the two agree for equal lengths only.
    """
    likelihood = -weighted_sum(chosen_logp, weights, pair_mask)
    held = Loss(total=nll_coef * likelihood, metrics={"nll": likelihood.detach()})
    return dpo(chosen, rejected, weights, pair_mask, beta=beta) + held


@checked
def simpo(
    chosen_mean: Float[Tensor, " P"],
    rejected_mean: Float[Tensor, " P"],
    weights: Float[Tensor, " P"],
    pair_mask: Bool[Tensor, " P"],
    *,
    beta: float,
    gamma_beta_ratio: float,
) -> Loss:
    """sum_i w_i -log sigmoid(beta (a_w - a_l - gamma / beta)), a the policy's mean logp per token (`row_mean_logp`); no reference.

    The margin is given as the ratio gamma / beta, as in the authors' code; the paper's (and TRL's) gamma is beta times that.
    Reference: arXiv 2405.14734 eq 6.
    """
    rewards = beta * on_mask(chosen_mean, pair_mask), beta * on_mask(rejected_mean, pair_mask)
    return paired_loss(-logsigmoid(rewards[0] - rewards[1] - beta * gamma_beta_ratio), *rewards, weights, pair_mask, name="preference_loss")


@checked
def orpo(
    chosen_mean: Float[Tensor, " P"],
    rejected_mean: Float[Tensor, " P"],
    weights: Float[Tensor, " P"],
    pair_mask: Bool[Tensor, " P"],
    *,
    coef: float,
) -> Loss:
    """sum_i w_i [-a_w - coef log sigmoid(o(a_w) - o(a_l))], o(a) = a - log(1 - e^a) the log-odds, a the policy's mean logp per token.

    -a_w is the chosen answer's NLL; where it should also cover the prompt (as the authors' code does), add `nll` to `odds_ratio`.
    Reference: arXiv 2403.07691 eq 6 and 7.
    """
    likelihood = -weighted_sum(chosen_mean, weights, pair_mask)
    held = Loss(total=likelihood, metrics={"nll": likelihood.detach()})
    return odds_ratio(chosen_mean, rejected_mean, weights, pair_mask, coef=coef) + held


@checked
def odds_ratio(
    chosen_mean: Float[Tensor, " P"],
    rejected_mean: Float[Tensor, " P"],
    weights: Float[Tensor, " P"],
    pair_mask: Bool[Tensor, " P"],
    *,
    coef: float,
) -> Loss:
    """Coef * sum_i w_i -log sigmoid(o(a_w) - o(a_l)): ORPO's second term alone; see `orpo`. Rewards are coef a."""
    # Off the mask a probability of 1/e: anything but one.
    chosen, rejected = (on_mask(mean, pair_mask).masked_fill(~pair_mask, -1.0) for mean in (chosen_mean, rejected_mean))
    log_odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    return paired_loss(-coef * logsigmoid(log_odds), coef * chosen, coef * rejected, weights, pair_mask, name="preference_loss")


@checked
def log1mexp(logp: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """log(1 - e^x) for x <= 0, accurate at both ends; a probability e^x within the dtype's eps of one counts as one minus eps.

    log1p(-e^x) far from zero, log(-expm1(x)) near it: in fp32 the former gives -15.94 for x = -1e-7, the truth is -16.12.
    """
    x = logp.clamp(max=-torch.finfo(logp.dtype).eps / 2)
    # Each branch sees a harmless number where the other one is taken, so that no NaN comes back through it.
    near = x > -0.6931
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -0.5))), torch.log1p(-torch.exp(torch.where(near, -1.0, x))))
