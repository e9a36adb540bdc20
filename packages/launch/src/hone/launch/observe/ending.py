"""The last thing a run shows: outcome, reward, time, memory, where the model is, and what to try next."""

from rich.text import Text

from hone.launch.observe.frame import Canvas, reward_line
from hone.launch.observe.progress import RunInfo, View
from hone.launch.observe.summary import Summary
from hone.launch.observe.text import duration, encodable, inert, number

_STYLES = {"finished": "bold green", "stopped": "bold yellow", "failed": "bold red"}


def ending(info: RunInfo, view: View, summary: Summary, canvas: Canvas) -> list[Text]:
    """The lines to print."""
    steps = f"{view.step} step" + ("" if view.step == 1 else "s")
    if summary.outcome != "finished":
        steps = f"{view.step} of {info.total_steps} steps"
    head = Text.assemble(
        (summary.outcome, _STYLES[summary.outcome]), f"  {canvas.foreign(info.verb)}, {steps} in {duration(summary.elapsed_s)}"
    )
    rows: list[tuple[str, Text]] = []
    if view.rewards:
        rows.append((view.headline, reward_line(view.rewards, max(min(canvas.width, 100) - 12, 0), ascii_only=canvas.ascii_only)))
    if view.largest_gap is not None:
        rows.append(("gap", Text(f"{number(view.largest_gap)} nats at most between engine and learner")))
    rows.append(("memory", Text(f"{summary.peak_memory_gb:.2f} GB at the peak, all processes together")))
    if summary.model is not None:
        rows.append(("model", Text(canvas.foreign(summary.model), "bold")))
    rows.append(("run", Text(canvas.foreign(info.directory))))
    lines = [head, *(Text.assemble("  ", (f"{label:<8}", "dim"), "  ", content) for label, content in rows)]
    if summary.error is not None:
        shown = encodable(inert(summary.error, keep_newlines=True), canvas.encoding)
        lines += [Text(f"  {line}", "red") for line in shown.split("\n")]
    if summary.next_commands:
        lines += [Text(), Text("  next", "dim"), *(Text(f"    {canvas.foreign(command)}", "cyan") for command in summary.next_commands)]
    return lines
