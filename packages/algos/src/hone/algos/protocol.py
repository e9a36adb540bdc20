"""What an algorithm is: a frozen dataclass of hyper-parameters with pure methods over the stages of the data.

Flow: Batch --advantages--> Advantages --judge--> Scored --loss--> Loss. Nothing here knows a model, a device or a rank.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from hone.algos.batch import Batch, Scored
from hone.algos.reduce import Reduction


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What the policy says now, with gradient: `logp` [nats] and, where asked for, `entropy` [nats] of each token's distribution."""

    logp: Float[Tensor, " T"]
    entropy: Float[Tensor, " T"] | None = None


@dataclass(frozen=True, kw_only=True)
class Advantages:
    """Advantages per token, zero off the action mask; `returns` are the critic's targets where a critic exists.

    `figures` are numbers of the whole rollout worth telling (a group baseline's groups of one, say).
    """

    advantages: Float[Tensor, " T"]
    returns: Float[Tensor, " T"] | None = None
    figures: dict[str, Float[Tensor, ""]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A weighted sum to minimise, and figures that add up over micro-batches and ranks just as it does (detached)."""

    total: Float[Tensor, ""]
    metrics: dict[str, Float[Tensor, ""]]

    def __add__(self, other: "Loss") -> "Loss":
        """Two terms of one objective, or two parts of one step: totals add, and so do figures of the same name."""
        metrics = dict(self.metrics)
        for name, value in other.metrics.items():
            metrics[name] = metrics[name] + value if name in metrics else value
        return Loss(total=self.total + other.total, metrics=metrics)


@runtime_checkable
class Corrected(Protocol):
    """How samples count that another program, or an older policy, has drawn."""

    @property
    def level(self) -> str:
        """What shares one correction: "sequence", or else a token; the figures of its effective sample size count those."""
        ...

    def factor(self, batch: Batch) -> Float[Tensor, " T"] | None:
        """What every advantage of a whole rollout is multiplied by; None where nothing is corrected."""
        ...


@runtime_checkable
class Algorithm(Protocol):
    """The two pure methods of a policy-gradient algorithm, and what it needs computed beforehand."""

    name: ClassVar[str]
    house: ClassVar[frozenset[str]]
    """Settings whose default is this project's or a peer's: the paper has none, or another."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Batch` to fill before judging: "old_logp", "ref_logp", "values", "greedy_scores"."""
        ...

    @property
    def reduction(self) -> Reduction:
        """How the action tokens of one optimiser step are weighted."""
        ...

    @property
    def correction(self) -> Corrected:
        """How samples count for which engine and learner disagree; `judge` applies it."""
        ...

    def advantages(self, batch: Batch) -> Advantages:
        """Judge a whole rollout."""
        ...

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        """The policy's loss over any part of an optimiser step."""
        ...


@runtime_checkable
class ActorCritic(Algorithm, Protocol):
    """An algorithm whose `needs` contains "values": it also trains a critic."""

    def value_loss(self, values: Float[Tensor, " T"], scored: Scored) -> Loss:
        """The critic's loss over any part of an optimiser step."""
        ...
