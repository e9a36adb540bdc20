"""Prompts into token ids: ours, cold and from the cache, beside OpenRLHF's path, a tokenizer call with tensors for every row.

And how long a million rows take from a file to their first step, as prompts and as demonstrations: read, judged, put in order.

The peer's call is the one of its rollout worker (`utils/agent.py`), which tokenises each prompt when it is drawn; the roof is the
tokenizer's own batch call, whose ids nobody keeps. 4,000 worked problems of GSM8K where they lie beside the checkout, made-up ones
else; a byte-level BPE of 32,000 tokens trained on them.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.bench_roof import beside
from hone.datasets.config import DataConfig
from hone.datasets.layouts import exchange_rows
from hone.datasets.offline_config import SFTData
from hone.datasets.reading import open_one
from hone.datasets.records import PromptSet
from hone.datasets.rows_stream import SampleStream
from hone.datasets.samples import samples_of
from hone.datasets.schemas import load_prompts
from hone.datasets.stream import PromptStream
from hone.datasets.tokenise import tokenise
from hone.datasets.tokenizer import tokenizer_hash

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
ROWS = 4000
MILLION, FIRST_STEP_S = 10**6, 10.0


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> PromptSet:
    if GSM8K.exists():
        read = [json.loads(line) for line in GSM8K.read_text().splitlines()[:ROWS]]
        texts = [f"{row['question']}\n{row['answer']}" for row in read]
    else:
        generator = random.Random(0)
        words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 9))) for _ in range(20_000)]
        texts = [" ".join(generator.choices(words, k=150)) for _ in range(ROWS)]
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps({"input": text}) + "\n" for text in texts))
    return load_prompts(DataConfig(prompt_dataset=str(file)))


@pytest.fixture(scope="module")
def tokenizer(rows: PromptSet) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=32_000, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([str(row.prompt) for row in rows.rows], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_tokenise(
    benchmark: BenchmarkFixture,
    state: str,
    rows: PromptSet,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HONE_CACHE", str(tmp_path))
    monkeypatch.setitem(os.environ, "TOKENIZERS_PARALLELISM", "true")
    texts = [str(row.prompt) for row in rows.rows]
    config, hashed = DataConfig(max_len=100_000), tokenizer_hash(tokenizer)

    def ours() -> object:
        if state == "cold":
            shutil.rmtree(tmp_path / "datasets", ignore_errors=True)
        return tokenise(rows, tokenizer, config=config, max_new_tokens=8, tokenizer_hash=hashed).records

    def per_row() -> list[list[int]]:
        calls = (tokenizer(text, add_special_tokens=False, max_length=100_000, truncation=True, return_tensors="pt") for text in texts)
        return [call["input_ids"][0].tolist() for call in calls]

    expected = per_row()
    assert [list(record.tokens) for record in ours()] == expected
    tokens = sum(map(len, expected))
    benchmark.extra_info |= {"rows": len(texts), "tokens": tokens}
    roof = lambda: tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)  # noqa: E731 - one line, used once
    beside(benchmark, ours, peers={"per_row": per_row}, roof=roof, rounds=5, calls=1 if state == "cold" else 5)
    benchmark.extra_info["ours_mega_tokens_per_s"] = tokens / benchmark.extra_info["ours_ms"] / 1000


@pytest.mark.parametrize("kind", ["prompts", "demonstrations"])
def test_first_step_of_a_million_rows(benchmark: BenchmarkFixture, kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with file.open("w") as out:
        out.writelines(f'{{"prompt": "How much is {row} + 1?", "completion": "It is {row + 1}."}}\n' for row in range(MILLION))

    def prompts() -> list[object]:
        config = DataConfig(prompt_dataset=str(file))
        done = tokenise(load_prompts(config), tokenizer, config=config, max_new_tokens=8, tokenizer_hash="made here")
        return list(next(PromptStream(done.records, batch_size=128, seed=0, num_episodes=1)))

    def demonstrations() -> list[object]:
        samples = samples_of(exchange_rows(open_one(str(file)), SFTData()), tokenizer, SFTData(), tokenizer_hash="made here")
        return [samples.samples[place] for place in next(SampleStream(samples, batch_size=128, seed=0, epochs=1))]

    begin: Callable[[], list[object]] = {"prompts": prompts, "demonstrations": demonstrations}[kind]
    seconds: list[float] = []

    def once() -> None:
        began = time.perf_counter()
        assert len(begin()) == 128
        seconds.append(time.perf_counter() - began)

    benchmark.pedantic(once, rounds=1)
    benchmark.extra_info |= {"rows": MILLION, "first_step_s": seconds[0]}
    assert seconds[0] < FIRST_STEP_S
