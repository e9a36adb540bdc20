"""OpenRLHF's advantages (RemoteExperienceMaker in openrlhf/trainer/ppo_utils/experience_maker.py) beside ours; see docs/parity.md."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hone.algos.advantages import discounted_returns, gae, group_centred, group_normalised, row_sums, spread, whiten
from hone.algos.group_baselines import action_counts, leave_one_out
from hone.algos.kl import kl_per_token
from hone.algos.shaping import clip_scores, rescored
from hone.algos.turn_credit import turn_gae
from tests.parity.cases import Case, agree, case
from tests.reference.fixtures import f3

SCORES = torch.tensor([1.0, 0.25, -0.5, 2.0])
GROUP = torch.tensor([0, 0, 1, 1])
KL_COEF = 0.1


def maker(peer: SimpleNamespace, estimator: str, *, samples: int, kl_coef: float, **advantage: object) -> SimpleNamespace:
    """What RemoteExperienceMaker's methods read of it."""
    settings = {"estimator": estimator, "gamma": 1.0, "lambd": 0.95, "no_std_norm": False} | advantage
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=SimpleNamespace(**settings)),
        rollout=SimpleNamespace(n_samples_per_prompt=samples, max_new_tokens=100),
        reward=SimpleNamespace(clip_range=(-10, 10)),
    )
    own = peer.experience_maker.RemoteExperienceMaker
    fake = SimpleNamespace(strategy=SimpleNamespace(args=args), advantage_estimator=estimator, kl_ctl=SimpleNamespace(value=kl_coef))
    for method in ("get_advantages_and_returns", "get_cumulative_returns", "compute_advantages_and_returns"):
        setattr(fake, method, getattr(own, method).__get__(fake))
    return fake


def theirs(
    peer: SimpleNamespace,
    given: Case,
    estimator: str,
    scores: Tensor = SCORES,
    *,
    samples: int = 2,
    kl_coef: float = KL_COEF,
    **advantage: object,
) -> SimpleNamespace:
    experience = SimpleNamespace(
        rewards=scores.clone(),
        index=list(range(scores.numel())),
        action_mask=given.mask[: scores.numel()],
        values=given.values[: scores.numel()],
        kl=((given.old_logp - given.ref_logp) * given.mask)[: scores.numel()],
        info={},
    )
    maker(peer, estimator, samples=samples, kl_coef=kl_coef, **advantage).compute_advantages_and_returns([experience])
    return experience


def penalty(given: Case) -> Tensor:
    return KL_COEF * kl_per_token(given.packed(given.old_logp), given.packed(given.ref_logp), given.action_mask, estimator="k1")


def token_rewards(given: Case, scores: Tensor) -> Tensor:
    return rescored(torch.zeros_like(penalty(given)), scores, given.action_mask, given.cu_seqlens) - penalty(given)


def to_go(given: Case, scores: Tensor, gamma: float = 1.0) -> Tensor:
    return discounted_returns(token_rewards(given, scores), given.action_mask, given.cu_seqlens, gamma=gamma)


def on_mask(given: Case, padded: Tensor) -> Tensor:
    return torch.where(given.action_mask, given.packed(padded), 0.0)


@pytest.mark.parametrize(("gamma", "lambd"), [(1.0, 1.0), (0.99, 0.95)])
def test_openrlhf_gae_of_one_turn(openrlhf: SimpleNamespace, gamma: float, lambd: float) -> None:
    given = case(gap=False)
    fake = maker(openrlhf, "gae", samples=1, kl_coef=0.0)
    advantages, returns = fake.get_advantages_and_returns(given.values, given.rewards, given.mask, gamma, lambd)
    packed = given.packed(given.rewards), given.packed(given.values), given.action_mask, given.cu_seqlens
    ours = gae(*packed, gamma=gamma, lambd=lambd)
    agree(given.packed(advantages), ours[0])
    agree(given.packed(returns), ours[1])


def test_openrlhf_gae_falls_into_gaps(openrlhf: SimpleNamespace) -> None:
    rewards, values, mask, cu_seqlens = f3()
    fake = maker(openrlhf, "gae", samples=1, kl_coef=0.0)
    padded = torch.nan_to_num(values)[None], torch.nan_to_num(rewards)[None], mask[None]
    advantages = fake.get_advantages_and_returns(*padded, 1.0, 0.95)[0][0]
    # Before the gap they bootstrap from a value of zero, and lambda is paid for the environment's token.
    assert_close(advantages[mask], torch.tensor([0.392564, 0.307962, 0.585, 0.3], dtype=torch.float64), atol=1e-6, rtol=0)
    ours = gae(rewards, values, mask, cu_seqlens, gamma=1.0, lambd=0.95)[0]
    assert_close(ours[mask], torch.tensor([0.437962, 0.355750, 0.585, 0.3], dtype=torch.float64), atol=1e-6, rtol=0)


def test_openrlhf_gae_knows_no_turns(openrlhf: SimpleNamespace) -> None:
    # F3 by turns: delta_2 = 1 - 0.4, A_1 = (0.4 - 0.5) + 0.95 * 0.6 = 0.47; ours puts a turn's number on all of its tokens.
    rewards, values, mask, cu_seqlens = f3()
    fake = maker(openrlhf, "gae", samples=1, kl_coef=0.0)
    per_token = fake.get_advantages_and_returns(torch.nan_to_num(values)[None], torch.nan_to_num(rewards)[None], mask[None], 1.0, 0.95)[0][
        0
    ]
    assert len({round(float(advantage), 6) for advantage in per_token[mask]}) == 4
    by_turn = turn_gae(rewards, values, mask, cu_seqlens, gamma=1.0, lambd=0.95)[0]
    assert_close(by_turn, torch.tensor([0.47, 0.47, 0.0, 0.6, 0.6], dtype=torch.float64))


def test_openrlhf_returns_of_one_turn(openrlhf: SimpleNamespace) -> None:
    given = case(gap=False)
    fake = maker(openrlhf, "reinforce", samples=1, kl_coef=0.0)
    peers_returns = fake.get_cumulative_returns(given.rewards, given.mask, 0.9)
    agree(given.packed(peers_returns), discounted_returns(given.packed(given.rewards), given.action_mask, given.cu_seqlens, gamma=0.9))


def test_openrlhf_returns_are_discounted_in_gaps(openrlhf: SimpleNamespace) -> None:
    rewards, _, mask, cu_seqlens = f3()
    fake = maker(openrlhf, "reinforce", samples=1, kl_coef=0.0)
    peers_returns = fake.get_cumulative_returns(torch.nan_to_num(rewards)[None], mask[None], 0.9)[0]
    # They count the environment's token as a step, and leave a return on it.
    assert_close(peers_returns, torch.tensor([0.6561, 0.729, 0.81, 0.9, 1.0], dtype=torch.float64))
    ours = discounted_returns(rewards, mask, cu_seqlens, gamma=0.9)
    assert_close(ours, torch.tensor([0.729, 0.81, 0.0, 0.9, 1.0], dtype=torch.float64))


def test_openrlhf_ppo_advantages(openrlhf: SimpleNamespace) -> None:
    given = case(gap=False)
    experience = theirs(openrlhf, given, "gae")
    packed = token_rewards(given, SCORES), given.packed(given.values), given.action_mask, given.cu_seqlens
    advantages, returns = gae(*packed, gamma=1.0, lambd=0.95)
    agree(on_mask(given, experience.advantages), whiten(advantages, given.action_mask))
    agree(given.packed(experience.returns), returns)


@pytest.mark.parametrize("no_std_norm", [False, True])
def test_openrlhf_reinforce(openrlhf: SimpleNamespace, no_std_norm: bool) -> None:
    given = case(gap=False)
    experience = theirs(openrlhf, given, "reinforce", gamma=0.9, no_std_norm=no_std_norm)
    raw = to_go(given, SCORES, gamma=0.9)
    live = given.action_mask
    ours = torch.where(live, raw - raw[live].mean(), 0.0) if no_std_norm else whiten(raw, live)
    agree(on_mask(given, experience.advantages), ours)


def test_openrlhf_reinforce_baseline(openrlhf: SimpleNamespace) -> None:
    given = case()
    experience = theirs(openrlhf, given, "reinforce_baseline")
    agree(on_mask(given, experience.advantages), whiten(to_go(given, group_centred(SCORES, GROUP)), given.action_mask))


def test_openrlhf_rloo(openrlhf: SimpleNamespace) -> None:
    given = case()
    experience = theirs(openrlhf, given, "rloo", kl_coef=0.0)
    per_row = leave_one_out(SCORES, GROUP, torch.ones(4, dtype=torch.bool))
    agree(on_mask(given, experience.advantages), spread(per_row, given.action_mask, given.cu_seqlens))


def test_openrlhf_rloo_keeps_the_kl_out_of_the_baseline(openrlhf: SimpleNamespace) -> None:
    given = case()
    live = torch.ones(4, dtype=torch.bool)
    # Theirs: the baseline is of scores alone, each token pays the penalty still to come.
    experience = theirs(openrlhf, given, "rloo")
    agree(on_mask(given, experience.advantages), to_go(given, leave_one_out(SCORES, GROUP, live)))
    # The paper's, and ours: a response is one action, its whole penalty is in its score, and the baseline has it too.
    scores = SCORES - row_sums(penalty(given), given.action_mask, given.cu_seqlens)
    ours = spread(leave_one_out(scores, GROUP, live), given.action_mask, given.cu_seqlens)
    assert float((on_mask(given, experience.advantages) - ours).abs().max()) > 0.01


def test_openrlhf_group_norm(openrlhf: SimpleNamespace) -> None:
    given = case()
    experience = theirs(openrlhf, given, "group_norm")
    agree(on_mask(given, experience.advantages), to_go(given, group_normalised(SCORES, GROUP, eps=1e-9)))


def test_openrlhf_group_norm_amplifies_rounding(openrlhf: SimpleNamespace) -> None:
    # Eight rewards of 0.1: nothing to learn. In fp32 their mean is off by 7e-9 and that becomes an advantage of -0.83.
    given = case(gap=False)
    wide = replace(given, **{name: getattr(given, name).repeat(2, 1) for name in vars(given) if name != "cu_seqlens"})
    scores = torch.full((8,), 0.1)
    experience = theirs(openrlhf, wide, "group_norm", scores, samples=8, kl_coef=0.0)
    assert_close(experience.advantages[:, 0], torch.full((8,), -0.8312), atol=1e-3, rtol=0)
    assert group_normalised(scores, torch.zeros(8, dtype=torch.long), eps=1e-9).tolist() == [0.0] * 8


@pytest.mark.filterwarnings("ignore:std:UserWarning")
def test_openrlhf_group_of_one_is_nan(openrlhf: SimpleNamespace) -> None:
    given = case()
    for estimator in ("group_norm", "rloo"):
        assert torch.isnan(theirs(openrlhf, given, estimator, samples=1, kl_coef=0.0).advantages[given.mask]).all()
    alone = torch.arange(4)
    assert group_normalised(SCORES, alone, eps=1e-9).tolist() == [0.0] * 4
    assert leave_one_out(SCORES, alone, torch.ones(4, dtype=torch.bool)).tolist() == [0.0] * 4


def test_openrlhf_groups_by_position(openrlhf: SimpleNamespace) -> None:
    # Three rows, two of one prompt: they need every prompt to have the same number, side by side.
    given = case()
    with pytest.raises(RuntimeError, match="shape"):
        theirs(openrlhf, given, "rloo", SCORES[:3])
    ours = leave_one_out(SCORES[:3], torch.tensor([0, 1, 0]), torch.ones(3, dtype=torch.bool))
    assert_close(ours, torch.tensor([1.5, 0.0, -1.5]))


def test_openrlhf_dr_grpo(openrlhf: SimpleNamespace) -> None:
    given = case()
    experience = theirs(openrlhf, given, "dr_grpo")
    agree(on_mask(given, experience.advantages), to_go(given, group_centred(SCORES, GROUP)))


def test_openrlhf_flash_reinforce(openrlhf: SimpleNamespace) -> None:
    given = case()
    experience = theirs(openrlhf, given, "flash_reinforce")
    agree(on_mask(given, experience.advantages), to_go(given, group_centred(SCORES, torch.zeros(4, dtype=torch.long))))


def test_openrlhf_clips_rewards_after_the_baseline(openrlhf: SimpleNamespace) -> None:
    # Rewards 12 and 8, range 10: theirs clips the difference of 4, which is inside; clipping what was given makes it 2.
    given = case()
    scores = torch.tensor([12.0, 8.0])
    experience = theirs(openrlhf, given, "rloo", scores, kl_coef=0.0)
    assert_close(experience.advantages[:, 0], torch.tensor([4.0, -4.0]))
    clipped = clip_scores(scores, low=-10.0, high=10.0)
    assert_close(leave_one_out(clipped, torch.tensor([0, 0]), torch.ones(2, dtype=torch.bool)), torch.tensor([2.0, -2.0]))


def test_openrlhf_baselines_hold_rows_without_actions(openrlhf: SimpleNamespace) -> None:
    # Scores 1, 0 and 0.5, the last row without an action token: it halves their baseline's distance, not ours.
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    zeros = torch.zeros(3, 2)
    experience = SimpleNamespace(rewards=torch.tensor([1.0, 0.0, 0.5]), index=[0, 1, 2], action_mask=mask, values=zeros, kl=zeros, info={})
    maker(openrlhf, "rloo", samples=3, kl_coef=0.0).compute_advantages_and_returns([experience])
    assert_close(experience.advantages[:2, 0], torch.tensor([0.75, -0.75]))
    live = action_counts(mask.flatten(), torch.tensor([0, 2, 4, 6])) > 0
    ours = leave_one_out(torch.tensor([1.0, 0.0, 0.5]), torch.zeros(3, dtype=torch.long), live)
    assert_close(ours, torch.tensor([1.0, -1.0, 0.0]))
