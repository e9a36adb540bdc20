"""Draws.

What is locked here:
1. Every epoch draws every record exactly once, in an order fixed by (seed, epoch) and by nothing else.
2. Every draw has an id of its own, "<fingerprint>:<epoch>:<index>".
3. Every step but the last has `batch_size` prompts: the rest of an epoch shares a step with the start of the next.
4. `steps` is the number of steps, known beforehand.
5. A stream restored from its state goes on exactly as if it had never stopped; on other data it refuses.
"""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.datasets.errors import DataError
from hone.datasets.records import PromptRecord
from hone.datasets.stream import PromptStream, StreamState

COUNTS = st.integers(1, 12)


def records(count: int, *, fingerprint: str = "abc") -> list[PromptRecord]:
    return [
        PromptRecord(uid=f"{fingerprint}:{index}", tokens=(index, 7), text=str(index), label=None, line=index + 1) for index in range(count)
    ]


def ids(stream: PromptStream) -> list[list[str]]:
    return [[draw.prompt_id for draw in step] for step in stream]


def test_the_order_of_a_seed_never_changes() -> None:
    # Random("3:0").random() begins 0.579 0.692 0.372 0.257 0.415: from low to high the records 3 2 4 0 1.
    # Random("3:1").random() begins 0.274 0.164 0.651 0.187 0.318: the records 1 3 0 4 2.
    assert ids(PromptStream(records(5), batch_size=4, seed=3, num_episodes=2)) == [
        ["abc:0:3", "abc:0:2", "abc:0:4", "abc:0:0"],
        ["abc:0:1", "abc:1:1", "abc:1:3", "abc:1:0"],
        ["abc:1:4", "abc:1:2"],
    ]


@given(count=COUNTS, batch_size=COUNTS, episodes=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_epoch_draws_every_record_once_in_steps_of_equal_size(count: int, batch_size: int, episodes: int, seed: int) -> None:
    stream = PromptStream(records(count), batch_size=batch_size, seed=seed, num_episodes=episodes)
    steps = ids(stream)
    flat = [draw for step in steps for draw in step]
    assert len(steps) == stream.steps == math.ceil(count * episodes / batch_size)
    assert all(len(step) == batch_size for step in steps[:-1])
    assert 1 <= len(steps[-1]) <= batch_size
    for epoch in range(episodes):
        drawn = flat[epoch * count : (epoch + 1) * count]
        assert sorted(drawn) == sorted(f"abc:{epoch}:{index}" for index in range(count))


def test_the_id_is_that_of_the_record_drawn() -> None:
    for step in PromptStream(records(7), batch_size=3, seed=0, num_episodes=2):
        assert all(draw.prompt_id.split(":")[2] == draw.record.text for draw in step)


def test_epochs_and_seeds_differ_in_order_and_batch_size_does_not_matter() -> None:
    def order(seed: int, batch_size: int) -> list[str]:
        return [draw for step in ids(PromptStream(records(30), batch_size=batch_size, seed=seed, num_episodes=2)) for draw in step]

    assert order(0, 4) == order(0, 7)
    assert order(0, 4) != order(1, 4)
    first, second = order(0, 4)[:30], order(0, 4)[30:]
    assert [draw.split(":")[2] for draw in first] != [draw.split(":")[2] for draw in second]


@given(count=COUNTS, batch_size=COUNTS, episodes=st.integers(1, 3), taken=st.integers(0, 40))
def test_resumed_at_any_step_is_never_stopped(count: int, batch_size: int, episodes: int, taken: int) -> None:
    whole = PromptStream(records(count), batch_size=batch_size, seed=5, num_episodes=episodes)
    expected = ids(whole)
    stopped = PromptStream(records(count), batch_size=batch_size, seed=5, num_episodes=episodes)
    before = [[draw.prompt_id for draw in step] for _, step in zip(range(taken), stopped, strict=False)]
    state = StreamState(**json.loads(json.dumps(dataclasses.asdict(stopped.state()))))
    resumed = PromptStream.from_state(state, records(count))
    assert before + ids(resumed) == expected
    assert resumed.steps == whole.steps
    assert resumed.state() == whole.state()


@pytest.mark.parametrize(
    "changed",
    [
        records(6)[:5],
        records(6, fingerprint="other"),
        [*records(5), dataclasses.replace(records(6)[5], tokens=(1, 2))],
        [records(6)[index] for index in (1, 0, 2, 3, 4, 5)],
    ],
    ids=["fewer rows", "another file", "other ids", "another order"],
)
def test_other_data_under_a_saved_position_is_refused(changed: list[PromptRecord]) -> None:
    state = PromptStream(records(6), batch_size=2, seed=0, num_episodes=1).state()
    with pytest.raises(DataError, match=r"the data has changed since the run was saved: fingerprint \w+ now, " + state.fingerprint):
        PromptStream.from_state(state, changed)


def test_nothing_to_draw_and_sizes_below_one_are_refused() -> None:
    with pytest.raises(DataError, match="no prompt to draw"):
        PromptStream([], batch_size=1, seed=0, num_episodes=1)
    with pytest.raises(ValueError, match=r"--rollout\.batch-size is 0"):
        PromptStream(records(1), batch_size=0, seed=0, num_episodes=1)
    with pytest.raises(ValueError, match=r"--train\.num-episodes is 0"):
        PromptStream(records(1), batch_size=1, seed=0, num_episodes=0)
