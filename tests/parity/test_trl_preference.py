"""TRL's preference and reward losses (DPOTrainer, KTOTrainer, RewardTrainer, CPOTrainer, ORPOTrainer) beside ours; see docs/parity.md."""

import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hone.algos.kto import anchor_sums, kl_anchor, kto_loss
from hone.algos.pairs import pair_weights, row_logp, row_mean_logp
from hone.algos.preference import conservative_dpo, dpo, ipo, odds_ratio, orpo, robust_dpo, rpo, simpo
from hone.algos.reduce import Reduction, token_weights
from hone.algos.reward_models import bradley_terry, reward_centre
from hone.algos.supervised import nll
from tests.parity import fakes
from tests.parity.cases import Case, agree, case, losses_agree

TWO = torch.ones(2, dtype=torch.bool)
WEIGHTS = pair_weights(TWO)
REF = torch.tensor([-6.0, -5.0, -7.0, -2.5])
"""Reference sums of four rows: two chosen, two rejected."""


def model_outputs(given: Case, logp: Tensor) -> SimpleNamespace:
    """What a model with TRL's fused head answers: log-probabilities are zero off the labels."""
    log_probs = logp * given.mask
    return SimpleNamespace(
        log_probs=log_probs, entropy=torch.zeros_like(log_probs), mean_logits=torch.zeros_like(log_probs), is_top1=log_probs > 0
    )


def with_prompt(given: Case) -> tuple[Tensor, Tensor]:
    """(attention, completion) masks [B, L + 1]: one token of prompt stands before every row."""
    first = torch.ones(given.mask.shape[0], 1, dtype=torch.long)
    return torch.cat([first, given.valid.long()], 1), torch.cat([0 * first, given.mask.long()], 1)


def their_dpo(trl: SimpleNamespace, given: Case, loss_types: dict[str, float], **settings: float) -> Callable[[Tensor], Tensor]:
    own = {"beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False}
    trainer = SimpleNamespace(
        **(own | settings),
        loss_types=list(loss_types),
        loss_weights=list(loss_types.values()),
        model=fakes.TRAINING,
        accelerator=fakes.accelerator(),
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    attention, completion = with_prompt(given)
    inputs = {
        "input_ids": torch.zeros_like(attention),
        "attention_mask": attention,
        "completion_mask": completion,
        "ref_chosen_logps": REF[:2],
        "ref_rejected_logps": REF[2:],
    }
    return lambda logp: trl.dpo.DPOTrainer._compute_loss(trainer, lambda **_: model_outputs(given, logp), inputs, False)


def sums(given: Case, logp: Tensor) -> tuple[Tensor, Tensor]:
    """Log-ratios of the chosen rows and of the rejected ones."""
    return (row_logp(given.packed(logp), given.action_mask, given.cu_seqlens) - REF).split(2)


def means(given: Case, logp: Tensor) -> Tensor:
    return row_mean_logp(given.packed(logp), given.action_mask, given.cu_seqlens)


def mean_ratios(given: Case, logp: Tensor) -> tuple[Tensor, Tensor]:
    return (means(given, logp) - REF / given.mask.sum(1)).split(2)


@pytest.mark.parametrize(
    ("loss_types", "settings", "ours"),
    [
        ({"sigmoid": 1.0}, {}, lambda given, logp: dpo(*sums(given, logp), WEIGHTS, TWO, beta=0.1)),
        ({"sigmoid": 1.0}, {"label_smoothing": 0.1}, lambda given, logp: dpo(*sums(given, logp), WEIGHTS, TWO, beta=0.1)),
        ({"robust": 1.0}, {"label_smoothing": 0.1}, lambda given, logp: robust_dpo(*sums(given, logp), WEIGHTS, TWO, beta=0.1, flip=0.1)),
        ({"ipo": 1.0}, {"beta": 0.5}, lambda given, logp: ipo(*mean_ratios(given, logp), WEIGHTS, TWO, beta=0.5)),
        ({"sigmoid_norm": 1.0}, {}, lambda given, logp: dpo(*mean_ratios(given, logp), WEIGHTS, TWO, beta=0.1)),
    ],
    ids=["sigmoid", "sigmoid ignores label_smoothing", "robust", "ipo", "sigmoid_norm"],
)
def test_trl_dpo(trl: SimpleNamespace, loss_types: dict[str, float], settings: dict[str, float], ours: Callable[..., object]) -> None:
    given = case()
    losses_agree(their_dpo(trl, given, loss_types, **settings), lambda logp: ours(given, logp).total, given.logp)


def test_trl_dpo_with_nll(trl: SimpleNamespace) -> None:
    given = case()
    theirs = their_dpo(trl, given, {"sigmoid": 1.0, "sft": 0.2})
    chosen = given.packed(given.mask & (torch.arange(4) < 2)[:, None])
    weights = token_weights(chosen, given.cu_seqlens, Reduction())

    def ours(logp: Tensor) -> Tensor:
        return dpo(*sums(given, logp), WEIGHTS, TWO, beta=0.1).total + 0.2 * nll(given.packed(logp), weights, chosen).total

    losses_agree(theirs, ours, given.logp)
    # Rows of 5 and 3 tokens: the papers' mean over each row is another number.
    by_row = rpo(*sums(given, given.logp), means(given, given.logp)[:2], WEIGHTS, TWO, beta=0.1, nll_coef=0.2).total
    assert abs(float(theirs(given.logp) - by_row)) > 1e-3


def their_kto(
    trl: SimpleNamespace,
    patch: pytest.MonkeyPatch,
    given: Case,
    good: Tensor,
    mismatched: Tensor,
    gathered: Callable[[Tensor], Tensor] = fakes.same,
) -> Callable[[Tensor], Tensor]:
    patch.setattr(trl.kto, "disable_gradient_checkpointing", lambda *_: nullcontext())
    reduced = fakes.accelerator()
    reduced.gather_for_metrics = gathered
    trainer = SimpleNamespace(
        beta=0.1,
        loss_type="kto",
        desirable_weight=1.0,
        undesirable_weight=1.25,
        calculate_KL=True,
        model=fakes.TRAINING,
        accelerator=reduced,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        _compute_kl_logps=lambda *_: mismatched,
    )
    attention, completion = with_prompt(given)
    inputs = {
        "input_ids": torch.zeros_like(attention),
        "attention_mask": attention,
        "completion_mask": completion,
        "label": good,
        "ref_logps": REF,
        "ref_KL_logps": torch.zeros_like(mismatched),
    }
    return lambda logp: trl.kto.KTOTrainer._compute_loss(trainer, lambda **_: model_outputs(given, logp), inputs, False)


def our_kto(given: Case, logp: Tensor, good: Tensor, anchor: Tensor) -> Tensor:
    ratios, rows = row_logp(given.packed(logp), given.action_mask, given.cu_seqlens) - REF, torch.ones(4, dtype=torch.bool)
    return kto_loss(ratios, good, torch.full((4,), 0.25), rows, anchor, beta=0.1, desirable_weight=1.0, undesirable_weight=1.25).total


@pytest.mark.parametrize("good", [[True, False, True, False], [True] * 4, [False] * 4], ids=["both", "good", "bad"])
@pytest.mark.parametrize("mismatched", [[0.4, -0.2, 0.7], [-0.4, 0.2, -0.7]], ids=["above", "below"])
def test_trl_kto(trl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, good: list[bool], mismatched: list[float]) -> None:
    given, labels, ratios = case(), torch.tensor(good), torch.tensor(mismatched)
    anchor = kl_anchor(anchor_sums(ratios, torch.ones(3, dtype=torch.bool)))
    losses_agree(their_kto(trl, monkeypatch, given, labels, ratios), lambda logp: our_kto(given, logp, labels, anchor), given.logp)


def test_trl_kto_anchor_is_a_mean_of_means(trl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    # A rank with three mismatched rows of mean 0.3 and another with one of 0.9: they say 0.6, the mean over all rows is 0.45.
    given, labels, here = case(), torch.tensor([True, False, True, False]), torch.tensor([0.4, -0.2, 0.7])

    def other_rank(value: Tensor) -> Tensor:
        return torch.stack([value, torch.tensor(0.9)]) if value.dtype == torch.float32 and value.dim() == 0 else value

    theirs = their_kto(trl, monkeypatch, given, labels, here, gathered=other_rank)(given.logp)
    agree(theirs, our_kto(given, given.logp, labels, torch.tensor(0.6)))
    sums_of_ranks = anchor_sums(here, torch.ones(3, dtype=torch.bool)) + anchor_sums(torch.tensor([0.9]), torch.tensor([True]))
    assert_close(kl_anchor(sums_of_ranks), torch.tensor(0.45, dtype=torch.float64), atol=1e-6, rtol=0)


def test_trl_kto_of_one_row(trl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    # One mismatched row is no estimate: they take it for the anchor, ours refuses.
    given, labels = case(), torch.tensor([True, False, True, False])
    theirs = their_kto(trl, monkeypatch, given, labels, torch.tensor([0.9]))(given.logp)
    agree(theirs, our_kto(given, given.logp, labels, torch.tensor(0.9)))
    with pytest.raises(ValueError, match="at least 2"):
        kl_anchor(anchor_sums(torch.tensor([0.9]), torch.tensor([True])))


def test_trl_reward_loss(trl: SimpleNamespace) -> None:
    rejected, margin = torch.tensor([0.5, 1.5]), torch.tensor([1.0, 0.0])
    trainer = SimpleNamespace(
        model=fakes.TRAINING,
        accelerator=fakes.accelerator(),
        args=SimpleNamespace(center_rewards_coefficient=0.01),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )

    def theirs(chosen: Tensor) -> Tensor:
        outputs = SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])
        inputs = {"margin": margin, "attention_mask": torch.ones(4, 1, dtype=torch.long)}
        return trl.reward.RewardTrainer.compute_loss(trainer, lambda **_: outputs, inputs)

    def ours(chosen: Tensor) -> Tensor:
        centred = reward_centre(chosen, rejected, WEIGHTS, TWO, coef=0.01)
        return (bradley_terry(chosen, rejected, margin, WEIGHTS, TWO) + centred).total

    losses_agree(theirs, ours, torch.tensor([1.0, 0.25]))


def their_cpo(trl: SimpleNamespace, loss_type: str, rejected: Tensor, **settings: float) -> Callable[[Tensor], Tensor]:
    own = {"alpha": 0.0, "beta": 0.1, "label_smoothing": 0.0, "simpo_gamma": 0.5}
    trainer = SimpleNamespace(**(own | settings), loss_type=loss_type, accelerator=fakes.accelerator())
    return lambda chosen: trl.cpo.CPOTrainer.cpo_loss(trainer, chosen, rejected)[0].mean()


def test_trl_cpo(trl: SimpleNamespace) -> None:
    chosen, rejected = torch.tensor([-10.0, -6.5]), torch.tensor([-12.0, -6.0])
    theirs = their_cpo(trl, "sigmoid", rejected, label_smoothing=0.1)
    losses_agree(theirs, lambda at: conservative_dpo(at, rejected, WEIGHTS, TWO, beta=0.1, flip=0.1).total, chosen)


def test_trl_simpo(trl: SimpleNamespace) -> None:
    # Their gamma is the paper's; ours is the authors' code's gamma / beta.
    chosen, rejected = torch.tensor([-2.5, -1.0]), torch.tensor([-2.4, -1.5])
    theirs = their_cpo(trl, "simpo", rejected, beta=2.0, simpo_gamma=1.0)
    losses_agree(theirs, lambda at: simpo(at, rejected, WEIGHTS, TWO, beta=2.0, gamma_beta_ratio=0.5).total, chosen)


def test_trl_simpo_defaults_are_of_another_scale(trl: SimpleNamespace) -> None:
    # Means -2.5 and -2.4. beta 0.1 and gamma 0.5 ask for a margin of 5 nats per token; beta 2 and ratio 0.25 for a quarter of one.
    one, weight = torch.tensor([True]), torch.ones(1)
    theirs = their_cpo(trl, "simpo", torch.tensor([-2.4]))(torch.tensor([-2.5]))
    assert_close(theirs, torch.tensor(0.980313), atol=1e-6, rtol=0)
    ours = simpo(torch.tensor([-2.5]), torch.tensor([-2.4]), weight, one, beta=2.0, gamma_beta_ratio=0.25).total
    assert_close(ours, torch.tensor(1.103186), atol=1e-6, rtol=0)


def their_orpo(trl: SimpleNamespace, rejected: Tensor, beta: float = 0.1) -> Callable[[Tensor], Tensor]:
    trainer = SimpleNamespace(beta=beta, accelerator=fakes.accelerator())
    return lambda chosen: -trl.orpo.ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0].mean()


def test_trl_odds_ratio(trl: SimpleNamespace) -> None:
    chosen, rejected = torch.tensor([-2.5, -0.2]), torch.tensor([-2.4, -0.9])
    losses_agree(their_orpo(trl, rejected), lambda at: odds_ratio(at, rejected, WEIGHTS, TWO, coef=0.1).total, chosen)


def test_trl_odds_ratio_of_a_certain_answer(trl: SimpleNamespace) -> None:
    # A mean log-probability of zero has infinite odds: theirs sends NaN back, ours counts it as one minus eps.
    rejected, certain, one = torch.tensor([-1.0]), torch.zeros(1, requires_grad=True), torch.tensor([True])
    (gradient,) = torch.autograd.grad(their_orpo(trl, rejected)(certain), certain)
    assert not torch.isfinite(gradient).all()
    (gradient,) = torch.autograd.grad(odds_ratio(certain, rejected, torch.ones(1), one, coef=0.1).total, certain)
    assert torch.isfinite(gradient).all()


def test_trl_orpo_learns_the_prompt(trl: SimpleNamespace) -> None:
    # Prompt of three tokens, answer of two, uniform over four: each token costs log 4, so lengths do not show; a sure prompt does.
    logits = torch.zeros(2, 5, 4)
    logits[:, :2, 0] = 30.0  # the prompt's second and third token are certain
    ids, labels = torch.zeros(2, 5, dtype=torch.long), torch.tensor([[-100, -100, -100, 0, 0]] * 2)
    batch = {"concatenated_input_ids": ids, "concatenated_attention_mask": torch.ones_like(ids), "concatenated_labels": labels}
    trainer = SimpleNamespace(
        is_encoder_decoder=False,
        padding_value=0,
        accelerator=fakes.accelerator(),
        aux_loss_enabled=False,
        concatenated_inputs=lambda *_, **__: batch,
        get_batch_logps=trl.orpo.ORPOTrainer.get_batch_logps,
    )
    chosen, _, _, _, held = trl.orpo.ORPOTrainer.concatenated_forward(
        trainer, lambda *_, **__: SimpleNamespace(logits=logits), {"chosen_labels": labels[:1]}
    )
    assert_close(chosen, torch.tensor([-math.log(4.0)]))
    assert_close(held, torch.tensor(math.log(4.0) / 2))
    one = torch.tensor([True])
    assert_close(orpo(chosen, chosen, torch.ones(1), one, coef=0.1).metrics["nll"], torch.tensor(math.log(4.0)))
