"""Models that are not what their roles' settings suppose: told from the configuration and the files' headers, before anything starts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from hone.launch.errors import Problem
from hone.launch.offline_preflight import lacking
from hone.learner import model as learner_model
from tests.launch.asking import missing, only, resolved
from tests.launch.conftest import MADE_UP, save_model, write_rows

HEAVY = ("ray", "vllm", "deepspeed")


@pytest.fixture(autouse=True)
def nothing_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("weights were read")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(learner_model, "_load", refuse)


@pytest.fixture
def dense(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    return save_model(tmp_path / "dense", tokenizer, kind="qwen3", tied=True)


def with_head(model: Path, **shapes: tuple[int, ...]) -> Path:
    """A head of these shapes beside the model's own weights; `score_weight` is score.weight."""
    file = model / "model.safetensors"
    head = {name.replace("_", "."): torch.zeros(shape) for name, shape in shapes.items()}
    save_file({**load_file(file), **head}, file, metadata={"format": "pt"})
    return model


def offline(line: str) -> list[Problem]:
    return list(lacking(resolved(line), 0))


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ("--ds.lora.rank 4 --ds.lora.target-modules query", "--ds.lora.target-modules query matches none of the linear layers of "),
        ("--actor.freeze *.router.*", "has no parameter that matches '*.router.*', which was to be frozen"),
        ("--actor.freeze *", "would have nothing left to train"),
        ("--critic.freeze transformer.*", "has no parameter that matches 'transformer.*', which was to be frozen"),
        ("--actor.aux-loss-coef 0.01", "has no routers whose load could be balanced"),
        ("--critic.aux-loss-coef 0.01", "has no routers whose load could be balanced"),
    ],
)
def test_parts_that_a_model_has_not_are_told(dense: Path, flags: str, what: str) -> None:
    problem = only(missing(f"ppo --actor.model-name-or-path {dense} {flags}"))
    assert what in problem.what and flags.split()[0] in problem.where
    assert problem.code == 5 and problem.mend


def test_parts_that_a_model_has_are_accepted(dense: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    mixture = save_model(tmp_path / "mixture", tokenizer, kind="mixture", tied=False)
    words = "--actor.aux-loss-coef 0.01 --actor.freeze *.mlp.gate.* --ds.lora.rank 4 --ds.lora.target-modules q_proj,v_proj"
    assert missing(f"ppo --actor.model-name-or-path {mixture} {words}") == []
    # A reference does not train, and a critic that nothing needs is not looked at.
    assert missing(f"grpo --actor.model-name-or-path {mixture} --ref.model-name-or-path {dense} --actor.aux-loss-coef 0.01") == []


@pytest.mark.parametrize("name", ["score", "value_head"])
def test_a_value_head_of_another_shape_is_told_by_its_header(dense: Path, name: str) -> None:
    assert missing(f"ppo --actor.model-name-or-path {with_head(dense, score_weight=(1, 32))}") == []
    file = dense / "model.safetensors"
    save_file({**load_file(file), f"{name}.weight": torch.zeros(3, 32)}, file, metadata={"format": "pt"})
    if name != "score":
        (dense / "config.json").write_text(json.dumps({**json.loads((dense / "config.json").read_text()), "value_head_prefix": name}))
    problem = only(missing(f"ppo --actor.model-name-or-path {dense}"))
    assert f"{name}.weight has shape (3, 32), a critic head of 1 label has (1, 32)" in problem.what
    assert problem.mend == "name a critic model, or set --ds.value-head-prefix to the head's name" and problem.code == 5
    assert missing(f"grpo --actor.model-name-or-path {dense}") == []


def test_statistics_that_a_critic_is_to_be_normalised_by_are_told(dense: Path) -> None:
    problem = only(missing(f"ppo --actor.model-name-or-path {with_head(dense, score_weight=(1, 32))} --ds.normalize-reward"))
    assert "has no mean and std of the model's rewards" in problem.what and problem.code == 5


def test_models_over_labelled_rows_are_looked_at_too(dense: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"input": row["question"], "output": row["answer"]} for row in MADE_UP])
    words = f"sft --model.model-name-or-path {dense} --data.dataset {rows}"
    assert offline(words) == []
    problem = only(offline(f"{words} --ds.lora.rank 4 --ds.lora.target-modules query"))
    assert "--ds.lora.target-modules query matches none" in problem.what and problem.code == 5
    with_head(dense, score_weight=(3, 32))
    assert offline(words) == []
    problem = only(offline(f"rm --model.model-name-or-path {dense}"))
    assert "score.weight has shape (3, 32), a reward head of 1 label" in problem.what and problem.code == 5
    problem = only(offline(f"prm --model.model-name-or-path {dense}"))
    assert "score.weight has shape (3, 32), a process head of 2 labels" in problem.what and problem.code == 5


def test_a_refusal_starts_neither_ray_nor_an_engine(dense: Path) -> None:
    words = ["grpo", "--actor.model-name-or-path", str(dense), "--ds.lora.rank", "4", "--ds.lora.target-modules", "query"]
    script = f"""
import sys
from hone.launch.cli import main
code = main({words!r})
print(code, *(name for name in {HEAVY!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "5", done.stdout
    assert "--ds.lora.target-modules query matches none" in " ".join(done.stderr.split())
