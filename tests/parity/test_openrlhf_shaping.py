"""OpenRLHF's KL, rewards, penalties and filters (openrlhf/models/utils.py, openrlhf/trainer/ppo_utils) beside ours; see docs/parity.md."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hone.algos.controllers import AdaptiveKL
from hone.algos.group_baselines import action_counts, pass_at_k
from hone.algos.kl import Gradient, kl_loss, kl_per_token, weighted_kl_loss
from hone.algos.shaping import groups_in_range, overlong_penalty, rescored, stop_properly, varied_groups
from tests.parity.cases import agree, case, losses_agree, our_head, single, value_and_gradient


def one_kl(logp: Tensor, ref_logp: Tensor, *, gradient: Gradient, estimator: str = "k3") -> Tensor:
    return kl_loss(logp[0], ref_logp[0], torch.ones(1), torch.tensor([True]), coef=1.0, estimator=estimator, gradient=gradient).total


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize(("unbiased", "gradient"), [(False, "as_written"), (True, "reverse")])
def test_openrlhf_kl_estimators(openrlhf: SimpleNamespace, estimator: str, unbiased: bool, gradient: Gradient) -> None:
    given = case()

    def theirs(logp: Tensor) -> Tensor:
        kl = openrlhf.utils.compute_approx_kl(logp, given.ref_logp, kl_estimator=estimator, unbiased_gradient=unbiased)
        return openrlhf.loss.aggregate_loss(kl, given.mask)

    def ours(logp: Tensor) -> Tensor:
        packed = given.packed(logp), given.packed(given.ref_logp), given.weights(), given.action_mask
        return kl_loss(*packed, coef=1.0, estimator=estimator, gradient=gradient).total

    losses_agree(theirs, ours, given.logp)


def test_openrlhf_weighs_the_kl_gradient_off_policy(openrlhf: SimpleNamespace) -> None:
    # rho = 2, d = 0.5: their straight-through gradient is rho d = 1, ours d = 0.5; the values are the same k3.
    logp, old, ref = single(-1.0, -1.0 - math.log(2.0), -1.5)
    theirs = value_and_gradient(
        lambda x: openrlhf.utils.compute_approx_kl(x, ref, old, kl_estimator="k3", unbiased_gradient=True).sum(), logp
    )
    ours = value_and_gradient(lambda x: one_kl(x, ref, gradient="reverse"), logp)
    assert_close(theirs[0], ours[0])
    assert_close(theirs[1], torch.full((1, 1), 1.0))
    assert_close(ours[1], torch.full((1, 1), 0.5))
    mask = torch.tensor([True])
    weighted = value_and_gradient(
        lambda x: weighted_kl_loss(x[0], old[0], ref[0], torch.ones(1), mask, coef=1.0, estimator="k3", ratio_cap=10.0).total, logp
    )
    assert_close(weighted, (2 * ours[0], theirs[1]))  # their value lacks the weight


def test_openrlhf_caps_the_kl_at_ten(openrlhf: SimpleNamespace) -> None:
    # d = -5: k3 = e^5 - 1 - 5 with gradient 1 - e^5. They stop at 10 and send nothing back, where it matters most.
    logp, ref = single(-6.0, -1.0)
    theirs = value_and_gradient(lambda x: openrlhf.utils.compute_approx_kl(x, ref, kl_estimator="k3").sum(), logp)
    ours = value_and_gradient(lambda x: one_kl(x, ref, gradient="as_written"), logp)
    assert_close(theirs, (torch.tensor(10.0), torch.zeros(1, 1)))
    assert_close(ours, (torch.tensor(math.exp(5) - 6), torch.full((1, 1), 1 - math.exp(5))))


def test_openrlhf_k3_of_close_policies_cancels(openrlhf: SimpleNamespace) -> None:
    # d = 1e-4 (as fp32 has it): the truth is 5e-9, and never negative.
    logp, ref = single(1e-4, 0.0)
    assert float(openrlhf.utils.compute_approx_kl(logp, ref, kl_estimator="k3")) < 0
    assert float(kl_per_token(logp[0], ref[0], torch.tensor([True]), estimator="k3")) == pytest.approx(5e-9, rel=1e-3)


def test_openrlhf_reward_with_kl(openrlhf: SimpleNamespace) -> None:
    given = case()
    scores, kl = torch.tensor([1.0, -0.5, 0.25, 2.0]), (given.old_logp - given.ref_logp) * given.mask
    theirs = openrlhf.utils.compute_reward(scores, 0.1, kl, given.mask)
    penalty = kl_per_token(given.packed(given.old_logp), given.packed(given.ref_logp), given.action_mask, estimator="k1")
    ours = rescored(torch.zeros_like(penalty), scores, given.action_mask, given.cu_seqlens) - 0.1 * penalty
    agree(given.packed(theirs), ours)


def test_openrlhf_rewards_a_row_without_actions(openrlhf: SimpleNamespace) -> None:
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    theirs = openrlhf.utils.compute_reward(torch.tensor([1.0]), 0.0, torch.zeros(1, 3), nothing)
    assert_close(theirs, torch.tensor([[0.0, 0.0, 1.0]]))
    assert_close(rescored(torch.zeros(3), torch.tensor([1.0]), nothing[0], torch.tensor([0, 3])), torch.zeros(3))


def test_openrlhf_adaptive_kl(openrlhf: SimpleNamespace) -> None:
    theirs, ours = openrlhf.kl_controller.AdaptiveKLController(0.1, 6.0, 10000), AdaptiveKL(coef=0.1, target=6.0, horizon=10000)
    for kl, sequences in ((8.0, 512), (6.6, 512), (0.0, 2000), (5.5, 128)):
        theirs.update(kl, sequences)
        ours = ours.after(kl=kl, sequences=sequences)
        assert ours.coef == pytest.approx(theirs.value, abs=1e-12)
    # Golden after the first two: 0.1 (1 + 0.2 * 0.0512) (1 + 0.1 * 0.0512).
    assert AdaptiveKL(coef=0.1).after(kl=8.0, sequences=512).coef == pytest.approx(0.1 * 1.01024)


def test_openrlhf_adaptive_kl_turns_negative(openrlhf: SimpleNamespace) -> None:
    # Six horizons at once far below the target: 1 - 0.2 * 6 = -0.2.
    theirs = openrlhf.kl_controller.AdaptiveKLController(0.1, 6.0, 10000)
    theirs.update(0.0, 60000)
    assert theirs.value == pytest.approx(-0.02)
    with pytest.raises(ValueError, match="raise the horizon"):
        AdaptiveKL(coef=0.1, target=6.0, horizon=10000).after(kl=0.0, sequences=60000)


def rows(rewards: list[float], lengths: list[int] | None = None, truncated: list[bool] | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        rewards=torch.tensor(rewards),
        response_length=torch.tensor(lengths or [1] * len(rewards)),
        truncated=torch.tensor(truncated or [False] * len(rewards)),
    )


def test_openrlhf_overlong_penalty(openrlhf: SimpleNamespace) -> None:
    lengths = [10, 80, 81, 90, 100, 140]
    given = rows([1.0] * 6, lengths)
    openrlhf.length_penalty.apply_overlong_penalty([given], 100, 20, 0.5)
    agree(given.rewards, 1.0 + overlong_penalty(torch.tensor(lengths), max_length=100, buffer=20, factor=0.5).float())


def test_openrlhf_overlong_without_a_buffer(openrlhf: SimpleNamespace) -> None:
    # A buffer of nothing: they never punish, however long; ours refuses.
    given = rows([1.0], [140])
    openrlhf.length_penalty.apply_overlong_penalty([given], 100, 0)
    assert float(given.rewards) == 1.0
    with pytest.raises(ValueError, match="buffer"):
        overlong_penalty(torch.tensor([140]), max_length=100, buffer=0)


def test_openrlhf_counts_the_environments_tokens(openrlhf: SimpleNamespace) -> None:
    # Prompt of one, two tokens of the policy, two of the environment, one of the policy: their length is 5, ours 3.
    response = {
        "observation_tokens": [7, 1, 2, 3, 4, 5],
        "action_ranges": [(1, 3), (5, 6)],
        "rollout_log_probs": None,
        "reward": 1.0,
        "scores": 1.0,
        "prompt": "",
        "label": "",
    }
    experience = openrlhf.samples_generator.SamplesGenerator._process_response_into_experience(None, response, max_len=10)
    mask = torch.tensor([False, True, True, False, False, True])
    assert experience.response_length.tolist() == [5]
    assert action_counts(mask, torch.tensor([0, 6])).tolist() == [3]


def test_openrlhf_stop_properly(openrlhf: SimpleNamespace) -> None:
    scores, truncated = [1.0, 0.5, 2.0, 0.0], [True, False, True, True]
    for coef in (0.5, 0.0, -0.25):
        given = rows(scores, truncated=truncated)
        openrlhf.length_penalty.apply_stop_properly_penalty([given], coef)
        agree(given.rewards, stop_properly(torch.tensor(scores), torch.tensor(truncated), coef=coef))


def test_openrlhf_stop_properly_raises_bad_scores(openrlhf: SimpleNamespace) -> None:
    # A score of -1 cut off: half of it is better than it was, and so is -0.25; ours takes the lower of the two.
    for coef, raised in ((0.5, -0.5), (-0.25, -0.25)):
        given = rows([-1.0], truncated=[True])
        openrlhf.length_penalty.apply_stop_properly_penalty([given], coef)
        assert float(given.rewards) == raised
        assert float(stop_properly(torch.tensor([-1.0]), torch.tensor([True]), coef=coef)) == -1.0


def test_openrlhf_dynamic_filter(openrlhf: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.5, 0.5]]
    module = openrlhf.samples_generator
    monkeypatch.setattr(module, "ray", SimpleNamespace(wait=lambda refs, **_: (refs, []), get=lambda ref: ref))
    monkeypatch.setattr(module, "tqdm", lambda *_, **__: SimpleNamespace(set_postfix=lambda _: None, update=lambda: None))
    monkeypatch.setattr(
        module, "_collect_prompt_batch", lambda _, count: ([""] * 4, [""] * 4, [None] * 4, False) if count == 4 else ([], [], [], True)
    )
    trainer = SimpleNamespace(
        args=SimpleNamespace(algo=SimpleNamespace(dynamic_filtering_range=(0.0, 1.0))),
        _dispatch_prompts_to_vllm=lambda *_, **__: groups,
        _process_response_into_experience=lambda score, **_: SimpleNamespace(scores=torch.tensor([score])),
    )
    accepted, _, _ = module.SamplesGenerator._generate_vllm(trainer, None, 4, True)
    assert [float(experience.scores) for experience in accepted] == [1.0, 0.0, 0.5, 0.5]
    scores, group = torch.tensor(groups).flatten(), torch.arange(4).repeat_interleave(2)
    live = torch.ones(8, dtype=torch.bool)
    assert scores[groups_in_range(scores, group, live, low=0.0, high=1.0)].tolist() == [1.0, 0.0, 0.5, 0.5]
    # Two equal halves teach a group baseline nothing; by variance they go.
    assert scores[varied_groups(scores, group, live)].tolist() == [1.0, 0.0]


def test_openrlhf_pass_at_k(openrlhf: SimpleNamespace) -> None:
    # Four samples of two prompts, 1 and 3 of them right: 4 drawn of 4 surely hold a right one, 1 does in a quarter and in three.
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    samples = [
        SimpleNamespace(prompts=["ab"[place // 4]], rewards=reward, response_length=None, truncated=None)
        for place, reward in enumerate(rewards)
    ]
    theirs = openrlhf.ppo.compute_eval_metrics([(["x", "x"], ["a", "b"], None, None)], samples, 4)
    correct, drawn = torch.tensor([1, 3]), torch.tensor([4, 4])
    for k, golden in ((1, 0.5), (4, 1.0)):
        assert theirs[f"eval_x_pass{k}"] == golden
        assert float(pass_at_k(correct, drawn, k=k).mean()) == golden


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_openrlhf_log_probabilities_and_entropy(openrlhf: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # its kernel, where it is installed, wants a GPU
    generator = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(6, 11, generator=generator), torch.randint(11, (6,), generator=generator)

    def theirs(given: Tensor) -> Tensor:
        tempered = given / temperature
        logp = openrlhf.utils.log_probs_from_logits(tempered[None], tokens[None])
        return (logp + 0.3 * openrlhf.utils.compute_entropy(tempered[None])).sum() / 6

    def ours(given: Tensor) -> Tensor:
        logp, entropy = our_head(given, tokens, temperature)
        return (logp + 0.3 * entropy).sum() / 6

    losses_agree(theirs, ours, logits)


def test_openrlhf_temperature_overwrites_the_logits(openrlhf: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    logits, tokens = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    mine = our_head(logits, tokens, 0.5)[0]
    assert_close(logits, torch.tensor([[2.0, 1.0, 0.0]]))
    agree(openrlhf.utils.log_probs_from_logits(logits[None], tokens[None], temperature=0.5)[0], mine)
    assert_close(logits, torch.tensor([[4.0, 2.0, 0.0]]))
