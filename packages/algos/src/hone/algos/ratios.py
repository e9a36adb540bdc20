"""Importance ratios between two policies on the sampled tokens. T packed tokens; log-probabilities in nats."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hone.algos.checks import checked
from hone.algos.masking import on_mask


@checked
def log_ratio(logp: Float[Tensor, " T"], old_logp: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Log-ratio log rho_t = logp_t - old_logp_t [nats], with `old_logp` a constant; zero off the mask.

    Upcast before subtracting: bf16 keeps 8 significant bits, so the ratio of two close policies would be rounding noise.
    """
    return on_mask(logp, action_mask) - on_mask(old_logp.detach(), action_mask)


@checked
def importance_ratio(logp: Float[Tensor, " T"], old_logp: Float[Tensor, " T"], action_mask: Bool[Tensor, " T"]) -> Float[Tensor, " T"]:
    """rho_t = exp(logp_t - old_logp_t); one off the mask, inf where the difference overflows exp."""
    return torch.exp(log_ratio(logp, old_logp, action_mask))
