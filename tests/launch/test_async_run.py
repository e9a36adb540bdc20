"""Rollout ahead of the learner for real: Ray, vLLM and DeepSpeed, responses held over updates, killed with SIGKILL and taken up again."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from hone.launch.observe.ledger import replay
from hone.launch.observe.metrics import check_names
from hone.launch.observe.run_directory import read_events, read_metrics
from tests.launch.conftest import MADE_UP, save_model, write_reward, write_rows
from tests.launch.running import started

LENGTH_IS_GOOD = 'return {"rewards": [len(queries[0]) % 7 / 7.0]}'
pytestmark = pytest.mark.timeout(900)


def arguments(home: Path, tokenizer: PreTrainedTokenizerFast, *more: str) -> list[str]:
    """GRPO on an untrained model that seldom stops, so that responses are long and updates meet them."""
    model = save_model(home / "model", tokenizer, kind="qwen3", tied=True)
    return [
        *("grpo", "--actor.model-name-or-path", str(model), "--data.prompt-dataset", str(write_rows(home / "rows.jsonl", MADE_UP))),
        *("--data.input-key", "question", "--data.label-key", "answer"),
        *("--reward.remote-url", str(write_reward(home / "reward.py", LENGTH_IS_GOOD))),
        *("--rollout.batch-size", "4", "--rollout.n-samples-per-prompt", "2", "--train.batch-size", "8"),
        *("--rollout.max-new-tokens", "256", "--data.max-len", "384", "--train.max-tokens-per-gpu", "1024"),
        *("--vllm.kv-cache-gib", "0.125", "--run.threads", "1", "--train.max-steps", "6", "--ckpt.save-steps", "1", "--ckpt.max-num", "9"),
        *("--train.async-enable", "--algo.correction.level", "token", *more),
    ]


def test_a_killed_run_goes_on_with_what_was_open_and_no_token_is_older_than_the_bound(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    asked = arguments(tmp_path, tokenizer, "--train.partial-rollout-enable", "--train.async-queue-size", "2")
    with started(asked, tmp_path / "killed") as run:
        run.wait_for(lambda: (tmp_path / "killed" / "checkpoints" / "step_2").exists(), limit_s=800)
        run.kill()
    checkpoint = max((tmp_path / "killed" / "checkpoints").glob("step_?"))
    with np.load(checkpoint / "open.npz", allow_pickle=False) as kept:
        assert kept["tokens"].size == kept["lengths"].sum()
    with started([*asked, "--resume", "killed"], tmp_path / "resumed") as run:
        output = run.finish(limit_s=800)
        assert run.process.returncode == 0, output

    steps = read_metrics(tmp_path / "resumed")[0]
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    for step in steps:
        check_names(step)
        assert step["staleness/version_lag_max"] <= 2 and step["staleness/dropped"] == 0
        assert step["sync/canary_abs_diff_max"] <= 1e-3
    assert steps[0]["mismatch/logp_abs_diff_max"] <= 1e-4  # the first batch was sampled by the policy that learns
    assert max(step["staleness/version_lag_max"] for step in steps) >= 1
    # Responses are of more versions than one: their mean lag is no whole number of versions.
    assert any(step["staleness/version_lag_mean"] % 1 for step in steps)

    events = read_events(tmp_path / "resumed")[0]
    totals = replay(events).verify()
    assert (totals.trained, totals.open) == (6 * 4, 0) and set(totals.reasons) <= {"the run ended before a step took it"}
    issued = Counter(prompt for event in events if event["kind"] == "issued" for prompt in event["prompts"])
    assert set(issued.values()) == {1}  # what was under way was begun anew, not drawn anew
    assert [event["step"] for event in events if event["kind"] == "resumed"] == [int(checkpoint.name.removeprefix("step_"))]


def test_over_sampling_goes_on_with_the_first_full_batch_and_accounts_for_the_others(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    asked = [one for one in arguments(tmp_path, tokenizer) if one not in ("--train.async-enable",)]
    more = ["--rollout.over-sampling", "1.5", "--rollout.straggler-policy", "abort", "--train.max-steps", "3", "--ckpt.save-steps", "-1"]
    with started([*asked, *more], tmp_path / "run") as run:
        output = run.finish(limit_s=800)
        assert run.process.returncode == 0, output
    steps = read_metrics(tmp_path / "run")[0]
    assert len(steps) == 3 and all(step["rollout/num_samples"] == 8 for step in steps)
    assert all(step["staleness/version_lag_max"] <= 1 for step in steps)
    totals = replay(read_events(tmp_path / "run")[0]).verify()
    assert totals.trained == 12 and totals.open == 0 and totals.issued > 12
    assert {reason.partition(":")[0] for reason in totals.reasons} <= {"straggler", "stale", "the run ended before a step took it"}
