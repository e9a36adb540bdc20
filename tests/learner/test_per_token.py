"""Which losses are sums over tokens, and that learning is the same whether or not the head is told their derivatives."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from hone.algos.algorithms import ALGORITHMS, GRPO, GSPO, PPO
from hone.algos.algorithms.terms import KLPenalty
from hone.learner import per_token
from hone.learner.kernels.tiles import Gradients
from hone.learner.packing import shards
from hone.learner.per_token import PerToken, tokens_of
from tests.learner.tiny import make_batch, make_learner, save_model, score

LENGTHS = [7, 12, 3, 20, 9]


def scored_rows():
    batch = score(make_batch(LENGTHS))
    return dataclasses.replace(batch, ref_logp=batch.old_logp.roll(1))


@pytest.mark.parametrize(("name", "expected"), [("ppo", True), ("grpo", True), ("cispo", True), ("gspo", False), ("gmpo", False)])
def test_sums_over_tokens_are_told_from_sequence_ratios(name: str, expected: bool) -> None:
    asked = PerToken(ALGORITHMS[name]())
    assert (asked.slopes(scored_rows()) is not None) is expected


def test_a_filler_decides_nothing() -> None:
    part = scored_rows()
    asked = PerToken(GSPO())
    assert asked.slopes(dataclasses.replace(part, action_mask=torch.zeros_like(part.action_mask))) is None
    assert asked.holds is None


def test_cut_down_rows_keep_their_own_tokens() -> None:
    # Rows of 7 and 12 tokens; 1, 6 and 7 belong to the first, the first and the second.
    part = tokens_of(scored_rows(), torch.tensor([1, 6, 7, 45]))
    assert part.cu_seqlens.tolist() == [0, 2, 3, 3, 4, 4][: 2 + 1] + part.cu_seqlens.tolist()[3:]
    assert part.cu_seqlens.tolist()[-1] == 4
    assert torch.equal(part.tokens, scored_rows().tokens[[1, 6, 7, 45]])


@pytest.mark.parametrize("kind", ["qwen3-tied", "llama-untied"])
@pytest.mark.parametrize(
    "algo", [PPO(kl=KLPenalty(init_coef=0.1, use_loss=True), entropy_coef=0.01), GRPO(), GSPO()], ids=lambda algo: type(algo).__name__
)
def test_an_update_is_the_same_told_or_not(tmp_path: Path, kind: str, algo: PPO | GRPO | GSPO, monkeypatch: pytest.MonkeyPatch) -> None:
    name = save_model(tmp_path, kind)
    (shard,) = shards(scored_rows(), ranks=1, max_tokens=64)
    outcomes, passes = [], []
    add = Gradients.add

    def counted(*args, kept=None, **kwargs) -> None:
        passes.append(kept is not None)
        add(*args, kept=kept, **kwargs)

    monkeypatch.setattr(Gradients, "add", counted)
    for told in (True, False):
        if not told:
            monkeypatch.setattr(per_token.PerToken, "slopes", lambda self, part: None)
        passes.clear()
        learner = make_learner({"policy": name}, lr=1e-3)
        result = learner.update_policy("policy", shard, algo)
        outcomes.append((result.grad_norm, {name: weight.clone() for name, weight in learner.weights("policy")}))
        # Told, all gradients come from the forward pass's own logits; otherwise backward takes them again.
        assert set(passes) == {told and not isinstance(algo, GSPO)}
    assert_close(outcomes[0], outcomes[1], rtol=1e-5, atol=1e-6)
