"""The language model's head over [M, H] hidden states, a tile of tokens by vocabulary at a time; no table of logits [M, V].

M scored tokens, H hidden size, V vocabulary, c tokens of a chunk, b vocabulary entries of a tile. With z the tempered
logits, log Z = logsumexp(z), p = exp(z - log Z) and S the entropy:

    logp = z[target] - log Z                     d logp / d z_v = [v = target] - p_v
    S = -sum_v p_v (z_v - log Z)                 d S / d z_v    = -p_v (z_v - log Z + S)

A tile's maximum, sum of exponentials and sum of exponentials times exponents are merged online (arXiv 1805.02867), so a
tile lives in a CPU's cache and is never written to memory. Gradients take each tile once more: out of the chunk's logits where
they were kept, else from its product again.
"""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hone.algos.kernels import PLAIN_VARIABLE
from hone.learner.kernels.vocabulary import Vocabulary

TILE_LOGITS = 2**20
"""Logits of one tile on a CPU [numbers]: 4 MiB in fp32, which its caches hold."""
TILE_LOGITS_OF_TWO_BYTES = 2**22
"""The same for bf16 and fp16, whose products lay out their factors anew each time: that pays for larger tiles."""
COMPILED_VOCABULARY = 8192
"""Vocabulary from which compiled loops (two seconds in every process) take a tile's statistics and gradients on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Projection:
    """From hidden states to tempered logits: z = softcap tanh((hidden weight^T + bias) / softcap) / temperature.

    With a `vocabulary`, of this rank's words alone: targets then count from its first word, and `statistics` are of all words.
    """

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None
    temperature: float
    softcap: float | None
    vocabulary: Vocabulary | None = None

    @property
    def precision(self) -> torch.dtype:
        """What is summed and returned in: fp32, or fp64 where the weights are."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def tiles(self, chunk: int) -> Iterator[slice]:
        """The vocabulary in slices: all of it at once on a GPU, where one large product pays."""
        size = self.weight.shape[0]
        logits = TILE_LOGITS_OF_TWO_BYTES if self.weight.element_size() == 2 else TILE_LOGITS
        step = size if self.weight.is_cuda else min(size, max(1, logits // chunk))
        for start in range(0, size, step):
            yield slice(start, min(start + step, size))

    def logits(self, hidden: Float[Tensor, "c H"], tile: slice, *, out: Tensor | None = None) -> Float[Tensor, "c b"]:
        """Raw logits of a tile, in the weights' own format, as engines take the product."""
        weight = self.weight[tile].T
        return torch.mm(hidden, weight, out=out) if self.bias is None else torch.addmm(self.bias[tile], hidden, weight, out=out)

    def tempered(self, logits: Float[Tensor, "c b"]) -> Float[Tensor, "c b"]:
        """Softcap and temperature; a new tensor in `precision`."""
        if self.softcap is None:
            return logits.to(self.precision) / self.temperature
        return (logits.to(self.precision) / self.softcap).tanh_().mul_(self.softcap / self.temperature)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of each token's distribution [nats]: its target's log-probability, log Z, and the entropy where asked for."""

    logp: Float[Tensor, " c"]
    log_norm: Float[Tensor, " c"]
    entropy: Float[Tensor, " c"] | None


def keep(projection: Projection, chunk: int) -> list[Tensor]:
    """Room for all raw logits of a chunk, tile by tile: c V numbers in the weights' format."""
    room = projection.weight.new_empty(chunk * projection.weight.shape[0])
    return [room[chunk * tile.start : chunk * tile.stop].view(chunk, -1) for tile in projection.tiles(chunk)]


def statistics(
    projection: Projection,
    hidden: Float[Tensor, "c H"],
    targets: Int[Tensor, " c"],
    *,
    with_entropy: bool,
    kept: list[Tensor] | None = None,
) -> Statistics:
    """One chunk's statistics; its raw logits are left in `kept`, if given (from `keep`)."""
    highest = hidden.new_full((len(targets),), -torch.inf, dtype=projection.precision)
    total, weighted, at_target = torch.zeros_like(highest), torch.zeros_like(highest), torch.zeros_like(highest)
    scratch = None
    for index, tile in enumerate(projection.tiles(len(targets))):
        width = tile.stop - tile.start
        if kept is None and (scratch is None or scratch.shape[1] != width):
            scratch = hidden.new_empty(len(targets), width)
        logits = projection.logits(hidden, tile, out=scratch if kept is None else kept[index])
        own = (targets >= tile.start) & (targets < tile.stop)
        column = (targets - tile.start).clamp_(0, width - 1)
        top, added, product, gathered = _reduced(projection, logits, column, with_entropy=with_entropy)
        # log Z = highest + log(total); `weighted` holds sum e (z - highest), whose terms all have one sign: nothing cancels.
        new = torch.maximum(highest, top)
        before, after = (highest - new).exp_(), (top - new).exp_()
        # The shift of an empty beginning is infinite, times nothing.
        weighted = before * (weighted + total * (highest - new).nan_to_num(neginf=0.0)) + after * (product + added * (top - new))
        total, highest = before * total + after * added, new
        at_target = torch.where(own, gathered, at_target)
    if projection.vocabulary is not None:
        highest, total, weighted, at_target = projection.vocabulary.merged(highest, total, weighted, at_target)
    log_total = total.log()
    entropy = log_total - weighted / total if with_entropy else None
    return Statistics(logp=(at_target - highest) - log_total, log_norm=highest + log_total, entropy=entropy)


def _reduced(projection: Projection, logits: Tensor, column: Tensor, *, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per token over a tile: max z, sum exp(z - max), sum exp(z - max) (z - max) (0 unless asked for), and z of `column`."""
    if (epilogue := _epilogue(logits)) is not None:
        return epilogue.reduce(logits, column, temperature=projection.temperature, softcap=projection.softcap)
    if (compiled := _compiled_epilogue(projection, logits)) is not None:
        return compiled.reduce(logits, column, temperature=projection.temperature, with_entropy=with_entropy)
    exponents = projection.tempered(logits)
    top = exponents.amax(1)
    gathered = exponents.gather(1, column[:, None]).squeeze(1)
    exponents.sub_(top[:, None])
    if not with_entropy:
        added = exponents.exp_().sum(1)
        return top, added, torch.zeros_like(added), gathered
    exponentials = exponents.exp()
    added = exponentials.sum(1)
    return top, added, exponentials.mul_(exponents).sum(1), gathered


class Gradients:
    """Sums of the head's gradients over chunks, in `precision`: in bf16 every chunk after the first few would be rounded away.

    The weights' are as large as the weights; where there is one chunk (`alone`), a product rounded once is its whole sum.
    """

    def __init__(self, projection: Projection, hidden: Float[Tensor, "M H"], *, needs: tuple[bool, bool, bool], alone: bool) -> None:
        needs_hidden, needs_weight, needs_bias = needs
        weight, precision = projection.weight, projection.precision
        self.projection = projection
        self.hidden = torch.empty_like(hidden) if needs_hidden else None
        self.weight = torch.empty(weight.shape, dtype=weight.dtype if alone else precision, device=weight.device) if needs_weight else None
        self.bias = torch.zeros(weight.shape[0], dtype=precision, device=weight.device) if needs_bias else None
        self.chunks = 0

    def add(
        self,
        part: slice,
        hidden: Float[Tensor, "c H"],
        targets: Int[Tensor, " c"],
        found: Statistics,
        *,
        logp_slope: Float[Tensor, " c"] | None,
        entropy_slope: Float[Tensor, " c"] | None,
        kept: list[Tensor] | None = None,
    ) -> None:
        """Adds chunk `part`'s, for these derivatives of the loss by logp and entropy. Spoils the logits in `kept`."""
        projection = self.projection
        slope = torch.zeros_like(found.log_norm) if logp_slope is None else logp_slope.to(projection.precision)
        into_hidden = None if self.hidden is None else torch.zeros(hidden.shape, dtype=projection.precision, device=hidden.device)
        for index, tile in enumerate(projection.tiles(len(targets))):
            logits = projection.logits(hidden, tile) if kept is None else kept[index]
            column = torch.where((targets >= tile.start) & (targets < tile.stop), targets - tile.start, -1)
            pull = _pull(projection, logits, column, found, slope, entropy_slope)
            if self.bias is not None:
                self.bias[tile] += pull.sum(0, dtype=self.bias.dtype)
            if into_hidden is not None:
                _add_product(into_hidden, pull, projection.weight[tile], first=tile.start == 0)
            if self.weight is not None:
                _add_product(self.weight[tile], pull.T, hidden, first=self.chunks == 0)
        if self.hidden is not None:
            assert into_hidden is not None
            self.hidden[part] = into_hidden
        self.chunks += 1

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """By hidden states, weight and bias, each in its own format."""
        if self.weight is not None and self.chunks == 0:
            self.weight.zero_()
        dtype = self.projection.weight.dtype
        weight, bias = (None if total is None else total.to(dtype) for total in (self.weight, self.bias))
        return self.hidden, weight, bias


def _pull(
    projection: Projection, logits: Tensor, column: Tensor, found: Statistics, slope: Tensor, entropy_slope: Tensor | None
) -> Float[Tensor, "c b"]:
    """The loss's derivatives by a tile's raw logits, in the weights' format; `column` is the target's, -1 where it is elsewhere."""
    if (epilogue := _epilogue(logits)) is not None:
        settings = {"temperature": projection.temperature, "softcap": projection.softcap}
        return epilogue.pull_(logits, column, found.logp, found.log_norm, slope, found.entropy, entropy_slope, **settings)
    # 1 - p of a confident token would drown in the rounding of log Z, and all of it in the weights' format.
    at_target = slope * torch.expm1(found.logp).neg_()
    if entropy_slope is not None:
        assert found.entropy is not None
        at_target -= entropy_slope * found.logp.exp() * (found.logp + found.entropy)
    if (compiled := _compiled_epilogue(projection, logits)) is not None:
        slopes = (slope, found.entropy, entropy_slope)
        return compiled.pull_(logits, column, at_target, found.log_norm, *slopes, temperature=projection.temperature)
    tempered = projection.tempered(logits)
    bend = None if projection.softcap is None else (tempered * (projection.temperature / projection.softcap)).square_().neg_().add_(1)
    log_probabilities = tempered.sub_(found.log_norm[:, None])
    if entropy_slope is None:
        pull = log_probabilities.exp_().mul_(slope.neg()[:, None])
    else:
        assert found.entropy is not None
        probabilities = log_probabilities.exp()
        pull = log_probabilities.add_(found.entropy[:, None]).mul_(entropy_slope[:, None]).add_(slope[:, None]).mul_(probabilities).neg_()
    place = column.clamp(min=0)[:, None]
    pull.scatter_(1, place, torch.where(column[:, None] >= 0, at_target[:, None], pull.gather(1, place))).div_(projection.temperature)
    return (pull if bend is None else pull.mul_(bend)).to(logits.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """In place: total (+)= left @ right, in total's own format."""
    if total.dtype == right.dtype:
        torch.addmm(total, left, right, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(left @ right)
    else:
        total += left @ right


def _epilogue(logits: Tensor) -> ModuleType | None:
    """The Triton kernels, where they run: on CUDA, and on a CPU in Triton's interpreter (TRITON_INTERPRET=1)."""
    runs = logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return _triton_epilogue() if runs and logits.dtype != torch.float64 else None


def _compiled_epilogue(projection: Projection, logits: Tensor) -> ModuleType | None:
    """The loops for a CPU, for fp32 and bf16 without a softcap, where numba is installed and the vocabulary pays for compiling them."""
    known = logits.dtype in (torch.float32, torch.bfloat16)
    suited = logits.device.type == "cpu" and known and projection.softcap is None and logits.is_contiguous()
    if not suited or projection.weight.shape[0] < COMPILED_VOCABULARY or os.environ.get(PLAIN_VARIABLE):
        return None
    return _numba_epilogue()


@functools.cache
def _numba_epilogue() -> ModuleType | None:
    if find_spec("numba") is None:
        return None
    from hone.learner.kernels import epilogue_cpu

    return epilogue_cpu


@functools.cache
def _triton_epilogue() -> ModuleType | None:
    if find_spec("triton") is None:
        return None
    from hone.learner.kernels import epilogue

    return epilogue
