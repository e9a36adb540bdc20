"""Documents, pairs and judged answers that are tokenised as they are drawn.

What is locked here:
1. Documents are laid into samples by their length: every character is in one sample, and no row of tokens is longer than allowed.
2. Each document is drawn once an epoch; datasets are apart and drawn by their weights; a stream goes on from any place.
3. A prompt goes with the next other prompt's answer, whether or not all samples are made.
4. What is held is bounded, and a million rows of any kind begin without being held or tokenised.
"""

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hone.datasets import drawn_samples
from hone.datasets import samples as samples_module
from hone.datasets.drawn_samples import DrawnDocuments, DrawnSamples
from hone.datasets.errors import DataError
from hone.datasets.labelled import LabelledSet, Samples, TextRow
from hone.datasets.layouts import judged_rows, text_rows
from hone.datasets.lazy import Joined
from hone.datasets.mismatched import Mismatched
from hone.datasets.offline_config import JudgedData, SFTData
from hone.datasets.records import Source
from hone.datasets.rows_stream import SampleStream
from hone.datasets.samples import samples_of
from hone.datasets.sources import read_file
from hone.datasets.tasks.arithmetic import build_tokenizer

WORDS = ["clips", "sold", "to", "friends", "in", "April", "and", "how", "many", "did", "she", "sell", "altogether"]
ROOM = 64


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 20 rows are tokenised as they are drawn."""
    monkeypatch.setattr(samples_module, "UPFRONT_ROWS", 20)
    monkeypatch.setattr(samples_module, "SAMPLED_ROWS", 20)


def written(file: Path, rows: list[dict[str, Any]]) -> Source:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_file(str(file), max_samples=10**9)


def texts(count: int, *, seed: int, longest: int = 40) -> list[str]:
    """Documents of a few words, and each tenth of some hundred."""
    draw = random.Random(seed)
    lengths = [draw.randrange(300, 500) if place % 10 == 9 else draw.randrange(1, longest) for place in range(count)]
    return [f"{seed}.{place}: " + " ".join(draw.choices(WORDS, k=length)) for place, length in enumerate(lengths)]


def documents(folder: Path, name: str, found: list[str]) -> LabelledSet[TextRow]:
    return text_rows(written(folder / f"{name}.jsonl", [{"text": text} for text in found]), SFTData(pretrain_mode=True))


def laid(rows: LabelledSet[TextRow], tokenizer: PreTrainedTokenizerBase, *, max_len: int = ROOM) -> Samples:
    samples = samples_of(rows, tokenizer, SFTData(pretrain_mode=True, max_len=max_len))
    assert isinstance(samples.samples, DrawnDocuments)
    return samples


def said(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of ids, special tokens left out."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("which", ["chatml", "llama", "ends_with_eos"])
def test_every_character_is_in_one_sample(which: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(which)
    found = texts(200, seed=1)
    samples = laid(documents(tmp_path, "one", found), tokenizer)
    end, start = int(str(tokenizer.eos_token_id)), None if tokenizer.bos_token is None else int(str(tokenizer.bos_token_id))
    learnt: list[int] = []
    for sample in samples.samples:
        assert all(1 < len(row.tokens) <= ROOM and row.trained == b"\1" * len(row.tokens) for row in sample.rows)
        learnt += [token for row in sample.rows for token in row.tokens]
    assert learnt.count(end) == 200 and (start is None or learnt.count(start) == 200)
    assert said(tokenizer, learnt) == "".join(found)
    # Where a document is parted, it is before white space: its tokens are those it has when it is not.
    whole = tokenizer(found, add_special_tokens=False)["input_ids"]
    assert isinstance(whole, list) and learnt == [token for ids in whole for token in [*([] if start is None else [start]), *ids, end]]


def test_samples_are_about_as_long_as_is_asked_for(chatml: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    short = [text for text in texts(400, seed=2, longest=15) if len(text) < 100]
    samples = laid(documents(tmp_path, "one", short), chatml, max_len=256)
    lengths = [sample.length for sample in samples.samples]
    assert 215 < sum(lengths) / len(lengths) <= 256 and max(lengths) < 1.2 * 256
    assert max(len(sample.rows) for sample in samples.samples) > 3


def test_what_is_shorter_or_longer_than_its_characters_led_to_expect_is_learnt_too(chatml: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    # Single letters in the rows that are looked at: a token a character. Whole words, and characters of four bytes, in two others.
    found = ["x y z " * 12] * 200
    found[7], found[13] = " friends" * 60, "\U0001f600" * 60
    samples = laid(documents(tmp_path, "one", found), chatml)
    assert said(chatml, [token for sample in samples.samples for row in sample.rows for token in row.tokens]) == "".join(found)
    assert max(len(row.tokens) for sample in samples.samples for row in sample.rows) <= ROOM


def test_each_document_is_drawn_once_an_epoch_and_a_stream_goes_on_from_any_place(chatml: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = documents(tmp_path, "one", texts(300, seed=3, longest=15))
    samples = laid(rows, chatml, max_len=256)
    steps = list(SampleStream(samples, batch_size=8, seed=5, epochs=2))
    places = [place for step in steps for place in step]
    for epoch in (places[: len(samples.samples)], places[len(samples.samples) :]):
        assert sorted(epoch) == list(range(len(samples.samples)))
    begun = [said(chatml, row.tokens).partition(":")[0] for place in places for row in samples.samples[place].rows]
    assert Counter(one for one in begun if one[:2] == "3.") == Counter({f"3.{place}": 2 for place in range(300)})

    for taken in (1, 4, len(steps) - 1):
        stopped = SampleStream(laid(rows, chatml, max_len=256), batch_size=8, seed=5, epochs=2)
        for _ in range(taken):
            next(stopped)
        again = laid(rows, chatml, max_len=256)
        remaining = list(SampleStream(again, batch_size=8, seed=5, epochs=2, state=stopped.state()))
        assert remaining == steps[taken:]
        assert [again.samples[place] for place in remaining[0]] == [samples.samples[place] for place in steps[taken]]
    with pytest.raises(DataError, match="the data has changed since the run was saved"):
        SampleStream(laid(rows, chatml, max_len=255), batch_size=8, seed=5, epochs=2, state=stopped.state())


def test_documents_of_two_datasets_stay_apart(chatml: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    sets = [documents(tmp_path, name, texts(count, seed=seed)) for name, count, seed in (("one", 33, 1), ("two", 50, 2))]
    characters, lines = Joined([one.characters for one in sets]), Joined([one.rows for one in sets])
    both = LabelledSet(name="both", fingerprint="f", rows=lines, characters=characters, sizes=(33, 50), weights=(0.3, 0.7))
    samples = laid(both, chatml)
    assert sum(samples.sizes) == len(samples.samples) and min(samples.sizes) > 33
    for place, sample in enumerate(samples.samples):
        source = sets[place >= samples.sizes[0]].rows
        assert sample.uid in {row.uid for row in source}
        begun = [said(chatml, row.tokens) for row in sample.rows]
        assert not any(one.startswith("2." if place < samples.sizes[0] else "1.") for one in begun)


def judged(folder: Path, count: int, *, unusable: int = 10**9) -> LabelledSet[Any]:
    """Three judged answers to each sum; every so many rows there is no room for one."""
    rows = [{"prompt": f"{row // 3}+{row // 3}=", "completion": f"{row}", "label": row % 2 == 0} for row in range(count)]
    for place in range(unusable - 1, count, unusable):
        rows[place]["prompt"] = "1" * 20 + "="
    return judged_rows(written(folder / "judged.jsonl", rows), JudgedData())


def test_a_prompt_goes_with_the_next_other_prompts_answer_whenever_that_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tokenizer = JudgedData(max_len=16), build_tokenizer()
    rows = judged(tmp_path, 302, unusable=101)
    before, later = (samples_of(rows, tokenizer, config, upfront=upfront).samples for upfront in (True, False))
    assert isinstance(later, DrawnSamples) and len(before) == 300
    # The same rows by their places: the drawn ones have those that cannot be used among them.
    unusable = later.unusable(range(302))
    usable = [place for place in range(302) if place not in unusable]
    expected = Mismatched(before, 16)
    calls = [0]
    made = DrawnSamples._make
    monkeypatch.setattr(DrawnSamples, "_make", lambda self, places: (calls.__setitem__(0, calls[0] + 1), made(self, places))[1])
    fresh = samples_of(rows, tokenizer, config).samples
    joined = Mismatched(fresh, 16)
    for start in (200, 0, 100):
        batch = usable[start : start + 100]
        fresh.unusable(batch)
        before_call, calls[0] = calls[0], 0
        joined.ready(batch)
        assert [joined[place] for place in batch] == [expected[start + place] for place in range(100)]
        assert calls[0] < 90 and before_call >= 0  # most were made in one go


@pytest.mark.parametrize("upfront", [True, False])
def test_answers_that_are_all_judged_alike_are_told(upfront: bool, tmp_path: Path) -> None:
    config, tokenizer = JudgedData(max_len=16), build_tokenizer()
    for label, told in ((1, "every answer is judged good"), (0, "every answer is judged bad")):
        rows = [{"prompt": f"{row}+1=", "completion": "1", "label": label} for row in range(60)]
        (note,) = samples_of(judged_rows(written(tmp_path / "rows.jsonl", rows), config), tokenizer, config, upfront=upfront).notes
        assert told in note and "--data.label-key" in note
    assert samples_of(judged(tmp_path, 60), tokenizer, config, upfront=upfront).notes == ()


def test_what_is_held_of_drawn_samples_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn_samples, "KEPT", 10)
    samples = samples_of(judged(tmp_path, 300), build_tokenizer(), JudgedData(max_len=16)).samples
    assert isinstance(samples, DrawnSamples)
    for start in range(0, 300, 50):
        assert samples.unusable(range(start, start + 50)) == {} and len(samples._made) <= 60
        # A second question for the same rows tokenises nothing.
        with monkeypatch.context() as patch:
            patch.setattr("hone.datasets.together.ids_of", None)
            samples.unusable(range(start, start + 50))
    assert [sample.line for sample in samples] == list(range(1, 301)) and len(samples._made) <= 10 + drawn_samples.AT_ONCE


MILLION = """
import resource, sys, time
from hone.datasets.layouts import judged_rows, pair_rows, text_rows
from hone.datasets.mismatched import Mismatched
from hone.datasets.offline_config import JudgedData, PairData, SFTData
from hone.datasets.rows_stream import SampleStream
from hone.datasets.samples import samples_of
from hone.datasets.sources import read_file
from hone.datasets.tasks.arithmetic import build_tokenizer

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def build(path, most):
    samples = samples_of(read(read_file(path, max_samples=most), config), tokenizer, config)
    return samples, Mismatched(samples.samples, 64) if read is judged_rows else None

def taken():
    places = next(stream)
    if others is not None:
        others.ready(places)
        assert len([others[place] for place in places]) == len(places)
    return [samples.samples[place] for place in places]

read, config = {
    "pairs": (pair_rows, PairData(max_len=64)),
    "judged": (judged_rows, JudgedData(max_len=64, output_key="chosen")),
    "documents": (text_rows, SFTData(pretrain_mode=True, input_key="prompt", max_len=64)),
}[sys.argv[2]]
tokenizer = build_tokenizer()
build(sys.argv[1], 2000)
start, clock = peak_mib(), time.monotonic()
samples, others = build(sys.argv[1], 10**9)
stream = SampleStream(samples, batch_size=256, seed=0, epochs=1)
first = taken()
begun, seconds = peak_mib(), time.monotonic() - clock
rows = len(first)
for _ in range(60):
    rows += len(taken())
print(len(samples.samples), rows, begun - start, peak_mib() - begun, seconds)
"""


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("million") / "rows.jsonl"
    with file.open("w") as out:
        for row in range(10**6):
            out.write(
                f'{{"prompt": "{row}+1=", "chosen": "{row + 1}", "rejected": "{row + 2}", "label": {"true" if row % 2 else "false"}}}\n'
            )
    return file


@pytest.mark.parametrize("kind", ["pairs", "judged", "documents"])
def test_a_million_rows_of_any_kind_begin_without_being_held_or_tokenised(kind: str, million: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", MILLION, str(million), kind], capture_output=True, text=True, check=True)
    count, rows, begin_mib, later_mib, _ = map(float, ended.stdout.split())
    assert rows == 61 * 256 and (count == 10**6 if kind != "documents" else 10**5 < count < 3 * 10**5)
    # Places, order and lengths are 64 bytes a row, of which reading them before has made room for some; as rows, they would be a gigabyte.
    assert begin_mib < 110 and later_mib < 20
