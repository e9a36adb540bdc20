"""The offline algorithms from tokens on: golden values of F4 and F5, their settings, and what they refuse."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from hone.algos.algorithms import ALGORITHMS, OFFLINE
from hone.algos.algorithms.distillation import Distillation
from hone.algos.algorithms.dpo import DPO
from hone.algos.algorithms.ipo import IPO
from hone.algos.algorithms.kto import KTO
from hone.algos.algorithms.on_policy_distillation import OnPolicyDistillation
from hone.algos.algorithms.orpo import ORPO
from hone.algos.algorithms.process_reward_model import ProcessRewardModel
from hone.algos.algorithms.reward_model import RewardModel
from hone.algos.algorithms.sft import SFT
from hone.algos.algorithms.simpo import SimPO
from hone.algos.algorithms.terms import Clip
from hone.algos.batch import Batch, select
from hone.algos.judging import judge
from hone.algos.kto import anchor_sums
from hone.algos.offline import (
    LogitsLoss,
    LogpLoss,
    Offline,
    Pairs,
    ScoreLoss,
    weighed_demonstrations,
    weighed_judgements,
    weighed_pairs,
    weighed_steps,
    weighed_taught,
    with_anchor,
)
from hone.algos.pairs import row_logp
from hone.algos.process import hard_process_loss
from hone.algos.protocol import Outputs
from hone.algos.ranges import violations
from hone.algos.reduce import Reduction
from tests.algos.strategies import law, scored_batch
from tests.reference.fixtures import scatter
from tests.reference.offline_rows import evaluated, f4, loss_of, packed

NAN, INF = math.nan, math.inf
STUDENT, TEACHER = [1.0, 0.0, -1.0, 0.5], [0.0, 2.0, 0.0, 1.0]  # F5
BY_ROW = Reduction(over="sequence")


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def _close(actual: Tensor, *expected: float) -> None:
    assert_close(actual.detach().double(), _fp64(*expected).reshape(actual.shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("algo", "expected"),
    [
        (DPO(), 0.620957),  # log(1 + exp(-.1 * 1.5))
        (DPO(label_smoothing=0.1), 0.635957),  # .9 * .620957 + .1 * .770957
        (DPO(nll_loss_coef=1.0), 3.120957),  # and the chosen answer's 10 / 4
        (DPO(beta=0.01, nll_loss_coef=0.02), 0.735675),  # log(1 + exp(-.015)) + .02 * 2.5
        (IPO(), 21.6225),  # means 1 / 4 and -.5 / 5: (.35 - 5)^2
        (SimPO(), 1.463282),  # means -2.5 and -2.4: log(1 + exp(2 * .1 + 1))
        (SimPO(gamma_beta_ratio=0.25), 1.103186),
        (SimPO(beta=0.1, gamma_beta_ratio=5.0), 0.980313),
        (ORPO(), 2.574937),  # 2.5 + .1 * .749369
        (ORPO(coef=1.0), 3.249369),
    ],
    ids=lambda case: getattr(case, "name", ""),
)
def test_preference_losses_golden_of_f4_from_tokens(algo, expected):
    rows, logp = f4()
    loss, gradient = evaluated(algo, logp, weighed_pairs(rows))
    _close(loss.total, expected)
    assert (gradient[~rows.action_mask] == 0).all()


def test_the_gradient_of_dpo_reaches_every_token_of_both_answers_and_no_other():
    rows, logp = f4()
    # d/dh = -.1 sigmoid(-.15) = -.046257, and h rises with every chosen token.
    _, gradient = evaluated(DPO(), logp, weighed_pairs(rows))
    _close(gradient[rows.action_mask], *[-0.046257] * 4, *[0.046257] * 5)
    # IPO: 2 (.35 - 5) = -9.3 over each answer's length.
    _, gradient = evaluated(IPO(), logp, weighed_pairs(rows))
    _close(gradient[rows.action_mask], *[-9.3 / 4] * 4, *[9.3 / 5] * 5)


def test_the_figures_of_f4():
    rows, logp = f4()
    metrics = {
        algo.name: {name: round(float(figure), 6) for name, figure in evaluated(algo, logp, weighed_pairs(rows))[0].metrics.items()}
        for algo in (DPO(nll_loss_coef=1.0), IPO(), SimPO(), ORPO())
    }
    assert metrics == {
        "dpo": {"preference_loss": 0.620957, "chosen_reward": 0.1, "rejected_reward": -0.05, "accuracy": 1.0, "nll": 2.5},
        "ipo": {"preference_loss": 21.6225, "chosen_reward": 0.025, "rejected_reward": -0.01, "accuracy": 1.0},
        "simpo": {"preference_loss": 1.463282, "chosen_reward": -5.0, "rejected_reward": -4.8, "accuracy": 0.0},
        "orpo": {"preference_loss": 0.074937, "chosen_reward": -0.25, "rejected_reward": -0.24, "accuracy": 0.0, "nll": 2.5},
    }


def test_two_pairs_weigh_half_each_and_one_without_an_answer_nothing():
    rows, logp = f4()
    prompt, gap = _fp64(NAN, NAN), scatter(_fp64(-1.0, -1.0), torch.tensor([False, True, True]))
    reference = torch.cat([rows.ref_logp, gap, prompt, gap + 1, gap])
    more = packed(["..##.##", ".#####.", ".##", "..", ".##", ".##"], ref_logp=reference)
    # The third pair: equal answers, but for the reference: h = -2 against the chosen one's gain of -2 over it: -.2.
    numbers = torch.cat([logp, gap, prompt, gap, gap])
    third = math.log1p(math.exp(0.2))
    _close(evaluated(DPO(), numbers, weighed_pairs(more))[0].total, (0.620957 + third) / 2)


def test_kto_golden_of_f4_from_tokens():
    rows, logp = f4()
    # Mismatched rows of log-ratios .4, -.2 and .7, each over two tokens.
    other = packed([".##", "##.", "#.#"])
    ratios = scatter(_fp64(0.1, 0.3, -0.4, 0.2, 0.5, 0.2), other.action_mask)
    sums = anchor_sums(row_logp(ratios, other.action_mask, other.cu_seqlens), torch.tensor([True] * 3))
    judged = with_anchor(weighed_judgements(rows, torch.tensor([True, False])), sums)
    loss, gradient = evaluated(KTO(), logp, judged)
    _close(loss.total, (0.482507 + 0.480011) / 2)
    figures = {name: round(float(figure), 6) for name, figure in loss.metrics.items()}
    assert figures == {"preference_loss": 0.481259, "kl_anchor": 0.3, "chosen_reward": 0.05, "rejected_reward": -0.025}
    # -.1 / 2 times .482507 * .517493 on the good answer's tokens, .1 / 2 times .480011 * .519989 on the bad one's.
    _close(gradient[rows.action_mask], *[-0.0124847] * 4, *[0.0124800] * 5)
    weighed = KTO(desirable_loss_weight=2.0, undesirable_loss_weight=0.0)
    _close(evaluated(weighed, logp, judged)[0].total, 0.482507)
    good_only = with_anchor(weighed_judgements(rows, torch.tensor([True, True])), sums)  # the second: 1 - sigmoid(.1 (-.5 - .3)) = .519989
    _close(evaluated(KTO(), logp, good_only)[0].total, (0.482507 + 0.519989) / 2)


@pytest.mark.parametrize(
    ("algo", "margin", "expected"),
    [
        (RewardModel(), 0.0, 0.474077),  # log(1 + exp(-.5))
        (RewardModel(), 1.0, 0.974077),  # log(1 + exp(1 - .5))
        (RewardModel(centre_coef=0.01), 0.0, 0.474077 + 0.0225),  # .01 (1 + .5)^2
    ],
)
def test_reward_model_golden(algo, margin, expected):
    rows = packed(["#", "#.", "##", "."])  # the second pair has no rejected answer
    loss, gradient = evaluated(algo, _fp64(1.0, 0.5, NAN, INF), weighed_pairs(rows, margins=_fp64(margin, NAN)))
    _close(loss.total, expected)
    assert (gradient[2:] == 0).all()
    assert {name: round(float(figure), 6) for name, figure in loss.metrics.items() if name not in ("rm_loss", "centre")} == {
        "chosen_reward": 1.0,
        "rejected_reward": 0.5,
        "accuracy": 1.0,
    }


def test_process_reward_model_golden():
    rows = packed([".#.", ".#"])
    classifier = torch.full((5, 2), NAN, dtype=torch.float64)
    classifier[1] = classifier[4] = _fp64(1.2, -0.3)
    vocabulary = torch.full((5, 6), NAN, dtype=torch.float64)
    vocabulary[rows.action_mask] = _fp64(50.0, -0.3, 7.0, 0.0, 1.2, 99.0)  # of which tokens 4 and 1 stand for the labels
    for first, second, expected in (
        ([0.0, 1.0], [1.0, 0.0], (1.701413 + 0.201413) / 2),  # log(1 + exp(1.5)) and log(1 + exp(-1.5))
        ([0.75, 0.25], [0.75, 0.25], 0.576413),  # .25 * 1.701413 + .75 * .201413
    ):
        targets = torch.full((5, 2), NAN, dtype=torch.float64)
        targets[1], targets[4] = _fp64(*first), _fp64(*second)
        labelled = weighed_steps(rows, targets, reduction=ProcessRewardModel().reduction)
        _close(evaluated(ProcessRewardModel(), classifier, labelled)[0].total, expected)
        loss, gradient = evaluated(ProcessRewardModel(reward_tokens=(4, 1)), vocabulary, labelled)
        _close(loss.total, expected)
        assert (gradient[:, [0, 2, 3, 5]] == 0).all() and (gradient[~rows.action_mask] == 0).all()


@law
@given(st.integers(0, 2**31))
def test_hard_labels_are_shares_of_one(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = packed(["#.#", "##"])
    logits, columns = torch.randn(5, 3, generator=generator, dtype=torch.float64), torch.randint(0, 3, (5,), generator=generator)
    labelled = weighed_steps(rows, torch.nn.functional.one_hot(columns, 3).double(), reduction=BY_ROW)
    loss, gradient = evaluated(ProcessRewardModel(), logits, labelled)
    leaf = logits.clone().requires_grad_()
    hard = hard_process_loss(leaf, columns, labelled.weights, rows.action_mask)
    assert_close(loss.total, hard.total)
    assert_close(loss.metrics, hard.metrics)
    assert_close(gradient, torch.autograd.grad(hard.total, leaf)[0])


def _f5(*, temperature: float = 1.0, top: int | None = None, reduction: Reduction | None = None):
    """(rows, logits): F5 on one action token, whose own token is 0, after a prompt's that holds garbage."""
    rows = dataclasses.replace(packed([".#"]), tokens=torch.tensor([3, 0]))
    teacher = (_fp64(*TEACHER) / temperature).log_softmax(-1)
    kept = teacher if top is None else teacher.topk(top).values
    tokens = None if top is None else torch.stack([torch.full((top,), -7), teacher.topk(top).indices])
    logp = torch.stack([torch.full_like(kept, NAN), kept])
    labelled = weighed_taught(rows, logp, teacher_tokens=tokens, reduction=reduction or Reduction())
    return labelled, torch.stack([_fp64(NAN, INF, NAN, -INF), _fp64(*STUDENT)])


@pytest.mark.parametrize(
    ("algo", "expected", "gradient"),
    [
        (Distillation(kd_coef=1.0), 0.585605, [0.391396, -0.435924, -0.018447, 0.062975]),
        (Distillation(kd_coef=1.0, divergence="reverse"), 0.664600, [0.513164, -0.334332, -0.058846, -0.119985]),
        (Distillation(kd_coef=1.0, divergence="jsd"), 0.142684, [0.094035, -0.082535, -0.008662, -0.002837]),
        (Distillation(kd_coef=1.0, divergence="jsd", beta=0.1), 0.051758, None),
        (Distillation(kd_coef=1.0, divergence="jsd", beta=0.9), 0.056676, None),
        (Distillation(kd_coef=1.0, divergence="jsd", beta=0.0), 0.585605, None),
        (Distillation(kd_coef=1.0, divergence="jsd", beta=1.0), 0.664600, None),
        (Distillation(kd_coef=1.0, temperature=2.0), 0.153309, None),
        # logsumexp of the student is 1.746567, so token 0 costs .746567: .4 * .585605 + .6 * .746567.
        (Distillation(), 0.682182, None),
        # The likelihood stays at temperature 1: .4 * .153309 + .6 * .746567.
        (Distillation(temperature=2.0), 0.509264, None),
        (Distillation(kd_coef=0.0), 0.746567, [-0.526009, 0.174372, 0.064147, 0.287490]),  # softmax less the token itself
    ],
)
def test_distillation_golden_of_f5(algo, expected, gradient):
    rows, logits = _f5(temperature=algo.temperature)
    loss, actual = evaluated(algo, logits, rows)
    _close(loss.total, expected)
    assert (actual[0] == 0).all()
    if gradient is not None:
        _close(actual[1], *gradient)
    assert set(loss.metrics) == {"distillation_loss"} | ({"nll"} if algo.kd_coef < 1 else set())


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_a_top_of_the_teacher_is_a_lower_bound_that_tightens(divergence):
    algo = Distillation(kd_coef=1.0, divergence=divergence)
    whole = evaluated(algo, *reversed(_f5()))[0].total
    tops = [evaluated(algo, *reversed(_f5(top=top)))[0].total for top in (1, 2, 3)]
    assert 0 < tops[0] < tops[1] < tops[2]
    assert_close(tops[2], whole)  # the rest is one token: nothing is lumped


def test_a_top_of_the_teacher_golden():
    # Of the teacher's mass tokens 1 and 3 of F5 have .610296 and .224515, of the student's .174371 and .287490; the rest is the rest.
    teacher, student = [0.6102957, 0.2245152, 0.1651891], [0.1743715, 0.2874900, 0.5381385]
    expected = sum(p * math.log(p / q) for p, q in zip(teacher, student, strict=True))
    _close(evaluated(Distillation(kd_coef=1.0), *reversed(_f5(top=2)))[0].total, expected)


def test_sft_golden():
    rows = packed(["..#.##", "#"])
    logp = scatter(_fp64(-1.0, -0.2, -2.4, -5.0), rows.action_mask)
    # By token (1 + .2 + 2.4 + 5) / 4, by row (1.2 + 5) / 2.
    for reduction, expected in ((Reduction(), 2.15), (BY_ROW, 3.1), (Reduction(over="constant", length=4), 8.6 / 8)):
        loss, gradient = evaluated(SFT(reduction=reduction), logp, weighed_demonstrations(rows, reduction=reduction))
        _close(loss.total, expected)
        assert_close(loss.metrics, {"nll": loss.total.detach()})
        assert_close(gradient, -weighed_demonstrations(rows, reduction=reduction).weights.double())


def _sampled(rows: list[list[bool]], **fields: Tensor) -> Batch:
    scored = scored_batch(rows, Reduction(), seed=0)
    return dataclasses.replace(Batch(**{field.name: getattr(scored, field.name) for field in dataclasses.fields(Batch)}), **fields)


def test_on_policy_distillation_golden():
    mask = [[False, True, True, True]]
    logp, teacher = _fp64(NAN, -1.0, -0.2, -3.0), _fp64(NAN, -0.5, -0.4, -2.0)
    batch = _sampled(mask, old_logp=logp, rollout_logp=logp, ref_logp=teacher)
    algo = OnPolicyDistillation()
    judged = judge(algo, batch)
    _close(judged.advantages, 0.0, 0.5, -0.2, 1.0)
    assert_close(judge(algo, dataclasses.replace(batch, rewards=batch.rewards + 100)).advantages, judged.advantages)
    current = logp.clone().requires_grad_()
    loss = algo.loss(Outputs(logp=current), judged)
    _close(loss.total, -(0.5 - 0.2 + 1.0) / 3)
    loss.total.backward()
    _close(current.grad, 0.0, -0.5 / 3, 0.2 / 3, -1.0 / 3)


def test_on_policy_distillation_descends_the_reverse_divergence():
    # Every token of the student's vocabulary as a row of its own, weighing its probability.
    logits = _fp64(*STUDENT).requires_grad_()
    logp, teacher = logits.log_softmax(-1), _fp64(*TEACHER).log_softmax(-1)
    batch = _sampled([[True]] * 4, old_logp=logp.detach(), rollout_logp=logp.detach(), ref_logp=teacher)
    judged = dataclasses.replace(judge(OnPolicyDistillation(), batch), weights=logp.detach().exp())
    (gradient,) = torch.autograd.grad(OnPolicyDistillation().loss(Outputs(logp=logp), judged).total, logits)
    _close(gradient, 0.513164, -0.334332, -0.058846, -0.119985)


READS = {
    **{name: LogpLoss for name in ("sft", "dpo", "ipo", "simpo", "orpo", "kto")},
    "rm": ScoreLoss,
    **{name: LogitsLoss for name in ("prm", "kd")},
}


def test_every_algorithm_stands_under_its_name_and_reads_one_thing():
    assert set(OFFLINE) == set(READS)
    for name, algorithm in OFFLINE.items():
        algo = algorithm()
        assert algo.name == name
        assert isinstance(algo, Offline) and list(violations(algo)) == []
        assert [kind for kind in (LogpLoss, ScoreLoss, LogitsLoss) if isinstance(algo, kind)] == [READS[name]]
    assert not set(OFFLINE) & set(ALGORITHMS)


def test_what_every_algorithm_needs():
    needs = {name: set(algorithm().needs) for name, algorithm in OFFLINE.items() if algorithm().needs}
    assert needs == {"dpo": {"ref_logp"}, "ipo": {"ref_logp"}, "kto": {"ref_logp", "anchor"}}
    assert OnPolicyDistillation().needs == {"old_logp", "ref_logp"}


def test_the_papers_defaults():
    assert SFT() == SFT(reduction=Reduction())
    assert RewardModel() == RewardModel(centre_coef=0.0)
    assert ProcessRewardModel() == ProcessRewardModel(reward_tokens=(), reduction=Reduction())
    assert DPO() == DPO(beta=0.1, label_smoothing=0.0, nll_loss_coef=0.0)
    assert IPO() == IPO(beta=0.1)
    assert SimPO() == SimPO(beta=2.0, gamma_beta_ratio=0.5)
    assert ORPO() == ORPO(coef=0.1)
    assert KTO() == KTO(beta=0.1, desirable_loss_weight=1.0, undesirable_loss_weight=1.0)
    assert Distillation() == Distillation(divergence="forward", beta=0.5, temperature=1.0, kd_coef=0.4, reduction=Reduction())
    assert OnPolicyDistillation() == OnPolicyDistillation(clip=Clip(low=0.2, high=0.2), entropy_coef=0.0, reduction=Reduction())


@pytest.mark.parametrize(
    ("algo", "found"),
    [
        (
            DPO(beta=0.0, label_smoothing=0.6, nll_loss_coef=-1.0),
            {"beta": "(0, inf)", "label_smoothing": "[0, 0.5]", "nll_loss_coef": "[0, inf)"},
        ),
        (IPO(beta=NAN), {"beta": "(0, inf)"}),
        (SimPO(beta=0.0, gamma_beta_ratio=-0.1), {"beta": "(0, inf)", "gamma_beta_ratio": "[0, inf)"}),
        (ORPO(coef=-0.1), {"coef": "[0, inf)"}),
        (
            KTO(beta=-1.0, desirable_loss_weight=-1.0, undesirable_loss_weight=-1.0),
            {"beta": "(0, inf)", "desirable_loss_weight": "[0, inf)", "undesirable_loss_weight": "[0, inf)"},
        ),
        (RewardModel(centre_coef=-0.01), {"centre_coef": "[0, inf)"}),
        (Distillation(beta=1.1, temperature=0.0, kd_coef=1.5), {"beta": "[0, 1]", "temperature": "(0, inf)", "kd_coef": "[0, 1]"}),
        (OnPolicyDistillation(entropy_coef=-1.0, clip=Clip(low=2.0)), {"entropy_coef": "[0, inf)", "clip.low": "[0, 1]"}),
    ],
    ids=lambda case: getattr(case, "name", ""),
)
def test_values_out_of_range_are_found(algo, found):
    assert {name: str(limit) for name, _, limit in violations(algo)} == found


@pytest.mark.parametrize("algo", [DPO(), IPO(), KTO()])
def test_a_missing_reference_names_who_fills_it(algo):
    rows, logp = f4()
    plain = dataclasses.replace(rows, ref_logp=None)
    labelled = weighed_judgements(plain, torch.tensor([True, False])) if algo.name == "kto" else weighed_pairs(plain)
    with pytest.raises(
        ValueError, match="the batch has no ref_logp; the learner fills it when the algorithm's `needs` contains 'ref_logp'"
    ):
        algo.loss(Outputs(logp=logp), labelled)


def test_a_missing_anchor_names_what_fills_it():
    rows, logp = f4()
    with pytest.raises(ValueError, match="the batch has no anchor; `with_anchor` fills it"):
        KTO().loss(Outputs(logp=logp), weighed_judgements(rows, torch.tensor([True, False])))


@pytest.mark.parametrize("algo", [DPO(), IPO(), SimPO(), ORPO(), RewardModel()])
def test_half_a_pair_is_refused(algo):
    rows, logp = f4()
    one = select(rows, [0])
    half = Pairs(**{field.name: getattr(one, field.name) for field in dataclasses.fields(one)}, row_weights=_fp64(1.0), margins=_fp64(0.0))
    numbers = _fp64(1.0) if algo.name == "rm" else logp[:7]
    with pytest.raises(ValueError, match="has 1 rows; pairs need an even number: chosen, rejected"):
        loss_of(algo, numbers, half)


def test_reward_tokens_outside_the_vocabulary_and_a_whole_vocabulary_for_a_top_are_refused():
    rows = packed(["#"])
    labelled = weighed_steps(rows, torch.tensor([[0.5, 0.5]]), reduction=Reduction())
    for tokens in ((0, 5), (-1, 2)):
        with pytest.raises(ValueError, match="the vocabulary ends at 4: give the ids of its own tokens"):
            ProcessRewardModel(reward_tokens=tokens).logits_loss(torch.zeros(1, 5), labelled)
    everything = weighed_taught(rows, torch.zeros(1, 3), teacher_tokens=torch.tensor([[0, 1, 2]]), reduction=Reduction())
    with pytest.raises(ValueError, match="teacher_tokens has 3 of 3 tokens; use tempered_logp for a whole vocabulary"):
        Distillation().logits_loss(torch.zeros(1, 3), everything)
