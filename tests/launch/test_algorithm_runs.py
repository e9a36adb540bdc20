"""Every command but those of test_local_run.py, in this process, on the built-in model: short runs whose figures are known."""

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

from hone.algos.algorithms import ALGORITHMS
from hone.launch.builtin import BuiltinModel, builtin_model
from hone.launch.cli import main
from hone.launch.groups import compares_samples
from hone.launch.observe.metrics import check_names
from hone.launch.observe.run_directory import read_metrics
from hone.launch.verbs import VERBS

# Eight prompts of the recipe's eight samples, in two optimiser steps, so that ratios leave one.
SMALL = ["--run.backend", "local", "--rollout.batch-size", "8", "--train.batch-size", "32"]


def ran(verb: str, run: Path, *words: str, steps: int = 2) -> list[dict[str, Any]]:
    assert main([verb, *SMALL, "--train.max-steps", str(steps), "--run.dir", str(run), *words]) == 0
    metrics, torn = read_metrics(run)
    assert torn == 0 and len(metrics) == steps
    for step in metrics:
        check_names(step)
    return metrics


def moved(before: Path, after: Path) -> bool:
    """Whether a training has changed a model."""
    pairs = zip(*(AutoModelForCausalLM.from_pretrained(path).parameters() for path in (before, after)), strict=True)
    return any(not torch.equal(one, other) for one, other in pairs)


def groups_of_equals(run: Path, step: int) -> int:
    """Prompts whose samples were all rewarded alike, counted from the record of the samples."""
    rows = pyarrow.parquet.read_table(run / "rollouts" / f"step_{step:06d}.parquet").to_pylist()
    rewards: dict[str, set[float]] = {}
    for row in rows:
        rewards.setdefault(row["prompt_id"], set()).add(row["reward"])
    return sum(len(values) == 1 for values in rewards.values())


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("ppo", "grpo", "on_policy_distill")])
def test_a_command_trains_the_builtin_model_and_tells_what_it_should(verb: str, hone_cache: Path, tmp_path: Path) -> None:
    run, algo = tmp_path / "run", ALGORITHMS[verb]()
    metrics = ran(verb, run)
    assert moved(builtin_model(), run / "model")
    for number, step in enumerate(metrics, start=1):
        # The engine in this process computes as the learner does: no ratio leaves one.
        assert step["mismatch/ess"] == pytest.approx(1, abs=1e-4) and abs(step["mismatch/chi2"]) <= 1e-3
        assert step["mismatch/kl"] == pytest.approx(0, abs=1e-4) and step["mismatch/k3"] == pytest.approx(0, abs=1e-6)
        assert step["mismatch/perplexity_ratio"] == pytest.approx(1, abs=1e-4)
        assert not [name for name in step if "correction" in name]
        grouped = {name: value for name, value in step.items() if name.startswith("rollout/groups")}
        counts = {"rollout/groups": 8, "rollout/groups_of_one": 0, "rollout/groups_of_equals": groups_of_equals(run, number)}
        assert grouped == (counts if compares_samples(algo) else {})
        assert ("train/critic_loss" in step) == ("values" in algo.needs)
        assert ("train/kl" in step) == ("ref_logp" in algo.needs)
        assert ("train/ppo_clip_ratio" in step) == (verb != "sapo")
        assert step["train/optimizer_steps"] == 2 and step["train/actor_grad_norm"] > 0 and step["train/ppo_kl"] != 0
    assert ("train/sapo_gate" in metrics[0]) == (verb == "sapo") and metrics[0].get("train/sapo_gate", 0.9) == pytest.approx(0.99, abs=0.1)
    # What is imitated are right answers, of which there are some, and VAPO alone imitates.
    assert (metrics[0].get("train/imitation_nll", 0) > 0) == (verb == "vapo")


def test_a_correction_is_told_of_and_applied(hone_cache: Path, tmp_path: Path) -> None:
    # Every ratio is one: a mask from 1.5 rejects every token, so nothing is left to learn from.
    words = "--algo.correction.level token --algo.correction.mode mask --algo.correction.low 1.5 --algo.correction.high 2"
    (step,) = ran("dapo", tmp_path / "all", *words.split(), steps=1)
    told = {name: value for name, value in step.items() if "correction" in name}
    assert told == pytest.approx({"mismatch/correction_ess": 0, "mismatch/correction_mean": 0, "mismatch/correction_rejected": 1})
    assert step["train/policy_loss"] == step["train/actor_grad_norm"] == 0
    assert not moved(builtin_model(), tmp_path / "all" / "model")
    # A cap of a half halves every advantage and rejects none.
    (step,) = ran("dapo", tmp_path / "half", *["--algo.correction.level", "token", "--algo.correction.high", "0.5"], steps=1)
    told = {name: value for name, value in step.items() if "correction" in name}
    assert told == pytest.approx({"mismatch/correction_ess": 1, "mismatch/correction_mean": 0.5, "mismatch/correction_rejected": 0})
    assert step["train/actor_grad_norm"] > 0


def test_on_policy_the_policy_comes_nearer_to_its_teacher(hone_cache: Path, tmp_path: Path) -> None:
    """On policy and by token the loss is the mean of log student - log teacher, an estimate of KL(student || teacher)."""
    teacher = builtin_model(BuiltinModel(wrong=0, steps=120))  # it has seen right answers only
    words = ["--ref.model-name-or-path", str(teacher), "--train.batch-size", "64", "--actor.adam.lr", "1e-3", "--train.seed", "0"]
    metrics = ran("on_policy_distill", tmp_path / "run", *words, steps=8)
    distances, rewards = ([step[name] for step in metrics] for name in ("train/policy_loss", "rollout/reward_mean"))
    assert distances[0] > 1 and sum(distances[-2:]) / 2 < distances[0] / 2
    assert sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.1
    assert not [name for name in metrics[0] if name.startswith("rollout/groups") or name == "train/kl"]
