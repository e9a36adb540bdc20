"""What the loop over labelled rows needs, put together from a group of learner ranks, samples, and what was asked of a reference.

Where the ranks run is not known here: `offline_groups.py` hands in Ray actors or a learner in this process.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hone.algos.algorithms.distillation import Distillation
from hone.algos.batch import Packed, select
from hone.algos.kl import k1
from hone.algos.kto import anchor_sums
from hone.algos.offline import Demonstrations, Judgements, Offline, Taught, with_anchor
from hone.algos.pairs import row_logp
from hone.datasets.labelled import Drawable, Sample
from hone.datasets.mismatched import Mismatched
from hone.launch.labels import LABELLERS, packed
from hone.launch.parts import RoleGroup
from hone.launch.phases import Phases
from hone.launch.reference import Asked, Memory
from hone.learner.roles import StepResult

MODEL, TEACHER, REFERENCE = "model", "teacher", "reference"
"""The roles: the model that is trained, in distillation the one it learns from, and where answers are compared the one they are with."""
PAIRS_FOR_STATISTICS = 500


@runtime_checkable
class OfflineGroup(RoleGroup, Protocol):
    """The processes that host the model, as far as labelled rows go."""

    def update_offline(self, role: str, rows: Packed, algo: Offline) -> StepResult:
        """One optimiser step over labelled rows."""
        ...

    def evaluate_offline(self, role: str, rows: Packed, algo: Offline) -> dict[str, float]:
        """The figures of such a step, without one."""
        ...

    def scores(self, role: str, rows: Packed) -> Tensor:
        """A reward model's score of every row [reward], [N]."""
        ...

    def keep_statistics(self, role: str, scores: Tensor) -> None:
        """Let a reward model's configuration have the mean and deviation of its scores."""
        ...

    def top_logp(self, role: str, rows: Packed, *, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """A teacher's likeliest tokens and their log-probabilities [nats] at every action token, [T, K] each."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Samples and, where the loss compares, what the reference says of them: `said` of the rows of tokens of all samples together.

    Each sample has `rows_each` rows then. `mismatched` are KTO's rows of a prompt and another's answer, one for each sample, with the
    reference's words on them in `said_of_mismatched`.
    """

    samples: Drawable
    said: Memory | None = None
    rows_each: int = 1
    mismatched: Mismatched | None = None
    said_of_mismatched: Memory | None = None

    @property
    def known(self) -> bool:
        """Whether the reference has answered for every row."""
        return all(one is None or one.whole for one in (self.said, self.said_of_mismatched))

    def rows(self, samples: Sequence[Sample], places: Sequence[int], asked: Asked) -> Packed:
        """The rows of these samples, which are those at `places`, end to end; `asked` is a reference for those not asked for yet."""
        rows = [row for sample in samples for row in sample.rows]
        if self.said is None:
            return packed(rows)
        numbers = [self.rows_each * place + row for place in places for row in range(self.rows_each)]
        return packed(rows, self.said.of(rows, numbers, asked))

    def others(self, places: Sequence[int], asked: Asked) -> Packed:
        """The mismatched rows of the samples at `places`; at least two, for a mean of one is no anchor."""
        assert self.mismatched is not None and self.said_of_mismatched is not None, "no anchor is measured here"
        self.mismatched.ready(places)
        wanted = places if len(places) > 1 else [places[0], self.mismatched.other(places[0])]
        rows = [self.mismatched[place] for place in wanted]
        return packed(rows, self.said_of_mismatched.of(rows, wanted, asked))


@dataclasses.dataclass(kw_only=True)
class OfflineAssembly:
    """`OfflineParts` made of a group, samples and the algorithm of a command (`verb`).

    `evaluate_every` steps the rows held out are measured, and after the `last` one. With a teacher, `top_k` of its tokens are looked
    at, 0 for all of its `vocabulary`.
    """

    verb: str
    algo: Offline
    group: OfflineGroup
    source: Iterator[Sequence[int]]
    table: Table
    held_out: Table | None
    batch_size: int
    evaluate_every: int
    last: int
    on_phase: Callable[[str, float | None], None]
    closers: Sequence[Callable[[], None]]
    top_k: int = 0
    vocabulary: int = 0

    def __post_init__(self) -> None:
        """Begin to time."""
        self._phases = Phases(self.on_phase)

    def draws(self) -> Iterator[Sequence[int]]:
        """The rows of one step after another, by their places."""
        return self.source

    def label(self, places: Sequence[int]) -> Packed:
        """The step's rows with their weights and all that the algorithm needs besides."""
        return self._completed(self._labelled(self.table, places), self.table, places)

    def learn(self, rows: Packed) -> dict[str, float]:
        """One optimiser step."""
        result = self.group.update_offline(MODEL, rows, self.algo)
        return {**result.metrics, "grad_norm": result.grad_norm, "lr": result.lr, "skipped": float(not result.applied)}

    def due(self, number: int) -> bool:
        """Whether the rows held out are to be measured after a step."""
        return self.held_out is not None and (number % self.evaluate_every == 0 or number == self.last)

    def evaluate(self) -> dict[str, float]:
        """The figures of all rows held out as if they were one optimiser step, so that no cut of them changes any."""
        assert self.held_out is not None, "evaluated where nothing is held out"
        places = range(len(self.held_out.samples))
        rows = self._labelled(self.held_out, places)
        if isinstance(rows, Judgements):
            rows = self._completed(rows, self.held_out, places)
        size = max(1, self.batch_size) * rows.ROWS_TOGETHER
        totals: dict[str, float] = {}
        for start in range(0, rows.rows, size):
            part = select(rows, range(start, min(start + size, rows.rows)))
            part = self._taught(part) if isinstance(self.algo, Distillation) else part
            for name, share in self.group.evaluate_offline(MODEL, part, self.algo).items():
                totals[name] = totals.get(name, 0.0) + share
        return totals

    def keep_statistics(self) -> None:
        """A reward model's mean and deviation over the rows held out, else over the first rows it learnt from."""
        table = self.held_out or self.table
        samples = list(islice(table.samples, PAIRS_FOR_STATISTICS))
        rows = table.rows(samples, range(len(samples)), self.group)
        self.group.keep_statistics(MODEL, self.group.scores(MODEL, rows))

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time what happens inside."""
        return self._phases.phase(name)

    def measured(self, rows: Packed) -> dict[str, float]:
        """`timing/<phase>` [s], the rate of tokens, and how many were trained on, of the step that ends here."""
        seconds = self._phases.taken()
        return {
            **{f"timing/{name}": value for name, value in seconds.items()},
            "timing/step_total": sum(seconds.values()),
            "perf/train_tokens_per_second": rows.tokens.numel() / seconds["train"],
            "train/tokens": float(rows.action_mask.sum()),
        }

    def export(self, role: str, directory: str, *, average: bool = False) -> None:
        """Write a role's model in the Hugging Face layout, or the moving average of its weights."""
        self.group.export(role, directory, average=average)

    def close(self) -> None:
        """End everything that was started, in order; the first error is raised after all were tried."""
        errors: list[Exception] = []
        for closer in self.closers:
            try:
                closer()
            except Exception as error:  # every part gets its chance to end; nothing is dropped: raised below
                errors.append(error)
        if errors:
            raise ExceptionGroup("ending the run's parts failed", errors)

    def _labelled(self, table: Table, places: Sequence[int]) -> Packed:
        samples = [table.samples[place] for place in places]
        return LABELLERS[self.verb](table.rows(samples, places, self.group), samples, self.algo)

    def _completed(self, rows: Packed, table: Table, places: Sequence[int]) -> Packed:
        """The rows with what depends on the models: KTO's anchor under the policy as it stands, a teacher's distributions."""
        if isinstance(rows, Judgements):
            others = table.others(places, self.group)
            log_ratios = k1(self.group.logp(MODEL, others), others.require("ref_logp"))
            found = row_logp(log_ratios, others.action_mask, others.cu_seqlens)
            return with_anchor(rows, anchor_sums(found, torch.ones(others.rows, dtype=torch.bool)))
        return self._taught(rows) if isinstance(self.algo, Distillation) else rows

    def _taught(self, rows: Packed) -> Taught:
        assert isinstance(rows, Demonstrations) and isinstance(self.algo, Distillation), "a teacher judges demonstrations"
        whole = self.top_k == 0 or self.top_k >= self.vocabulary
        k = self.vocabulary if whole else self.top_k
        tokens, logp = self.group.top_logp(TEACHER, rows, k=k, temperature=self.algo.temperature)
        fields: dict[str, Any] = {field.name: getattr(rows, field.name) for field in dataclasses.fields(Demonstrations)}
        if whole:  # in the order of the vocabulary
            return Taught(**fields, teacher_logp=torch.zeros_like(logp).scatter_(1, tokens, logp))
        return Taught(**fields, teacher_logp=logp, teacher_tokens=tokens)
