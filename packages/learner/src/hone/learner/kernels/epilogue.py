"""What follows the head's product on a GPU, in Triton: one pass over a chunk's logits for its statistics, one for their gradients.

One program per token walks over the vocabulary. Numbers are read in the product's format and worked on in fp32; the
gradient takes the logits' own place. See `tiles` for the formulas, and for the same in plain torch. Imported only where it runs.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 4096
"""Vocabulary entries a program holds at once."""


@triton.jit
def _tempered(raw, temperature, softcap, CAPPED: tl.constexpr):
    z = raw.to(tl.float32)
    if CAPPED:
        # tanh x = 2 sigmoid(2 x) - 1, which every backend has.
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return z / temperature


@triton.jit
def _reduce(logits, stride, column, top, added, product, gathered, width, temperature, softcap, CAPPED: tl.constexpr, SIZE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * stride
    highest = -float("inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, width, SIZE):
        place = start + tl.arange(0, SIZE)
        z = _tempered(tl.load(row + place, mask=place < width, other=0.0), temperature, softcap, CAPPED)
        z = tl.where(place < width, z, -float("inf"))
        new = tl.maximum(highest, tl.max(z, 0))
        exponent = tl.where(place < width, z - new, 0.0)
        exponential = tl.where(place < width, tl.exp(exponent), 0.0)
        shift = tl.where(start > 0, highest - new, 0.0)
        kept = tl.exp(shift)
        weighted = kept * (weighted + total * shift) + tl.sum(exponential * exponent, 0)
        total = kept * total + tl.sum(exponential, 0)
        highest = new
    tl.store(top + token, highest)
    tl.store(added + token, total)
    tl.store(product + token, weighted)
    tl.store(gathered + token, _tempered(tl.load(row + tl.load(column + token)), temperature, softcap, CAPPED))


@triton.jit
def _pull(
    logits,
    stride,
    column,
    logp,
    log_norm,
    slope,
    entropy,
    entropy_slope,
    width,
    temperature,
    softcap,
    CAPPED: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    SIZE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    row = logits + token * stride
    z = _tempered(tl.load(row + place, mask=place < width, other=0.0), temperature, softcap, CAPPED)
    log_probability = z - tl.load(log_norm + token)
    probability = tl.exp(log_probability)
    push = tl.load(slope + token)
    result = -push * probability
    # 1 - p of a confident token would drown in the rounding of log Z: expm1 of its own log-probability, after Kahan.
    own = tl.load(logp + token)
    ratio = tl.exp(own)
    at_target = -push * tl.where(ratio == 1.0, own, (ratio - 1.0) * own / tl.log(tl.where(ratio == 1.0, 2.0, ratio)))
    if WITH_ENTROPY:
        entropy_push = tl.load(entropy_slope + token)
        spread = tl.load(entropy + token)
        result -= entropy_push * probability * (log_probability + spread)
        at_target -= entropy_push * ratio * (own + spread)
    result = tl.where(place == tl.load(column + token), at_target, result)
    result = result / temperature
    if CAPPED:
        capped = z * temperature / softcap
        result = result * (1.0 - capped * capped)
    tl.store(row + place, result.to(logits.dtype.element_ty), mask=place < width)


def reduce(
    logits: Float[Tensor, "c b"], column: Int[Tensor, " c"], *, temperature: float, softcap: float | None
) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"], Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Per token: max z, sum exp(z - max), sum exp(z - max) (z - max), and z of `column`; z = softcap and temperature of `logits`."""
    results = torch.empty(4, len(logits), dtype=torch.float32, device=logits.device)
    top, added, product, gathered = results
    cap = 1.0 if softcap is None else softcap
    settings = {"CAPPED": softcap is not None, "SIZE": BLOCK}
    _reduce[(len(logits),)](logits, logits.stride(0), column, top, added, product, gathered, logits.shape[1], temperature, cap, **settings)
    return top, added, product, gathered


def pull_(
    logits: Float[Tensor, "c b"],
    column: Int[Tensor, " c"],
    logp: Float[Tensor, " c"],
    log_norm: Float[Tensor, " c"],
    slope: Float[Tensor, " c"],
    entropy: Float[Tensor, " c"] | None,
    entropy_slope: Float[Tensor, " c"] | None,
    *,
    temperature: float,
    softcap: float | None,
) -> Float[Tensor, "c b"]:
    """`logits` overwritten by d loss / d logits, for slopes by log-probability and entropy; `column` is -1 where no target is in here."""
    with_entropy = entropy_slope is not None
    grid = (len(logits), triton.cdiv(logits.shape[1], BLOCK))
    settings = {"CAPPED": softcap is not None, "WITH_ENTROPY": with_entropy, "SIZE": BLOCK}
    cap = 1.0 if softcap is None else softcap
    _pull[grid](
        logits,
        logits.stride(0),
        column,
        logp,
        log_norm,
        slope.contiguous(),
        entropy if with_entropy else slope,
        entropy_slope.contiguous() if with_entropy else slope,
        logits.shape[1],
        temperature,
        cap,
        **settings,
    )
    return logits
