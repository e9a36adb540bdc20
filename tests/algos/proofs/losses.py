"""Every public loss in one table: how it is called, on what, where its gradient goes, and how it may be cut.

`columns` invents one micro-batch with everything any loss could ask for; each entry picks what it needs. An item is what a
weight belongs to (a token, a pair, a judged answer, a step): the leading dimension of every column. T items.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hone.algos.covariance_losses import clip_cov_loss, kl_cov_loss
from hone.algos.decoupled import decoupled_surrogate
from hone.algos.distillation import forward_kl, generalised_jsd, lumped_student_logp, lumped_teacher_logp, reverse_kl, tempered_logp
from hone.algos.kl import kl_loss, weighted_kl_loss
from hone.algos.kto import kto_loss
from hone.algos.pairs import paired_loss
from hone.algos.policy_losses import clipped_surrogate, entropy_bonus
from hone.algos.preference import conservative_dpo, dpo, ipo, ipo_summed, odds_ratio, orpo, robust_dpo, rpo, simpo
from hone.algos.process import hard_process_loss, soft_process_loss
from hone.algos.protocol import Loss
from hone.algos.reward_models import bradley_terry, log_exp, reward_centre
from hone.algos.sequence_losses import gmpo_loss, gspo_loss, gspo_token_loss
from hone.algos.soft_losses import cispo_loss, reinforce_loss, sapo_loss
from hone.algos.supervised import nll
from hone.algos.trust_region import dppo_loss
from hone.algos.value_losses import clipped_value_loss, squared_value_loss

ROWS = ["..#.#", "###", "....", "#.##", ".#"]
"""Rows of the invented micro-batch: prompts, gaps, one row without anything."""


@dataclass(frozen=True)
class Columns:
    """Numbers by name, one per item; `lengths` are the rows' items."""

    numbers: dict[str, Tensor]
    mask: Tensor
    lengths: tuple[int, ...]

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.numbers[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def cu_seqlens(self) -> Tensor:
        """Where the rows begin and end."""
        return torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)

    def map(self, change: Callable[[str, Tensor], Tensor]) -> "Columns":
        """With every column changed."""
        return Columns({name: change(name, column) for name, column in self.numbers.items()}, self.mask, self.lengths)

    def replace(self, **changes: Tensor) -> "Columns":
        """With other numbers in the named columns."""
        return Columns({**self.numbers, **changes}, self.mask, self.lengths)

    def off(self) -> "Columns":
        """With nothing on the mask."""
        return Columns(self.numbers, torch.zeros_like(self.mask), self.lengths)

    def take(self, rows: Sequence[int]) -> "Columns":
        """The given rows in the given order."""
        edges = self.cu_seqlens.tolist()
        index = torch.tensor([item for row in rows for item in range(edges[row], edges[row + 1])], dtype=torch.long)
        taken = {name: column[index] for name, column in self.numbers.items()}
        return Columns(taken, self.mask[index], tuple(self.lengths[row] for row in rows))

    def single_items(self) -> "Columns":
        """The same items, each a row of its own."""
        return Columns(self.numbers, self.mask, (1,) * self.mask.numel())


def columns(*, seed: int = 0, spread: float = 0.4) -> Columns:
    """One micro-batch in fp64; log-ratios of about `spread` nats and at most twice that, so that probabilities stay below one."""
    mask = torch.tensor([slot == "#" for row in ROWS for slot in row])
    generator = torch.Generator().manual_seed(seed)
    count = mask.numel()

    def normal(*more: int) -> Tensor:
        return torch.randn(count, *more, generator=generator, dtype=torch.float64)

    def share() -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    old_logp = -normal().abs() - 1.0
    values = normal()
    numbers = {
        "old_logp": old_logp,
        "logp": old_logp + spread * normal().clamp(-2, 2),
        "ref_logp": old_logp + normal(),
        "rollout_logp": old_logp + spread * normal().clamp(-2, 2),
        "advantages": normal(),
        "weights": 0.05 + share() / 10,
        "entropy": share(),
        "values": values + normal(),
        "old_values": values,
        "returns": values + normal(),
        "chosen": -0.1 - 3 * share(),
        "rejected": -0.1 - 3 * share(),
        "chosen_logp": -5 * share(),
        "margins": share(),
        "desirable": torch.arange(count) % 2 == 0,
        "logits": 2 * normal(4),
        "shares": normal(4).softmax(-1),
        "labels": torch.randint(0, 4, (count,), generator=generator),
        "student": normal(4).log_softmax(-1),
        "teacher": normal(4).log_softmax(-1),
        "top": torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(count)]),
    }
    return Columns(numbers, mask, tuple(len(row) for row in ROWS))


Slopes = Callable[[Columns], Tensor]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One way to call a public loss."""

    function: Callable[..., Loss]
    call: Callable[[Callable[..., Loss], Columns], Loss]
    leaves: tuple[str, ...]
    """Columns that carry a gradient; all others are constants."""
    slope: Slopes | None = None
    """Gradient of the first leaf, written by hand, where a factor of the value is detached; otherwise the value's derivative."""
    rows: Literal["items", "rows", "nothing"] = "items"
    """What it may be cut between: "items", "rows" where a ratio belongs to a row, "nothing" where statistics are of all that is given."""
    variant: str = ""
    constants: tuple[str, ...] = ()
    """Columns that no gradient may reach even if the caller left one attached."""

    @property
    def label(self) -> str:
        """Module, name and variant."""
        own = f"{self.function.__module__.removeprefix('hone.algos.')}.{self.function.__name__}"
        return f"{own}: {self.variant}" if self.variant else own

    def __call__(self, given: Columns) -> Loss:
        return self.call(self.function, given)


CLIP = {"clip_low": 0.2, "clip_high": 0.28}
LOG_CLIP = {"log_clip_low": 0.3, "log_clip_high": 0.4}
OPEN = {"clip_low": 1.0, "clip_high": math.inf}
COV = {"fraction": 0.3, "cov_low": 0.0, "cov_high": math.inf}


def _judged(c: Columns) -> tuple[Tensor, Tensor, Tensor]:
    return c.advantages, c.weights, c.mask


def _ratio(c: Columns, old: Tensor) -> Tensor:
    return torch.exp(c.logp - old)


def _cispo_slope(c: Columns) -> Tensor:
    return -c.weights * _ratio(c, c.old_logp).clamp(0.7, 1.2) * c.advantages


def _dppo_slope(divergence: str, threshold: float) -> Slopes:
    def slope(c: Columns) -> Tensor:
        pi, mu = c.logp.exp(), c.rollout_logp.exp()
        kl = mu * (mu / pi).log() + (1 - mu) * ((1 - mu) / (1 - pi)).log()
        distance = (pi - mu).abs() if divergence == "tv" else kl
        away = ((c.advantages > 0) & (pi > mu)) | ((c.advantages < 0) & (pi < mu))
        return torch.where(away & (distance > threshold), 0.0, -c.weights * (pi / mu).clamp(max=1.5) * c.advantages)

    return slope


def _gspo_token_slope(c: Columns) -> Tensor:
    slopes = []
    for start, stop in zip(c.cu_seqlens[:-1].tolist(), c.cu_seqlens[1:].tolist(), strict=True):
        live = c.mask[start:stop]
        s = torch.exp((c.logp - c.old_logp)[start:stop][live].mean()) if live.any() else torch.tensor(1.0)
        a = c.advantages[start:stop]
        held = ((a > 0) & (s > 1 + 0.1)) | ((a < 0) & (s < 1 - 0.1))
        slopes.append(torch.where(held, 0.0, -c.weights[start:stop] * s * a))
    return torch.cat(slopes)


def _kto(function: Callable[..., Loss], c: Columns) -> Loss:
    settings = {"beta": 0.4, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    return function(c.chosen, c.desirable, c.weights, c.mask, torch.tensor(0.3, dtype=torch.float64), **settings)


def _lumped(c: Columns) -> tuple[Tensor, Tensor]:
    top = torch.where(c.mask[:, None], c.teacher.gather(-1, c.top.clamp(0, 3)), math.nan)
    return lumped_student_logp(c.logits, c.top, c.mask, temperature=0.7), lumped_teacher_logp(top, c.mask)


TOKENS = [
    Entry(
        function=clipped_surrogate,
        call=lambda f, c: f(c.logp, c.old_logp, *_judged(c), **CLIP, dual_clip=1.4),
        leaves=("logp",),
        variant="dual clip",
        constants=("old_logp", "advantages"),
    ),
    Entry(function=clipped_surrogate, call=lambda f, c: f(c.logp, c.old_logp, *_judged(c), **CLIP), leaves=("logp",)),
    Entry(function=entropy_bonus, call=lambda f, c: f(c.entropy, c.weights, c.mask, coef=0.3), leaves=("entropy",)),
    Entry(function=reinforce_loss, call=lambda f, c: f(c.logp, *_judged(c)), leaves=("logp",), constants=("advantages",)),
    Entry(
        function=cispo_loss,
        call=lambda f, c: f(c.logp, c.old_logp, *_judged(c), cap=1.2, floor=0.7),
        leaves=("logp",),
        slope=_cispo_slope,
        constants=("old_logp", "advantages"),
    ),
    Entry(function=sapo_loss, call=lambda f, c: f(c.logp, c.old_logp, *_judged(c)), leaves=("logp",), constants=("advantages",)),
    Entry(
        function=gspo_loss,
        call=lambda f, c: f(c.logp, c.old_logp, *_judged(c), c.cu_seqlens, clip_low=0.1, clip_high=0.1),
        leaves=("logp",),
        rows="rows",
        constants=("old_logp", "advantages"),
    ),
    Entry(
        function=gspo_token_loss,
        call=lambda f, c: f(c.logp, c.old_logp, *_judged(c), c.cu_seqlens, clip_low=0.1, clip_high=0.1),
        leaves=("logp",),
        slope=_gspo_token_slope,
        rows="rows",
        constants=("old_logp", "advantages"),
    ),
    Entry(
        function=gmpo_loss,
        call=lambda f, c: f(c.logp, c.old_logp, *_judged(c), c.cu_seqlens, **LOG_CLIP),
        leaves=("logp",),
        rows="rows",
        constants=("old_logp", "advantages"),
    ),
    Entry(
        function=clip_cov_loss,
        call=lambda f, c: f(c.logp, c.old_logp, *_judged(c), **CLIP, **COV, generator=torch.Generator().manual_seed(1)),
        leaves=("logp",),
        rows="nothing",
        constants=("old_logp", "advantages"),
    ),
    Entry(
        function=kl_cov_loss,
        call=lambda f, c: f(c.logp, c.old_logp, *_judged(c), fraction=0.3, coef=0.7),
        leaves=("logp",),
        rows="nothing",
        constants=("old_logp", "advantages"),
    ),
    *(
        Entry(
            function=dppo_loss,
            call=lambda f, c, d=divergence, t=threshold: f(c.logp, c.rollout_logp, *_judged(c), divergence=d, threshold=t, ratio_cap=1.5),
            leaves=("logp",),
            slope=_dppo_slope(divergence, threshold),
            variant=divergence,
            constants=("rollout_logp", "advantages"),
        )
        for divergence, threshold in (("tv", 0.05), ("kl", 0.02))
    ),
    Entry(
        function=decoupled_surrogate,
        call=lambda f, c: f(c.logp, c.old_logp, c.rollout_logp, *_judged(c), **CLIP, weight_cap=1.3),
        leaves=("logp",),
        constants=("old_logp", "rollout_logp", "advantages"),
    ),
    *(
        Entry(
            function=kl_loss,
            call=lambda f, c, e=estimator, g=gradient: f(c.logp, c.ref_logp, c.weights, c.mask, coef=0.3, estimator=e, gradient=g),
            leaves=("logp",),
            slope=(lambda c: 0.3 * c.weights * (c.logp - c.ref_logp)) if gradient == "reverse" else None,
            variant=f"{estimator}, {gradient}",
            constants=("ref_logp",),
        )
        for estimator in ("k1", "k2", "k3")
        for gradient in ("reverse", "as_written")
    ),
    *(
        Entry(
            function=weighted_kl_loss,
            call=lambda f, c, e=estimator: f(c.logp, c.old_logp, c.ref_logp, c.weights, c.mask, coef=0.3, estimator=e, ratio_cap=5.0),
            leaves=("logp",),
            slope=lambda c: 0.3 * c.weights * (c.logp - c.old_logp).exp().clamp(max=5.0) * (c.logp - c.ref_logp),
            variant=estimator,
            constants=("old_logp", "ref_logp"),
        )
        for estimator in ("k1", "k2", "k3")
    ),
    Entry(
        function=squared_value_loss, call=lambda f, c: f(c.values, c.returns, c.weights, c.mask), leaves=("values",), constants=("returns",)
    ),
    Entry(
        function=clipped_value_loss,
        call=lambda f, c: f(c.values, c.old_values, c.returns, c.weights, c.mask, clip=0.5),
        leaves=("values",),
        constants=("old_values", "returns"),
    ),
    Entry(function=nll, call=lambda f, c: f(c.logp, c.weights, c.mask), leaves=("logp",)),
]

PAIRS = [
    Entry(
        function=paired_loss,
        call=lambda f, c: f(c.chosen, c.values, c.returns, c.weights, c.mask, name="preference_loss"),
        leaves=("chosen",),
    ),
    *(
        Entry(
            function=function,
            call=lambda f, c, s=settings: f(c.chosen, c.rejected, c.weights, c.mask, **s),
            leaves=("chosen", "rejected"),
            variant=variant,
        )
        for function, variant, settings in (
            (dpo, "", {"beta": 0.4}),
            (conservative_dpo, "", {"beta": 0.4, "flip": 0.1}),
            (conservative_dpo, "half", {"beta": 0.4, "flip": 0.5}),
            (robust_dpo, "", {"beta": 0.4, "flip": 0.1}),
            (ipo, "", {"beta": 0.4}),
            (ipo_summed, "", {"beta": 0.4}),
            (simpo, "", {"beta": 0.4, "gamma_beta_ratio": 0.75}),
            (orpo, "", {"coef": 0.4}),
            (odds_ratio, "", {"coef": 0.4}),
            (log_exp, "", {}),
            (reward_centre, "", {"coef": 0.4}),
        )
    ),
    Entry(
        function=rpo,
        call=lambda f, c: f(c.chosen, c.rejected, c.chosen_logp, c.weights, c.mask, beta=0.4, nll_coef=0.7),
        leaves=("chosen", "rejected", "chosen_logp"),
    ),
    Entry(
        function=bradley_terry,
        call=lambda f, c: f(c.chosen, c.rejected, c.margins, c.weights, c.mask),
        leaves=("chosen", "rejected"),
        constants=("margins",),
    ),
    Entry(function=kto_loss, call=_kto, leaves=("chosen",)),
]

LABELLED = [
    Entry(function=hard_process_loss, call=lambda f, c: f(c.logits, c.labels, c.weights, c.mask), leaves=("logits",)),
    Entry(
        function=soft_process_loss,
        call=lambda f, c: f(c.logits, c.shares, c.weights, c.mask),
        leaves=("logits",),
        constants=("shares",),
    ),
]

DIVERGENCES = [
    *(
        Entry(
            function=function,
            call=lambda f, c, s=settings: f(c.student, c.teacher, c.weights, c.mask, **s),
            leaves=("student",),
            variant=variant,
            constants=("teacher",),
        )
        for function, variant, settings in (
            (forward_kl, "", {}),
            (reverse_kl, "", {}),
            (generalised_jsd, "0", {"beta": 0.0}),
            (generalised_jsd, ".1", {"beta": 0.1}),
            (generalised_jsd, ".5", {"beta": 0.5}),
            (generalised_jsd, "1", {"beta": 1.0}),
        )
    ),
    Entry(
        function=forward_kl,
        call=lambda f, c: f(tempered_logp(c.logits, c.mask, temperature=0.7), c.teacher, c.weights, c.mask),
        leaves=("logits",),
        variant="of logits",
    ),
    *(
        Entry(function=function, call=lambda f, c, s=settings: f(*_lumped(c), c.weights, c.mask, **s), leaves=("logits",), variant="lumped")
        for function, settings in ((forward_kl, {}), (reverse_kl, {}), (generalised_jsd, {"beta": 0.3}))
    ),
]

ENTRIES = {entry.label: entry for entry in (*TOKENS, *PAIRS, *LABELLED, *DIVERGENCES)}


def evaluate(entry: Entry, given: Columns) -> tuple[Loss, dict[str, Tensor]]:
    """(loss, gradient by leaf)."""
    leaves = {name: given.numbers[name].clone().requires_grad_() for name in entry.leaves}
    result = entry(given.replace(**leaves))
    gradients = torch.autograd.grad(result.total, list(leaves.values()))
    return result, dict(zip(leaves, gradients, strict=True))
