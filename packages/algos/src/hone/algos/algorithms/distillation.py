"""Knowledge distillation: the student's distribution towards the teacher's. Reference: arXiv 2306.13649 (GKD), 2306.08543 (reverse)."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from hone.algos.distillation import (
    forward_kl,
    generalised_jsd,
    lumped_student_logp,
    lumped_teacher_logp,
    reverse_kl,
    tempered_logp,
)
from hone.algos.offline import Taught
from hone.algos.protocol import Loss
from hone.algos.ranges import Range, require_valid
from hone.algos.reduce import Reduction
from hone.algos.supervised import nll


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A divergence to the teacher at every token, mixed with the likelihood of the tokens themselves."""

    name: ClassVar[str] = "kd"
    house: ClassVar[frozenset[str]] = frozenset({"divergence", "beta", "kd_coef"})

    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """KL(teacher || student), KL(student || teacher), or the generalised Jensen-Shannon divergence between them."""
    beta: Annotated[float, Range(low=0, high=1)] = 0.5
    """Teacher's share of the mixture in the Jensen-Shannon divergence, in [0, 1]; not looked at otherwise."""
    temperature: Annotated[float, Range(low=0, open_low=True)] = 1.0
    """Temperature of both distributions, above 0; the teacher's log-probabilities must have been taken at it."""
    kd_coef: Annotated[float, Range(low=0, high=1)] = 0.4
    """Share of the divergence in the loss, in [0, 1]; the rest is the tokens' negative log-likelihood."""
    reduction: Reduction = field(default_factory=Reduction)
    """How the tokens of an optimiser step are weighted."""

    @property
    def needs(self) -> frozenset[str]:
        """Nothing more: the teacher's log-probabilities are in the rows."""
        return frozenset()

    def logits_loss(self, logits: Float[Tensor, "T V"], rows: Taught) -> Loss:
        """The loss over any part of an optimiser step; logits[t] are those that tokens[t] was drawn from."""
        require_valid(self)
        mask = rows.action_mask
        if rows.teacher_tokens is None:
            student, teacher = tempered_logp(logits, mask, temperature=self.temperature), rows.teacher_logp
        else:
            student = lumped_student_logp(logits, rows.teacher_tokens, mask, temperature=self.temperature)
            teacher = lumped_teacher_logp(rows.teacher_logp, mask)
        if self.divergence == "jsd":
            divergence = generalised_jsd(student, teacher, rows.weights, mask, beta=self.beta)
        else:
            kl = forward_kl if self.divergence == "forward" else reverse_kl
            divergence = kl(student, teacher, rows.weights, mask)
        loss = Loss(total=self.kd_coef * divergence.total, metrics=divergence.metrics)
        if self.kd_coef == 1:
            return loss
        own = tempered_logp(logits, mask, temperature=1.0).gather(-1, rows.tokens[:, None])[:, 0]
        likelihood = nll(own, rows.weights, mask)
        return loss + Loss(total=(1 - self.kd_coef) * likelihood.total, metrics=likelihood.metrics)
