"""TRL's distillation losses and its log-probabilities (gkd, sdpo, trainer/utils.py) beside ours; see docs/parity.md."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hone.algos.distillation import (
    forward_kl,
    generalised_jsd,
    lumped_student_logp,
    lumped_teacher_logp,
    on_policy_distillation_advantages,
    reverse_kl,
    tempered_logp,
)
from hone.algos.soft_losses import reinforce_loss
from tests.parity.cases import agree, losses_agree, our_head, value_and_gradient

MASK = torch.tensor([True, True, False, True, True])
WEIGHTS = MASK / MASK.sum()
LABELS = torch.where(MASK, 0, -100)[None]
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def logits(seed: int) -> Tensor:
    return 2 * torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))


def our_jsd(beta: float, temperature: float) -> Callable[[Tensor], Tensor]:
    teacher = tempered_logp(logits(1), MASK, temperature=temperature)
    return lambda student: generalised_jsd(tempered_logp(student, MASK, temperature=temperature), teacher, WEIGHTS, MASK, beta=beta).total


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_trl_generalised_jsd(trl: SimpleNamespace, beta: float, temperature: float) -> None:
    def theirs(student: Tensor) -> Tensor:
        return trl.gkd.GKDTrainer.generalized_jsd_loss(student[None], logits(1)[None], LABELS, beta, temperature)

    losses_agree(theirs, our_jsd(beta, temperature), logits(0))


def test_trl_jsd_jumps_at_its_ends(trl: SimpleNamespace) -> None:
    # F5: both keep the paper's special cases, although the formula tends to zero there.
    student, teacher = torch.tensor([[1.0, 0.0, -1.0, 0.5]]), torch.tensor([[0.0, 2.0, 0.0, 1.0]])
    one = torch.tensor([True])
    pair = tempered_logp(student, one, temperature=1.0), tempered_logp(teacher, one, temperature=1.0)
    for beta, golden in ((0.0, 0.585605), (0.1, 0.051758), (0.5, 0.142684), (0.9, 0.056676), (1.0, 0.664600)):
        theirs = trl.gkd.GKDTrainer.generalized_jsd_loss(student[None], teacher[None], torch.zeros(1, 1, dtype=torch.long), beta)
        assert_close(theirs, torch.tensor(golden), atol=1e-6, rtol=0)
        assert_close(generalised_jsd(*pair, torch.ones(1), one, beta=beta).total, torch.tensor(golden), atol=1e-6, rtol=0)


def test_trl_gkd_forgets_its_temperature(trl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    # Trained at 0.9 by its configuration, the loss is that of temperature 1.
    monkeypatch.setattr(trl.gkd, "empty_cache", lambda: None)
    outputs = [SimpleNamespace(logits=torch.cat([given, given[:1]])[None]) for given in (logits(0), logits(1))]
    loss = trl.gkd.GKDTrainer.generalized_jsd_loss
    trainer = SimpleNamespace(beta=0.5, temperature=0.9, teacher_model=Teacher(outputs[1]), generalized_jsd_loss=loss)
    inputs = {"input_ids": None, "attention_mask": None, "labels": torch.cat([torch.full((1, 1), -100), LABELS], 1)}
    theirs = trl.gkd.GKDTrainer.compute_loss(trainer, lambda **_: outputs[0], inputs)
    agree(theirs, our_jsd(0.5, 1.0)(logits(0)))
    assert abs(float(theirs - our_jsd(0.5, 0.9)(logits(0)))) > 1e-3


class Teacher:
    """A model that answers with what it was given."""

    def __init__(self, outputs: SimpleNamespace) -> None:
        self.outputs = outputs

    def eval(self) -> None:
        pass

    def __call__(self, **_: object) -> SimpleNamespace:
        return self.outputs


@pytest.mark.parametrize("beta", BETAS)
def test_trl_chunked_divergence(trl: SimpleNamespace, beta: float) -> None:
    identity = torch.eye(7)

    def theirs(student: Tensor) -> Tensor:
        return trl.distillation._chunked_divergence_loss(
            student[None], logits(1)[None], identity, identity, MASK[None], beta, temperature=1.5
        )[0]

    losses_agree(theirs, our_jsd(beta, 1.5), logits(0))


@pytest.mark.parametrize(("alpha", "ours"), [(0.0, forward_kl), (1.0, reverse_kl)])
def test_trl_lumped_rest(trl: SimpleNamespace, alpha: float, ours: Callable[..., object]) -> None:
    # They take the student's top tokens; given those for the teacher's, the two are the same.
    student, teacher, everywhere = logits(0), logits(1), torch.ones(5, dtype=torch.bool)
    top = student.topk(3).indices
    seen = lumped_teacher_logp(teacher.log_softmax(-1).gather(-1, top), everywhere)
    theirs = trl.self_distillation.compute_topk_self_distillation_loss

    def ours_at(at: Tensor) -> Tensor:
        return ours(lumped_student_logp(at, top, everywhere, temperature=1.0), seen, torch.full((5,), 0.2), everywhere).total

    settings = {"distillation_topk": 3, "distillation_alpha": alpha, "distillation_add_tail": True}
    losses_agree(lambda at: theirs(at, teacher, **settings).mean(), ours_at, student)


def test_trl_sampled_token_distillation(trl: SimpleNamespace) -> None:
    # Theirs is log-ratio times logp; ours the policy gradient with minus the log-ratio for an advantage.
    teacher, tokens, everywhere = logits(1), torch.tensor([0, 3, 6, 1, 1]), torch.ones(5, dtype=torch.bool)
    theirs = trl.self_distillation.compute_sampled_token_self_distillation_loss
    theirs_at = value_and_gradient(lambda at: theirs(at, teacher, tokens, distillation_alpha=1.0).mean(), logits(0))

    def ours(student: Tensor) -> Tensor:
        logp, teacher_logp = (given.log_softmax(-1).gather(-1, tokens[:, None])[:, 0] for given in (student, teacher))
        advantages = on_policy_distillation_advantages(logp, teacher_logp, everywhere)
        return reinforce_loss(logp, advantages, torch.full((5,), 0.2), everywhere).total

    for their_part, our_part in zip(theirs_at, value_and_gradient(ours, logits(0)), strict=True):
        agree(their_part, our_part)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trl_log_probabilities_and_entropy(trl: SimpleNamespace, temperature: float) -> None:
    tokens = torch.tensor([0, 3, 6, 1, 1])

    def theirs(given: Tensor) -> Tensor:
        logp = trl.utils.selective_log_softmax(given[None], tokens[None], temperature=temperature)
        return (logp + 0.3 * trl.utils.entropy_from_logits(given[None] / temperature)).sum() / 5

    def ours(given: Tensor) -> Tensor:
        logp, entropy = our_head(given, tokens, temperature)
        return (logp + 0.3 * entropy).sum() / 5

    losses_agree(theirs, ours, logits(0))
