"""Two learner ranks in a ring on real Ray, killed with SIGKILL and taken up again, against the run that never stopped."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from hone.launch.observe.run_directory import read_events, read_metrics
from tests.launch.conftest import MADE_UP, save_model, write_reward, write_rows
from tests.launch.running import Run, started

LENGTH_IS_GOOD = 'return {"rewards": [len(queries[0]) % 7 / 7.0]}'
pytestmark = pytest.mark.timeout(900)


def arguments(home: Path, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """PPO on a model of the test's own. A ring's micro-batch holds two or three rows, so that some are cut in two."""
    model = save_model(home / "model", tokenizer, kind="qwen3", tied=True)
    return [
        *("ppo", "--actor.model-name-or-path", str(model), "--data.prompt-dataset", str(write_rows(home / "rows.jsonl", MADE_UP))),
        *("--data.input-key", "question", "--data.label-key", "answer"),
        *("--reward.remote-url", str(write_reward(home / "reward.py", LENGTH_IS_GOOD))),
        *("--rollout.batch-size", "4", "--rollout.n-samples-per-prompt", "2", "--train.batch-size", "8"),
        *("--rollout.max-new-tokens", "8", "--data.max-len", "64", "--train.max-tokens-per-gpu", "32"),
        *("--vllm.kv-cache-gib", "0.125", "--run.threads", "1", "--train.max-steps", "4", "--ckpt.save-steps", "1"),
        *("--actor.num-gpus-per-node", "2", "--ds.ring-attn-size", "2", "--ds.zero-stage", "2", "--ckpt.max-num", "9"),
    ]


def finished(run: Run) -> None:
    output = run.finish(limit_s=400)
    assert run.process.returncode == 0, output


def test_a_killed_ring_taken_up_again_is_the_run_that_never_stopped(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    asked = arguments(tmp_path, tokenizer)
    with started(asked, tmp_path / "whole") as run:
        finished(run)
    with started(asked, tmp_path / "killed") as run:
        run.wait_for(lambda: (tmp_path / "killed" / "checkpoints" / "step_2").exists(), limit_s=400)
        run.kill()
    for later in ("step_3", "step_4"):  # if it was quicker than the signal
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / later, ignore_errors=True)
    with started([*asked, "--resume", "killed"], tmp_path / "resumed") as run:
        finished(run)

    whole, resumed = (read_metrics(tmp_path / name)[0] for name in ("whole", "resumed"))
    assert [step["step"] for step in resumed] == [step["step"] for step in whole] == [1, 2, 3, 4]
    assert [event["step"] for event in read_events(tmp_path / "resumed")[0] if event["kind"] == "resumed"] == [2]
    for one, other in zip(whole, resumed, strict=True):
        # What the ring recomputes is what vLLM reported when it sampled, before and after the ring's own updates.
        assert one["mismatch/logp_abs_diff_mean"] <= 1e-4
        same = [name for name in one if name.startswith(("rollout/", "train/"))]
        assert {name: one[name] for name in same} == {name: other[name] for name in same}
    assert len({step["rollout/reward_mean"] for step in whole}) > 1
    for role in ("policy", "critic"):
        for rank in range(2):
            name = f"{role}-{rank:05d}-of-00002.safetensors"
            last = [load_file(tmp_path / home / "checkpoints" / "step_4" / name) for home in ("whole", "resumed")]
            assert last[0].keys() == last[1].keys() and all(torch.equal(tensor, last[1][key]) for key, tensor in last[0].items())
    exported = [load_file(tmp_path / home / "model" / "model.safetensors") for home in ("whole", "resumed")]
    assert all(torch.equal(tensor, exported[1][name]) for name, tensor in exported[0].items())
