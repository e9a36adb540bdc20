"""The order of draws.

What is locked here:
1. Without weights an epoch is every row once; with them every row comes at least once, in passes of permutations of each dataset.
2. With weights the datasets' shares of the draws are those asked for, within three sigma.
3. The order is a function of seed and epoch: of no worker, thread, batch size or call before.
4. From any place on, an order goes on as if it had been followed from the start.
"""

import dataclasses
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hone.datasets.order import Order, permutation
from hone.datasets.records import Dropped, PromptRecord
from hone.datasets.stream import PromptStream, StreamState

SIZES = st.lists(st.integers(1, 9), min_size=2, max_size=4)


def even(sizes: list[int]) -> list[float]:
    return [1 / len(sizes)] * len(sizes)


@given(sizes=SIZES, seed=st.integers(0, 99), episodes=st.integers(1, 3))
def test_with_weights_every_row_comes_in_passes_and_the_epoch_ends_with_the_last_first_pass(
    sizes: list[int], seed: int, episodes: int
) -> None:
    order = Order(sizes, even(sizes), seed=seed, episodes=episodes)
    places = [order[position] for position in range(len(order))]
    for epoch in range(episodes):
        own = [place for place in places if place.epoch == epoch]
        start = 0
        fullest = 0
        for size in sizes:
            rows = [place for place in own if start <= place.row < start + size]
            for number in range(len(rows) // size):
                part = rows[number * size : (number + 1) * size]
                assert sorted(place.row - start for place in part) == list(range(size))
                assert {place.again for place in part} == {number}
            assert len(rows) >= size
            fullest = max(fullest, own.index(rows[size - 1]))
            start += size
        assert fullest == len(own) - 1


def test_two_datasets_are_drawn_in_their_proportions_within_three_sigma() -> None:
    for seed, weight in ((0, 0.7), (1, 0.5), (2, 0.05)):
        order = Order((20_000, 20_000), (weight, 1 - weight), seed=seed, episodes=1)
        draws = len(order)
        first = sum(order[position].row < 20_000 for position in range(draws))
        assert abs(first - weight * draws) < 3 * math.sqrt(weight * (1 - weight) * draws)


def test_the_first_turns_are_those_of_the_seed() -> None:
    # Random("0:0:turns").random() begins 0.127 0.695 0.815 0.711: below 0.4 the first dataset, else the second.
    order = Order((3, 3), (0.4, 0.6), seed=0, episodes=1)
    assert [order[position].row >= 3 for position in range(4)] == [False, True, True, True]


def test_a_permutation_is_that_of_sorting_by_pythons_own_numbers() -> None:
    for count in (0, 1, 2, 1000):
        generator = random.Random(f"7:{3}")
        keys = [generator.random() for _ in range(count)]
        assert list(permutation(count, 7, 3)) == sorted(range(count), key=keys.__getitem__)


@given(sizes=SIZES, batch_size=st.integers(1, 7), taken=st.integers(0, 12))
def test_a_weighted_stream_resumed_at_any_step_is_never_stopped(sizes: list[int], batch_size: int, taken: int) -> None:
    records = [
        PromptRecord(uid=f"{set_}:{row}", tokens=(1,), text="", label=None, line=1) for set_, n in enumerate(sizes) for row in range(n)
    ]
    shares = {"sizes": sizes, "weights": even(sizes)}

    def new() -> PromptStream:
        return PromptStream(records, batch_size=batch_size, seed=5, num_episodes=2, **shares)

    whole = [[draw.prompt_id for draw in step] for step in new()]
    stopped = new()
    before = [[draw.prompt_id for draw in step] for _, step in zip(range(taken), stopped, strict=False)]
    state = StreamState(**json.loads(json.dumps(dataclasses.asdict(stopped.state()))))
    assert len(json.dumps(dataclasses.asdict(state))) < 150
    after = [[draw.prompt_id for draw in step] for step in PromptStream.from_state(state, records, **shares)]
    assert before + after == whole
    assert len(whole) == new().steps
    assert max(Counter(draw for step in whole for draw in step).values()) == 1  # an id for every draw, again or not


class Passing:
    """Rows that are made when drawn; those whose number ends in 3 cannot be used."""

    fingerprint = "f"

    def __len__(self) -> int:
        return 40

    def __iter__(self) -> Iterator[PromptRecord | Dropped]:
        return iter(self.take(range(40)))

    def take(self, rows: Sequence[int]) -> list[PromptRecord | Dropped]:
        return [
            Dropped(uid=f"f:{row}", line=row, reason="three")
            if row % 10 == 3
            else PromptRecord(uid=f"f:{row}", tokens=(row,), text="", label=None, line=row)
            for row in rows
        ]


@given(batch_size=st.integers(1, 50), taken=st.integers(0, 9))
def test_rows_that_cannot_be_used_are_passed_over_and_told_once(batch_size: int, taken: int) -> None:
    stream = PromptStream(Passing(), batch_size=batch_size, seed=1, num_episodes=2)
    steps = list(stream)
    drawn = [draw.record.line for step in steps for draw in step]
    assert sorted(drawn) == sorted(2 * [row for row in range(40) if row % 10 != 3])
    assert all(len(step) == batch_size for step in steps[:-1])
    assert sorted(row.line for row in stream.passed_over) == [3, 13, 23, 33]
    stopped = PromptStream(Passing(), batch_size=batch_size, seed=1, num_episodes=2)
    before = [step for _, step in zip(range(taken), stopped, strict=False)]
    assert before + list(PromptStream.from_state(stopped.state(), Passing())) == steps


def test_the_draws_are_the_same_for_any_number_of_tokenising_threads(tmp_path: Path) -> None:
    script = """
import hashlib
from hone.datasets.config import DataConfig
from hone.datasets.schemas import prompt_rows
from hone.datasets.stream import PromptStream
from hone.datasets.tasks import arithmetic
from hone.datasets.tokenise import tokenise
rows = prompt_rows(arithmetic.source(0, 3000), input_key="prompt", label_key="label", chat=False)
done = tokenise(rows, arithmetic.build_tokenizer(), config=DataConfig(), max_new_tokens=4)
draws = [draw for step in PromptStream(done.records, batch_size=7, seed=3, num_episodes=2) for draw in step]
print(hashlib.blake2b(repr([(draw.prompt_id, draw.record.tokens) for draw in draws]).encode()).hexdigest(), len(draws))
"""
    settings = [{"TOKENIZERS_PARALLELISM": "false"}, *({"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(n)} for n in (1, 3))]
    printed = {
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, **one}).stdout
        for one in settings
    }
    (only,) = printed
    assert only.split()[1] == "6000"
