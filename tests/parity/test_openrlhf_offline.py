"""OpenRLHF's critic, supervised, reward-model and preference losses (openrlhf/models/loss.py) beside ours; see docs/parity.md."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hone.algos.pairs import pair_weights, row_logp, row_mean_logp
from hone.algos.preference import conservative_dpo, dpo, ipo, ipo_summed, rpo
from hone.algos.reward_models import bradley_terry, log_exp
from hone.algos.supervised import nll
from hone.algos.value_losses import clipped_value_loss, squared_value_loss
from tests.parity import peers
from tests.parity.cases import agree, case, losses_agree

PAIRS = torch.ones(3, dtype=torch.bool)
WEIGHTS = pair_weights(PAIRS)
CHOSEN = torch.tensor([-10.0, -6.5, -8.0])
REJECTED = torch.tensor([-12.0, -6.0, -7.5])
REF_CHOSEN = torch.tensor([-11.0, -6.0, -8.25])
REF_REJECTED = torch.tensor([-11.5, -6.25, -9.0])


@pytest.mark.parametrize("clip", [None, 0.2])
def test_openrlhf_value_loss(openrlhf: SimpleNamespace, clip: float | None) -> None:
    given = case()
    theirs = openrlhf.loss.ValueLoss(clip)

    def ours(values: Tensor) -> Tensor:
        returns, weights, mask = given.packed(given.returns), given.weights(), given.action_mask
        if clip is None:
            return squared_value_loss(given.packed(values), returns, weights, mask).total
        return clipped_value_loss(given.packed(values), given.packed(given.old_values), returns, weights, mask, clip=clip).total

    losses_agree(lambda values: theirs(values, given.old_values, given.returns, given.mask), ours, given.values)


@pytest.mark.parametrize("over", ["token", "sequence"])
def test_openrlhf_supervised_loss(openrlhf: SimpleNamespace, over: str) -> None:
    given = case()
    theirs = openrlhf.loss.SFTLoss(token_level_loss=over == "token")
    losses_agree(
        lambda logp: theirs(logp, given.mask),
        lambda logp: nll(given.packed(logp), given.weights(over), given.action_mask).total,
        given.logp,
    )


@pytest.mark.parametrize("margin", [None, torch.tensor([1.0, 0.0, 0.5])])
def test_openrlhf_pairwise_loss(openrlhf: SimpleNamespace, margin: Tensor | None) -> None:
    rejected, theirs = torch.tensor([0.5, 1.5, -1.0]), openrlhf.loss.PairWiseLoss()
    margins = torch.zeros(3) if margin is None else margin
    losses_agree(
        lambda chosen: theirs(chosen, rejected, margin),
        lambda chosen: bradley_terry(chosen, rejected, margins, WEIGHTS, PAIRS).total,
        torch.tensor([1.0, 1.0, 0.25]),
    )


def test_openrlhf_log_exp_loss(openrlhf: SimpleNamespace) -> None:
    rejected, theirs = torch.tensor([0.5, 1.5, -1.0]), openrlhf.loss.LogExpLoss()
    losses_agree(
        lambda chosen: theirs(chosen, rejected),
        lambda chosen: log_exp(chosen, rejected, WEIGHTS, PAIRS).total,
        torch.tensor([1.0, 1.0, 0.25]),
    )


def test_openrlhf_log_exp_overflows(openrlhf: SimpleNamespace) -> None:
    chosen, rejected, one = torch.tensor([0.0]), torch.tensor([100.0]), torch.tensor([True])
    assert float(openrlhf.loss.LogExpLoss()(chosen, rejected)) == float("inf")
    assert float(log_exp(chosen, rejected, torch.ones(1), one).total) == 100.0


def test_openrlhf_log_exp_drops_the_margin(openrlhf: SimpleNamespace) -> None:
    # r_w - r_l = 0.5 and a margin of 1: -log sigmoid(-0.5); they leave it at -log sigmoid(0.5).
    chosen, rejected, margin, one = torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([1.0]), torch.tensor([True])
    assert_close(openrlhf.loss.LogExpLoss()(chosen, rejected, margin), torch.tensor(0.474077))
    assert_close(bradley_terry(chosen, rejected, margin, torch.ones(1), one).total, torch.tensor(0.974077))


@pytest.mark.parametrize("flip", [0.0, 0.1])
def test_openrlhf_dpo(openrlhf: SimpleNamespace, flip: float) -> None:
    theirs = openrlhf.loss.DPOLoss(0.1, label_smoothing=flip)
    ratios = REJECTED - REF_REJECTED
    losses_agree(
        lambda chosen: theirs(chosen, REJECTED, REF_CHOSEN, REF_REJECTED)[0],
        lambda chosen: conservative_dpo(chosen - REF_CHOSEN, ratios, WEIGHTS, PAIRS, beta=0.1, flip=flip).total,
        CHOSEN,
    )
    metrics = dpo(CHOSEN - REF_CHOSEN, ratios, WEIGHTS, PAIRS, beta=0.1).metrics
    _, chosen_reward, rejected_reward = theirs(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
    agree(chosen_reward.mean(), metrics["chosen_reward"])
    agree(rejected_reward.mean(), metrics["rejected_reward"])


def test_openrlhf_ipo_is_summed(openrlhf: SimpleNamespace) -> None:
    theirs = openrlhf.loss.DPOLoss(0.5, ipo=True)
    losses_agree(
        lambda chosen: theirs(chosen, REJECTED, REF_CHOSEN, REF_REJECTED)[0],
        lambda chosen: ipo_summed(chosen - REF_CHOSEN, REJECTED - REF_REJECTED, WEIGHTS, PAIRS, beta=0.5).total,
        CHOSEN,
    )
    # One pair of 4 and 5 tokens, log-ratios 1 and -0.5: summed (1.5 - 5)^2, averaged (0.25 + 0.1 - 5)^2.
    one = torch.tensor([True])
    tenth = openrlhf.loss.DPOLoss(0.1, ipo=True)
    assert_close(tenth(*(part[:1] for part in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)))[0], torch.tensor(12.25))
    assert_close(ipo(torch.tensor([0.25]), torch.tensor([-0.1]), torch.ones(1), one, beta=0.1).total, torch.tensor(21.6225))


def test_openrlhf_dpo_with_nll(openrlhf: SimpleNamespace) -> None:
    # Rows 0 and 1 are chosen, 2 and 3 rejected. A token of prompt stands before each; their log-probabilities begin with the next.
    given, own = case(gap=False), openrlhf.dpo.DPOTrainer
    attention = torch.cat([torch.ones(4, 1), given.valid], 1).long()
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(ring_attn_group=None),
        concatenated_inputs=lambda *_: (None, attention, [1, 1, 1, 1]),
        _get_batch_logps=lambda *arguments: own._get_batch_logps(None, *arguments),
    )
    pairs, references = PAIRS[:2], (REF_CHOSEN[:2], REF_REJECTED[:2])

    def theirs(logp: Tensor) -> Tensor:
        batch = attention[:2], None, None, None, None
        chosen, rejected, _, held = own.concatenated_forward(trainer, lambda *_, **__: (logp, {}), *batch)
        return openrlhf.loss.DPOLoss(0.1)(chosen, rejected, *references)[0] + 0.2 * held

    def ours(logp: Tensor) -> Tensor:
        packed = given.packed(logp), given.action_mask, given.cu_seqlens
        ratios = (row_logp(*packed) - torch.cat(references)).split(2)
        return rpo(*ratios, row_mean_logp(*packed)[:2], pair_weights(pairs), pairs, beta=0.1, nll_coef=0.2).total

    losses_agree(theirs, ours, given.logp)


def test_neither_peer_has_a_process_reward_loss(openrlhf: SimpleNamespace, trl: SimpleNamespace) -> None:
    names = [path.stem for peer in peers.RELEASES for path in (peers.DIRECTORY / peer).rglob("*.py")]
    assert len(names) > 100
    assert [name for name in names if "prm" in name or "process_reward" in name] == []


def test_openrlhf_has_no_kto_and_no_distillation(openrlhf: SimpleNamespace) -> None:
    names = [path.stem for path in (peers.DIRECTORY / "openrlhf").rglob("*.py")]
    assert [name for name in names if "kto" in name or "distill" in name or "kd_" in name] == []
