"""The ledger: every prompt drawn is trained or dropped with a reason, and the run's own events prove it.

    issued -> trained(step) | dropped(reason)

Each call writes one event (`events.jsonl`) before it is counted, so replaying the file gives the same ledger. The proof:
multiset(issued) = multiset(trained) + multiset(dropped) + multiset(open), no prompt id in two of them.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

KINDS = ("issued", "trained", "dropped")


class LedgerError(Exception):
    """The ledger does not balance: a prompt was lost, trained twice, or settled without having been drawn."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Prompts by their state, and the reasons of the dropped ones."""

    issued: int
    trained: int
    dropped: int
    open: int
    reasons: dict[str, int]


class Ledger:
    """Counts prompts through their life; a prompt id is unique per draw.

    `record(kind, **fields)` writes every change down before it counts: `RunDirectory.append_event`. The thread that acts and the one
    that learns may both enter.
    """

    def __init__(self, record: Callable[..., None]) -> None:
        self._record = record
        self._state: dict[str, str] = {}
        self._counts: dict[str, int] = dict.fromkeys(KINDS, 0)
        self._reasons: dict[str, int] = {}
        self._violations: list[str] = []
        self._entering = threading.Lock()

    def issue(self, prompt_ids: Iterable[str], *, step: int) -> None:
        """Prompts drawn for `step`."""
        self._enter("issued", list(prompt_ids), step=step)

    def train(self, prompt_ids: Iterable[str], *, step: int) -> None:
        """Prompts whose samples were trained on in `step`."""
        self._enter("trained", list(prompt_ids), step=step)

    def drop(self, prompt_ids: Iterable[str], *, step: int, reason: str) -> None:
        """Prompts that will not be trained on, and why. Raises ValueError for an empty reason."""
        if not reason.strip():
            raise ValueError("a prompt was dropped without a reason; say what happened, the ledger is where it is looked up")
        self._enter("dropped", list(prompt_ids), step=step, reason=reason)

    def _enter(self, kind: str, prompt_ids: list[str], *, step: int, **fields: str) -> None:
        if prompt_ids:
            with self._entering:
                self._record(kind, step=step, prompts=prompt_ids, **fields)
                self._count(kind, prompt_ids, step=step, reason=fields.get("reason", ""))

    def _count(self, kind: str, prompt_ids: list[str], *, step: int, reason: str) -> None:
        for prompt_id in prompt_ids:
            before = self._state.get(prompt_id)
            if before != (None if kind == "issued" else "issued"):
                why = "but never issued" if before is None else f"though already {before}"
                self._violations.append(f"{prompt_id} {kind} in step {step} {why}")
            self._state[prompt_id] = kind
        self._counts[kind] += len(prompt_ids)
        if kind == "dropped":
            self._reasons[reason] = self._reasons.get(reason, 0) + len(prompt_ids)

    @property
    def open_prompts(self) -> tuple[str, ...]:
        """Ids drawn and not yet settled, in the order drawn."""
        return tuple(prompt_id for prompt_id, state in self._state.items() if state == "issued")

    def verify(self) -> Totals:
        """Prove that issued = trained + dropped + open. Raises LedgerError with the first ten prompts for which it fails."""
        totals = Totals(**self._counts, open=len(self.open_prompts), reasons=dict(self._reasons))
        balanced = totals.issued == totals.trained + totals.dropped + totals.open
        if self._violations or not balanced:
            listed = "; ".join(self._violations[:10])
            raise LedgerError(
                f"the ledger does not balance: {totals.issued} issued, {totals.trained} trained, "
                f"{totals.dropped} dropped, {totals.open} open; "
                f"{len(self._violations)} violations: {listed}. "
                "Look the ids up in events.jsonl; this is a fault in the loop, not in your input"
            )
        return totals


def replay(events: Iterable[Mapping[str, Any]], record: Callable[..., None] | None = None) -> Ledger:
    """The ledger that events.jsonl tells of; other kinds of event are passed over. What is entered later goes to `record`."""
    ledger = Ledger(record or _write_nothing)
    for event in events:
        if event["kind"] in KINDS:
            ledger._count(event["kind"], event["prompts"], step=event["step"], reason=event.get("reason", ""))
    return ledger


def _write_nothing(kind: str, **fields: Any) -> None:
    """A replayed ledger has been recorded already."""
