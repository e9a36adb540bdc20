"""SFT and DPO as a user runs them, beside TRL's trainers on the same rows: tokens a second, loading and the first step left out.

Each side is a process of its own with one thread, since TRL needs other releases of some libraries (`just trainers`); they take turns.
Both pack where they can: TRL's DPO of this release pads, whatever `padding_free` says. Rows are worked problems of GSM8K where they lie
beside the checkout, made-up ones with log-normal lengths else. Tokens are those of the rows: padding counts for nothing.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
PYTHON = Path(__file__).parents[1] / ".peers-trainers" / "bin" / "python"
STEPS, ROUNDS = 12, 3
LENGTH, MICRO_BATCH = 1024, 2048
"""Longest row, and most tokens that are looked at together, of either side [tokens]."""
ROWS = {"sft": 32, "dpo": 16}
"""Rows of an optimiser step."""
LIMIT = 2.0
THEIRS: dict[str, tuple[str, dict[str, object]]] = {
    # Two packed rows of LENGTH at a time and three times that a step are about as many tokens as 32 rows.
    "sft": ("sft", {"packing": True, "max_length": LENGTH, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}),
    "dpo": ("dpo", {"max_length": LENGTH, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}),
    "dpo, its reference asked before": (
        "dpo",
        {"max_length": LENGTH, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "precompute_ref_log_probs": True},
    ),
}
OURS = """
import json, sys, time
from hone.launch.cli import main
from hone.launch.observe.run_directory import RunDirectory

steps, written = [], RunDirectory.append_metrics

def append(self, metrics):
    written(self, metrics)
    steps.append([time.perf_counter(), metrics["perf/train_tokens_per_second"] * metrics["timing/train"], metrics["train/loss"]])

RunDirectory.append_metrics = append
code = main(sys.argv[2:])
open(sys.argv[1], "w").write(json.dumps(steps))
raise SystemExit(code)
"""


@pytest.fixture(scope="module")
def problems() -> list[tuple[str, str]]:
    count = STEPS * max(ROWS.values())
    if GSM8K.exists():
        read = [json.loads(line) for line in GSM8K.read_text().splitlines()[:count]]
        return [(f"{row['question']}\n", row["answer"]) for row in read]
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(5000)]
    lengths = [tuple(max(8, min(300, int(draw.lognormvariate(4.0, 0.6)))) for _ in range(2)) for _ in range(count)]
    return [(" ".join(draw.choices(words, k=asked)) + "\n", " ".join(draw.choices(words, k=said))) for asked, said in lengths]


@pytest.fixture(scope="module")
def model(problems: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a tokenizer that was trained on the rows."""
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False)
    base.train_from_iterator([text for problem in problems for text in problem], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<eos>", pad_token="<pad>")
    logging.disable_progress_bar()
    described = Qwen3Config(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=len(tokenizer),
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    directory = tmp_path_factory.mktemp("model")
    Qwen3ForCausalLM(described).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def rows_of(kind: str, problems: list[tuple[str, str]], file: Path) -> Path:
    rows: list[dict[str, str]] = []
    for place, (asked, said) in enumerate(problems[: STEPS * ROWS[kind]]):
        other = problems[(place + 1) % len(problems)][1]
        rows.append({"prompt": asked, "completion": said} if kind == "sft" else {"prompt": asked, "chosen": said, "rejected": other})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.skipif(not PYTHON.exists(), reason="TRL with all its dependencies is not in .peers-trainers; `just trainers` puts it there")
@pytest.mark.parametrize("case", THEIRS)
def test_tokens_a_second(benchmark: BenchmarkFixture, case: str, problems: list[tuple[str, str]], model: Path, tmp_path: Path) -> None:
    kind, settings = THEIRS[case]
    rows = rows_of(kind, problems, tmp_path / "rows.jsonl")
    found: dict[str, list[list[list[float]]]] = {"ours": [], "trl": []}

    def run(side: str, command: list[str], **environment: str) -> Callable[[], None]:
        out = tmp_path / f"{side}.json"

        def once() -> None:
            words = [str(out) if word == "OUT" else f"{out}-{len(found[side])}" if word == "DIR" else word for word in command]
            inherited = {name: value for name, value in os.environ.items() if side == "ours" or name != "PYTHONPATH"}
            own = inherited | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HONE_CACHE": str(tmp_path / "cache"), **environment}
            ended = subprocess.run(words, env=own, capture_output=True, text=True)
            assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
            found[side].append(json.loads(out.read_text()))

        return once

    own = ["--model.model-name-or-path", str(model), "--data.dataset", str(rows), "--data.max-len", str(LENGTH)]
    own += ["--train.batch-size", str(ROWS[kind]), "--train.max-tokens-per-gpu", str(MICRO_BATCH), "--train.max-epochs", "1"]
    own += ["--model.lr-scheduler", "constant", "--model.lr-warmup-ratio", "0", "--model.adam.lr", "1e-4", "--run.threads", "1"]
    ours = run("ours", [sys.executable, "-c", OURS, "OUT", kind, *own, "--run.dir", "DIR"])
    script = Path(__file__).with_name("trl_programs.py")
    trl = run("trl", [str(PYTHON), str(script), kind, str(model), str(rows), "OUT", json.dumps(settings)])
    benchmark.pedantic(ours, setup=trl, rounds=ROUNDS)

    speeds = {side: [_tokens_a_second(steps) for steps in runs] for side, runs in found.items()}
    ratio = median(speeds["ours"]) / median(speeds["trl"])
    tokens = {side: sum(step[1] for step in runs[0]) for side, runs in found.items()}
    benchmark.extra_info |= {f"{side}_tokens_per_s": median(own) for side, own in speeds.items()}
    benchmark.extra_info |= {"times_faster_than_trl": ratio, "tokens": tokens["ours"], "steps": len(found["ours"][0]), "threads": 1}
    assert tokens["ours"] == pytest.approx(tokens["trl"], rel=0.01)  # the same rows, however they are put together
    assert found["ours"][0][0][2] == pytest.approx(found["trl"][0][0][2], rel=0.02)  # random models
    assert ratio >= LIMIT


def _tokens_a_second(steps: list[list[float]]) -> float:
    return sum(tokens for _, tokens, _ in steps[1:]) / (steps[-1][0] - steps[0][0])
