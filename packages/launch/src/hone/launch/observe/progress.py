"""What a display knows of the run so far: fed by the loop's thread, read by the thread that draws.

Times are seconds of `clock`. Kept small on purpose: of all steps only the rewards and a few extremes, so a long
run costs next to no memory.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

READY = "ready"
FAILED = "failed"
_STEPS_FOR_ETA = 10
HEADLINES = {"reward": "rollout/reward_mean", "loss": "train/loss"}
"""What a run is judged by at a glance, and its metric: one of them in each kind of run."""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The header: what is run on what, where it is written, and how many steps it will take."""

    verb: str
    model: str
    data: str
    directory: str
    total_steps: int


@dataclass(frozen=True, kw_only=True)
class Start:
    """A role being started: its state in words (READY and FAILED end it) and the seconds it has taken."""

    role: str
    state: str
    elapsed_s: float
    over: bool


@dataclass(frozen=True, kw_only=True)
class Running:
    """The phase in progress and the seconds it has taken; `usual_s` is the longest it took before, if it ran before."""

    name: str
    elapsed_s: float
    usual_s: float | None


@dataclass(frozen=True, kw_only=True)
class View:
    """Everything to draw, at one moment. `metrics` are the last step's, `step` 0 before the first; `rewards` are what `headline` says."""

    step: int
    elapsed_s: float
    eta_s: float | None
    metrics: Mapping[str, int | float]
    rewards: tuple[float, ...]
    largest_gap: float | None
    starts: tuple[Start, ...]
    running: Running | None
    headline: str = "reward"


class Progress:
    """Collects what happens; `view` is a consistent picture of it."""

    def __init__(self, *, total_steps: int, clock: Callable[[], float]) -> None:
        self.total_steps = total_steps
        self._clock = clock
        self._lock = threading.RLock()  # a signal handler may come in the middle of a change
        self._began = clock()
        self._starts: dict[str, tuple[str, float, float | None]] = {}
        self._phase: tuple[str, float] | None = None
        self._usual: dict[str, float] = {}
        self._metrics: Mapping[str, int | float] = {}
        self._rewards: list[float] = []
        self._headline = "reward"
        self._gap: float | None = None
        self._step_times: deque[float] = deque(maxlen=_STEPS_FOR_ETA)

    def startup(self, role: str, state: str) -> None:
        """A role's state changed; the first state of a role begins its time."""
        with self._lock:
            now = self._clock()
            began = self._starts[role][1] if role in self._starts and self._starts[role][2] is None else now
            self._starts[role] = (state, began, now if state in (READY, FAILED) else None)

    def phase(self, name: str, seconds: float | None) -> None:
        """A phase began (None) or ended after `seconds`."""
        with self._lock:
            self._phase = (name, self._clock()) if seconds is None else None
            if seconds is not None:
                self._usual[name] = max(seconds, self._usual.get(name, 0.0))

    def step(self, metrics: Mapping[str, int | float]) -> None:
        """A step is done; `metrics` holds its number as "step"."""
        with self._lock:
            self._metrics = dict(metrics)
            for headline, name in HEADLINES.items():
                if name in metrics:
                    self._headline = headline
                    self._rewards.append(float(metrics[name]))
            gap = metrics.get("mismatch/logp_abs_diff_mean")
            if gap is not None and (self._gap is None or not gap <= self._gap):  # a NaN is the largest of all
                self._gap = gap if self._gap is None or not math.isnan(self._gap) else self._gap
            if "timing/step_total" in metrics:
                self._step_times.append(float(metrics["timing/step_total"]))

    def view(self) -> View:
        """Everything to draw, now."""
        with self._lock:
            now = self._clock()
            step = int(self._metrics.get("step", 0))
            left = max(self.total_steps - step, 0)
            starts = (
                Start(role=role, state=state, elapsed_s=(now if ended is None else ended) - began, over=ended is not None)
                for role, (state, began, ended) in self._starts.items()
            )
            name_began = self._phase
            return View(
                step=step,
                elapsed_s=now - self._began,
                eta_s=left * sum(self._step_times) / len(self._step_times) if self._step_times else None,
                metrics=self._metrics,
                rewards=tuple(self._rewards),
                headline=self._headline,
                largest_gap=self._gap,
                starts=tuple(starts),
                running=name_began and Running(name=name_began[0], elapsed_s=now - name_began[1], usual_s=self._usual.get(name_began[0])),
            )
