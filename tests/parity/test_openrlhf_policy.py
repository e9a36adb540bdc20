"""OpenRLHF's PolicyLoss (openrlhf/models/loss.py) beside ours; the page that sums it up is docs/parity.md."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hone.algos.corrections import correction_weights, sequence_mask_tis
from hone.algos.mismatch import mismatch_figures
from hone.algos.policy_losses import clipped_surrogate
from hone.algos.ratios import importance_ratio
from hone.algos.reduce import Reduction, token_weights, weighted_sum
from hone.algos.sequence_losses import gspo_loss
from hone.algos.soft_losses import scaled_advantages
from hone.algos.trust_region import binary_kl, binary_tv
from tests.parity.cases import Case, agree, case, losses_agree, single, value_and_gradient

CLIPS = {"clip_low": 0.2, "clip_high": 0.28}


def their_loss(peer: SimpleNamespace, given: Case, logp: Tensor, **settings: object) -> tuple[Tensor, ...]:
    policy = peer.loss.PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.28, **settings)
    return policy(logp, given.old_logp, given.advantages, given.mask.long(), given.rollout_logp)


def our_loss(given: Case, logp: Tensor, correction: Tensor | None = None, **settings: float) -> Tensor:
    advantages = given.packed(given.advantages)
    if correction is not None:
        advantages = scaled_advantages(advantages, correction, given.action_mask)
    return clipped_surrogate(
        given.packed(logp), given.packed(given.old_logp), advantages, given.weights(), given.action_mask, **CLIPS, **settings
    ).total


def packed_logps(given: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return given.packed(given.old_logp), given.packed(given.rollout_logp), given.action_mask, given.cu_seqlens


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_openrlhf_clipped_surrogate(openrlhf: SimpleNamespace, dual_clip: float | None) -> None:
    given = case()
    losses_agree(
        lambda logp: their_loss(openrlhf, given, logp, dual_clip=dual_clip)[0],
        lambda logp: our_loss(given, logp, dual_clip=dual_clip),
        given.logp,
    )


def test_openrlhf_clip_and_kl_figures(openrlhf: SimpleNamespace) -> None:
    given = case()
    _, clip_ratio, ppo_kl, _, _ = their_loss(openrlhf, given, given.logp)
    mine = clipped_surrogate(
        given.packed(given.logp), given.packed(given.old_logp), given.packed(given.advantages), given.weights(), given.action_mask, **CLIPS
    )
    assert clip_ratio > 0
    agree(clip_ratio, mine.metrics["ppo_clip_ratio"])
    agree(ppo_kl, mine.metrics["ppo_kl"])


def test_openrlhf_counts_no_dual_clip(openrlhf: SimpleNamespace) -> None:
    # rho = 5, A = -2, c = 3: both say 3 * 2 with no gradient; we count the token as clipped, they do not.
    logp, old, advantage = single(math.log(5.0), 0.0, -2.0)
    policy = openrlhf.loss.PolicyLoss(dual_clip=3.0)
    theirs, their_share, *_ = policy(logp, old, advantage, torch.ones(1, 1))
    mine = clipped_surrogate(logp[0], old[0], advantage[0], torch.ones(1), torch.tensor([True]), clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    assert_close(theirs, torch.tensor(6.0))
    assert_close(mine.total, torch.tensor(6.0))
    assert (float(their_share), float(mine.metrics["ppo_clip_ratio"])) == (0.0, 1.0)


def test_openrlhf_clamps_log_ratios(openrlhf: SimpleNamespace) -> None:
    # A bad token 25 nats above the old policy: they cap the ratio at e^20 and send nothing back; ours costs e^25 and does.
    _, old, advantage = single(0.0, -25.0, -1.0)
    policy = openrlhf.loss.PolicyLoss()
    mask = torch.tensor([True])
    theirs = value_and_gradient(lambda logp: policy(logp, old, advantage, torch.ones(1, 1))[0], torch.zeros(1, 1))
    ours = value_and_gradient(
        lambda logp: clipped_surrogate(logp[0], old[0], advantage[0], torch.ones(1), mask, clip_low=0.2, clip_high=0.2).total,
        torch.zeros(1, 1),
    )
    assert_close(theirs, (torch.tensor(math.exp(20)), torch.zeros(1, 1)))
    assert_close(ours, (torch.tensor(math.exp(25)), torch.full((1, 1), math.exp(25))))
    # A good token however far up: 1.2 and no gradient with both.
    old, good = single(-100.0, 1.0)
    for loss in (
        lambda logp: policy(logp, old, good, torch.ones(1, 1))[0],
        lambda logp: clipped_surrogate(logp[0], old[0], good[0], torch.ones(1), mask, clip_low=0.2, clip_high=0.2).total,
    ):
        assert_close(value_and_gradient(loss, torch.zeros(1, 1)), (torch.tensor(-1.2), torch.zeros(1, 1)))


def test_openrlhf_gspo(openrlhf: SimpleNamespace) -> None:
    given = case()
    losses_agree(
        lambda logp: their_loss(openrlhf, given, logp, policy_loss_type="gspo")[0],
        lambda logp: (
            gspo_loss(
                given.packed(logp),
                given.packed(given.old_logp),
                given.packed(given.advantages),
                given.weights("sequence"),
                given.action_mask,
                given.cu_seqlens,
                **CLIPS,
            ).total
        ),
        given.logp,
    )


def test_openrlhf_gspo_changes_its_anchor_under_a_correction(openrlhf: SimpleNamespace) -> None:
    given = case()
    settings = {"policy_loss_type": "gspo", "is_correction_level": "token", "is_correction_mode": "clip"}
    theirs = their_loss(openrlhf, given, given.logp, **settings)[0]

    def ours(anchor: Tensor) -> Tensor:
        return gspo_loss(
            given.packed(given.logp),
            given.packed(anchor),
            given.packed(given.advantages),
            given.weights("sequence"),
            given.action_mask,
            given.cu_seqlens,
            **CLIPS,
        ).total

    # No weight at all: the sampler's log-probabilities take the place of the old ones.
    agree(theirs, ours(given.rollout_logp))
    assert abs(float(theirs - ours(given.old_logp))) > 0.01


def test_openrlhf_token_clip_correction(openrlhf: SimpleNamespace) -> None:
    given = case()
    correction = correction_weights(*packed_logps(given), level="token", mode="clip", low=0.7, high=1.5)
    assert {0.7, 1.5} <= {round(float(weight), 6) for weight in correction[given.action_mask]}
    settings = {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.7, 1.5), "dual_clip": 1.5}
    losses_agree(
        lambda logp: their_loss(openrlhf, given, logp, **settings)[0],
        lambda logp: our_loss(given, logp, correction, dual_clip=1.5),
        given.logp,
    )


def test_openrlhf_clip_raises_small_weights(openrlhf: SimpleNamespace) -> None:
    # w = exp(-2): what OpenRLHF calls TIS lifts it to 0.5; truncation, as the paper has it, leaves it.
    logp, old, rollout, advantage = single(0.0, 0.0, 2.0, 1.0)
    policy = openrlhf.loss.PolicyLoss(is_correction_level="token", is_correction_mode="clip", is_correction_threshold=(0.5, 5.0))
    theirs = policy(logp, old, advantage, torch.ones(1, 1), rollout)[0]
    arguments = (old[0], rollout[0], torch.tensor([True]), torch.tensor([0, 1]))
    assert_close(theirs, torch.tensor(-0.5))
    assert_close(correction_weights(*arguments, level="token", mode="clip", low=0.5, high=5.0), torch.tensor([0.5]))
    assert_close(correction_weights(*arguments, level="token", mode="truncate", high=5.0), torch.tensor([math.exp(-2)]))


def test_openrlhf_token_mask_correction(openrlhf: SimpleNamespace) -> None:
    given = case()
    correction = correction_weights(*packed_logps(given), level="token", mode="mask", low=0.7, high=1.5)
    rejected = given.action_mask & (correction == 0)
    settings = {"is_correction_level": "token", "is_correction_mode": "mask", "is_correction_threshold": (0.7, 1.5)}
    losses_agree(lambda logp: their_loss(openrlhf, given, logp, **settings)[0], lambda logp: our_loss(given, logp, correction), given.logp)
    share = their_loss(openrlhf, given, given.logp, **settings)[4]
    assert share > 0
    agree(share, weighted_sum(rejected.float(), given.weights(), given.action_mask))


def test_openrlhf_sequence_mask_correction(openrlhf: SimpleNamespace) -> None:
    given = case()
    correction = sequence_mask_tis(*packed_logps(given), low=0.9, high=1.2, cap=math.inf)
    kept = {bool(part.any()) for part in correction.split(given.cu_seqlens.diff().tolist())}
    assert kept == {True, False}
    settings = {"is_correction_level": "seq", "is_correction_mode": "mask", "is_correction_threshold": (0.9, 1.2)}
    losses_agree(lambda logp: their_loss(openrlhf, given, logp, **settings)[0], lambda logp: our_loss(given, logp, correction), given.logp)


def test_openrlhf_sequence_mask_leaves_weights_unbounded(openrlhf: SimpleNamespace) -> None:
    # Two tokens with u = 8 and -8: the mean is 0 and the row is kept. They weigh the first with e^8; ours stops at the cap.
    old, rollout = torch.tensor([[0.0, 0.0]]), torch.tensor([[-8.0, 8.0]])
    policy = openrlhf.loss.PolicyLoss(is_correction_level="seq", is_correction_mode="mask", is_correction_threshold=(0.5, 5.0))
    theirs = policy(old, old, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2), rollout)[0]
    assert_close(theirs, torch.tensor(-math.exp(8) / 2))
    ours = sequence_mask_tis(old[0], rollout[0], torch.ones(2, dtype=torch.bool), torch.tensor([0, 2]), low=0.5, high=5.0, cap=5.0)
    assert_close(ours, torch.tensor([5.0, math.exp(-8)]))


@pytest.mark.parametrize(("gating", "divergence", "delta"), [("binary_kl", binary_kl, 0.02), ("tv", binary_tv, 0.1)])
def test_openrlhf_divergence_gates(openrlhf: SimpleNamespace, gating: str, divergence: Callable[..., Tensor], delta: float) -> None:
    # Probabilities below 1 - 1e-6, where they start to clamp theirs.
    given = case()
    given = replace(given, old_logp=given.old_logp.clamp(max=-1e-3), rollout_logp=given.rollout_logp.clamp(max=-1e-3))
    old, rollout, mask, _ = packed_logps(given)
    kept = divergence(old, rollout, mask) <= delta
    assert 0 < int((kept & mask).sum()) < int(mask.sum())
    correction = torch.where(kept, importance_ratio(old, rollout, mask), 0.0)
    settings = {"is_correction_level": "token", "is_correction_gating": gating, "is_correction_threshold": (0.0, delta)}
    losses_agree(lambda logp: their_loss(openrlhf, given, logp, **settings)[0], lambda logp: our_loss(given, logp, correction), given.logp)


def test_openrlhf_mismatch_figure(openrlhf: SimpleNamespace) -> None:
    given = case()
    vllm_kl = their_loss(openrlhf, given, given.logp, is_correction_level="token")[3]
    old, rollout, mask, cu_seqlens = packed_logps(given)
    agree(vllm_kl, mismatch_figures(old, rollout, given.weights(), mask, cu_seqlens)["mismatch_k1"])


@pytest.mark.parametrize("over", ["token", "sequence"])
def test_openrlhf_aggregate_loss(openrlhf: SimpleNamespace, over: str) -> None:
    given = case()
    totals = {"batch_num_tokens": int(given.mask.sum()), "global_batch_size": 4}
    parts = [
        openrlhf.loss.aggregate_loss(given.logp[rows], given.mask[rows].float(), token_level_loss=over == "token", dp_size=1, **totals)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    agree(parts[0] + parts[1], weighted_sum(given.packed(given.logp), given.weights(over), given.action_mask))


def test_openrlhf_mean_of_nothing_is_nan(openrlhf: SimpleNamespace) -> None:
    numbers, nothing = torch.ones(1, 2), torch.zeros(1, 2)
    assert torch.isnan(openrlhf.utils.masked_mean(numbers, nothing))
    mask = torch.zeros(2, dtype=torch.bool)
    weights = token_weights(mask, torch.tensor([0, 2]), Reduction())
    assert float(weighted_sum(numbers[0], weights, mask)) == 0.0


def test_openrlhf_masked_mean(openrlhf: SimpleNamespace) -> None:
    given = case()
    theirs = openrlhf.utils.masked_mean(given.logp, given.mask)
    agree(theirs, weighted_sum(given.packed(given.logp), given.weights(), given.action_mask))
