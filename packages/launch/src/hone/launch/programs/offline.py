"""Every command that learns from labelled rows: from a settled configuration to a trained model, everything written down on the way.

Order: rows -> run directory -> the reference's answers -> model -> loop -> statistics, export -> report -> the end of every process.
"""

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from hone.launch.builtin import BuiltinModel, cache_directory
from hone.launch.finetune import Trained, finetune
from hone.launch.interrupt import Interrupt
from hone.launch.observe import manifest
from hone.launch.observe.progress import RunInfo
from hone.launch.observe.run_directory import RunDirectory
from hone.launch.offline_build import assemble, make_plan, tables_of
from hone.launch.offline_config import OfflineConfig
from hone.launch.offline_data import OfflineData, prepare, settled
from hone.launch.offline_groups import ranks_of
from hone.launch.offline_parts import MODEL, REFERENCE, TEACHER, OfflineAssembly
from hone.launch.plan import in_full
from hone.launch.programs.best import Best
from hone.launch.programs.conduct import Stage, began, built_in, conduct
from hone.launch.programs.keeping import Keeper
from hone.launch.programs.learnt import check_learnt
from hone.launch.saving import EVENTS, METRICS, STATE, Checkpoints, LoopState, Resumed, check_start, place_asked, take_up
from hone.launch.toml import to_toml

BUILT_IN_TEACHER = BuiltinModel(wrong=0)
"""What a student of the built-in task learns from: the same model, made from right answers alone."""


def run(
    config: OfflineConfig, sources: Mapping[str, str], *, started: float | None = None, next_commands: tuple[str, ...] | None = None
) -> int:
    """Carry out a run; returns its exit code, or raises what stopped it (the run directory then tells, too).

    Where it is a part of another command, `started` is when it began (by the monotonic clock) and `next_commands` are its last words.
    """
    start = began() if started is None else started
    console = Console(highlight=False)
    models = _models(config, console)
    resumed = _take_up(config, models) if config.ckpt.load_enable or config.ckpt.resume is not None else None
    data = prepare(config, model=models[MODEL], state=None if resumed is None else resumed.state.stream)
    steps = min(data.stream.steps, config.train.max_steps or data.stream.steps)
    check_start(resumed, steps=steps, path=config.ckpt.path)
    directory = RunDirectory.create(config.run.dir, config.verb)
    if resumed is not None:
        directory.go_on_from(resumed.text(METRICS), resumed.text(EVENTS))
        directory.append_event("resumed", step=resumed.state.step, checkpoint=str(resumed.path), passed_over=list(resumed.passed_over))
    else:
        held_out = None if data.held_out is None else len(data.held_out.samples)
        directory.append_event("began", rows=len(data.samples.samples), held_out=held_out, fingerprint=data.stream.state().fingerprint)
    directory.write_config(to_toml(config, sources))
    directory.write_manifest(manifest.collect(verb=config.verb, seed=config.train.seed, argv=sys.argv))
    info = RunInfo(verb=config.verb, model=models[MODEL], data=data.name, directory=str(directory.path), total_steps=steps)
    own = settled(config, data.tokenizer)

    def carry_out(stage: Stage, interrupt: Interrupt) -> Literal["finished", "stopped"]:
        return Session(own, models=models, data=data, steps=steps, stage=stage, resumed=resumed).carry_out(interrupt)

    again = f"uv run launch {config.verb} --model.model-name-or-path {directory.model}"
    after = (f"less {directory.path}/report.md", again) if config.data.dataset is None else (f"less {directory.path}/report.md",)
    last = after if next_commands is None else next_commands
    return conduct(directory, info, carry_out, console=console, began=start, next_commands=last)


class Session:
    """One run between its first process and its last."""

    def __init__(
        self, config: OfflineConfig, *, models: Mapping[str, str], data: OfflineData, steps: int, stage: Stage, resumed: Resumed | None
    ) -> None:
        self._config, self._models, self._data, self._steps, self._stage = config, models, data, steps, stage
        self._resumed = resumed
        self._directory, self._display = stage.directory, stage.display
        self._keeper = Keeper(stage.directory, stage.display, role=MODEL)
        self._told = 0
        self._done = self._first = 0 if resumed is None else resumed.state.step
        self._best = Best(config.ckpt.best_metric_key, self._directory.path / "model_best")

    def carry_out(self, interrupt: Interrupt) -> Literal["finished", "stopped"]:
        """Ask the reference, build the parts, run the loop, export; "finished", or "stopped" where Ctrl-C asked for it."""
        self._tell()
        with ExitStack() as stack:
            plan = make_plan(
                self._config,
                models=self._models,
                data=self._data,
                steps=self._steps,
                logs=self._directory.logs,
                scratch=self._stage.scratch,
                on_start=self._display.startup,
            )
            ranks = ranks_of(plan)
            stack.callback(ranks.close)
            tables = tables_of(plan, self._data, ranks, memory=cache_directory() / REFERENCE)
            parts = assemble(plan, self._data, ranks, tables, on_phase=self._display.phase)
            stack.push(partial(self._keeper.close, parts))
            if self._resumed is not None:
                self._take_up(parts, self._resumed)
            interrupt.patient = True
            try:
                outcome = self._loop(parts, interrupt)
            except Exception:
                if self._done > self._first:
                    self._keeper.rescue(parts, step=self._done + 1)
                raise
            if outcome == "finished":
                check_learnt(self._directory, {MODEL: "train/skipped"})
            self._export(parts, self._directory.model)
            if self._config.train.enable_ema:
                self._keeper.export(parts, self._directory.path / "model_ema", average=True)
        return outcome

    def _tell(self) -> None:
        """What became of rows that are not learnt from, or not wholly."""
        samples = self._data.samples
        for row in () if self._resumed else samples.dropped:
            self._directory.append_event("row_dropped", uid=row.uid, reason=row.reason)
        if samples.dropped:
            total = len(samples.samples) + len(samples.dropped)
            first = samples.dropped[0].reason
            self._display.note(f"{len(samples.dropped)} of {total} rows are left out, the first: {first} (all in events.jsonl)")
        for note in samples.notes:
            self._directory.append_event("rows_noted", note=note)
            self._display.note(note)

    def _drop(self) -> None:
        """What the stream came upon on the way and could not use."""
        passed_over = self._data.stream.passed_over
        for row in passed_over[self._told :]:
            self._directory.append_event("row_dropped", uid=row.uid, reason=row.reason)
        self._told = len(passed_over)

    def _take_up(self, parts: OfflineAssembly, resumed: Resumed) -> None:
        parts.group.restore(str(resumed.path.resolve()))
        for reason in resumed.passed_over:
            self._display.note(f"a newer checkpoint was passed over: {reason}")
        self._display.note(f"going on after step {self._first}, from {resumed.path}")
        self._best.go_on_from(resumed.state.controllers.get("best"), resumed.path.parent.parent / "model_best")

    def _loop(self, parts: OfflineAssembly, interrupt: Interrupt) -> Literal["finished", "stopped"]:
        config = self._config
        root = self._directory.checkpoints if config.ckpt.path is None else Path(config.ckpt.path)
        saves = Checkpoints([parts.group], root, keep=config.ckpt.max_num, event=self._keeper.saved)
        for step in finetune(parts, max_steps=self._steps, start=self._first):
            metrics = {
                "step": step.number,
                **step.metrics,
                "train/epoch": self._data.stream.epoch,
                "perf/peak_memory_gb": self._stage.memory.peak_gb,
            }
            self._directory.append_metrics(metrics)
            self._display.step(metrics)
            self._done = step.number
            self._drop()
            if step.evaluated and self._best.improved(step.metrics, step=step.number):
                self._best.keep(partial(self._export, parts))
                self._directory.append_event("best", step=step.number, metric=config.ckpt.best_metric_key, value=self._best.value)
            saves.poll(wait=False)
            stopping = interrupt.asked and step.number < self._steps
            if config.ckpt.save_steps > 0 and (step.number % config.ckpt.save_steps == 0 or stopping):
                saves.begin(step.number, self._texts(step))
                if config.ckpt.save_hf:
                    self._export(parts, self._directory.checkpoints / f"step_{step.number}_hf")
            if stopping:
                saves.poll(wait=True)
                return "stopped"
        saves.poll(wait=True)
        return "finished"

    def _export(self, parts: OfflineAssembly, directory: Path) -> None:
        """Have the model written, a reward model with the mean and deviation of its scores."""
        if self._config.kind == "reward":
            parts.keep_statistics()
        self._keeper.export(parts, directory)

    def _texts(self, step: Trained) -> dict[str, str]:
        """What goes into a checkpoint beside the roles: the loop's state, and what the run has written about itself so far."""
        controllers: dict[str, Any] = {"best": self._best.state()}
        stream = self._data.stream.state()
        state = LoopState(step=step.number, algorithm=self._config.algo.name, stream=stream, shuffle=b"", controllers=controllers)
        written = {name: (self._directory.path / name).read_text(encoding="utf-8") for name in (METRICS, EVENTS)}
        return {STATE: state.text(), **written}


def _models(config: OfflineConfig, console: Console) -> dict[str, str]:
    """Role -> model; the built-in ones are made now if this is the first run."""
    asked = config.model.model_name_or_path
    models = {MODEL: str(built_in(console)) if asked is None else in_full(asked)}
    for name, other in config.others.items():
        role = TEACHER if name.startswith("teacher.") else REFERENCE
        if other is not None:
            models[role] = in_full(other)
        elif role == TEACHER:
            models[role] = str(built_in(console, BUILT_IN_TEACHER, what="teacher"))
        else:
            models[role] = models[MODEL]
    return models


def _take_up(config: OfflineConfig, models: Mapping[str, str]) -> Resumed:
    """The checkpoint to go on from, before anything is loaded. Raises CheckpointError."""
    root, step = place_asked(config.ckpt, verb=config.verb)
    return take_up(
        root,
        algorithm=config.algo.name,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        num_episodes=config.train.max_epochs,
        models={role: model for role, model in models.items() if role != REFERENCE},
        step=step,
        batch_flag="--train.batch-size",
    )
