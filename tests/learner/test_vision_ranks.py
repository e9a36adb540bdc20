"""Images under DeepSpeed: two ranks of which one has none train as one process with all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.learner.test_ranks import wait
from tests.learner.tiny import make_learner
from tests.learner.vision_ranks import MAX_TOKENS, SETTINGS, train
from tests.vision import save_vision_model

CASES = [("qwen2_5_vl", "all", 2), ("qwen2_5_vl", "all", 3), ("qwen2_5_vl", "frozen", 3), ("qwen3_vl", "all", 3)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case in one pair of processes."""
    root, ports = tmp_path_factory.mktemp("vision-ranks"), tmp_path_factory.mktemp("ports")
    models = {family: save_vision_model(root / family, family=family) for family, _, _ in CASES}
    cases = [
        {"model": models[family], "settings": settings, "stage": stage, "out": str(root / f"{family}-{settings}-{stage}")}
        for family, settings, stage in CASES
    ]
    (root / "spec.json").write_text(json.dumps({"ports": str(ports), "cases": cases}))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "error", "-m", "tests.learner.vision_ranks", str(root / "spec.json")]
    logs, processes = [root / f"rank{rank}.log" for rank in range(2)], []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            processes.append(subprocess.Popen([*command, str(rank)], env=environment, stdout=output, stderr=subprocess.STDOUT))
    try:
        codes = wait(processes, timeout_s=300)
    finally:
        for process in processes:
            process.kill()
    if codes != [0, 0]:
        pytest.fail("\n".join(log.read_text()[-4000:] for log in logs))
    return root


@pytest.mark.parametrize(("family", "settings", "stage"), CASES)
def test_a_rank_without_images_trains_the_tower_with_the_others(root: Path, family: str, settings: str, stage: int) -> None:
    model = str(root / family)
    learner = make_learner({"policy": model}, max_tokens=MAX_TOKENS, lr=1e-3, **SETTINGS[settings])
    before = {name: tensor.detach().clone() for name, tensor in learner.weights("policy")}
    alone = train(learner, model, rank=0, world_size=1)
    ranks = [torch.load(root / f"{family}-{settings}-{stage}-{rank}.pt") for rank in range(2)]
    for name, weight in alone["policy"].items():
        assert torch.equal(ranks[0]["policy"][name], ranks[1]["policy"][name]), name
        assert_close(ranks[0]["policy"][name], weight, rtol=1e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert_close(ranks[0]["norms"], alone["norms"], rtol=1e-5, atol=1e-5)
    moved = {name for name, weight in alone["policy"].items() if not torch.equal(weight, before[name])}
    assert any(".visual." in name for name in moved) == (settings == "all")
