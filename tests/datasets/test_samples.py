"""Labelled rows into samples.

What is locked here:
1. The ids of many rows are made once and come from the cache after that; what decides them is part of its name.
2. Rows that are tokenised as they are drawn give the samples of those that are tokenised before.
3. Every row is drawn once an epoch; one that cannot be used is passed over and told, and the next takes its place.
4. Several datasets are drawn by their weights; the order is that of seed and epoch alone, and goes on from any place.
5. A million rows cost their places: the first steps come without the others being tokenised.
"""

import dataclasses
import json
import math
import random
import subprocess
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from hone.datasets import samples as samples_module
from hone.datasets.encoded_rows import RowEncoder
from hone.datasets.errors import DataError
from hone.datasets.labelled import LabelledSet, Sample, Samples, TokenRow
from hone.datasets.layouts import exchange_rows, judged_rows, pair_rows, text_rows
from hone.datasets.lazy import Joined, Lazy
from hone.datasets.offline_config import JudgedData, PairData, SFTData, StepData
from hone.datasets.records import Dropped, Source
from hone.datasets.rows_stream import SampleStream
from hone.datasets.sample_table import Made, TabledSamples, table_of
from hone.datasets.samples import DrawnSamples, samples_of
from hone.datasets.sources import read_file
from hone.datasets.step_rows import steps_rows
from hone.datasets.stream import StreamState
from hone.datasets.tasks import labelled_arithmetic
from hone.datasets.tasks.arithmetic import build_tokenizer

TOO_LONG = {"prompt": "1" * 20 + "=", "completion": "1"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


def source(tmp_path: Path, rows: Sequence[dict[str, Any]], name: str = "rows.jsonl") -> Source:
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_file(str(file), max_samples=10**9)


def asked(count: int, *, every: int = 0) -> list[dict[str, Any]]:
    """Sums, each one different; every so many of them is too long for 16 tokens."""
    return [TOO_LONG if every and row % every == every - 1 else {"prompt": f"{row}+1=", "completion": f"{row + 1}"} for row in range(count)]


def lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 100 rows are tokenised as they are drawn, and some 50 of them looked at before."""
    monkeypatch.setattr(samples_module, "UPFRONT_ROWS", 100)
    monkeypatch.setattr(samples_module, "SAMPLED_ROWS", 50)


KINDS: list[tuple[Any, Any, Any]] = [
    (exchange_rows, labelled_arithmetic.demonstrations, SFTData(max_len=64)),
    (pair_rows, labelled_arithmetic.pairs, PairData(max_len=64)),
    (judged_rows, labelled_arithmetic.judged, JudgedData(max_len=64)),
    (steps_rows, labelled_arithmetic.steps, StepData(max_len=64, step_separator=" ")),
]


@pytest.mark.parametrize(("read", "built_in", "config"), KINDS, ids=["exchanges", "pairs", "judged", "steps"])
def test_ids_are_made_once_and_then_come_from_the_cache(
    read: Any, built_in: Any, config: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HONE_CACHE", str(tmp_path))
    rows = read(built_in(1, 1200), config)
    plainly = samples_of(rows, tokenizer, config)
    first = samples_of(rows, tokenizer, config, tokenizer_hash="t")
    assert list(first.samples) == list(plainly.samples) and first.samples.fingerprint == plainly.samples.fingerprint

    with monkeypatch.context() as patch:
        patch.setattr("hone.datasets.together.ids_of", None)  # nothing is tokenised any more
        again = samples_of(rows, tokenizer, config, tokenizer_hash="t")
        assert list(again.samples) == list(first.samples) and again.samples.fingerprint == first.samples.fingerprint
        # Where the rows are said to lie is no part of what the ids are.
        moved = dataclasses.replace(config, dataset="elsewhere.jsonl", max_samples=5000)
        assert samples_of(rows, tokenizer, moved, tokenizer_hash="t").samples.fingerprint == first.samples.fingerprint
        others = [(rows, config, "another"), (dataclasses.replace(rows, fingerprint="other"), config, "t")]
        others += [(rows, dataclasses.replace(config, max_len=60), "t")]
        for other, settings, hashed in others:
            with pytest.raises(TypeError):
                samples_of(other, tokenizer, settings, tokenizer_hash=hashed)


def test_another_template_makes_other_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HONE_CACHE", str(tmp_path))
    own, config = build_tokenizer(), SFTData(max_len=64, apply_chat_template=True)
    rows = exchange_rows(labelled_arithmetic.demonstrations(1, 1200), config)
    found = []
    for behind in ("", "="):
        own.chat_template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'user' %}" + behind + "{% endif %}{% endfor %}"
        samples = samples_of(rows, own, config, tokenizer_hash="t").samples
        found.append((list(samples), samples.fingerprint))
    assert len(list((tmp_path / "datasets").glob("*.arrow"))) == 2
    assert len(found[1][0][0].rows[0].tokens) == len(found[0][0][0].rows[0].tokens) + 1 and found[0][1] != found[1][1]


def test_the_fingerprint_tells_whatever_is_learnt_from() -> None:
    plain = TokenRow(tokens=array("i", [1, 2, 3]), trained=b"\0\1\1")
    one = Sample(uid="a", line=1, rows=(plain,), shares=(0.5, 1.0))
    others = [
        dataclasses.replace(one, rows=(dataclasses.replace(plain, tokens=array("i", [1, 2, 4])),)),
        dataclasses.replace(one, rows=(dataclasses.replace(plain, trained=b"\0\0\1"),)),
        dataclasses.replace(one, rows=(plain, plain)),
        dataclasses.replace(one, shares=(0.25, 1.0)),
        dataclasses.replace(one, margin=1.0),
        dataclasses.replace(one, desirable=False),
    ]
    tables = [table_of(lambda made=made: iter([[Made(made=made)]]), key=None) for made in (one, *others)]
    assert len({TabledSamples(table, data="d").fingerprint for table in tables}) == len(tables)
    assert TabledSamples(tables[0], data="d").fingerprint == TabledSamples(tables[0], data="d").fingerprint


def test_dropped_rows_and_notes_come_from_the_cache_too(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HONE_CACHE", str(tmp_path / "cache"))
    config = SFTData(max_len=16)
    rows = [*asked(1500, every=300), {"prompt": "1+1=", "completion": "2" * 20}]
    found = [samples_of(exchange_rows(source(tmp_path, rows), config), tokenizer, config, tokenizer_hash="t") for _ in range(2)]
    for one in found:
        assert [row.line for row in one.dropped] == [300, 600, 900, 1200, 1500] and len(one.samples) == 1496
        assert one.notes == ("1 answers are cut at --data.max-len 16 and are taught without their end",)
    assert len(list((tmp_path / "cache" / "datasets").glob("*.arrow"))) == 1


def test_documents_of_two_datasets_do_not_fill_a_row_together(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    config = SFTData(pretrain_mode=True, max_len=64)
    sets = [text_rows(source(tmp_path, [{"text": f"{name}+1=2"}] * 3, f"{name}.jsonl"), config) for name in (1, 2)]
    both = LabelledSet(name="both", fingerprint="f", rows=Joined([one.rows for one in sets]), sizes=(3, 3), weights=(0.5, 0.5))
    samples = samples_of(both, tokenizer, config)
    assert [len(one.rows) for one in samples.samples] == [3, 3] and samples.sizes == (1, 1)


@pytest.mark.parametrize(("read", "built_in", "config"), KINDS, ids=["exchanges", "pairs", "judged", "steps"])
def test_rows_that_are_tokenised_as_they_are_drawn_give_the_same_samples(
    read: Any, built_in: Any, config: Any, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read(built_in(1, 120), config)
    before = samples_of(rows, tokenizer, config)
    lazily(monkeypatch)
    drawn = samples_of(rows, tokenizer, config)
    assert isinstance(drawn.samples, DrawnSamples) and not isinstance(before.samples, DrawnSamples)
    assert not isinstance(samples_of(rows, tokenizer, config, upfront=True).samples, DrawnSamples)
    expected = [[before.samples[place] for place in step] for step in SampleStream(before, batch_size=7, seed=3, epochs=2)]
    assert [[drawn.samples[place] for place in step] for step in SampleStream(drawn, batch_size=7, seed=3, epochs=2)] == expected
    assert list(drawn.samples) == list(before.samples)


def test_a_row_that_cannot_be_used_is_passed_over_when_it_is_drawn(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazily(monkeypatch)
    config = SFTData(max_len=16)
    rows = exchange_rows(source(tmp_path, asked(600, every=150)), config)
    samples = samples_of(rows, tokenizer, config)
    stream = SampleStream(samples, batch_size=32, seed=0, epochs=1)
    steps = [(places, [samples.samples[place].line for place in places]) for places in stream]
    assert sorted(line for _, lines in steps for line in lines) == [line for line in range(1, 601) if line % 150]
    assert [len(places) for places, _ in steps] == [32] * 18 + [20]
    assert sorted(row.line for row in stream.passed_over) == [150, 300, 450, 600]
    assert all("no room for an answer: 23 tokens > --data.max-len 16" in row.reason for row in stream.passed_over)

    for taken in (1, 9, 18):
        stopped = SampleStream(samples, batch_size=32, seed=0, epochs=1)
        for _ in range(taken):
            next(stopped)
        again = SampleStream(samples_of(rows, tokenizer, config), batch_size=32, seed=0, epochs=1, state=stopped.state())
        assert list(again) == [places for places, _ in steps[taken:]]
    changed = dataclasses.replace(config, max_len=15)
    with pytest.raises(DataError, match="the data has changed since the run was saved"):
        SampleStream(samples_of(rows, tokenizer, changed), batch_size=32, seed=0, epochs=1, state=stream.state())


def test_too_many_rows_without_room_are_an_error_before_the_first_is_drawn(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazily(monkeypatch)
    config = SFTData(max_len=16)
    with pytest.raises(DataError, match=r"no room for an answer \(4 rows\)"):
        samples_of(exchange_rows(source(tmp_path, asked(600, every=13)), config), tokenizer, config)


class Numbered(Lazy[Sample]):
    """Samples of which only the number is asked."""

    fingerprint = "f"

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def _at(self, index: int) -> Sample:
        return Sample(uid=f"f:{index}", line=index, rows=())

    def unusable(self, places: Sequence[int]) -> dict[int, Dropped]:
        return {}


def numbered(count: int, *, sizes: tuple[int, ...] = (), weights: tuple[float, ...] = ()) -> Samples:
    return Samples(name="numbers", samples=Numbered(count), sizes=sizes, weights=weights)


def places(stream: SampleStream) -> Iterator[int]:
    return (place for step in stream for place in step)


def test_an_epoch_of_a_million_is_each_of_them_once() -> None:
    drawn = list(places(SampleStream(numbered(10**6), batch_size=4096, seed=1, epochs=1)))
    assert len(drawn) == 10**6 and drawn[:1000] != list(range(1000)) and sorted(drawn) == list(range(10**6))


@pytest.mark.parametrize(("weight", "seed"), [(0.7, 0), (0.5, 1), (0.1, 2)])
def test_two_datasets_are_drawn_in_their_proportions_in_an_order_that_batches_do_not_change(weight: float, seed: int) -> None:
    both = numbered(9000, sizes=(4000, 5000), weights=(weight, 1 - weight))
    drawn = list(places(SampleStream(both, batch_size=64, seed=seed, epochs=1)))
    assert abs(sum(place < 4000 for place in drawn) - weight * len(drawn)) < 3 * math.sqrt(weight * (1 - weight) * len(drawn))
    assert min(Counter(drawn).values()) >= 1 and len(set(drawn)) == 9000
    assert list(places(SampleStream(both, batch_size=1000, seed=seed, epochs=1))) == drawn


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3), batch_size=st.integers(1, 7), taken=st.integers(0, 12))
def test_a_stream_resumed_at_any_step_is_never_stopped(sizes: list[int], batch_size: int, taken: int) -> None:
    weights = tuple(1 / len(sizes) for _ in sizes) if len(sizes) > 1 else ()
    data = numbered(sum(sizes), sizes=tuple(sizes) if weights else (), weights=weights)
    whole = list(SampleStream(data, batch_size=batch_size, seed=5, epochs=2))
    stopped = SampleStream(data, batch_size=batch_size, seed=5, epochs=2)
    before = [step for _, step in zip(range(taken), stopped, strict=False)]
    state = StreamState(**json.loads(json.dumps(dataclasses.asdict(stopped.state()))))
    assert before + list(SampleStream(data, batch_size=batch_size, seed=5, epochs=2, state=state)) == whole
    other = dataclasses.replace(data, weights=tuple(reversed([0.9, *[0.1 / (len(sizes) - 1)] * (len(sizes) - 1)]))) if weights else data
    if weights:
        with pytest.raises(DataError, match="the data has changed"):
            SampleStream(other, batch_size=batch_size, seed=5, epochs=2, state=state)


MILLION = """
import resource, sys
from hone.datasets.layouts import exchange_rows
from hone.datasets.offline_config import SFTData
from hone.datasets.rows_stream import SampleStream
from hone.datasets.samples import samples_of
from hone.datasets.sources import read_file
from hone.datasets.tasks.arithmetic import build_tokenizer

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

tokenizer, config = build_tokenizer(), SFTData()
build = lambda path, most: samples_of(exchange_rows(read_file(path, max_samples=most), config), tokenizer, config)
build(sys.argv[1], 2000)
start = peak_mib()
samples = build(sys.argv[1], 10**9)
stream = SampleStream(samples, batch_size=256, seed=0, epochs=1)
first = [samples.samples[place] for place in next(stream)]
begun = peak_mib()
seen = {sample.line for sample in first}
for _ in range(100):
    seen |= {samples.samples[place].line for place in next(stream)}
print(len(samples.samples), len(first), len(seen), begun - start, peak_mib() - begun)
"""


def test_a_million_rows_begin_without_being_held_or_tokenised(tmp_path: Path) -> None:
    file = tmp_path / "million.jsonl"
    draw = random.Random(0)
    with file.open("w") as out:
        out.writelines(f'{{"prompt": "{draw.randrange(10**6)}+{row}=", "completion": "{row}"}}\n' for row in range(10**6))
    ended = subprocess.run([sys.executable, "-c", MILLION, str(file)], capture_output=True, text=True, check=True)
    count, batch, seen, begin_mib, later_mib = map(float, ended.stdout.split())
    assert (count, batch, seen) == (10**6, 256, 101 * 256)
    # Places and order are 48 bytes a row, and what makes the order some more for a moment; as rows they would be a gigabyte.
    assert begin_mib < 160 and later_mib < 16


def test_a_template_that_fails_on_a_drawn_row_is_told(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    config = SFTData()
    rows = exchange_rows(source(tmp_path, [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+1=", "completion": "two"}]), config)
    drawn = DrawnSamples(rows, RowEncoder(tokenizer, config), identity="x")
    assert drawn.unusable([0]) == {}
    with pytest.raises(DataError, match="characters outside the vocabulary"):
        drawn.unusable([0, 1])
