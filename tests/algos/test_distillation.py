"""Distillation: golden values of F5, the reference, top-k teachers, and the ends of the generalised divergence."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.distillation import (
    forward_kl,
    generalised_jsd,
    lumped_student_logp,
    lumped_teacher_logp,
    on_policy_distillation_advantages,
    reverse_kl,
    tempered_logp,
)
from tests.algos.strategies import law
from tests.reference import numpy_offline

NAN, INF = math.nan, math.inf
STUDENT, TEACHER = [1.0, 0.0, -1.0, 0.5], [0.0, 2.0, 0.0, 1.0]  # F5
MASK = torch.tensor([False, True])
LOSSES = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "jsd .1": lambda *a: generalised_jsd(*a, beta=0.1),
    "jsd .5": lambda *a: generalised_jsd(*a, beta=0.5),
}


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def _f5(loss, *, temperature=1.0):
    """(total, gradient of the student's logits) of F5 behind a token off the mask that holds garbage."""
    student = torch.stack([_fp64(NAN, INF, NAN, -INF), _fp64(*STUDENT)]).requires_grad_()
    teacher = torch.stack([_fp64(INF, NAN, NAN, NAN), _fp64(*TEACHER)]).requires_grad_()
    logp = [tempered_logp(logits, MASK, temperature=temperature) for logits in (student, teacher)]
    result = loss(*logp, _fp64(NAN, 1.0), MASK)
    result.total.backward()
    assert teacher.grad is None and (student.grad[0] == 0).all()
    assert_close(result.metrics, {"distillation_loss": result.total.detach()})
    return result.total.detach(), student.grad[1]


@pytest.mark.parametrize(
    ("loss", "temperature", "expected", "gradient"),
    [
        (forward_kl, 1.0, 0.585605, [0.391396, -0.435924, -0.018447, 0.062975]),  # p_S - p_T
        (reverse_kl, 1.0, 0.664600, [0.513164, -0.334332, -0.058846, -0.119985]),  # p_S (log p_S - log p_T - KL)
        (lambda *a: generalised_jsd(*a, beta=0.1), 1.0, 0.051758, None),
        (lambda *a: generalised_jsd(*a, beta=0.5), 1.0, 0.142684, [0.094035, -0.082535, -0.008662, -0.002837]),
        (lambda *a: generalised_jsd(*a, beta=0.9), 1.0, 0.056676, None),
        (lambda *a: generalised_jsd(*a, beta=0.0), 1.0, 0.585605, [0.391396, -0.435924, -0.018447, 0.062975]),
        (lambda *a: generalised_jsd(*a, beta=1.0), 1.0, 0.664600, [0.513164, -0.334332, -0.058846, -0.119985]),
        (forward_kl, 2.0, 0.153309, None),
    ],
)
def test_divergences_golden(loss, temperature, expected, gradient):
    total, actual = _f5(loss, temperature=temperature)
    assert_close(total, _fp64(expected).squeeze(), rtol=0, atol=1e-6)
    if gradient is not None:
        assert_close(actual, _fp64(*gradient), rtol=0, atol=1e-6)


def test_on_policy_advantages_golden():
    logp, teacher = _fp64(NAN, -1.0, -0.2, -3.0).requires_grad_(), _fp64(INF, -0.5, -0.4, -2.0)
    advantages = on_policy_distillation_advantages(logp, teacher, torch.tensor([False, True, True, True]))
    assert_close(advantages, _fp64(0.0, 0.5, -0.2, 1.0))
    assert not advantages.requires_grad


def test_the_policy_gradient_of_the_advantages_is_that_of_the_reverse_divergence():
    # Enumerated: every token of the student's vocabulary, weighing its probability.
    logits, mask = _fp64(*STUDENT).requires_grad_(), torch.ones(4, dtype=torch.bool)
    logp, teacher = logits.log_softmax(-1), _fp64(*TEACHER).log_softmax(-1)
    advantages = on_policy_distillation_advantages(logp, teacher, mask)
    (gradient,) = torch.autograd.grad(-(logp.detach().exp() * advantages * logp).sum(), logits)
    assert_close(gradient, _f5(reverse_kl)[1])


@st.composite
def tokens(draw):
    """(student logits, teacher logits, weights, mask) of a few tokens over a vocabulary of five."""
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=1, max_size=6)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    student, teacher = (2 * torch.randn(mask.numel(), 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.rand(mask.numel(), generator=generator, dtype=torch.float64), mask


@law
@given(tokens(), st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.9, 1.0]), st.sampled_from([0.7, 1.0, 2.0]))
def test_divergences_equal_the_reference_in_probabilities(example, beta, temperature):
    student, teacher, weights, mask = example
    logp = [tempered_logp(logits, mask, temperature=temperature) for logits in (student, teacher)]
    expected = sum(
        float(weights[t])
        * numpy_offline.jsd(*[numpy_offline.softmax(logits[t].numpy() / temperature) for logits in (teacher, student)], beta=beta)
        for t in mask.nonzero().flatten().tolist()
    )
    assert_close(generalised_jsd(*logp, weights, mask, beta=beta).total, _fp64(expected).squeeze())
    # JSD_beta(S, T) = JSD_(1 - beta)(T, S)
    assert_close(generalised_jsd(*reversed(logp), weights, mask, beta=1 - beta).total, _fp64(expected).squeeze())


@law
@given(tokens(), st.integers(1, 4))
def test_lumping_equals_the_reference_and_only_shrinks_the_divergence(example, k):
    student, teacher, weights, mask = example
    teacher_logp = teacher.log_softmax(-1)
    top = teacher_logp.topk(k)
    lumped = lumped_student_logp(student, top.indices, mask, temperature=1.0), lumped_teacher_logp(top.values, mask)
    whole = tempered_logp(student, mask, temperature=1.0), teacher_logp
    p, q = ([numpy_offline.softmax(row.numpy()) for row in logits] for logits in (student, teacher))
    for loss, reference in ((forward_kl, lambda s, t: numpy_offline.kl(t, s)), (reverse_kl, numpy_offline.kl)):
        expected = sum(
            float(weights[t]) * reference(*[numpy_offline.lumped(column[t], top.indices[t].tolist()) for column in (p, q)])
            for t in mask.nonzero().flatten().tolist()
        )
        actual = loss(*lumped, weights, mask).total
        assert_close(actual, _fp64(expected).squeeze())
        assert -1e-12 <= actual <= loss(*whole, weights, mask).total + 1e-12


def test_a_teacher_whose_top_is_everything_leaves_a_rest_of_rounding():
    # In fp32 the mass can round to more than one; nothing of it may come back as NaN, or as an infinite price for all other tokens.
    student = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    teacher = torch.tensor([[math.log(0.5) + 1e-6, math.log(0.5)]])
    mask, one = torch.tensor([True]), torch.ones(1)
    logp = lumped_teacher_logp(teacher, mask)
    assert_close(logp[0, -1], torch.tensor(math.log(2**-23)))
    for loss in (forward_kl, reverse_kl, LOSSES["jsd .5"]):
        total = loss(lumped_student_logp(student, torch.tensor([[0, 1]]), mask, temperature=1.0), logp, one, mask).total
        assert total.isfinite() and torch.autograd.grad(total, student)[0].isfinite().all()


@law
@given(st.sampled_from(sorted(LOSSES)).map(LOSSES.__getitem__), tokens(), st.data())
def test_poison_order_and_cuts_change_nothing(loss, example, data):
    def evaluate(student, teacher, weights, mask):
        student = student.clone().requires_grad_()
        top = torch.where(mask[:, None], teacher, 0.0).log_softmax(-1).topk(2)
        token_ids = torch.where(mask[:, None], top.indices, -7)
        whole = loss(*(tempered_logp(logits, mask, temperature=0.7) for logits in (student, teacher)), weights, mask)
        teacher_logp = lumped_teacher_logp(torch.where(mask[:, None], top.values, NAN), mask)
        part = loss(lumped_student_logp(student, token_ids, mask, temperature=1.0), teacher_logp, weights, mask)
        return (whole + part).total.detach(), torch.autograd.grad((whole + part).total, student)[0]

    student, teacher, weights, mask = example
    total, gradient = evaluate(*example)
    for filler in (NAN, INF, -INF):
        dirty = [torch.where(mask[:, None], logits, filler) for logits in (student, teacher)]
        dirty_total, dirty_gradient = evaluate(*dirty, torch.where(mask, weights, filler), mask)
        assert_close(dirty_total, total, rtol=0, atol=0)
        assert_close(dirty_gradient, gradient, rtol=0, atol=0)
        assert (dirty_gradient[~mask] == 0).all()
    order = torch.tensor(data.draw(st.permutations(range(mask.numel()))))
    cut = data.draw(st.integers(0, mask.numel()))
    parts = [evaluate(*(column[part] for column in example)) for part in (order[:cut], order[cut:])]
    assert_close(parts[0][0] + parts[1][0], total)
    assert_close(torch.cat([parts[0][1], parts[1][1]]), gradient[order])


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_are_the_derivatives_of_the_values(name):
    logits, mask = torch.stack([_fp64(*STUDENT), _fp64(*TEACHER)]).requires_grad_(), torch.tensor([True, True])
    teacher = torch.stack([_fp64(*TEACHER), _fp64(0.3, 0.1, -0.2, 0.0)]).log_softmax(-1)
    top, weights = teacher.topk(2), _fp64(0.3, 0.7)

    def total(x):
        whole = LOSSES[name](tempered_logp(x, mask, temperature=0.7), teacher, weights, mask)
        lumped = lumped_student_logp(x, top.indices, mask, temperature=0.7)
        return (whole + LOSSES[name](lumped, lumped_teacher_logp(top.values, mask), weights, mask)).total

    assert torch.autograd.gradcheck(total, (logits,))


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_and_impossible_columns_stay_finite(name, dtype):
    mask, one = torch.tensor([True]), torch.ones(1)
    logits = torch.tensor([[1e4, -1e4, 0.0, -INF]], dtype=dtype, requires_grad=True)
    # Both rule the last column out, as a padded vocabulary does.
    student, teacher = tempered_logp(logits, mask, temperature=1.0), torch.tensor([[0.0, 1.0, 2.0, -INF]]).log_softmax(-1)
    total = LOSSES[name](student, teacher, one, mask).total
    assert total.isfinite() and total.dtype == torch.float32
    assert torch.autograd.grad(total, logits)[0].isfinite().all()


def test_near_its_ends_the_divergence_over_beta_tends_to_the_special_case():
    student, teacher = (_fp64(*logits).log_softmax(-1)[None] for logits in (STUDENT, TEACHER))
    arguments = student, teacher, _fp64(1.0), torch.tensor([True])
    assert_close(generalised_jsd(*arguments, beta=1e-7).total / 1e-7, forward_kl(*arguments).total, rtol=1e-5, atol=0)
    assert generalised_jsd(*arguments, beta=1e-7).total < 1e-6  # and the formula itself to zero: the loss jumps


def test_equal_distributions_cost_nothing():
    logp = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    for loss in LOSSES.values():
        assert_close(loss(logp, logp, torch.ones(3), torch.ones(3, dtype=torch.bool)).total, torch.zeros(()), rtol=0, atol=1e-6)


def test_settings_out_of_range_are_named():
    mask, logits = torch.tensor([True]), torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"beta is 1.5; .* \[0, 1\]"):
        generalised_jsd(logits, logits, torch.ones(1), mask, beta=1.5)
    for temperature in (0.0, np.nan):
        with pytest.raises(ValueError, match="must be above 0"):
            tempered_logp(logits, mask, temperature=temperature)
    with pytest.raises(ValueError, match="teacher_tokens has 3 of 3 tokens"):
        lumped_student_logp(logits, torch.tensor([[0, 1, 2]]), mask, temperature=1.0)
