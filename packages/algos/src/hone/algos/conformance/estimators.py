"""Laws of what feeds a loss: KL terms, log-probabilities, whitening, group advantages, returns.

Every law of a kind takes the function under test alone; its type is written beside the kind.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hone.algos.conformance.case import POISON, LawBroken, example

KLLoss = Callable[[Tensor, Tensor], Tensor]
"""(logp [T], ref_logp [T]) of sampled tokens -> loss per token [T], to be averaged over samples."""
Logp = Callable[[Tensor, Tensor, float], Tensor]
"""(logits [T, V], tokens [T], temperature) of one row -> [T]; entry t is that of tokens[t], given by logits[t - 1]; entry 0 is free."""
Whitening = Callable[[Tensor, Tensor], Tensor]
"""(values [T], mask [T]) -> [T]; entries off the mask are free."""
Group = Callable[[Tensor, Tensor], Tensor]
"""(scores [N], group [N]: prompt's id of each row) -> advantages [N]."""
Returns = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rewards [T], mask [T], cu_seqlens [N + 1]) -> [T]; entries off the mask are free."""


def kl_gradient(kl_loss: KLLoss) -> None:
    """Averaged over the policy's own samples, the term's gradient is that of KL(policy || reference), by enumeration.

    k3 differentiated as written gives KL(reference || policy), k1 nothing at all.
    """
    logits = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    ref_logp = torch.tensor([0.0, 0.3, -0.4], dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    (truth,) = torch.autograd.grad((logp.exp() * (logp - ref_logp)).sum(), logits, retain_graph=True)
    (actual,) = torch.autograd.grad((logp.detach().exp() * kl_loss(logp, ref_logp)).sum(), logits, materialize_grads=True)
    _same(actual, truth, "the expected gradient is not that of KL(policy || reference)")


def kl_pull(kl_loss: KLLoss) -> None:
    """Far from the reference the gradient is finite and still pulls back: clamped estimators let go where it matters most."""
    for distance in (-60.0, 60.0):
        logp = torch.tensor([distance - 100.0], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(kl_loss(logp, torch.full_like(logp, -100.0)).sum(), logp)
        if not (math.isfinite(float(gradient)) and float(gradient) * distance > 0):
            raise LawBroken(f"with logp - ref_logp = {distance} nats the gradient is {float(gradient)}")


def temperature(logp: Logp) -> None:
    """Log-probabilities are those of the distribution the tokens were drawn from: logits / temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    tokens = torch.tensor([4, 0, 3, 1, 2, 0])
    for tau in (1.0, 0.6, 1.7):
        expected = (logits / tau).log_softmax(-1)[:-1].gather(-1, tokens[1:, None])[:, 0]
        _same(logp(logits, tokens, tau)[1:], expected, f"log-probabilities at temperature {tau} are off")


def logp_alignment(logp: Logp) -> None:
    """Entry t is the log-probability of token t, which the logits of token t - 1 predict: no shift by one."""
    tokens = torch.tensor([1, 0, 2, 2, 1])
    logits = torch.zeros(5, 3, dtype=torch.float64)
    for token in range(4):
        logits[token, int(tokens[token + 1])] = 10.0 + token
    worst = float(logp(logits, tokens, 1.0)[1:].min())
    if worst < -0.01:
        raise LawBroken(f"every token was predicted with certainty, yet one has a log-probability of {worst:.3g} nats")


def whitening_leak(whiten: Whitening) -> None:
    """What stands off the mask has no say."""
    case = example()
    clean = whiten(case.advantages, case.action_mask)[case.action_mask]
    for poison in (0.0, *POISON):
        dirty = whiten(torch.where(case.action_mask, case.advantages, poison), case.action_mask)[case.action_mask]
        _same(dirty, clean, f"{poison} in every slot off the mask changed what stands on it")


def whitening_moments(whiten: Whitening) -> None:
    """Over the mask the mean is zero and the variance one (by either divisor), however far from zero the numbers lay."""
    case = example()
    count = int(case.action_mask.sum())
    for offset in (0.0, 1e4):
        white = whiten((case.advantages + offset).float(), case.action_mask)[case.action_mask].double()
        mean, squares = float(white.mean()), float(white.square().sum())
        if abs(mean) > 1e-3 or not count - 1 - 0.01 <= squares <= count + 0.01:
            raise LawBroken(f"offset {offset:g}: mean {mean:.6g}, sum of squares {squares:.6g} over {count} tokens")


def whitening_of_equals(whiten: Whitening) -> None:
    """Equal numbers become exactly zero: a small epsilon turns their mean's rounding error into an advantage."""
    for value in (0.1, 0.7, 1e4 / 3):
        white = whiten(torch.full((7,), value), torch.ones(7, dtype=torch.bool))
        if bool((white != 0).any()):
            raise LawBroken(f"seven copies of {value} became {white}")


def group_of_equals(advantages: Group) -> None:
    """Equal scores have exactly no advantage, for any number and any value of them."""
    for value in (0.1, 0.3, 1e4 / 3):
        for size in (2, 7, 12):
            actual = advantages(torch.full((size,), value), torch.zeros(size, dtype=torch.long))
            if bool((actual != 0).any()):
                raise LawBroken(f"{size} scores of {value} have advantages {actual}")


def group_of_one(advantages: Group) -> None:
    """A score with nothing to compare it with has exactly no advantage, beside other groups or alone."""
    alone = advantages(torch.tensor([3.0]), torch.tensor([0]))
    beside = advantages(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([0, 1, 0]))
    if float(alone[0]) != 0 or float(beside[1]) != 0:
        raise LawBroken(f"a group of one got {float(alone[0])} alone and {float(beside[1])} beside another group")


def group_by_id(advantages: Group) -> None:
    """Groups are told by id: rows in any order, and groups of any size, give every row the same advantage."""
    scores = torch.tensor([1.0, 0.0, 0.5, 0.25, 2.0, 0.0, 1.5, 3.0], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    expected = torch.cat([advantages(scores[:3], group[:3]), advantages(scores[3:], group[3:])])
    order = torch.tensor([5, 0, 7, 3, 1, 6, 2, 4])
    _same(advantages(scores[order], group[order])[order.argsort()], expected, "advantages changed with the other groups or the order")


def group_shift(advantages: Group) -> None:
    """A constant added to every score of a group changes nothing, even a large one in single precision."""
    scores, group = torch.tensor([1.0, 0.0, 0.5, 0.0]), torch.zeros(4, dtype=torch.long)
    _same(advantages(scores + 4096.0, group), advantages(scores, group), "4096 added to every score changed the advantages")


def bessel(advantages: Group) -> None:
    """The group's standard deviation divides by n - 1, as the estimate from a sample of answers it is."""
    actual = advantages(torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=torch.float64), torch.zeros(4, dtype=torch.long))
    expected = torch.tensor([1.305582, -0.783349, 0.261116, -0.783349], dtype=torch.float64)
    if not torch.allclose(actual.double(), expected, rtol=0, atol=1e-3):
        raise LawBroken(f"scores 1, 0, .5, 0 have advantages {actual}, not {expected}")


def returns_stay_in_their_row(returns: Returns) -> None:
    """Packed rows have the returns they have one by one: nothing crosses from a row into its neighbour."""
    case = example()
    packed = returns(case.rewards, case.action_mask, case.cu_seqlens)
    for row in range(case.rows):
        alone = case.select([row])
        span = slice(int(case.cu_seqlens[row]), int(case.cu_seqlens[row + 1]))
        expected = returns(alone.rewards, alone.action_mask, alone.cu_seqlens)
        _same(packed[span][alone.action_mask], expected[alone.action_mask], f"row {row} has other returns among its neighbours than alone")


def returns_cross_gaps(returns: Returns) -> None:
    """A gap, however long, is no step: the returns of the tokens around it are those without it, and a reward gets across."""
    expected = None
    for gap in (0, 1, 4):
        mask = torch.tensor([True, *[False] * gap, True, True])
        rewards = torch.zeros(mask.numel(), dtype=torch.float64)
        rewards[-1] = 1.0
        actual = returns(rewards, mask, torch.tensor([0, mask.numel()]))[mask]
        expected = actual if expected is None else expected
        _same(actual, expected, f"a gap of {gap} tokens of the environment changed the returns of the tokens around it")


def returns_ignore_other_tokens(returns: Returns) -> None:
    """Garbage off the mask, in a gap or in padding, reaches no token on it."""
    case = example()
    clean = returns(case.rewards, case.action_mask, case.cu_seqlens)[case.action_mask]
    for these in (case.poisoned(), case.widened(left=2, right=3)):
        dirty = returns(these.rewards, these.action_mask, these.cu_seqlens)[these.action_mask]
        _same(dirty, clean, "what stands off the mask, or how much of it there is before and after a row, changed what stands on it")


KL_LAWS: dict[str, Callable[[KLLoss], None]] = {"KL gradient": kl_gradient, "KL pull": kl_pull}
LOGP_LAWS: dict[str, Callable[[Logp], None]] = {"temperature": temperature, "logp alignment": logp_alignment}
WHITENING_LAWS: dict[str, Callable[[Whitening], None]] = {
    "whitening leak": whitening_leak,
    "whitening moments": whitening_moments,
    "whitening of equals": whitening_of_equals,
}
GROUP_LAWS: dict[str, Callable[[Group], None]] = {
    "group of equals": group_of_equals,
    "group of one": group_of_one,
    "group by id": group_by_id,
    "group shift": group_shift,
    "Bessel": bessel,
}
RETURN_LAWS: dict[str, Callable[[Returns], None]] = {
    "returns stay in their row": returns_stay_in_their_row,
    "returns ignore other tokens": returns_ignore_other_tokens,
    "returns cross gaps": returns_cross_gaps,
}


def _same(actual: Tensor, expected: Tensor, complaint: str) -> None:
    if actual.shape != expected.shape or not torch.allclose(actual.double(), expected.double(), rtol=1e-6, atol=1e-9):
        raise LawBroken(f"{complaint}: {actual} for {expected}")
