"""Distillation: weighted sums over tokens of a divergence between teacher and student. T packed tokens, V vocabulary, K top tokens.

Flow: logits -> log-probabilities [nats] (`tempered_logp`, or `lumped_student_logp` and `lumped_teacher_logp` for a teacher that
reports its top K) -> `forward_kl`, `reverse_kl` or `generalised_jsd`. C columns are the vocabulary, or K tokens and their rest.
The teacher is a constant. A loss at temperature tau shrinks with tau^2; multiply by it to keep the scale, as Hinton does.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.checks import checked
from hone.algos.masking import on_mask, upcast
from hone.algos.protocol import Loss
from hone.algos.reduce import weighted_sum


@checked
def tempered_logp(logits: Float[Tensor, "T V"], action_mask: Bool[Tensor, " T"], *, temperature: float) -> Float[Tensor, "T V"]:
    """Log softmax(logits / temperature) [nats]; uniform off the mask. Raises ValueError unless temperature > 0."""
    return _tempered(logits, action_mask, temperature=temperature).log_softmax(-1)


@checked
def lumped_student_logp(
    logits: Float[Tensor, "T V"], teacher_tokens: Int[Tensor, "T K"], action_mask: Bool[Tensor, " T"], *, temperature: float
) -> Float[Tensor, "T K_plus_1"]:
    """The student's log-probabilities of the teacher's top K tokens and, last, of all other tokens together.

    Lumping can only shrink a divergence, and never below zero; raw partial sums go negative, renormalised ones forget the rest.
    The rest is summed from its own logits: one minus the top's mass would cancel. Raises ValueError unless K < V.
    """
    if not teacher_tokens.shape[1] < logits.shape[1]:
        raise ValueError(
            f"teacher_tokens has {teacher_tokens.shape[1]} of {logits.shape[1]} tokens; use tempered_logp for a whole vocabulary"
        )
    tempered = _tempered(logits, action_mask, temperature=temperature)
    tokens = torch.where(action_mask[:, None], teacher_tokens, torch.arange(teacher_tokens.shape[1], device=logits.device))
    rest = tempered.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([tempered.gather(-1, tokens), rest], -1) - tempered.logsumexp(-1, keepdim=True)


@checked
@torch.no_grad()
def lumped_teacher_logp(teacher_logp: Float[Tensor, "T K"], action_mask: Bool[Tensor, " T"]) -> Float[Tensor, "T K_plus_1"]:
    """The teacher's reported log-probabilities (at the loss's temperature, over its whole vocabulary) and, last, its rest's.

    Rounding cannot tell a rest below the dtype's eps from none, and none would forbid the student every other token for ever: it
    counts as eps. Off the mask the numbers are arbitrary but harmless.
    """
    live = torch.where(action_mask[:, None], upcast(teacher_logp), -torch.inf)
    mass = live.double().logsumexp(-1, keepdim=True)
    rest = torch.log((-torch.expm1(mass.clamp(max=0.0))).clamp(min=torch.finfo(live.dtype).eps))
    return torch.cat([live, rest.to(live.dtype)], -1)


@checked
def forward_kl(
    student_logp: Float[Tensor, "T C"], teacher_logp: Float[Tensor, "T C"], weights: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]
) -> Loss:
    """sum_t w_t KL(teacher || student) [nats]: the student covers what the teacher does. The figure is "distillation_loss".

    Up to the teacher's entropy it is the cross-entropy on soft labels. Reference: arXiv 1503.02531 section 2.
    """
    student, teacher = _live(student_logp, action_mask), _live(teacher_logp.detach(), action_mask)
    return _loss(_divergence(teacher, student), weights, action_mask)


@checked
def reverse_kl(
    student_logp: Float[Tensor, "T C"], teacher_logp: Float[Tensor, "T C"], weights: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]
) -> Loss:
    """sum_t w_t KL(student || teacher) [nats]: the student keeps to where the teacher is likely.

    The exact sum over the vocabulary at each token; how the sampled tokens change later ones has no gradient here.
    Reference: arXiv 2306.08543, the single-step part of eq 3.
    """
    student, teacher = _live(student_logp, action_mask), _live(teacher_logp.detach(), action_mask)
    return _loss(_divergence(student, teacher), weights, action_mask)


@checked
def generalised_jsd(
    student_logp: Float[Tensor, "T C"],
    teacher_logp: Float[Tensor, "T C"],
    weights: Float[Tensor, " T"],
    action_mask: Bool[Tensor, " T"],
    *,
    beta: float,
) -> Loss:
    """sum_t w_t [beta KL(teacher || M) + (1 - beta) KL(student || M)] [nats], M = beta teacher + (1 - beta) student.

    beta = 0 is KL(teacher || student) and beta = 1 KL(student || teacher), as TRL and Liger have it, although the formula goes
    to zero at both ends: the loss jumps there. Raises ValueError for beta outside [0, 1]. Reference: arXiv 2306.13649 eq 1.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; the teacher's share of the mixture lies in [0, 1]")
    if beta == 0:
        return forward_kl(student_logp, teacher_logp, weights, action_mask)
    if beta == 1:
        return reverse_kl(student_logp, teacher_logp, weights, action_mask)
    student, teacher = _live(student_logp, action_mask), _live(teacher_logp.detach(), action_mask)
    # Where neither has any mass, logaddexp would send NaN back.
    empty = (student == -torch.inf) & (teacher == -torch.inf)
    mixture = torch.logaddexp(teacher.masked_fill(empty, 0.0) + math.log(beta), student.masked_fill(empty, 0.0) + math.log1p(-beta))
    return _loss(beta * _divergence(teacher, mixture) + (1 - beta) * _divergence(student, mixture), weights, action_mask)


@checked
@torch.no_grad()
def on_policy_distillation_advantages(
    logp: Float[Tensor, " T"], teacher_logp: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]
) -> Float[Tensor, " T"]:
    """A_t = teacher_logp_t - logp_t [nats] on tokens the student sampled: constants, zero off the mask, no discount, no whitening.

    With a policy-gradient loss its expectation is the gradient of -KL(student || teacher) at each token. Reference: arXiv 2601.02780 eq 8.
    """
    return on_mask(teacher_logp, action_mask) - on_mask(logp, action_mask)


def _tempered(logits: Float[Tensor, "T V"], action_mask: Bool[Tensor, " T"], *, temperature: float) -> Float[Tensor, "T V"]:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    return torch.where(action_mask[:, None], upcast(logits), 0.0) / temperature


def _live(logp: Float[Tensor, "T C"], action_mask: Bool[Tensor, " T"]) -> Float[Tensor, "T C"]:
    return torch.where(action_mask[:, None], upcast(logp), 0.0)


def _divergence(logp: Float[Tensor, "T C"], other_logp: Float[Tensor, "T C"]) -> Float[Tensor, " T"]:
    """KL(p || q) [nats] of log p and log q; columns whose mass in p is zero cost nothing, inf where only q has none."""
    massless = torch.exp(logp.detach()) == 0
    gap = logp.masked_fill(massless, 0.0) - other_logp.masked_fill(massless, 0.0)
    return (torch.exp(logp) * gap).sum(-1)


def _loss(per_token: Float[Tensor, " T"], weights: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]) -> Loss:
    total = weighted_sum(per_token, weights, action_mask)
    return Loss(total=total, metrics={"distillation_loss": total.detach()})
