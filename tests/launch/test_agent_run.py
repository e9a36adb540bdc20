"""A whole run whose policy acts in an environment over several turns, from a file as users of OpenRLHF have it."""

from pathlib import Path

import pyarrow.parquet
import pytest

from hone.launch.cli import main
from hone.launch.observe.run_directory import read_metrics

AGENT = (Path(__file__).parents[2] / "examples" / "agent.py").read_text()
LOCAL = ["--run.backend", "local", "--rollout.batch-size", "8", "--rollout.n-samples-per-prompt", "4", "--train.batch-size", "32"]


@pytest.mark.parametrize("verb", ["grpo", "ppo"])
def test_episodes_are_trained_on_as_they_were_played(verb: str, hone_cache: Path, tmp_path: Path) -> None:
    agent, run = tmp_path / "agent.py", tmp_path / "run"
    agent.write_text(AGENT)
    arguments = ["--rollout.agent-func-path", str(agent), "--train.max-steps", "2", "--train.seed", "1", "--run.dir", str(run)]
    assert main([verb, *LOCAL, *arguments]) == 0
    steps, _ = read_metrics(run)
    assert len(steps) == 2
    for step in steps:
        assert step["mismatch/logp_abs_diff_mean"] <= 1e-4
    rows = pyarrow.parquet.read_table(run / "rollouts" / "step_000001.parquet").to_pylist()
    turns = [1 + row["response"].count(row["prompt"]) for row in rows]
    assert set(turns) > {1}  # some answers were right at once, some were not
    for row, count in zip(rows, turns, strict=True):
        assert row["reward"] == pytest.approx(1 / count) or (row["reward"], count) == (0.0, 3)
    assert steps[0]["rollout/extra/turns"] == pytest.approx(sum(turns) / len(turns))


def test_a_file_without_an_environment_and_two_judges_are_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, run = tmp_path / "agent.py", tmp_path / "run"
    empty.write_text("x = 1\n")
    assert main(["grpo", "--rollout.agent-func-path", str(empty), "--run.dir", str(run)]) == 6
    assert "defines none of make_env, AgentInstance, AgentExecutor" in capsys.readouterr().err
    empty.write_text(AGENT)
    both = ["--rollout.agent-func-path", str(empty), "--reward.remote-url", str(empty), "--run.dir", str(run)]
    assert main(["grpo", *both]) == 2
    assert "an environment gives the rewards of its episodes" in capsys.readouterr().err
    assert not run.exists()


def test_an_environment_that_fails_ends_the_run_with_its_name(hone_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent = tmp_path / "agent.py"
    agent.write_text(AGENT.replace("self.tries += 1\n", "self.tries += 1\n        raise KeyError('no such move')\n"))
    assert main(["grpo", *LOCAL, "--rollout.agent-func-path", str(agent), "--run.dir", str(tmp_path / "run")]) == 6
    assert f"environment AgentInstance ({agent}) raised KeyError: 'no such move' in step" in " ".join(capsys.readouterr().err.split())
