"""Labelled rows, weighed for ONE optimiser step, and what an offline algorithm does with them.

Demonstrations -> sft; Pairs (chosen, rejected, chosen, ...) -> rm, dpo, ipo, simpo, orpo; Judgements (good or bad) -> kto;
Steps (labels where a step ends) -> prm; Taught (a teacher's distributions) -> kd. Each has a function that makes it from
`Packed` rows and settles the weights: give it all rows of the step, of all ranks, then cut with `select`, between rows
(between pairs for Pairs). A row without action tokens, or a pair with such a row, weighs nothing.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.algos.batch import Packed
from hone.algos.checks import checked, require_finite
from hone.algos.group_baselines import action_counts
from hone.algos.kto import kl_anchor
from hone.algos.pairs import pair_weights
from hone.algos.protocol import Loss, Outputs
from hone.algos.reduce import Reduction, token_weights

Rows = TypeVar("Rows", bound=Packed, contravariant=True)


@dataclass(frozen=True, kw_only=True)
class Demonstrations(Packed):
    """Rows whose action tokens are to be imitated."""

    weights: Float[Tensor, " T"]


@dataclass(frozen=True, kw_only=True)
class Pairs(Packed):
    """Rows 2i and 2i + 1 are pair i's chosen and rejected answer; both carry the pair's weight and margin [reward]."""

    PER_ROW: ClassVar[frozenset[str]] = frozenset({"row_weights", "margins"})
    ROWS_TOGETHER: ClassVar[int] = 2

    row_weights: Float[Tensor, " N"]
    margins: Float[Tensor, " N"]

    @property
    def pair_weights(self) -> Float[Tensor, " P"]:
        """Weight of each pair."""
        return self.row_weights[0::2]

    @property
    def pair_mask(self) -> Bool[Tensor, " P"]:
        """Pairs that weigh anything."""
        return self.pair_weights != 0


@dataclass(frozen=True, kw_only=True)
class Judgements(Packed):
    """Rows judged one by one; `anchor` is KTO's z_0 of the whole step [nats], put there by `with_anchor`."""

    PER_ROW: ClassVar[frozenset[str]] = frozenset({"row_weights", "desirable"})

    row_weights: Float[Tensor, " N"]
    desirable: Bool[Tensor, " N"]
    anchor: Float[Tensor, ""] | None = None


@dataclass(frozen=True, kw_only=True)
class Steps(Packed):
    """Rows whose action mask marks where steps end; `targets` are shares of C labels that add up to one there."""

    weights: Float[Tensor, " T"]
    targets: Float[Tensor, "T C"]


@dataclass(frozen=True, kw_only=True)
class Taught(Packed):
    """Rows with a teacher's log-probabilities [nats] at every action token: of its top K tokens, or of all V without `teacher_tokens`."""

    weights: Float[Tensor, " T"]
    teacher_logp: Float[Tensor, "T K"]
    teacher_tokens: Int[Tensor, "T K"] | None = None


def weighed_demonstrations(rows: Packed, *, reduction: Reduction) -> Demonstrations:
    """Rows to imitate, their tokens weighed as the reduction says."""
    return Demonstrations(**_fields(rows), weights=token_weights(rows.action_mask, rows.cu_seqlens, reduction))


@checked
def weighed_pairs(rows: Packed, *, margins: Float[Tensor, " P"] | None = None) -> Pairs:
    """Chosen and rejected answers side by side, every pair weighing the same; `margins` [reward] are for reward models, 0 if not given.

    Raises ValueError for an odd number of rows, or for another number of margins than pairs.
    """
    if rows.rows % 2:
        raise ValueError(f"rows are {rows.rows}; pairs need an even number: chosen, rejected, chosen, rejected, ...")
    live = action_counts(rows.action_mask, rows.cu_seqlens) > 0
    weights = pair_weights(live[0::2] & live[1::2])
    own = torch.zeros_like(weights) if margins is None else margins.to(weights.dtype)
    if own.shape != weights.shape:
        raise ValueError(f"margins have shape {tuple(own.shape)}; {rows.rows} rows are {weights.numel()} pairs, give each one margin")
    return Pairs(**_fields(rows), row_weights=weights.repeat_interleave(2), margins=own.repeat_interleave(2))


@checked
def weighed_judgements(rows: Packed, desirable: Bool[Tensor, " N"]) -> Judgements:
    """Answers judged good (True) or bad, every one weighing the same; see `with_anchor`."""
    live = action_counts(rows.action_mask, rows.cu_seqlens) > 0
    return Judgements(**_fields(rows), row_weights=pair_weights(live), desirable=desirable)


@checked
def with_anchor(rows: Judgements, sums: Float[Tensor, "2"]) -> Judgements:
    """The rows with the step's anchor, from `anchor_sums` added up over all ranks. Raises ValueError as `kl_anchor` does."""
    return dataclasses.replace(rows, anchor=kl_anchor(sums))


@checked
def weighed_steps(rows: Packed, targets: Float[Tensor, "T C"], *, reduction: Reduction) -> Steps:
    """Rows with shares of labels at their steps' ends (the action mask); hard labels are `one_hot` of a column.

    Raises ValueError where targets at a step's end are negative, not finite, or do not add up to one.
    """
    labelled = Steps(**_fields(rows), weights=token_weights(rows.action_mask, rows.cu_seqlens, reduction), targets=targets)
    require_finite("weighed_steps", "targets", targets, rows.action_mask[:, None].expand_as(targets))
    broken = rows.action_mask & ((targets < 0).any(-1) | ((targets.sum(-1) - 1).abs() > 1e-3))
    if bool(broken.any()):
        first = int(broken.nonzero()[0, 0])
        shares = [float(share) for share in targets[first]]
        raise ValueError(
            f"targets of the step that ends at token {first} are {shares}; they must be at least 0 and add up to 1, "
            "such as [1 - q, q] for a share q of good ones"
        )
    return labelled


@checked
def weighed_taught(
    rows: Packed, teacher_logp: Float[Tensor, "T K"], *, reduction: Reduction, teacher_tokens: Int[Tensor, "T K"] | None = None
) -> Taught:
    """Rows with the teacher's log-probabilities, their tokens weighed as the reduction says."""
    weights = token_weights(rows.action_mask, rows.cu_seqlens, reduction)
    return Taught(**_fields(rows), weights=weights, teacher_logp=teacher_logp, teacher_tokens=teacher_tokens)


@runtime_checkable
class Offline(Protocol):
    """A frozen dataclass of hyper-parameters; its loss is one of the three below, by what it reads of the model."""

    name: ClassVar[str]
    house: ClassVar[frozenset[str]]
    """Settings whose default is this project's or a peer's: the paper has none, or another."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of the rows to fill first: "ref_logp", "anchor"."""
        ...


@runtime_checkable
class LogpLoss(Offline, Protocol[Rows]):
    """A loss over the policy's log-probabilities of its own tokens."""

    def loss(self, outputs: Outputs, rows: Rows) -> Loss:
        """The loss over any part of an optimiser step."""
        ...


@runtime_checkable
class ScoreLoss(Offline, Protocol[Rows]):
    """A loss over one score per row [reward], read after the row's last token."""

    def score_loss(self, scores: Float[Tensor, " N"], rows: Rows) -> Loss:
        """The loss over any part of an optimiser step."""
        ...


@runtime_checkable
class LogitsLoss(Offline, Protocol[Rows]):
    """A loss over whole distributions; what `logits[t]` belong to is the algorithm's to say."""

    def logits_loss(self, logits: Float[Tensor, "T V"], rows: Rows) -> Loss:
        """The loss over any part of an optimiser step."""
        ...


def _fields(rows: Packed) -> dict[str, Any]:
    return {field.name: getattr(rows, field.name) for field in dataclasses.fields(Packed)}
