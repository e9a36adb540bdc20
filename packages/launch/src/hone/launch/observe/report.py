"""report.md: what a run was and how it went, for a person; made from the run directory's files alone, so it can be made again.

    manifest.json + metrics.jsonl + events.jsonl -> report.md

`conclude` writes the outcome as the run's last event and then the report; a run that was killed has no such event, and its
report says so.
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hone.launch.observe.files import replace_text
from hone.launch.observe.ledger import LedgerError, replay
from hone.launch.observe.metrics import METRICS, describe, is_healthy
from hone.launch.observe.run_directory import CONFIG, MANIFEST, REPORT, RunDirectory, read_events, read_metrics
from hone.launch.observe.summary import Summary
from hone.launch.observe.text import duration, inert, number, sparkline

CONCLUDED = "concluded"
_CURVE_WIDTH = 72
# Rewards of single steps are noisy; these means are what a run is judged by.
_FIRST_STEPS, _LAST_STEPS = 3, 5
_LOWER_IS_BETTER = ("mismatch/", "timing/", "staleness/", "sync/", "rollout/truncated_rate", "perf/peak_memory_gb", "perf/sync_ms")
_HIGHER_IS_BETTER = ("rollout/reward_mean", "rollout/score_mean", "perf/rollout_tokens", "perf/train_tokens")

Rows = Sequence[Mapping[str, int | float]]


def conclude(run: RunDirectory, summary: Summary) -> Path:
    """Record how the run ended and write its report; returns the report's path."""
    run.append_event(CONCLUDED, **asdict(summary))
    return write_report(run.path)


def write_report(run: Path) -> Path:
    """Write report.md from the other files of a run directory. Raises FileNotFoundError where there is no manifest."""
    manifest = json.loads((run / MANIFEST).read_text())
    rows, torn_metrics = read_metrics(run)
    events, torn_events = read_events(run)
    end = next((event for event in reversed(events) if event["kind"] == CONCLUDED), None)
    sections = [
        _outcome(manifest, end, rows),
        _reward(rows),
        _loss(rows),
        _metrics_table(rows),
        _timings(rows, end),
        _ledger(events),
        _odd(rows, events, torn_metrics + torn_events),
        _hardware(manifest),
        _next(end),
    ]
    replace_text(run / REPORT, "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n")
    return run / REPORT


def _outcome(manifest: Mapping[str, Any], end: Mapping[str, Any] | None, rows: Rows) -> list[str]:
    steps = int(rows[-1]["step"]) if rows else 0
    lines = [f"# hone {_cell(manifest['verb'])}: {end['outcome'] if end else 'ended without a word'}", ""]
    if end is None:
        lines += [f"The run wrote no outcome (killed, or still running); {steps} steps are on record.", ""]
    else:
        lines += [f"{steps} steps in {duration(end['elapsed_s'])}, {end['peak_memory_gb']:.2f} GB at the peak, all processes together.", ""]
        if end["error"] is not None:
            lines += ["What stopped it:", "", *_fenced(end["error"]), ""]
        if end["model"] is not None:
            lines += ["The trained model:", "", *_fenced(end["model"]), ""]
    lines += [f"Started {_cell(manifest['started'])}, seed {manifest['seed']}, commit {_cell(manifest['commit'])}, with", ""]
    return [
        *lines,
        *_fenced(shlex.join(manifest["command"])),
        "",
        f"The resolved configuration is in `{CONFIG}`, every version in `{MANIFEST}`.",
    ]


def _reward(rows: Rows) -> list[str]:
    rewards = _series(rows, "rollout/reward_mean")
    if not rewards:
        return []
    first, last = rewards[:_FIRST_STEPS], rewards[-_LAST_STEPS:]
    means = f"mean of the first {len(first)} steps {number(_mean(first))}, of the last {len(last)} steps {number(_mean(last))}"
    return ["## Reward", "", "```", sparkline(rewards, _CURVE_WIDTH), "```", "", f"{number(rewards[0])} to {number(rewards[-1])}; {means}."]


def _loss(rows: Rows) -> list[str]:
    losses, held_out = _series(rows, "train/loss"), _series(rows, "eval/loss")
    if not losses:
        return []
    lines = ["## Loss", "", "```", sparkline(losses, _CURVE_WIDTH), "```", "", f"{number(losses[0])} to {number(losses[-1])} in training."]
    if held_out:
        lines.append(f"Held out: {number(held_out[0])} to {number(held_out[-1])}, lowest {number(min(held_out))}.")
    return lines


def _metrics_table(rows: Rows) -> list[str]:
    names = [name for row in rows for name in row if name != "step"]
    if not names:
        return []
    order = list(METRICS)
    lines = ["## Metrics", "", "| name | unit | first | last | best or range |", "|---|---|---|---|---|"]
    for name in sorted(dict.fromkeys(names), key=lambda name: (order.index(name) if name in order else len(order), name)):
        values, metric = _series(rows, name), describe(name)
        unit = "" if metric is None else metric.unit
        lines.append(f"| `{_cell(name)}` | {unit} | {number(values[0])} | {number(values[-1])} | {_best(name, values)} |")
    gaps = _series(rows, "mismatch/logp_abs_diff_mean")
    largest = math.nan if any(math.isnan(gap) for gap in gaps) else max(gaps, default=0.0)
    return [*lines, *(["", f"Largest `mismatch/logp_abs_diff_mean` of any step: {number(largest)} nats."] if gaps else [])]


def _best(name: str, values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "none is finite"
    low, high = number(min(finite)), number(max(finite))
    if name.startswith(_HIGHER_IS_BETTER):
        return f"highest {high}"
    return f"lowest {low}, highest {high}" if name.startswith(_LOWER_IS_BETTER) else f"{low} to {high}"


def _timings(rows: Rows, end: Mapping[str, Any] | None) -> list[str]:
    total = sum(_series(rows, "timing/step_total"))
    if not total:
        return []
    lines = ["## Time", "", "| phase | mean of a step | of all steps | share |", "|---|---|---|---|"]
    for name in METRICS:
        if name.startswith("timing/") and (values := _series(rows, name)):
            share = f"{100 * sum(values) / total:.0f} %"
            lines.append(f"| {name.removeprefix('timing/')} | {duration(_mean(values))} | {duration(sum(values))} | {share} |")
    if end is not None:
        lines.append(f"| before, between and after the steps | | {duration(max(end['elapsed_s'] - total, 0.0))} | |")
    return lines


def _ledger(events: Sequence[Mapping[str, Any]]) -> list[str]:
    try:
        totals = replay(events).verify()
    except LedgerError as error:  # the report is where this is read; hiding it would hide the run's worst news
        return ["## Ledger", "", "**It does not balance.**", "", *_fenced(str(error))]
    rows = [event for event in events if event["kind"] == "row_dropped"]
    if not totals.issued and not rows:
        return []  # labelled rows are drawn by place, in an order that the seed fixes
    lines = ["## Ledger", "", "Every prompt drawn was trained on, dropped with a reason, or still open when the run ended:", ""]
    lines += [f"{totals.issued} issued = {totals.trained} trained + {totals.dropped} dropped + {totals.open} open."]
    if rows:
        lines += [
            "",
            f"{len(rows)} rows of the data could not be drawn at all, the first: {_cell(rows[0]['reason'])}; all are in `events.jsonl`.",
        ]
    return [*lines, *(["", *(f"- dropped {count}: {_cell(reason)}" for reason, count in totals.reasons.items())] if totals.reasons else [])]


def _odd(rows: Rows, events: Sequence[Mapping[str, Any]], torn: int) -> list[str]:
    """What deserves a look: values outside their healthy range, faults, torn lines."""
    lines = []
    for name in dict.fromkeys(name for row in rows for name in row):
        steps = [int(row["step"]) for row in rows if name in row and not is_healthy(name, row[name])]
        metric = describe(name)
        if steps and metric is not None:
            plural = "step" if len(steps) == 1 else "steps"
            lines.append(f"- `{_cell(name)}` outside {metric.healthy} in {len(steps)} {plural}, first in step {steps[0]}. {metric.meaning}")
    lines += [
        f"- step {event['step']}: not finite: {_cell(', '.join(event['metrics']))}" for event in events if event["kind"] == "not_finite"
    ]
    lines += ["- One line at the end of a file was torn: the process died while writing."] if torn else []
    return ["## Worth a look", "", *lines] if lines else []


def _hardware(manifest: Mapping[str, Any]) -> list[str]:
    machine, packages = manifest["hardware"], manifest["packages"]
    installed = ", ".join(f"{name} {version}" for name, version in packages.items() if version != "not installed")
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    return [
        "## Machine",
        "",
        _cell(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {gpus}; {machine['system']}."),
        "",
        _cell(f"Python {manifest['python']}; {installed}."),
    ]


def _next(end: Mapping[str, Any] | None) -> list[str]:
    return ["## Next", "", *_fenced("\n".join(end["next_commands"]))] if end and end["next_commands"] else []


def _series(rows: Rows, name: str) -> list[float]:
    return [float(row[name]) for row in rows if name in row]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _cell(text: str) -> str:
    """Foreign text within a line of Markdown: no markup, no HTML, no second line."""
    return inert(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "'")


def _fenced(text: str) -> list[str]:
    """Foreign text as a code block that it cannot end."""
    safe = inert(text, keep_newlines=True)
    fence = "```"
    while fence in safe:
        fence += "`"
    return [fence, *safe.split("\n"), fence]
