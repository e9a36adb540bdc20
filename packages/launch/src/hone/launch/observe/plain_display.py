"""Plain lines for a log file, a pipe or a dumb terminal: one a step, and a sign of life from whatever takes over two seconds.

hone ppo: model tiny, data arithmetic, 40 steps, run runs/ppo-20260920-101500
starting rollout engine: importing vllm
step  1/40  reward 0.312  gap 2.1e-06  KL 0.002  entropy 1.204  length 5.300  truncated 0.0 %  8,421 tok/s  2.1 s  1m22s left
"""

import contextlib
import threading
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console
from rich.text import Text

from hone.launch.observe.ending import ending
from hone.launch.observe.frame import Canvas
from hone.launch.observe.gate import gated
from hone.launch.observe.metrics import is_healthy
from hone.launch.observe.progress import FAILED, READY, Progress, RunInfo
from hone.launch.observe.summary import Summary
from hone.launch.observe.text import duration, encodable, inert, number

# The first sign of life, and the ones after it; then one a minute.
_SIGNS_S = (2.0, 10.0, 30.0, 60.0)
# A phase that has run before may take twice as long before it is mentioned, but never more than this.
_LONGEST_SILENCE_S = 30.0
_WATCH_EVERY_S = 0.5
_STEP_FIGURES = (
    ("reward", "rollout/reward_mean", ""),
    ("gap", "mismatch/logp_abs_diff_mean", ""),
    ("KL", "train/kl", ""),
    ("entropy", "train/entropy", ""),
    ("length", "rollout/response_length_mean", ""),
    ("truncated", "rollout/truncated_rate", "%"),
    ("loss", "train/loss", ""),
    ("accuracy", "train/accuracy", "%"),
    ("margin", "train/reward_margin", ""),
    ("held out: loss", "eval/loss", ""),
    ("accuracy", "eval/accuracy", "%"),
    ("", "perf/rollout_tokens_per_second", "tok/s"),
)


class PlainDisplay:
    """Prints as things happen; a thread says so when nothing does."""

    def __init__(self, console: Console, info: RunInfo, *, clock: Callable[[], float]) -> None:
        self._console = console
        self._info = info
        self._progress = Progress(total_steps=info.total_steps, clock=clock)
        self._printing = threading.RLock()  # a signal handler may print in the middle of a print
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="hone-plain-display", daemon=True)
        self._restore = contextlib.ExitStack()
        self._said: dict[tuple[str, str], int] = {}

    def startup(self, role: str, state: str) -> None:
        """One line for a role's every state."""
        self._progress.startup(role, state)
        taken = next(start.elapsed_s for start in self._progress.view().starts if start.role == role)
        self._print(f"{role} {state} after {duration(taken)}" if state in (READY, FAILED) else f"starting {role}: {state}")

    def phase(self, name: str, seconds: float | None) -> None:
        """Nothing, unless it takes long (see `signs`)."""
        self._progress.phase(name, seconds)
        self._said.pop(("phase", name), None)

    def step(self, metrics: Mapping[str, int | float]) -> None:
        """One tidy line."""
        self._progress.step(metrics)
        view = self._progress.view()
        parts = [f"step {view.step:>{len(str(self._info.total_steps))}}/{self._info.total_steps}"]
        for label, name, unit in _STEP_FIGURES:
            if (value := metrics.get(name)) is not None:
                figure = f"{value * 100:.1f} %" if unit == "%" else f"{number(value)} {unit}".strip()
                parts.append(f"{label} {figure}".strip() + ("" if is_healthy(name, value) else " !"))
        if "timing/step_total" in metrics:
            parts.append(duration(float(metrics["timing/step_total"])))
        if view.eta_s is not None and view.step < self._info.total_steps:
            parts.append(f"{duration(view.eta_s)} left")
        self._print("  ".join(parts))

    def note(self, text: str) -> None:
        """Print it."""
        self._print(text)

    def done(self, summary: Summary) -> None:
        """Print the outcome."""
        self._stop()
        for line in ending(self._info, self._progress.view(), summary, self._canvas()):
            self._print(line.plain)

    def __enter__(self) -> "PlainDisplay":
        info = self._info
        self._print(f"hone {info.verb}: model {info.model}, data {info.data}, {info.total_steps} steps, run {info.directory}")
        self._restore.enter_context(gated(self._print))
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def signs(self) -> list[str]:
        """What to say of things that take long and have not been mentioned since their last mark."""
        view = self._progress.view()
        waiting: list[tuple[tuple[str, str], str, float, float | None]] = [
            (("start", start.role), f"still starting {start.role}: {start.state}", start.elapsed_s, None)
            for start in view.starts
            if not start.over
        ]
        if view.running:
            text = f"step {view.step + 1}: {view.running.name} still running"
            waiting.append((("phase", view.running.name), text, view.running.elapsed_s, view.running.usual_s))
        said = []
        for key, text, elapsed_s, usual_s in waiting:
            patience_s = 0.0 if usual_s is None else min(2 * usual_s, _LONGEST_SILENCE_S)
            marks = sum(elapsed_s >= max(mark, patience_s) for mark in _SIGNS_S) + int(max(elapsed_s - _SIGNS_S[-1], 0) // 60)
            if marks > self._said.get(key, 0):
                said.append(f"  {text} ({duration(elapsed_s)})")
            self._said[key] = marks
        return said

    def _watch(self) -> None:
        while not self._over.wait(_WATCH_EVERY_S):
            for line in self.signs():
                self._print(line)

    def _stop(self) -> None:
        self._restore.close()
        self._over.set()
        if self._watcher.is_alive():
            self._watcher.join()

    def _canvas(self) -> Canvas:
        return Canvas(width=100, height=100, encoding=self._console.encoding)

    def _print(self, text: str) -> None:
        """Print foreign and own text alike, never wrapped, never markup."""
        shown = encodable(inert(text, keep_newlines=True), self._console.encoding)
        with self._printing:
            self._console.print(Text(shown), soft_wrap=True)
            self._console.file.flush()
