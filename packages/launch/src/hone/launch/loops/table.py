"""What the iterations of a loop came to: lines of metrics, a table for the terminal, and report.md; all from the finished stages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from hone.launch.loop_config import ConditionalSFTConfig, IterativeDPOConfig, LoopConfig
from hone.launch.loops.state import Finished
from hone.launch.observe.text import duration, number

COLUMNS = ("", "prompts", "samples", "reward", "best", "learnt", "equal", "ties", "out", "cut [%]", "loss", "time")
_JUDGED = "reward: mean over all responses of the model as the iteration began; best: mean over each prompt's best;"
_END = "cut: responses that reached the longest length; loss: of the last optimiser step."
STORY = {
    "rejection-sampling": f"{_JUDGED} learnt: responses trained on; equal: prompts whose responses all earned the same; ties: others with "
    f"several best ones, of which the first is taken; out: prompts whose best is not above `select.above`; {_END}",
    "iterative-dpo": f"{_JUDGED} learnt: pairs trained on; equal: prompts whose responses all earned the same, which give no pair; ties: "
    f"others with several best / several worst ones, of which the first is taken; out: pairs of one and the same response; {_END}",
    "conditional-sft": f"{_JUDGED} learnt: responses trained on; equal: prompts whose responses all earned the same; ties: others with "
    f"several best ones; {_END} From the second iteration on the best reward is asked for.",
}


def iterations(finished: Sequence[Finished]) -> dict[int, dict[str, Any]]:
    """Iteration -> the figures of its stages together, with the seconds they took."""
    found: dict[int, dict[str, Any]] = {}
    for one in finished:
        own = found.setdefault(one.iteration, {"seconds": 0.0})
        own["seconds"] += one.seconds
        own |= one.figures
    return found


def metrics(finished: Sequence[Finished]) -> list[dict[str, int | float]]:
    """A line for each iteration that was judged, under the names of metrics."""
    names = {
        "rollout/reward_mean": "reward_mean",
        "rollout/reward_std": "reward_std",
        "rollout/reward_best": "reward_best",
        "rollout/response_length_mean": "length_mean",
        "rollout/truncated_rate": "truncated",
        "loop/kept": "kept",
        "loop/equal": "equal",
        "loop/tied_best": "tied_best",
        "loop/tied_worst": "tied_worst",
        "loop/below": "below",
        "loop/same": "same",
        "train/loss": "loss_last",
        "timing/step_total": "seconds",
    }
    return [
        {"step": iteration, **{name: own[figure] for name, figure in names.items() if figure in own}}
        for iteration, own in iterations(finished).items()
        if "reward_mean" in own
    ]


def cells(config: LoopConfig, iteration: int, own: Mapping[str, Any]) -> list[str]:
    """The row of an iteration, as `COLUMNS`; the measurement behind the last one learns nothing."""
    last = iteration > config.train.iterations
    head = ["after" if last else str(iteration), str(own.get("prompts", "")), str(own.get("samples", ""))]
    judged = [number(own[name]) if name in own else "" for name in ("reward_mean", "reward_best")]
    if "kept" in own:
        ties = f"{own['tied_best']} / {own['tied_worst']}" if isinstance(config, IterativeDPOConfig) else str(own["tied_best"])
        chosen = [str(own["kept"]), str(own["equal"]), ties, str(own["below"] + own["same"])]
    else:
        chosen = ["", "", "", ""]
    cut = f"{100 * own['truncated']:.1f}" if "truncated" in own else ""
    loss = number(own["loss_last"]) if "loss_last" in own else ""
    return [*head, *judged, *chosen, cut, loss, duration(own["seconds"])]


def table(config: LoopConfig, finished: Sequence[Finished]) -> Table:
    """For the terminal."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    kept = [place for place, column in enumerate(COLUMNS) if column not in ("samples", "cut [%]")]  # 80 columns have no room for all
    for column in (COLUMNS[place] for place in kept):
        shown.add_column(column, justify="right" if column else "left", no_wrap=True)
    for iteration, own in iterations(finished).items():
        row = cells(config, iteration, own)
        shown.add_row(*(row[place] for place in kept))
    return shown


def report(config: LoopConfig, finished: Sequence[Finished], *, outcome: str, directory: Path, model: Path | None, again: str) -> str:
    """report.md."""
    lines = [f"# hone {config.verb}: {outcome}", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells(config, iteration, own)) + " |" for iteration, own in iterations(finished).items()]
    lines += ["", STORY[config.verb], ""]
    if isinstance(config, ConditionalSFTConfig) and (best := condition_after(config, finished)) is not None:
        lines += [f"The model was last taught with {number(best)} as the best reward. Ask it as it was taught, with the template", ""]
        lines += ["```", config.condition.template, "```", ""]
    if model is not None:
        lines += ["The trained model:", "", "```", str(model), "```"]
    else:
        lines += ["To go on:", "", "```", again, "```"]
    lines += ["", f"Every stage with its files and their fingerprints is in `{directory}/loop.json`."]
    return "\n".join(lines) + "\n"


def condition_after(config: ConditionalSFTConfig, finished: Sequence[Finished]) -> float | None:
    """The reward that the model of the last training is asked for; None before any."""
    taught = [one.figures["best_condition"] for one in finished if one.stage == "select"]
    if not taught or not any(one.stage == "train" for one in finished):
        return None
    return taught[-1] if config.condition.best is None else config.condition.best
