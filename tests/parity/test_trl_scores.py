"""TRL's group advantages and engine corrections (`_generate_and_score_completions`) and its rewards beside ours; see docs/parity.md."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hone.algos.advantages import group_centred, group_normalised, row_sums, spread, whiten
from hone.algos.corrections import correction_weights, off_policy_sequence_mask
from hone.algos.group_baselines import leave_one_out
from hone.algos.kl import kl_per_token
from hone.algos.policy_losses import clipped_surrogate
from hone.algos.shaping import clip_scores, overlong_penalty
from hone.algos.soft_losses import scaled_advantages
from tests.parity import fakes
from tests.parity.cases import Case, agree, case, losses_agree

SCORES = torch.tensor([1.0, 0.25, -0.5, 2.0])
GROUP = torch.tensor([0, 0, 1, 1])
ALL = torch.ones(4, dtype=torch.bool)
MODES = {
    "token_truncate": {"level": "token", "mode": "truncate", "high": 1.3},
    "token_mask": {"level": "token", "mode": "mask", "low": 0.7, "high": 1.3},
    "sequence_truncate": {"level": "sequence", "mode": "truncate", "high": 1.3},
    "sequence_mask": {"level": "sequence", "mode": "mask", "low": 0.7, "high": 1.3},
}


def advantages(
    module: SimpleNamespace, trainer: type, patch: pytest.MonkeyPatch, scores: Tensor, *, generations: int = 2, **settings: object
) -> Tensor:
    rewards = scores if scores.dim() == 2 else scores[:, None]
    given = wide(rewards.shape[0])
    return fakes.score(module, trainer, patch, given, rewards, generations=generations, **settings)["advantages"]


def wide(rows: int) -> Case:
    given = case()
    return replace(given, **{name: getattr(given, name).repeat(2, 1)[:rows] for name in vars(given) if name != "cu_seqlens"})


def test_trl_group_advantages(trl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = advantages(trl.grpo, trl.grpo.GRPOTrainer, monkeypatch, SCORES)
    agree(theirs, group_normalised(SCORES, GROUP, eps=1e-4))
    agree(advantages(trl.grpo, trl.grpo.GRPOTrainer, monkeypatch, SCORES, scale_rewards="none"), group_centred(SCORES, GROUP))


def test_trl_several_rewards_are_summed(trl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = torch.stack([SCORES, SCORES.flip(0)], 1)
    theirs = advantages(trl.grpo, trl.grpo.GRPOTrainer, monkeypatch, parts, reward_weights=torch.tensor([1.0, 0.5]))
    agree(theirs, group_normalised(SCORES + 0.5 * SCORES.flip(0), GROUP, eps=1e-4))


def test_trl_equal_rewards_leave_rounding(trl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    # Seven rewards of 0.1: the mean is off by some 7e-9 and eps makes less than 1e-4 of it; ours is exactly zero.
    scores = torch.full((7,), 0.1)
    theirs = advantages(trl.grpo, trl.grpo.GRPOTrainer, monkeypatch, scores, generations=7)
    assert 0 < float(theirs.abs().max()) < 1e-4
    for same in (scores, torch.full((7,), 0.1, dtype=torch.float64)):
        assert group_normalised(same, torch.zeros(7, dtype=torch.long), eps=1e-4).tolist() == [0.0] * 7


def test_trl_groups_by_position(trl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        advantages(trl.rloo, trl.rloo.RLOOTrainer, monkeypatch, SCORES[:3])
    ours = leave_one_out(SCORES[:3], torch.tensor([0, 1, 0]), ALL[:3])
    assert_close(ours, torch.tensor([1.5, 0.0, -1.5]))


def test_trl_group_of_one(trl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = torch.arange(4)
    agree(advantages(trl.grpo, trl.grpo.GRPOTrainer, monkeypatch, SCORES, generations=1), group_normalised(SCORES, alone, eps=1e-4))
    agree(advantages(trl.rloo, trl.rloo.RLOOTrainer, monkeypatch, SCORES, generations=1), leave_one_out(SCORES, alone, ALL))


def test_trl_rloo_advantages(trl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    agree(advantages(trl.rloo, trl.rloo.RLOOTrainer, monkeypatch, SCORES), leave_one_out(SCORES, GROUP, ALL))


def test_trl_rloo_with_kl(trl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    given = case(gap=False)
    theirs = fakes.score(trl.rloo, trl.rloo.RLOOTrainer, monkeypatch, given, SCORES[:, None], generations=2, beta=0.1)["advantages"]
    penalty = kl_per_token(given.packed(given.old_logp), given.packed(given.ref_logp), given.action_mask, estimator="k1")
    agree(theirs, leave_one_out(SCORES - 0.1 * row_sums(penalty, given.action_mask, given.cu_seqlens), GROUP, ALL))


def test_trl_rloo_clips_what_was_given(trl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = advantages(trl.rloo, trl.rloo.RLOOTrainer, monkeypatch, SCORES, reward_clip_range=(-0.25, 1.0))
    agree(theirs, leave_one_out(clip_scores(SCORES, low=-0.25, high=1.0), GROUP, ALL))


def test_trl_rloo_normalises_over_samples(trl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    # Advantages 0.75, -0.75, -2.5, 2.5: Bessel's deviation of four samples is sqrt(13.625 / 3). On 5, 3, 5 and 1 tokens, which all
    # weigh the same, the mean is -8.5 / 14 and the population's variance 3 - (8.5 / 14)^2.
    theirs = advantages(trl.rloo, trl.rloo.RLOOTrainer, monkeypatch, SCORES, normalize_advantages=True)
    assert_close(theirs, torch.tensor([0.75, -0.75, -2.5, 2.5]) / ((13.625 / 3) ** 0.5 + 1e-4))
    given = case()
    per_token = spread(leave_one_out(SCORES, GROUP, ALL), given.action_mask, given.cu_seqlens)
    first = whiten(per_token, given.action_mask)[0]
    assert_close(first, torch.tensor((0.75 + 8.5 / 14) / (3 - (8.5 / 14) ** 2) ** 0.5))


def test_trl_leaves_out_what_has_no_score(trl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    # A row no reward function could score has no say and no advantage: for ours it is a row that is not live.
    scores, group = torch.tensor([1.0, 0.25, float("nan"), 2.0]), torch.zeros(4, dtype=torch.long)
    theirs = advantages(trl.rloo, trl.rloo.RLOOTrainer, monkeypatch, scores, generations=4)
    agree(theirs, leave_one_out(scores, group, ~scores.isnan()))
    assert_close(theirs, torch.tensor([-0.125, -1.25, 0.0, 1.375]))


@pytest.mark.parametrize("mode", MODES)
def test_trl_engine_corrections(trl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    given, bounds = case(), MODES[mode]
    made = fakes.score(
        trl.grpo,
        trl.grpo.GRPOTrainer,
        monkeypatch,
        given,
        SCORES[:, None],
        generations=2,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=bounds.get("low"),
        vllm_importance_sampling_clip_max=bounds["high"],
    )
    correction = correction_weights(
        given.packed(given.old_logp), given.packed(given.rollout_logp), given.action_mask, given.cu_seqlens, **bounds
    )
    theirs = made["importance_sampling_ratio"].expand(given.mask.shape)
    assert 0 < int(((correction == 0) | (correction == 1.3)).sum()) < int(given.mask.sum())
    agree(given.packed(theirs)[given.action_mask], correction[given.action_mask])

    trainer = fakes.grpo(use_vllm=True, vllm_importance_sampling_correction=True)
    scaled = scaled_advantages(given.packed(given.advantages), correction, given.action_mask)
    losses_agree(
        fakes.grpo_loss(trl.grpo.GRPOTrainer, trainer, given, importance_sampling_ratio=made["importance_sampling_ratio"]),
        lambda logp: (
            clipped_surrogate(
                given.packed(logp), given.packed(given.old_logp), scaled, given.weights(), given.action_mask, clip_low=0.2, clip_high=0.28
            ).total
        ),
        given.logp,
    )


def test_trl_truncation_with_a_floor_is_clip(trl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    given = case()
    made = fakes.score(
        trl.grpo,
        trl.grpo.GRPOTrainer,
        monkeypatch,
        given,
        SCORES[:, None],
        generations=2,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_min=0.7,
        vllm_importance_sampling_clip_max=1.3,
    )
    packed = given.packed(given.old_logp), given.packed(given.rollout_logp), given.action_mask, given.cu_seqlens
    ours = correction_weights(*packed, level="token", mode="clip", low=0.7, high=1.3)
    agree(given.packed(made["importance_sampling_ratio"])[given.action_mask], ours[given.action_mask])
    with pytest.raises(ValueError, match="no lower bound"):
        correction_weights(*packed, level="token", mode="truncate", low=0.7, high=1.3)


def test_trl_off_policy_mask(trl: SimpleNamespace) -> None:
    given = case()
    rows = torch.tensor([1.0, -1.0, -1.0, 0.0])
    arguments = given.logp, given.rollout_logp, given.mask.float()
    packed = given.packed(given.logp), given.packed(given.rollout_logp)
    behind = ((given.rollout_logp - given.logp) * given.mask).sum(1) / given.mask.sum(1)
    for threshold in (behind[:, None] + torch.tensor([-1e-4, 1e-4])).flatten().tolist():
        theirs = trl.grpo.GRPOTrainer.get_off_policy_mask(rows[:, None], *arguments, threshold) * given.mask
        fixed = given.packed(given.per_row(rows.tolist())), given.action_mask, given.cu_seqlens
        agree(given.packed(theirs), off_policy_sequence_mask(*packed, *fixed, threshold=threshold))


def test_trl_overlong_punishment(trl: SimpleNamespace) -> None:
    lengths = [10, 80, 81, 90, 100, 140]
    theirs = torch.tensor(trl.rewards.get_soft_overlong_punishment(100, 20)([[0] * length for length in lengths]))
    agree(theirs, overlong_penalty(torch.tensor(lengths), max_length=100, buffer=20).float())


def test_trl_overlong_without_a_cache(trl: SimpleNamespace) -> None:
    # A cache of nothing: a cliff of -1 right above the longest; ours refuses it.
    assert trl.rewards.get_soft_overlong_punishment(100, 0)([[0] * 100, [0] * 101]) == [0.0, -1.0]
    with pytest.raises(ValueError, match="buffer"):
        overlong_penalty(torch.tensor([101]), max_length=100, buffer=0)
