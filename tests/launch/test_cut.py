"""`--train.micro-batch-size` and the policy's hidden size reach the plan that cuts batches into micro-batches."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hone.launch import local
from hone.launch.cli import main
from tests.launch.conftest import MADE_UP, SHORT_IS_GOOD, SIZES, save_model, write_reward, write_rows
from tests.launch.test_local_run import own


def test_fixed_micro_batches_by_the_flag(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut, shards = [], local.shards

    def watched(*args: Any, **settings: Any) -> Any:
        parts = shards(*args, **settings)
        cut.append((settings["hidden_size"], max(len(rows) for part in parts for rows in part.micro_batches)))
        return parts

    monkeypatch.setattr(local, "shards", watched)
    model = save_model(tmp_path / "model", tokenizer, kind="qwen3", tied=True)
    reward, prompts = write_reward(tmp_path / "reward.py", SHORT_IS_GOOD), write_rows(tmp_path / "rows.jsonl", MADE_UP)
    for name, more, most in (("fixed", ["--train.micro-batch-size", "3"], 3), ("by tokens", [], 8)):
        assert main(["grpo", *own(model, prompts, reward, tmp_path / name, "--train.max-steps", "1", *more)]) == 0
        assert {size for size, _ in cut} == {SIZES["hidden_size"]} and max(rows for _, rows in cut) == most
        cut.clear()
