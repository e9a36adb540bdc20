import math

import pytest

from hone.launch.observe.ledger import Ledger
from hone.launch.observe.manifest import collect
from hone.launch.observe.report import conclude, write_report
from hone.launch.observe.run_directory import RunDirectory
from hone.launch.observe.summary import Summary
from tests.launch.observe.demo import step_metrics

STEPS = 12


@pytest.fixture
def run(tmp_path):
    run = RunDirectory.create(tmp_path / "run", "ppo")
    run.write_manifest(collect(verb="ppo", seed=3, argv=["launch", "ppo", "--note", "a b"], environment={}))
    ledger = Ledger(run.append_event)
    for step in range(1, STEPS + 1):
        ledger.issue([f"d:{step}:0", f"d:{step}:1"], step=step)
        ledger.train([f"d:{step}:0"], step=step)
        run.append_metrics({**step_metrics(step, STEPS, 2.0), "rollout/reward_mean": 0.1 * min(step, 9)})
    ledger.drop(["d:1:1"], step=1, reason="longer than | the budget")
    return run


def summary(**changes):
    return Summary(
        **{"outcome": "finished", "elapsed_s": 61.0, "peak_memory_gb": 3.25, "model": "runs/x/model", "next_commands": ("a", "b")} | changes
    )


def test_the_report_tells_the_run_and_is_private(run):
    path = conclude(run, summary())
    text = path.read_text()
    assert path == run.path / "report.md" and path.stat().st_mode & 0o777 == 0o600
    assert text.startswith("# hone ppo: finished\n\n12 steps in 1m01s, 3.25 GB at the peak")
    assert "launch ppo --note 'a b'" in text and "seed 3" in text and "runs/x/model" in text
    # The first three are 0.1 0.2 0.3; the last five 0.8 and four times 0.9.
    assert "0.100 to 0.900; mean of the first 3 steps 0.200, of the last 5 steps 0.880." in text
    assert "\u2581\u2582\u2583\u2584\u2585\u2585\u2586\u2587\u2588\u2588\u2588\u2588" in text
    assert "| `rollout/reward_mean` | reward | 0.100 | 0.900 | highest 0.900 |" in text
    assert "Largest `mismatch/logp_abs_diff_mean` of any step: 2.1e-06 nats." in text
    assert "24 issued = 12 trained + 1 dropped + 11 open." in text
    assert "- dropped 1: longer than \\| the budget" in text
    assert "| generation | 0.92 s | 11 s | 46 % |" in text
    assert "| before, between and after the steps | | 37 s | |" in text  # 61 s less 12 steps of 2 s
    assert "`mismatch/logp_abs_diff_max` outside [0, 1] in 1 step, first in step 4" in text
    assert text.endswith("## Next\n\n```\na\nb\n```\n")


def test_the_report_can_be_made_again_from_the_files_alone(run):
    first = conclude(run, summary()).read_text()
    (run.path / "report.md").unlink()
    assert write_report(run.path).read_text() == first


def test_a_failure_is_told_in_full_and_its_text_cannot_escape(run):
    text = conclude(run, summary(outcome="failed", model=None, next_commands=(), error="engine 0 died\n```\n<script>\x1b[31m")).read_text()
    assert text.startswith("# hone ppo: failed\n")
    assert "````\nengine 0 died\n```\n<script>\\x1b[31m\n````" in text
    assert "\x1b" not in text and "## Next" not in text and "The trained model" not in text


def test_a_killed_run_has_a_report_that_says_so(run):
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "rollout/rew')
    text = write_report(run.path).read_text()
    assert "# hone ppo: ended without a word" in text and "12 steps are on record" in text
    assert "torn" in text


def test_a_ledger_that_does_not_balance_is_the_reports_news(run):
    run.append_event("trained", step=9, prompts=["never-drawn"])
    assert "**It does not balance.**" in conclude(run, summary()).read_text()
    assert "never-drawn trained in step 9 but never issued" in (run.path / "report.md").read_text()


def test_values_that_are_not_finite_are_reported(run):
    run.append_metrics({**step_metrics(13, STEPS, 2.0), "mismatch/logp_abs_diff_mean": math.nan, "train/policy_loss": math.inf})
    text = conclude(run, summary()).read_text()
    assert "Largest `mismatch/logp_abs_diff_mean` of any step: nan nats." in text
    assert "- step 13: not finite: train/policy_loss, mismatch/logp_abs_diff_mean" in text


def test_a_run_that_failed_before_its_first_step_has_a_report(tmp_path):
    run = RunDirectory.create(tmp_path / "run", "grpo")
    run.write_manifest(collect(verb="grpo", seed=0, argv=["launch", "grpo"], environment={}))
    text = conclude(run, summary(outcome="failed", error="no engine", model=None)).read_text()
    assert "0 steps in 1m01s" in text and "no engine" in text and "## Metrics" not in text
