"""Laws of the buffer between engines and learner, under any order of finishing.

1. Nothing is lost and nothing comes twice: every prompt begun is taken, dropped, given up, or open.
2. No group is trained more than `staleness` versions after it was begun.
3. Without over-sampling nothing is dropped for its age, and once nothing is in flight a step is never kept waiting.
4. Never more is open than admission allows; as much is begun as it allows.
"""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hone.algos.batch import SamplerContract, Trajectory
from hone.rollout.buffer import Buffer, Window
from hone.rollout.executor import Group, Sample
from hone.rollout.types import Prompt

CONTRACT = SamplerContract(temperature=1.0, top_p=1.0, top_k=0, seed=0, engine="scripted", tokenizer="", template="")


def prompt_of(number: int) -> Prompt:
    return Prompt(prompt_id=f"p{number}", tokens=(1, 2), text="1+1=", label=str(number))


def group_of(prompt: Prompt, *, version: int = 0, samples: int = 1) -> Group:
    """Samples of one token each."""
    mask = torch.tensor([False] * len(prompt.tokens) + [True])
    trajectories = [
        Trajectory(
            prompt_id=prompt.prompt_id,
            sample=sample,
            tokens=torch.tensor([*prompt.tokens, 3 + sample]),
            action_mask=mask,
            rollout_logp=torch.tensor([0.0] * len(prompt.tokens) + [-0.1 - sample]),
            rewards=torch.zeros(len(mask)),
            version=torch.full((len(mask),), version),
            truncated=False,
            score=0.5,
            contract=CONTRACT,
        )
        for sample in range(samples)
    ]
    told = {"prompt_text": prompt.text, "response_text": "2", "label": prompt.label, "score": 0.5, "extra_logs": {"a": 1.0}}
    return Group(prompt=prompt, samples=tuple(Sample(trajectory=one, reward=1.0, cached_tokens=0, **told) for one in trajectories))


@st.composite
def windows(draw: st.DrawFn, *, extra: bool) -> Window:
    ahead = draw(st.integers(0, 3))
    return Window(
        batch=draw(st.integers(1, 4)),
        ahead=ahead,
        staleness=ahead + draw(st.integers(0, 2)),
        extra=draw(st.integers(1, 5)) if extra else 0,
        last_step=draw(st.one_of(st.none(), st.integers(3, 12))),
    )


def played(window: Window, chance: random.Random, *, steps: int, keep: bool = True) -> tuple[Counter[str], list[int]]:
    """A run in which chance says what finishes when; returns what became of every prompt, and the lag of each that was trained."""
    buffer, ends, lags, begun = Buffer(window), Counter[str](), [], 0
    versions: dict[str, int] = {}

    def fill() -> None:
        nonlocal begun
        while buffer.room():
            entry = buffer.begin(prompt_of(begun))
            versions[entry.prompt.prompt_id] = buffer.version
            assert entry.step > buffer.taken
            begun += 1
        assert buffer.open <= (buffer.version + 1 + window.ahead - buffer.taken) * window.batch + window.extra or not buffer.room()

    for step in range(1, steps + 1):
        if window.last_step is not None and step > window.last_step:
            break
        fill()
        while (taken := buffer.take()) is None:
            flying = buffer.in_flight
            assert flying, "it waits for nothing"
            entry = chance.choice(flying)
            if chance.random() < 0.1:
                buffer.give_up(entry.prompt.prompt_id)
                ends[entry.prompt.prompt_id] += 1
            else:
                buffer.finish(group_of(entry.prompt, version=entry.version))
            fill()
        assert buffer.taken == step and len(taken.groups) == window.batch
        for group in taken.groups:
            ends[group.prompt.prompt_id] += 1
            lags.append(step - 1 - versions[group.prompt.prompt_id])
        for entry in taken.stale:
            ends[entry.prompt.prompt_id] += 1
        assert window.extra or not (taken.stale or taken.expired or taken.overtaken)
        for entry in taken.expired + ([] if keep else taken.overtaken):
            buffer.give_up(entry.prompt.prompt_id)
            ends[entry.prompt.prompt_id] += 1
        fill()  # while the learner learns
        for entry in buffer.in_flight:
            if chance.random() < 0.5:
                buffer.finish(group_of(entry.prompt, version=entry.version))
        buffer.version = step
    still = [entry.prompt.prompt_id for entry in buffer.in_flight] + [entry.prompt.prompt_id for entry, _ in buffer.finished]
    for prompt_id in still:
        ends[prompt_id] += 1
    assert set(ends) == {f"p{number}" for number in range(begun)}
    return ends, lags


@given(window=windows(extra=False), seed=st.integers(0, 2**32))
def test_nothing_is_lost_or_twice_or_older_than_the_bound(window: Window, seed: int) -> None:
    ends, lags = played(window, random.Random(seed), steps=8)
    assert set(ends.values()) <= {1} and max(lags) <= window.staleness


@given(window=windows(extra=True), keep=st.booleans(), seed=st.integers(0, 2**32))
def test_nor_with_over_sampling(window: Window, keep: bool, seed: int) -> None:
    ends, lags = played(window, random.Random(seed), steps=8, keep=keep)
    assert set(ends.values()) <= {1} and max(lags) <= window.staleness


def test_a_batch_waits_for_a_group_in_its_last_step_and_for_no_other() -> None:
    # Of four prompts begun under version 0 the first is slow. Two steps may train it: the first goes on without it, the second waits.
    buffer = Buffer(Window(batch=2, ahead=1, staleness=1))
    for number in range(4):
        buffer.begin(prompt_of(number))
    assert buffer.room() == 0
    for number in (1, 2):
        buffer.finish(group_of(prompt_of(number)))
    assert [group.prompt.prompt_id for group in buffer.take().groups] == ["p1", "p2"]  # pyright: ignore[reportOptionalMemberAccess]
    assert buffer.room() == 0  # a batch is under way while the learner learns
    buffer.version = 1
    assert buffer.room() == 2
    for number in (4, 5):
        buffer.begin(prompt_of(number))
        buffer.finish(group_of(prompt_of(number), version=1))
    buffer.finish(group_of(prompt_of(3)))
    assert buffer.take() is None
    buffer.finish(group_of(prompt_of(0)))
    assert [group.prompt.prompt_id for group in buffer.take().groups] == ["p0", "p3"]  # pyright: ignore[reportOptionalMemberAccess]


def test_with_over_sampling_the_first_to_finish_make_the_batch_and_the_others_are_named() -> None:
    buffer = Buffer(Window(batch=2, ahead=0, staleness=1, extra=2))
    entries = [buffer.begin(prompt_of(number)) for number in range(4)]
    assert buffer.room() == 0 and {entry.step for entry in entries} == {1}
    for number in (3, 1):
        buffer.finish(group_of(prompt_of(number)))
    first = buffer.take()
    assert first is not None and [group.prompt.prompt_id for group in first.groups] == ["p1", "p3"]
    assert first.overtaken == [entries[0], entries[2]] and first.expired == first.stale == []
    # Kept, they may still be trained in the next step, and not in the one after.
    buffer.version = 1
    assert [buffer.begin(prompt_of(number)).step for number in (4, 5)] == [2, 2]
    for number in (4, 5):
        buffer.finish(group_of(prompt_of(number), version=1))
    second = buffer.take()
    assert second is not None and second.expired == [entries[0], entries[2]] and second.overtaken == []


def test_the_last_batch_is_what_is_left() -> None:
    buffer = Buffer(Window(batch=4, ahead=1, staleness=1))
    buffer.begin(prompt_of(0))
    buffer.finish(group_of(prompt_of(0)))
    assert buffer.take() is None
    taken = buffer.take(drained=True)
    assert taken is not None and len(taken.groups) == 1
    empty = buffer.take(drained=True)
    assert empty is not None and empty.groups == []


def test_finished_groups_of_an_earlier_run_keep_their_age() -> None:
    buffer = Buffer(Window(batch=1, ahead=2, staleness=2), version=5, taken=5)
    buffer.put_back([group_of(prompt_of(0), version=3), group_of(prompt_of(1), version=4)])
    assert buffer.room() == 1
    buffer.begin(prompt_of(2))
    taken = buffer.take()
    assert taken is not None and [group.prompt.prompt_id for group in taken.groups] == ["p0"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch": 0, "ahead": 0, "staleness": 0}, "batches of 0"),
        ({"batch": 1, "ahead": 2, "staleness": 1}, "samples become 2 versions old, and only 1 are allowed"),
    ],
)
def test_a_window_that_cannot_be_kept_is_refused(settings: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Window(**settings)


def test_what_is_open_already_or_has_no_room_is_refused() -> None:
    buffer = Buffer(Window(batch=2, ahead=0, staleness=0))
    buffer.begin(prompt_of(0))
    with pytest.raises(ValueError, match="is open already"):
        buffer.begin(prompt_of(0))
    buffer.begin(prompt_of(1))
    with pytest.raises(ValueError, match="no room for prompt 'p2': 2 groups are open"):
        buffer.begin(prompt_of(2))
