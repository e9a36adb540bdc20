"""What each kind of offline loss asks of a model: log-probabilities, scores, label logits, or the whole vocabulary's logits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hone.algos.batch import Packed
from hone.algos.offline import LogitsLoss, LogpLoss, Offline, ScoreLoss
from hone.algos.protocol import Loss, Outputs
from hone.learner.logprobs import Slopes
from hone.learner.over_logits import LossOverLogits, OverLogits
from hone.learner.per_token import PerToken


@dataclass(frozen=True, kw_only=True)
class Questions:
    """A role's model asked about a micro-batch, with gradient.

    `logp` a policy's log-probabilities; `read` what a reward or process head says; `over_logits` what a reader makes of a
    policy's logits; `slopes` whether `logp` may be told the loss's derivatives.
    """

    logp: Callable[[Packed, Slopes | None], Outputs]
    read: Callable[[Packed], Tensor]
    over_logits: Callable[[Packed, OverLogits], tuple[Tensor, ...]]
    slopes: bool


def told(algo: Offline, *, role: str, kind: str, ask: Questions) -> Callable[[Any], Loss]:
    """As `loss_of`, with the whole loss among the figures, as "loss": most algorithms have terms beside their own."""
    loss_over = loss_of(algo, role=role, kind=kind, ask=ask)

    def loss(part: Any) -> Loss:
        found = loss_over(part)
        return Loss(total=found.total, metrics={"loss": found.total.detach(), **found.metrics})

    return loss


def loss_of(algo: Offline, *, role: str, kind: str, ask: Questions) -> Callable[[Any], Loss]:
    """The algorithm's loss over any micro-batch of one optimiser step. Raises ValueError for a kind of model it cannot train."""
    if kind == "reward" and isinstance(algo, ScoreLoss):
        return lambda part: algo.score_loss(ask.read(part), part)
    if kind == "process" and isinstance(algo, LogitsLoss):
        return lambda part: algo.logits_loss(ask.read(part), part)
    if kind == "policy" and isinstance(algo, LogpLoss):
        per_token = PerToken(algo, with_entropy=False)
        return lambda part: algo.loss(ask.logp(part, per_token.slopes(part) if ask.slopes else None), part)
    if kind == "policy" and isinstance(algo, LogitsLoss):

        def over_logits(part: Packed) -> Loss:
            reader = LossOverLogits(part, algo)
            total, figures = ask.over_logits(part, reader)
            return Loss(total=total, metrics=dict(zip(reader.names, figures.unbind(), strict=True)))

        return over_logits
    raise ValueError(
        f"{algo.name} cannot train {role}, a {kind} model: losses over log-probabilities (sft, dpo, kto) take a policy, over scores (rm) "
        "a reward model, over logits (prm, kd) a process model or a policy"
    )
