"""Runs whose models train in part: adapters from the command line to the export, and the exit codes of what cannot be meant."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hone.launch.cli import main
from hone.launch.observe.metrics import check_names
from hone.launch.observe.run_directory import read_metrics
from tests.launch.conftest import MADE_UP, SHORT_IS_GOOD, save_model, write_reward, write_rows
from tests.launch.test_local_run import own

LORA = ("--ds.lora.rank", "4", "--actor.adam.lr", "1e-3")


@pytest.fixture
def command(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> list[str]:
    """All that stands behind the verb; the model is in `tmp_path / "model"`, the run in `tmp_path / "run"`."""
    model = save_model(tmp_path / "model", tokenizer, kind="qwen3", tied=True)
    prompts, reward = write_rows(tmp_path / "rows.jsonl", MADE_UP), write_reward(tmp_path / "reward.py", SHORT_IS_GOOD)
    return own(model, prompts, reward, tmp_path / "run")


def test_a_run_with_adapters_serves_them_and_leaves_them_beside_the_merged_model(command: list[str], tmp_path: Path) -> None:
    assert main(["ppo", *command, *LORA, "--ckpt.save-steps", "2"]) == 0
    steps, _ = read_metrics(tmp_path / "run")
    for step in steps:  # what sampled is what learnt, merged
        assert step["mismatch/logp_abs_diff_mean"] <= 1e-4 and step["sync/canary_abs_diff_max"] <= 1e-3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        before, after = base(input_ids=tokens).logits, merged(input_ids=tokens).logits
        assert float((after - before).abs().max()) > 1e-3
        adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "model" / "adapter")
        assert_close(adapted(input_ids=tokens).logits, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--ds.lora.rank", "4", "--ds.lora.target-modules", "query"), "--ds.lora.target-modules query matches none of the linear layers"),
        (("--actor.freeze", "*.router.*"), "has no parameter that matches '*.router.*', which was to be frozen"),
        (("--actor.aux-loss-coef", "0.01"), "has no routers whose load could be balanced"),
    ],
)
def test_names_that_match_nothing_end_a_run_with_5(
    command: list[str], capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    assert main(["grpo", *command, *flags]) == 5
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_value_head_of_another_shape_ends_a_run_with_5(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "score.weight": torch.zeros(3, 8)}, file, metadata={"format": "pt"})
    assert main(["ppo", *command]) == 5
    assert "score.weight has shape (3, 8)" in " ".join(capsys.readouterr().err.split())


def test_a_checkpoint_with_adapters_is_refused_without_them_with_4(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = ("--ckpt.path", str(tmp_path / "checkpoints"))
    assert main(["grpo", *command, *LORA, *saved, "--ckpt.save-steps", "1"]) == 0
    again = [*command[:-1], str(tmp_path / "again")]
    assert main(["grpo", *again, *saved, "--ckpt.load-enable"]) == 4
    assert "another model" in " ".join(capsys.readouterr().err.split())


def test_a_mixture_is_balanced_and_served(command: list[str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    save_model(tmp_path / "model", tokenizer, kind="mixture", tied=False)
    assert main(["ppo", *command, "--actor.aux-loss-coef", "0.01", "--critic.aux-loss-coef", "0.01"]) == 0
    steps, _ = read_metrics(tmp_path / "run")
    for step in steps:
        check_names(step)
        assert step["mismatch/logp_abs_diff_mean"] <= 1e-4 and step["sync/canary_abs_diff_max"] <= 1e-3
        for role in ("", "critic_"):  # two experts a token of four
            assert step[f"train/{role}aux_loss"] >= 1 and 1 <= step[f"train/{role}max_expert_load"] <= 2
