"""TRL's GRPO losses (GRPOTrainer._compute_loss, GMPOTrainer._compute_loss, RLOOTrainer._compute_loss) beside ours; see docs/parity.md."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hone.algos.controllers import AdaptiveEntropy
from hone.algos.kl import kl_loss, weighted_kl_loss
from hone.algos.pairs import row_logp
from hone.algos.policy_losses import clipped_surrogate, entropy_bonus
from hone.algos.sequence_losses import gmpo_loss, gspo_loss
from hone.algos.soft_losses import cispo_loss, sapo_loss
from tests.parity import fakes
from tests.parity.cases import Case, agree, case, losses_agree, single, value_and_gradient

CLIPS = {"clip_low": 0.2, "clip_high": 0.28}


def ours(given: Case, function: Callable[..., object], weights: Tensor, **settings: float) -> Callable[[Tensor], Tensor]:
    rows = (given.cu_seqlens,) if function in (gspo_loss, gmpo_loss) else ()
    fixed = given.packed(given.old_logp), given.packed(given.advantages), weights, given.action_mask, *rows
    return lambda logp: function(given.packed(logp), *fixed, **settings).total


@pytest.mark.parametrize(
    ("loss_type", "reduction"), [("grpo", ("sequence",)), ("bnpo", ("token",)), ("dapo", ("token",)), ("dr_grpo", ("constant", 16))]
)
def test_trl_clipped_losses(trl: SimpleNamespace, loss_type: str, reduction: tuple[str, int]) -> None:
    given = case()
    theirs = fakes.grpo_loss(trl.grpo.GRPOTrainer, fakes.grpo(loss_type=loss_type), given)
    losses_agree(theirs, ours(given, clipped_surrogate, given.weights(*reduction), **CLIPS), given.logp)


def test_trl_clip_figure(trl: SimpleNamespace) -> None:
    given, trainer = case(), fakes.grpo(loss_type="bnpo")
    fakes.grpo_loss(trl.grpo.GRPOTrainer, trainer, given)(given.logp)
    fixed = given.packed(given.old_logp), given.packed(given.advantages), given.weights(), given.action_mask
    mine = clipped_surrogate(given.packed(given.logp), *fixed, **CLIPS).metrics["ppo_clip_ratio"]
    assert mine > 0
    agree(torch.tensor(trainer._metrics["train"]["clip_ratio/region_mean"][0]), mine)


def test_trl_counts_rows_without_actions(trl: SimpleNamespace) -> None:
    # On policy with A = 1 on two rows, one of them without action tokens: -1/2 for them, -1 for ours.
    given = case(gap=False)
    mask = torch.tensor([[True], [False]])
    given = replace(given, **{name: getattr(given, name)[:2, :1] for name in vars(given) if name != "cu_seqlens"})
    given = replace(given, mask=mask, logp=given.old_logp, advantages=mask.float())
    for loss_type, reduction in (("grpo", ("sequence",)), ("dr_grpo", ("constant", 1))):
        theirs = fakes.grpo_loss(trl.grpo.GRPOTrainer, fakes.grpo(loss_type=loss_type, max_completion_length=1), given)
        assert_close(theirs(given.logp), torch.tensor(-0.5))
        assert_close(ours(given, clipped_surrogate, given.weights(*reduction), **CLIPS)(given.logp), torch.tensor(-1.0))


@pytest.mark.parametrize(("loss_type", "reduction"), [("grpo", ("sequence",)), ("dapo", ("token",)), ("luspo", ("constant", 1))])
def test_trl_sequence_ratios(trl: SimpleNamespace, loss_type: str, reduction: tuple[str, int]) -> None:
    given = case()
    given = replace(given, advantages=given.per_row([1.0, -0.5, 0.75, -1.0]))
    trainer = fakes.grpo(loss_type=loss_type, importance_sampling_level="sequence")
    theirs = fakes.grpo_loss(trl.grpo.GRPOTrainer, trainer, given, advantages=torch.tensor([1.0, -0.5, 0.75, -1.0]))
    losses_agree(theirs, ours(given, gspo_loss, given.weights(*reduction), **CLIPS), given.logp)


def test_trl_delta_is_dual_clip(trl: SimpleNamespace) -> None:
    given = case()
    theirs = fakes.grpo_loss(trl.grpo.GRPOTrainer, fakes.grpo(delta=1.5), given)
    assert bool(((given.logp - given.old_logp > math.log(1.5)) & (given.advantages < 0)).any())
    losses_agree(theirs, ours(given, clipped_surrogate, given.weights(), **CLIPS, dual_clip=1.5), given.logp)


def test_trl_counts_no_delta(trl: SimpleNamespace) -> None:
    # rho = 5, A = -2, delta 3: both say 6; to them the token is not clipped.
    logp, old, advantage = single(math.log(5.0), 0.0, -2.0)
    given, trainer = one_token(logp, old, advantage), fakes.grpo(delta=3.0)
    assert_close(fakes.grpo_loss(trl.grpo.GRPOTrainer, trainer, given)(logp), torch.tensor(6.0))
    assert trainer._metrics["train"]["clip_ratio/region_mean"] == [0.0]
    mine = clipped_surrogate(logp[0], old[0], advantage[0], torch.ones(1), torch.tensor([True]), **CLIPS, dual_clip=3.0)
    assert_close(mine.total, torch.tensor(6.0))
    assert float(mine.metrics["ppo_clip_ratio"]) == 1.0


def test_trl_delta_below_the_clip(trl: SimpleNamespace) -> None:
    # rho = 2, A = -1, delta 1.1 under 1 + 0.28: the minimum is then the clipped branch, 1.28; a dual clip of 1.1 says 1.1.
    logp, old, advantage = single(math.log(2.0), 0.0, -1.0)
    given = one_token(logp, old, advantage)
    assert_close(fakes.grpo_loss(trl.grpo.GRPOTrainer, fakes.grpo(delta=1.1), given)(logp), torch.tensor(1.28))
    assert_close(ours(given, clipped_surrogate, torch.ones(1), **CLIPS, dual_clip=1.1)(logp), torch.tensor(1.1))


def test_trl_overflow_is_nan(trl: SimpleNamespace) -> None:
    # A good token 100 nats above the old policy: both cost -1.28, theirs with a gradient of 0 * inf.
    logp, old, advantage = single(0.0, -100.0, 1.0)
    given = one_token(logp, old, advantage)
    value, gradient = value_and_gradient(fakes.grpo_loss(trl.grpo.GRPOTrainer, fakes.grpo(), given), logp)
    assert_close(value, torch.tensor(-1.28))
    assert torch.isnan(gradient).all()
    mine = value_and_gradient(ours(given, clipped_surrogate, torch.ones(1), **CLIPS), logp)
    assert_close(mine, (torch.tensor(-1.28), torch.zeros(1, 1)))


def one_token(logp: Tensor, old: Tensor, advantage: Tensor) -> Case:
    here, nothing = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1)
    rest = dict.fromkeys(("rollout_logp", "ref_logp", "values", "old_values", "returns", "rewards"), nothing)
    return Case(valid=here, mask=here, logp=logp, old_logp=old, advantages=advantage, **rest)


def test_trl_mean_of_nothing(trl: SimpleNamespace) -> None:
    given = one_token(*single(0.0, -1.0, 1.0))
    given = replace(given, mask=torch.zeros(1, 1, dtype=torch.bool))
    for loss_type in ("grpo", "bnpo", "dapo"):
        assert float(fakes.grpo_loss(trl.grpo.GRPOTrainer, fakes.grpo(loss_type=loss_type), given)(given.logp)) == 0.0
    assert float(ours(given, clipped_surrogate, given.weights(), **CLIPS)(given.logp)) == 0.0


def test_trl_cispo(trl: SimpleNamespace) -> None:
    given = case()
    theirs = fakes.grpo_loss(trl.grpo.GRPOTrainer, fakes.grpo(loss_type="cispo", epsilon_high=1.25), given)
    losses_agree(theirs, ours(given, cispo_loss, given.weights(), cap=1.25), given.logp)


def test_trl_sapo(trl: SimpleNamespace) -> None:
    given = case()
    theirs = fakes.grpo_loss(trl.grpo.GRPOTrainer, fakes.grpo(loss_type="sapo"), given)
    losses_agree(theirs, ours(given, sapo_loss, given.weights("sequence")), given.logp)


def test_trl_gmpo(trl: SimpleNamespace) -> None:
    given = case()
    rows = [1.0, -0.5, 0.75, -1.0]
    given = replace(given, advantages=given.per_row(rows))
    theirs = fakes.grpo_loss(trl.gmpo.GMPOTrainer, fakes.grpo(epsilon_low=0.4, epsilon_high=0.4), given, advantages=torch.tensor(rows))
    losses_agree(theirs, ours(given, gmpo_loss, given.weights("sequence"), log_clip_low=0.4, log_clip_high=0.4), given.logp)


def with_kl(given: Case, gradient: str) -> Callable[[Tensor], Tensor]:
    policy = ours(given, clipped_surrogate, given.weights("sequence"), **CLIPS)
    fixed = given.packed(given.ref_logp), given.weights("sequence"), given.action_mask
    return lambda logp: policy(logp) + kl_loss(given.packed(logp), *fixed, coef=0.3, estimator="k3", gradient=gradient).total


def test_trl_k3_in_the_loss(trl: SimpleNamespace) -> None:
    given = case()
    theirs = fakes.grpo_loss(trl.grpo.GRPOTrainer, fakes.grpo(loss_type="grpo", beta=0.3), given, ref_per_token_logps=given.ref_logp)
    losses_agree(theirs, with_kl(given, "as_written"), given.logp)


def test_trl_corrected_kl_on_policy(trl: SimpleNamespace) -> None:
    # rho k3 at rho = 1 has k3's value and the gradient d, which is that of k2: our "reverse".
    given = case()
    given = replace(given, old_logp=given.logp)
    trainer = fakes.grpo(loss_type="grpo", beta=0.3, use_bias_correction_kl=True)
    theirs = fakes.grpo_loss(trl.grpo.GRPOTrainer, trainer, given, ref_per_token_logps=given.ref_logp)
    losses_agree(theirs, with_kl(given, "reverse"), given.logp)


def test_trl_corrected_kl_off_policy(trl: SimpleNamespace) -> None:
    # rho = 2, d = 0.5, A = 0: theirs is 2 k3 with gradient rho d = 1, as our weighted form; the default keeps k3 and d.
    logp, old, advantage = single(-1.0, -1.0 - math.log(2.0), 0.0)
    given = one_token(logp, old, advantage)
    ref, k3 = torch.tensor([[-1.5]]), math.exp(-0.5) - 1 + 0.5
    trainer = fakes.grpo(beta=1.0, use_bias_correction_kl=True)
    theirs = value_and_gradient(fakes.grpo_loss(trl.grpo.GRPOTrainer, trainer, given, ref_per_token_logps=ref), logp)
    mask = torch.tensor([True])
    mine = value_and_gradient(
        lambda x: kl_loss(x[0], ref[0], torch.ones(1), mask, coef=1.0, estimator="k3", gradient="reverse").total, logp
    )
    assert_close(theirs, (torch.tensor(2 * k3), torch.tensor([[1.0]])))
    assert_close(mine, (torch.tensor(k3), torch.tensor([[0.5]])))
    weighted = value_and_gradient(
        lambda x: weighted_kl_loss(x[0], old[0], ref[0], torch.ones(1), mask, coef=1.0, estimator="k3", ratio_cap=10.0).total, logp
    )
    assert_close(weighted, theirs)


def test_trl_entropy_bonus(trl: SimpleNamespace) -> None:
    given = case()
    trainer = fakes.grpo(loss_type="bnpo", _entropy_bonus_enabled=True, entropy_coef=0.05)
    entropies = given.values.abs()
    theirs = fakes.grpo_loss(trl.grpo.GRPOTrainer, trainer, given, entropies=entropies)
    policy = ours(given, clipped_surrogate, given.weights(), **CLIPS)
    bonus = entropy_bonus(given.packed(entropies), given.weights(), given.action_mask, coef=0.05).total
    losses_agree(theirs, lambda logp: policy(logp) + bonus, given.logp)


def test_trl_entropy_bonus_ignores_the_reduction(trl: SimpleNamespace) -> None:
    # loss_type "grpo" averages by row, its bonus by token; ours averages both as it is told.
    given = case()
    entropies, trainer = given.values.abs(), fakes.grpo(loss_type="grpo", _entropy_bonus_enabled=True, entropy_coef=0.05)
    theirs = fakes.grpo_loss(trl.grpo.GRPOTrainer, trainer, given, entropies=entropies)(given.logp)
    policy = ours(given, clipped_surrogate, given.weights("sequence"), **CLIPS)(given.logp)
    by_token, by_row = (
        entropy_bonus(given.packed(entropies), weights, given.action_mask, coef=0.05).total
        for weights in (given.weights(), given.weights("sequence"))
    )
    agree(theirs, policy + by_token)
    assert abs(float(by_token - by_row)) > 1e-3


def test_trl_adaptive_entropy(trl: SimpleNamespace) -> None:
    given = case()
    trainer = fakes.grpo(
        _entropy_bonus_enabled=True,
        use_adaptive_entropy=True,
        entropy_coef=0.01,
        entropy_target=0.5,
        entropy_coef_delta=0.004,
        _last_world_entropy=math.inf,
    )
    state = AdaptiveEntropy(level=0.01, target=0.5, step=0.004)
    for entropy in (0.75, 0.25, 0.5, 0.75, 0.75, 0.75, 0.75, 0.75, 0.25):
        applied = fakes.grpo_loss(trl.grpo.GRPOTrainer, trainer, given, entropies=torch.full(given.mask.shape, entropy))(given.logp)
        policy = ours(given, clipped_surrogate, given.weights(), **CLIPS)(given.logp)
        assert_close(applied, policy - state.coef * entropy, atol=1e-6, rtol=0)
        state = state.after(entropy=entropy)
        assert trainer.entropy_coef == pytest.approx(state.level, abs=1e-12)


def rloo_loss(trl: SimpleNamespace, given: Case) -> Callable[[Tensor], Tensor]:
    trainer = fakes.grpo(epsilon_high=0.2)
    inputs = {"old_logps": (given.old_logp * given.mask).sum(1), "completion_mask": given.mask.long()}
    return fakes.grpo_loss(trl.rloo.RLOOTrainer, trainer, given, advantages=given.advantages[:, 0], **inputs)


def test_trl_rloo_clips_whole_responses(trl: SimpleNamespace) -> None:
    # F1 with the signs swapped: products of ratios 0.904837 and 1.491825, the second clipped to 1.2.
    ratios = torch.tensor([[0.0, 0.3, -0.4], [0.5, -0.1, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    old = torch.tensor([[-1.0, -0.5, -2.0], [-0.7, -1.2, 0.0]])
    rest = dict.fromkeys(("rollout_logp", "ref_logp", "values", "old_values", "returns", "rewards"), old)
    given = Case(valid=mask, mask=mask, logp=old + ratios, old_logp=old, advantages=torch.tensor([[-1.0], [1.0]]) * mask, **rest)
    theirs = value_and_gradient(rloo_loss(trl, given), given.logp)
    assert_close(theirs[0], torch.tensor(-0.147581), atol=1e-6, rtol=0)
    assert_close(theirs[1], torch.tensor([[0.452419] * 3, [0.0] * 3]), atol=1e-6, rtol=0)
    # A response given as one token is the same loss; given by tokens, each is clipped for itself.
    packed, both = (given.action_mask, given.cu_seqlens), torch.ones(2, dtype=torch.bool)
    losses_agree(
        rloo_loss(trl, given),
        lambda logp: (
            clipped_surrogate(
                row_logp(given.packed(logp), *packed),
                row_logp(given.packed(old), *packed),
                given.advantages[:, 0],
                torch.full((2,), 0.5),
                both,
                clip_low=0.2,
                clip_high=0.2,
            ).total
        ),
        given.logp,
    )
    by_token = ours(given, clipped_surrogate, given.weights(), clip_low=0.2, clip_high=0.2)(given.logp)
    assert_close(by_token, torch.tensor(0.209004), atol=1e-6, rtol=0)
