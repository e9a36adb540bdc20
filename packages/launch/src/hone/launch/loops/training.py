"""The last stages of an iteration: what is learnt from, in train.jsonl, and the training itself, which is a run of `sft` or `dpo`."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from hone.datasets.errors import DataError
from hone.launch.commands import defaults_of
from hone.launch.loop_config import ConditionalSFTConfig, IterativeDPOConfig, RejectionSamplingConfig
from hone.launch.loops import select
from hone.launch.loops.stages import ROWS, SCORED, Conditioner, Work, asked, read, write
from hone.launch.observe.run_directory import read_metrics
from hone.launch.programs import offline
from hone.launch.schema import settings
from hone.learner.checkpoint import directory as checkpoints

MODEL = "model"


def choose(work: Work) -> dict[str, Any]:
    """Write what the iteration learns from; how much that is, and what was left out. Raises DataError where nothing is left."""
    config, found = work.config, list(select.groups(read(work.directory / SCORED)))
    if isinstance(config, RejectionSamplingConfig):
        chosen = select.best(found, above=config.select.above)
    elif isinstance(config, IterativeDPOConfig):
        chosen = select.pairs(found)
    else:
        assert isinstance(config, ConditionalSFTConfig), f"{config.verb} chooses nothing"
        condition = Conditioner(config, asked(work))
        chosen = select.conditioned(found, normalize=config.condition.normalize, condition=condition)
    if not chosen.rows:
        raise DataError(
            f"iteration {work.iteration} has nothing to learn from: of {len(found)} prompts {chosen.equal} have responses that all earned "
            f"the same, {chosen.below} have none that is good enough, {chosen.same} a best that is the worst; raise "
            "--rollout.n-samples-per-prompt or --rollout.temperature, or look at the rewards in "
            f"{work.directory / SCORED}"
        )
    write(work.directory / ROWS, chosen.rows)
    conditions = [row["condition"] for row in chosen.rows if "condition" in row]
    return chosen.counts() | ({"best_condition": max(conditions)} if conditions else {})


def train(work: Work, *, first: str, began: float) -> tuple[int, dict[str, Any]]:
    """Train on what was chosen; the exit code of the training and, where that is 0, what it came to. `first` is the run's first model.

    An attempt that was stopped is gone on with where it left a checkpoint, in a directory beside it, as every run has its own.
    """
    attempts = sorted(work.directory.glob("train*/"), key=lambda path: (len(path.name), path.name))
    held = next((one for one in reversed(attempts) if _complete(one / "checkpoints")), None)
    place = work.directory / (f"train-{len(attempts) + 1}" if attempts else "train")
    config = work.config.training(
        work.model, rows=str(work.directory / ROWS), directory=str(place), resume=None if held is None else str(held)
    )
    if isinstance(work.config, IterativeDPOConfig) and work.config.ref.follows == "first" and work.config.ref.model_name_or_path is None:
        config = replace(config, ref=replace(config.ref, model_name_or_path=first))  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue] - that of dpo
    sources = dict.fromkeys(settings(defaults_of(config)), f"{work.config.verb}, iteration {work.iteration}")
    code = offline.run(config, sources, started=began, next_commands=())
    if code != 0:
        return code, {}
    link = work.directory / f".{MODEL}.{place.name}"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(place.name) / MODEL)
    os.replace(link, work.directory / MODEL)
    losses = [step["train/loss"] for step in read_metrics(place)[0]]
    return 0, {"steps": len(losses), "loss_first": losses[0], "loss_last": losses[-1], "attempt": place.name}


def _complete(root: Path) -> bool:
    """Whether a directory of checkpoints has one that is whole."""
    return root.is_dir() and any(checkpoints.step_of(entry) is not None for entry in root.iterdir())
