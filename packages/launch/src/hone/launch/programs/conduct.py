"""What every program does around its loop: a display, an interrupt that is heeded after the step, and an ending that is written down.

Whatever ends a run, its directory tells of it, every process it caused is gone, and the terminal is as it was.
"""

import math
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import transformers
from rich.console import Console

from hone.launch.builtin import BuiltinModel, builtin_model, cache_directory
from hone.launch.errors import INTERRUPTED, PREEMPTED, exit_code
from hone.launch.interrupt import Interrupt
from hone.launch.machine import visible_gpus
from hone.launch.observe.display import Display, make_display
from hone.launch.observe.files import replace_text
from hone.launch.observe.peak_memory import PeakMemory
from hone.launch.observe.progress import RunInfo
from hone.launch.observe.redact import redact
from hone.launch.observe.report import conclude
from hone.launch.observe.run_directory import RunDirectory
from hone.launch.observe.summary import Summary
from hone.launch.processes import Descendants, adopt_orphans, keep_bytecode


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a session plays on: where it writes, what it shows, the memory it takes, and a short path for Ray's own files."""

    directory: RunDirectory
    display: Display
    memory: PeakMemory
    scratch: Path


def began() -> float:
    """Makes this process a run's; when it was started, by the clock that durations are measured with [s]: half a start is imports."""
    keep_bytecode(cache_directory() / "bytecode")
    adopt_orphans()
    # Loading and saving are shown by the display; a second bar in between would tear it.
    transformers.utils.logging.disable_progress_bar()
    return time.monotonic() - (time.time() - psutil.Process().create_time())


def conduct(
    directory: RunDirectory,
    info: RunInfo,
    carry_out: Callable[[Stage, Interrupt], Literal["finished", "stopped"]],
    *,
    console: Console,
    began: float,
    next_commands: tuple[str, ...],
) -> int:
    """Carry out a session; returns the run's exit code, or raises what stopped it, which is written down first."""
    with ExitStack() as stack:
        scratch = Path(tempfile.mkdtemp(prefix="hone-ray-"))
        stack.callback(_remove, scratch, directory)
        stack.enter_context(Descendants())  # after the directory, so that nobody writes there any more when it is removed
        memory = stack.enter_context(PeakMemory(os.getpid()))
        display = stack.enter_context(make_display(console, info))

        def notice(text: str) -> None:
            directory.append_event("interrupted")
            display.note(text)

        interrupt = stack.enter_context(Interrupt(notice))
        summarise = partial(_summary, began=began, memory=memory)
        try:
            outcome = carry_out(Stage(directory=directory, display=display, memory=memory, scratch=scratch), interrupt)
        except KeyboardInterrupt:
            _finish(directory, display, summarise("stopped"))
            raise
        except BaseException as error:
            _keep_traceback(directory, error)
            message = str(error) if exit_code(error) != 1 else f"{type(error).__name__}: {error}"
            _finish(directory, display, summarise("failed", error=message))
            raise
        _finish(directory, display, summarise(outcome, model=str(directory.model), next_commands=next_commands))
    if outcome == "finished":
        return 0
    return PREEMPTED if interrupt.preempted else INTERRUPTED


def built_in(console: Console, recipe: BuiltinModel | None = None, *, what: str = "model") -> Path:
    """A built-in model, made now (with a progress bar) if this is the first run."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    if not visible_gpus():  # else DeepSpeed, which transformers looks into as it writes a model, tells stdout that it found none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not console.is_terminal and not any(cache_directory().glob("arithmetic-*")):
        console.print(f"making the built-in {what} (first run only, up to a minute)")
    columns = (
        TextColumn(f"making the built-in {what} (first run only)"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", visible=False, loss=math.nan)
        return builtin_model(
            recipe, progress=lambda step, steps, loss: bar.update(task, completed=step, total=steps, loss=loss, visible=True)
        )


def _remove(scratch: Path, directory: RunDirectory) -> None:
    """Remove Ray's own files. A run is not failed by what cannot be removed, but it is written down."""
    try:
        shutil.rmtree(scratch)
    except OSError as error:
        directory.append_event("scratch_left", path=str(scratch), error=str(error))


def _keep_traceback(directory: RunDirectory, error: BaseException) -> None:
    """Where it happened, for whoever looks into it; secrets struck out as everywhere in a run directory."""
    text = redact("".join(traceback.format_exception(error)))
    replace_text(directory.logs / "traceback.txt", text)


def _summary(outcome: Literal["finished", "stopped", "failed"], *, began: float, memory: PeakMemory, **fields: Any) -> Summary:
    memory.look()
    return Summary(outcome=outcome, elapsed_s=time.monotonic() - began, peak_memory_gb=memory.peak_gb, **fields)


def _finish(directory: RunDirectory, display: Display, summary: Summary) -> None:
    conclude(directory, summary)
    display.done(summary)
