"""TRL's SFT, DPO, KTO and reward trainers, whole, on the same rows as `launch sft, dpo, kto, rm`: loss and gradient of every step.

They need all of TRL's dependencies, so they run in an environment of their own, `.peers-trainers`, which `just trainers` makes.
KTO's anchor is measured on other pairs of prompts and answers than TRL's (which takes them from the batch): here both are 0.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from hone.launch.cli import main
from hone.launch.observe.run_directory import read_metrics
from hone.launch.offline_data import READERS, prepare
from hone.launch.resolve import resolve
from tests.golden.offline_curves import STEPS, small, words

PYTHON = Path(__file__).parents[2] / ".peers-trainers" / "bin" / "python"
CONSTANT = ["--model.lr-scheduler", "constant", "--model.lr-warmup-ratio", "0"]


@pytest.mark.skipif(not PYTHON.exists(), reason="TRL with all its dependencies is not in .peers-trainers; `just trainers` puts it there")
@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "rm"])
def test_every_step_has_the_loss_and_the_gradient_of_trls_trainer(name: str, hone_cache: Path, tmp_path: Path) -> None:
    model = small(tmp_path / "model")
    verb, *options = [*words(name, tmp_path), *CONSTANT]
    config = resolve(verb, options, gpus=0).config
    source = READERS[verb][1](config.train.seed, config.data.max_samples)
    drawn = [place for step in prepare(config, model=str(model)).stream for place in step][: STEPS * config.train.batch_size]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(source.rows[place].columns) + "\n" for place in drawn))
    script = Path(__file__).with_name("trl_trainers.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [str(PYTHON), str(script), name, str(model), str(rows), str(tmp_path / "theirs.json")]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=280)
    theirs = json.loads((tmp_path / "theirs.json").read_text())

    assert main([verb, *options, "--run.dir", str(tmp_path / "run")]) == 0
    ours = read_metrics(tmp_path / "run")[0]
    assert len(theirs) == len(ours) == STEPS
    assert [step["train/loss"] for step in ours] == pytest.approx([step["loss"] for step in theirs], abs=1e-5)
    assert [step["train/grad_norm"] for step in ours] == pytest.approx([step["grad_norm"] for step in theirs], rel=1e-5)
    if name == "kto":
        assert all(step["train/kl_anchor"] == 0 for step in ours)
