"""Laws of a loss: additive over cuts, blind to order, padding and what stands off the mask, right on policy, finite.

`Loss`: Case -> the micro-batch's share of the step's loss, a scalar; shares are summed, by the engine, over micro-batches and
ranks. `Step`: ranks of micro-batches -> the step's loss, for engines that combine shares in a way of their own.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hone.algos.conformance.case import Case, LawBroken

Loss = Callable[[Case], Tensor]
Step = Callable[[Sequence[Sequence[Case]]], Tensor]

GRIDS = (
    ([[0, 1, 2, 3, 4]],),
    ([[0], [1, 2, 3, 4]],),
    ([[4], [3], [2], [1], [0]],),
    ([[0, 2]], [[1], [3, 4]]),
    ([[2]], [[4]], [[0], [1, 3]]),
)
"""Five rows dealt out to micro-batches and ranks, evenly and not."""


def micro_batch_additivity(loss: Loss, case: Case) -> None:
    """The shares of any cut into micro-batches add up to the loss of the whole."""
    accumulation_and_ranks(lambda ranks: torch.stack([loss(part) for rank in ranks for part in rank]).sum(), case)


def accumulation_and_ranks(step: Step, case: Case) -> None:
    """The step's loss and gradient are the same for any number of micro-batches and ranks, however uneven."""
    whole, gradient = _evaluate(lambda all_rows: step([[all_rows]]), case)
    for grid in GRIDS:
        total, cut_gradient = _evaluate(lambda rows, grid=grid: step([[rows.select(part) for part in rank] for rank in grid]), case)
        _same(total, whole, f"the loss of one micro-batch became another when its rows were dealt out as {grid}")
        _same(cut_gradient, gradient, f"the gradient of one micro-batch became another when its rows were dealt out as {grid}")


def row_order(loss: Loss, case: Case) -> None:
    """Rows in another order give the same loss and the same gradients."""
    whole, gradient = _evaluate(loss, case)
    total, shuffled = _evaluate(lambda rows: loss(rows.select([3, 1, 4, 0, 2])), case)
    _same(total, whole, "the loss changed with the order of the rows")
    _same(shuffled, gradient, "the gradient changed with the order of the rows")


def packing_is_padding(loss: Loss, case: Case) -> None:
    """Padding before or after every row, however wide, changes neither the loss nor the gradient."""
    whole, gradient = _evaluate(loss, case)
    for left, right in ((0, 1), (0, 7), (3, 0), (2, 5)):
        total, wide = _evaluate(lambda rows, left=left, right=right: loss(rows.widened(left=left, right=right)), case)
        _same(total, whole, f"the loss changed with {left} slots of padding before every row and {right} after it")
        _same(wide, gradient, f"the gradient changed with {left} slots of padding before every row and {right} after it")


def poison_off_the_mask(loss: Loss, case: Case) -> None:
    """NaN, infinities and huge numbers off the mask change neither the loss nor a gradient, to the last bit."""
    whole, gradient = _evaluate(loss, case)
    total, dirty = _evaluate(loss, case.poisoned())
    if not (total.equal(whole) and dirty[case.action_mask].equal(gradient[case.action_mask])):
        raise LawBroken(f"garbage off the mask changed the loss from {float(whole):.9g} to {float(total):.9g}, or its gradient on the mask")


def zero_gradient_off_the_mask(loss: Loss, case: Case) -> None:
    """The gradient is exactly zero off the mask, with garbage there or without (a `where` on the output alone gives NaN)."""
    for these in (case, case.poisoned()):
        _, gradient = _evaluate(loss, these)
        off = gradient[~case.action_mask]
        if not bool((off == 0).all()):
            raise LawBroken(f"gradient off the mask: {off}")


def mask_alignment(loss: Loss, case: Case) -> None:
    """On policy, exactly the tokens on the mask move: one shift between mask and log-probabilities trains the wrong ones."""
    on_policy = case.replace(logp=case.old_logp)
    _, gradient = _evaluate(loss, on_policy)
    moved = gradient != 0
    if not moved.equal(case.action_mask):
        raise LawBroken(f"tokens with a gradient: {moved.nonzero().flatten()}; on the mask: {case.action_mask.nonzero().flatten()}")


def on_policy_gradient(loss: Loss, case: Case) -> None:
    """With logp = old_logp the ratio is one, and the gradient the plain policy gradient's, -w A, whatever the loss's value is."""
    _, gradient = _evaluate(loss, case.replace(logp=case.old_logp))
    expected = torch.where(case.action_mask, -case.weights * case.advantages, 0.0)
    _same(gradient, expected, "on policy the gradient is not -w A (w the weights of the step's reduction)")


def finite_on_extreme_ratios(loss: Loss, case: Case) -> None:
    """Loss and gradient stay finite where exp(logp - old_logp) overflows behind a bound, meets A = 0, or underflows.

    A bad token a policy has moved towards may cost as much as it likes, so where A < 0 no ratio beyond e^50 is asked about.
    """
    advantages = case.advantages.abs()
    for log_ratio, these in ((1e3, advantages), (1e3, 0 * advantages), (50.0, -advantages), (-1e3, advantages), (-1e3, -advantages)):
        total, gradient = _evaluate(loss, case.replace(logp=case.old_logp + log_ratio, advantages=these))
        if not (math.isfinite(float(total)) and bool(gradient.isfinite().all())):
            sign = "A = 0" if not bool(these.any()) else "A > 0" if these is advantages else "A < 0"
            raise LawBroken(f"a log-ratio of {log_ratio:g} nats with {sign} gave loss {float(total)} and gradient {gradient}")


def pessimism(loss: Loss, case: Case) -> None:
    """PPO's clip forbids only what would go further: behind a bound on the way out nothing moves, on the way back everything does."""
    for log_ratio, sign, moves in ((1.0, 1, False), (-1.0, -1, False), (1.0, -1, True), (-1.0, 1, True)):
        these = case.replace(logp=case.old_logp + log_ratio, advantages=sign * case.advantages.abs())
        _, gradient = _evaluate(loss, these)
        moved = gradient[case.action_mask] != 0
        if not bool((moved == moves).all()):
            kind = "good" if sign > 0 else "bad"
            raise LawBroken(
                f"{kind} tokens with a log-ratio of {log_ratio:+g} nats must {'' if moves else 'not '}move; gradient {gradient}"
            )


CLIP_LAWS: dict[str, Callable[[Loss, Case], None]] = {"pessimism": pessimism}
"""Of losses that clip ratios as PPO does, at bounds nearer than one nat."""
LOSS_LAWS: dict[str, Callable[[Loss, Case], None]] = {
    "micro-batch additivity": micro_batch_additivity,
    "row order": row_order,
    "packing is padding": packing_is_padding,
    "poison off the mask": poison_off_the_mask,
    "zero gradient off the mask": zero_gradient_off_the_mask,
    "mask alignment": mask_alignment,
    "on-policy gradient": on_policy_gradient,
    "finite on extreme ratios": finite_on_extreme_ratios,
}
STEP_LAWS: dict[str, Callable[[Step, Case], None]] = {"accumulation and ranks": accumulation_and_ranks}


def _evaluate(loss: Loss, case: Case) -> tuple[Tensor, Tensor]:
    """(loss, gradient with respect to the case's logp)."""
    logp = case.logp.detach().clone().requires_grad_()
    total = loss(case.replace(logp=logp))
    if total.shape != ():
        raise LawBroken(f"the loss has shape {tuple(total.shape)}; it must be a scalar")
    (gradient,) = torch.autograd.grad(total, logp, allow_unused=True, materialize_grads=True)
    return total.detach(), gradient


def _same(actual: Tensor, expected: Tensor, complaint: str) -> None:
    if not torch.allclose(actual, expected.to(actual.dtype), rtol=1e-6, atol=1e-9):
        raise LawBroken(f"{complaint}: {actual} for {expected}")
