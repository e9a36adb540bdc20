"""Which losses are sums over tokens, and that learning is the same whether or not the head is told their derivatives."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from hone.algos import kernels
from hone.algos.algorithms import ALGORITHMS, GRPO, GSPO, PPO
from hone.algos.algorithms.terms import KLPenalty
from hone.algos.batch import Scored
from hone.algos.protocol import Loss, Outputs
from hone.learner import per_token
from hone.learner.kernels.tiles import Gradients
from hone.learner.packing import shards
from hone.learner.per_token import PerToken, tokens_of
from tests.learner.tiny import in_chunks, make_batch, make_learner, save_model, score

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


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A loss that drops tokens at random, by torch's own numbers and by a generator it holds."""

    share: float
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(3))

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        kept = (torch.rand(outputs.logp.shape) >= self.share) & (torch.rand(outputs.logp.shape, generator=self.generator) >= self.share)
        return Loss(total=-(outputs.logp * scored.weights * kept).sum(), metrics={})


@dataclass(frozen=True, kw_only=True)
class WholeRows:
    """A sum over tokens that refuses rows of fewer than so many."""

    fewest: int

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        if int(scored.lengths.min()) < self.fewest:
            raise ValueError("a row is too short")
        return Loss(total=-(outputs.logp * scored.weights).sum(), metrics={})


# A share of zero looks like a sum over tokens, and is one. A row has 7 to 20 tokens and no less than 3 scored ones.
@pytest.mark.parametrize(
    "make", [lambda: Drawn(share=0.3), lambda: Drawn(share=0.0), lambda: WholeRows(fewest=1), lambda: WholeRows(fewest=3)]
)
def test_calling_the_loss_more_often_changes_nothing(tmp_path: Path, make, monkeypatch: pytest.MonkeyPatch) -> None:
    name = save_model(tmp_path, "qwen3-tied")
    (shard,) = shards(score(make_batch([7, 12, 8, 20, 9])), ranks=1, max_tokens=32)
    outcomes = []
    for told in (True, False):
        if not told:
            monkeypatch.setattr(per_token.PerToken, "slopes", lambda self, part: None)
        learner = make_learner({"policy": name}, lr=1e-3)
        in_chunks(learner.engines["policy"].module.head, 3)  # chunks with rows left empty
        torch.manual_seed(5)
        result = learner.update_policy("policy", shard, algo := make())
        after = [torch.rand(3), torch.rand(3, generator=getattr(algo, "generator", None))]
        outcomes.append((result.grad_norm, after, {name: weight.clone() for name, weight in learner.weights("policy")}))
    assert_close(outcomes[0], outcomes[1], rtol=1e-5, atol=1e-6)
    assert outcomes[0][0] > 0


@pytest.mark.parametrize("fewest", [1, 10])
def test_native_kernels_tell_the_same_slopes(tmp_path: Path, fewest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # From 1 token on everything is native; from 10, the whole loss is and a chunk's is not.
    pytest.importorskip("numba")
    name = save_model(tmp_path, "qwen3-tied")
    (shard,) = shards(scored_rows(), ranks=1, max_tokens=64)
    outcomes, calls = [], []
    add, kernels_for = Gradients.add, kernels.kernels_for

    def counted(*args, kept=None, **kwargs) -> None:
        calls.append(kept is not None)
        add(*args, kept=kept, **kwargs)

    monkeypatch.setattr(Gradients, "add", counted)
    for told_and_native in (True, False):
        monkeypatch.setattr(kernels, "FEWEST_TOKENS", fewest if told_and_native else 2**16)
        if not told_and_native:
            monkeypatch.setattr(per_token.PerToken, "slopes", lambda self, part: None)
        calls.clear()
        assert (kernels_for(torch.zeros(51)) is not None) is told_and_native
        learner = make_learner({"policy": name}, lr=1e-3)
        in_chunks(learner.engines["policy"].module.head, 3)
        result = learner.update_policy("policy", shard, PPO(entropy_coef=0.01))
        outcomes.append((result.grad_norm, result.metrics, {name: weight.clone() for name, weight in learner.weights("policy")}))
        assert set(calls) == {told_and_native}
    assert_close(outcomes[0], outcomes[1], rtol=1e-5, atol=1e-6)
