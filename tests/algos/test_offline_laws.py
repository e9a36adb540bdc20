"""Laws of the offline algorithms on any rows: their slow references, cuts, poison, empty steps, and their gradients."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from hone.algos.algorithms.distillation import Distillation
from hone.algos.algorithms.dpo import DPO
from hone.algos.algorithms.ipo import IPO
from hone.algos.algorithms.kto import KTO
from hone.algos.algorithms.orpo import ORPO
from hone.algos.algorithms.process_reward_model import ProcessRewardModel
from hone.algos.algorithms.reward_model import RewardModel
from hone.algos.algorithms.sft import SFT
from hone.algos.algorithms.simpo import SimPO
from hone.algos.batch import Packed, select
from hone.algos.offline import (
    Offline,
    ScoreLoss,
    weighed_demonstrations,
    weighed_judgements,
    weighed_pairs,
    weighed_steps,
    weighed_taught,
    with_anchor,
)
from hone.algos.reduce import Reduction
from tests.algos.strategies import law
from tests.reference import numpy_offline, offline_rows
from tests.reference.offline_rows import evaluated, loss_of, packed

NAN, INF = math.nan, math.inf
BY_ROW = Reduction(over="sequence")


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """An algorithm on any rows: how they are labelled, the shape of what it reads, and a slow reference."""

    algo: Offline
    label: Callable[[Packed], Packed]
    shape: Callable[[Packed], tuple[int, ...]]
    reference: Callable[[Tensor, Packed], float]
    unit: int = 1  # rows that belong together

    def numbers(self, rows: Packed, seed: int) -> Tensor:
        """What the model says: negative, so that it may be log-probabilities."""
        generator = torch.Generator().manual_seed(seed)
        return -0.05 - torch.rand(self.shape(rows), generator=generator, dtype=torch.float64) * 3


def _per_token(rows):
    return (rows.tokens.numel(),)


def _logits(rows):
    return (rows.tokens.numel(), 5)


def _some(rows: Packed, *shape: int) -> Tensor:
    """Numbers that differ, of the rows alone."""
    count = math.prod(shape)
    return (torch.arange(count, dtype=torch.float64) * 0.7).sin().reshape(shape)


def _paired(algo, name, *, mean, against_reference, extra=lambda logp, rows: 0.0, **settings):
    def reference(logp, rows):
        compared = offline_rows.preferred(name, logp, rows, mean=mean, against_reference=against_reference, **settings)
        return compared + extra(logp, rows)

    return Case(algo, weighed_pairs, _per_token, reference, unit=2)


def _scores(algo, coef):
    def reference(scores, rows):
        c, r = scores[0::2].tolist(), scores[1::2].tolist()
        live = [w > 0 for w in rows.pair_weights.tolist()]
        margins = rows.margins[0::2].tolist()
        losses = [
            numpy_offline.paired("bt", c[i], r[i], beta=1.0, margin=margins[i]) + coef * (c[i] + r[i]) ** 2
            for i in range(len(c))
            if live[i]
        ]
        return sum(losses) / max(len(losses), 1)

    return Case(algo, lambda rows: weighed_pairs(rows, margins=_some(rows, rows.rows // 2)), lambda rows: (rows.rows,), reference, unit=2)


def _judged(algo, scales):
    def label(rows):
        return with_anchor(weighed_judgements(rows, torch.arange(rows.rows) % 3 == 0), _fp64(0.9, 3.0))

    def reference(logp, rows):
        return offline_rows.kahneman_tversky(logp, rows, rows.desirable.tolist(), 0.3, beta=algo.beta, scales=scales)

    return Case(algo, label, _per_token, reference)


def _labelled(algo, columns, over):
    def label(rows):
        return weighed_steps(rows, _some(rows, rows.tokens.numel(), len(columns)).softmax(-1), reduction=algo.reduction)

    def reference(logits, rows):
        weights = offline_rows.weights(rows, over=over)
        shares = rows.targets.tolist()
        return sum(w * numpy_offline.cross_entropy(logits[t, columns].tolist(), shares[t]) for t, w in enumerate(weights) if w)

    return Case(algo, label, _logits if algo.reward_tokens else lambda rows: (rows.tokens.numel(), len(columns)), reference)


def _taught(algo, top, beta, over="token"):
    def label(rows):
        teacher = (2 * _some(rows, rows.tokens.numel(), 5)).log_softmax(-1)
        kept = teacher.topk(top or 5)
        known = {"teacher_tokens": kept.indices} if top else {}
        return weighed_taught(rows, kept.values if top else teacher, reduction=algo.reduction, **known)

    def reference(logits, rows):
        weights, total = offline_rows.weights(rows, over=over), 0.0
        for t, w in enumerate(weights):
            if w:
                student = numpy_offline.softmax(logits[t].numpy() / algo.temperature)
                teacher = rows.teacher_logp[t].exp().numpy()
                if top:
                    student = numpy_offline.lumped(student, rows.teacher_tokens[t].tolist())
                    teacher = [*teacher, 1 - teacher.sum()]
                divergence = numpy_offline.jsd(torch.tensor(teacher).numpy(), student, beta=beta)
                own = offline_rows.likelihood(logits[t], int(rows.tokens[t])) if algo.kd_coef < 1 else 0.0
                total += w * (algo.kd_coef * divergence + (1 - algo.kd_coef) * own)
        return total

    return Case(algo, label, _logits, reference)


def _imitated(algo, over):
    def reference(logp, rows):
        return -sum(w * float(logp[t]) for t, w in enumerate(offline_rows.weights(rows, over=over)) if w)

    return Case(algo, lambda rows: weighed_demonstrations(rows, reduction=algo.reduction), _per_token, reference)


def _nll(coef):
    return lambda logp, rows: coef * offline_rows.chosen_nll(logp, rows)


CASES = {
    "sft": _imitated(SFT(), "token"),
    "sft by row": _imitated(SFT(reduction=BY_ROW), "sequence"),
    "rm": _scores(RewardModel(), 0.0),
    "rm, centred": _scores(RewardModel(centre_coef=0.3), 0.3),
    "prm": _labelled(ProcessRewardModel(), [0, 1, 2], "token"),
    "prm, tokens, by row": _labelled(ProcessRewardModel(reward_tokens=(4, 0), reduction=BY_ROW), [4, 0], "sequence"),
    "dpo": _paired(DPO(beta=0.4), "dpo", beta=0.4, mean=False, against_reference=True),
    "cdpo": _paired(DPO(beta=0.4, label_smoothing=0.2), "cdpo", beta=0.4, flip=0.2, mean=False, against_reference=True),
    "rpo": _paired(DPO(beta=0.4, nll_loss_coef=0.3), "dpo", beta=0.4, mean=False, against_reference=True, extra=_nll(0.3)),
    "ipo": _paired(IPO(beta=0.4), "ipo", beta=0.4, mean=True, against_reference=True),
    "simpo": _paired(SimPO(beta=0.4, gamma_beta_ratio=0.75), "simpo", beta=0.4, margin=0.3, mean=True, against_reference=False),
    "orpo": _paired(ORPO(coef=0.4), "orpo", beta=0.4, mean=True, against_reference=False),
    "kto": _judged(KTO(beta=0.4, desirable_loss_weight=1.3, undesirable_loss_weight=0.7), (1.3, 0.7)),
    "kd": _taught(Distillation(), None, 0.0),
    "kd, reverse, by row, hot": _taught(
        Distillation(divergence="reverse", temperature=1.7, kd_coef=1.0, reduction=BY_ROW), None, 1.0, "sequence"
    ),
    "kd, jsd of a top": _taught(Distillation(divergence="jsd", beta=0.3, kd_coef=0.7), 2, 0.3),
}
cases = pytest.mark.parametrize("name", CASES)
masks = st.lists(st.text("#.", min_size=0, max_size=4), min_size=1, max_size=6).map(
    lambda masks: masks[: len(masks) // 2 * 2] or ["#", "#"]
)


def _drawn(name: str, masks: list[str], seed: int) -> tuple[Case, Tensor, Packed]:
    case = CASES[name]
    plain = packed(masks)
    rows = case.label(dataclasses.replace(plain, ref_logp=_some(plain, plain.tokens.numel()) - 1))
    return case, case.numbers(rows, seed), rows


def _tokens_of(rows: Packed, order: list[int]) -> list[int]:
    edges = rows.cu_seqlens.tolist()
    return [token for row in order for token in range(edges[row], edges[row + 1])]


@cases
@law
@given(masks=masks, seed=st.integers(0, 2**31))
def test_every_loss_equals_its_slow_reference(name, masks, seed):
    case, numbers, rows = _drawn(name, masks, seed)
    # Weights are in single precision.
    assert_close(loss_of(case.algo, numbers, rows).total, _fp64(case.reference(numbers, rows)).squeeze(), rtol=1e-6, atol=1e-7)


@cases
@law
@given(masks=masks, seed=st.integers(0, 2**31), data=st.data())
def test_any_cut_between_rows_or_pairs_in_any_order_adds_up_to_the_whole(name, masks, seed, data):
    case, numbers, rows = _drawn(name, masks, seed)
    units = data.draw(st.permutations(range(rows.rows // case.unit)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(units)), max_size=3)))
    whole, gradient = evaluated(case.algo, numbers, rows)
    total, parts, read = None, [], []
    for start, stop in itertools.pairwise([0, *cuts, len(units)]):
        order = [unit * case.unit + row for unit in units[start:stop] for row in range(case.unit)]
        index = torch.tensor(order if case.shape(rows) == (rows.rows,) and isinstance(case.algo, ScoreLoss) else _tokens_of(rows, order))
        loss, part = evaluated(case.algo, numbers[index.long()], select(rows, order))
        total = loss if total is None else total + loss
        parts, read = [*parts, part], [*read, index.long()]
    assert_close(total.total, whole.total)
    assert_close(total.metrics, whole.metrics)
    assert_close(torch.cat(parts), gradient[torch.cat(read)])


@cases
@law
@given(masks=masks, seed=st.integers(0, 2**31), filler=st.sampled_from([NAN, INF, -INF, 1e38]))
def test_poison_off_the_mask_and_in_rows_that_weigh_nothing_changes_no_bit(name, masks, seed, filler):
    case, numbers, rows = _drawn(name, masks, seed)
    weighs = rows.row_weights != 0 if "row_weights" in rows.PER_ROW else torch.ones(rows.rows, dtype=torch.bool)
    live = rows.action_mask & weighs[rows.row_of_token]

    def poisoned(value: Tensor, keep: Tensor, filler: float = filler) -> Tensor:
        return torch.where(keep.reshape(-1, *[1] * (value.dim() - 1)), value, filler)

    changes = {
        name: poisoned(getattr(rows, name), live) for name in ("ref_logp", "weights", "targets", "teacher_logp") if hasattr(rows, name)
    }
    if hasattr(rows, "margins"):
        changes["margins"] = poisoned(rows.margins, weighs)
    if getattr(rows, "teacher_tokens", None) is not None:
        changes["teacher_tokens"] = poisoned(rows.teacher_tokens, live, -7)
    by_row = isinstance(case.algo, ScoreLoss)
    clean, gradient = evaluated(case.algo, numbers, rows)
    dirty, dirty_gradient = evaluated(case.algo, poisoned(numbers, weighs if by_row else live), dataclasses.replace(rows, **changes))
    assert_close(dirty.total, clean.total, rtol=0, atol=0)
    assert_close(dirty.metrics, clean.metrics, rtol=0, atol=0)
    assert_close(dirty_gradient, gradient, rtol=0, atol=0)
    assert (gradient[~(weighs if by_row else live)] == 0).all()
    assert not any(figure.requires_grad for figure in clean.metrics.values())


@cases
@pytest.mark.parametrize("masks", [[], ["..", "."], ["", ".", "..", ""]])
def test_a_step_without_an_action_token_costs_zero_and_stays_attached_to_the_graph(name, masks):
    case, numbers, rows = _drawn(name, masks, 0)
    loss, gradient = evaluated(case.algo, torch.full_like(numbers, NAN), rows)
    assert loss.total == 0 and (gradient == 0).all()
    assert all(figure == 0 for figure in loss.metrics.values())


@cases
def test_gradients_are_the_derivatives_of_the_values(name):
    case, numbers, rows = _drawn(name, ["#.#", "##", "..", "#", ".#", "###"], 1)
    numbers = numbers.requires_grad_()
    assert torch.autograd.gradcheck(lambda numbers: loss_of(case.algo, numbers, rows).total, (numbers,))


@cases
def test_half_precision_is_promoted_before_anything_is_subtracted(name):
    case, numbers, rows = _drawn(name, ["#.#", "##", "..", "#", ".#", "###"], 1)
    half = numbers.bfloat16()
    loss = loss_of(case.algo, half, rows)
    assert loss.total.dtype in (torch.float32, torch.float64)  # the latter where it meets the reference's numbers
    assert_close(loss.total, loss_of(case.algo, half.float(), rows).total, rtol=0, atol=0)
