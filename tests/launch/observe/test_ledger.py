"""Locks the ledger.

1. Every prompt drawn is trained, dropped with a reason, or open: issued = trained + dropped + open, prompt by prompt.
2. No prompt is trained twice, trained after it was dropped, settled without having been drawn, or drawn twice.
3. What is counted was written down before; replaying the events gives the same ledger.
4. A drop without a reason is refused.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.launch.observe.ledger import Ledger, LedgerError, Totals, replay


class Events(list):
    def __call__(self, kind, **fields):
        self.append({"kind": kind, **fields})


def test_a_clean_run_balances():
    ledger = Ledger(Events())
    ledger.issue(["a", "b", "c", "d"], step=1)
    ledger.train(["a", "b"], step=1)
    ledger.drop(["c"], step=1, reason="longer than the budget")
    assert ledger.verify() == Totals(issued=4, trained=2, dropped=1, open=1, reasons={"longer than the budget": 1})
    assert ledger.open_prompts == ("d",)


@given(st.lists(st.sampled_from(["train", "drop", "leave"]), max_size=20))
def test_any_fate_of_every_prompt_balances_and_replays(fates):
    events = Events()
    ledger = Ledger(events)
    ledger.issue([str(index) for index in range(len(fates))], step=1)
    for index, fate in enumerate(fates):
        if fate == "train":
            ledger.train([str(index)], step=2)
        elif fate == "drop":
            ledger.drop([str(index)], step=2, reason="x")
    totals = ledger.verify()
    assert (totals.issued, totals.trained, totals.dropped, totals.open) == (
        len(fates),
        fates.count("train"),
        fates.count("drop"),
        fates.count("leave"),
    )
    assert replay(events).verify() == totals
    assert replay(events).open_prompts == ledger.open_prompts


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (lambda ledger: ledger.train(["a"], step=2), "a trained in step 2 though already trained"),
        (lambda ledger: ledger.drop(["a"], step=2, reason="x"), "a dropped in step 2 though already trained"),
        (lambda ledger: ledger.issue(["a"], step=2), "a issued in step 2 though already trained"),
        (lambda ledger: ledger.train(["z"], step=2), "z trained in step 2 but never issued"),
    ],
)
def test_what_must_not_happen_is_named(second, said):
    events = Events()
    ledger = Ledger(events)
    ledger.issue(["a"], step=1)
    ledger.train(["a"], step=1)
    second(ledger)
    for one in (ledger, replay(events)):
        with pytest.raises(LedgerError, match=said):
            one.verify()


def test_an_event_is_written_before_it_counts():
    def full(kind, **fields):
        raise OSError(28, "No space left on device")

    ledger = Ledger(full)
    with pytest.raises(OSError, match="No space"):
        ledger.issue(["a"], step=1)
    assert ledger.verify().issued == 0


def test_a_drop_needs_a_reason():
    ledger = Ledger(Events())
    ledger.issue(["a"], step=1)
    with pytest.raises(ValueError, match="without a reason"):
        ledger.drop(["a"], step=1, reason=" ")


def test_nothing_to_enter_writes_nothing_and_other_events_are_passed_over():
    events = Events()
    Ledger(events).issue([], step=1)
    assert events == []
    assert replay([{"kind": "row_dropped", "uid": "a"}]).verify().issued == 0
