"""The loops over generations, one program: generate -> score -> select -> train, and again with the model that came of it.

    runs/<verb>-<time>/loop.json                      the stages that are finished, with fingerprints and figures
    runs/<verb>-<time>/iteration_K/generated.jsonl    scored.jsonl  train.jsonl  train/ (a run of sft or dpo)  model
    runs/<verb>-<time>/model/                         the last iteration's

What is finished is never done again: a run that was stopped goes on, in its directory, with the first stage that is not.
"""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from hone.launch.errors import INTERRUPTED, PREEMPTED, exit_code
from hone.launch.loop_config import ConditionalSFTConfig, LoopConfig
from hone.launch.loops import table
from hone.launch.loops.isolated import isolated
from hone.launch.loops.judging import score, try_out
from hone.launch.loops.stages import GENERATED, ROWS, SCORED, Work, generate
from hone.launch.loops.state import State, deciding, held, place_of, read
from hone.launch.loops.training import MODEL, choose, train
from hone.launch.observe import manifest
from hone.launch.observe.files import replace_text
from hone.launch.observe.metrics import check_names
from hone.launch.observe.run_directory import METRICS_FILE, REPORT, RunDirectory
from hone.launch.plan import in_full
from hone.launch.programs.conduct import began, built_in
from hone.launch.toml import to_toml

Stage = Literal["generate", "score", "select", "train", "export"]
LEARNING: tuple[Stage, ...] = ("generate", "score", "select", "train")
"""The stages of an iteration, in order."""
DOING = {
    "generate": "generating responses",
    "score": "judging them",
    "select": "choosing what to learn from",
    "train": "training",
    "export": "handing its model over",
}


def run(config: LoopConfig, sources: Mapping[str, str]) -> int:
    """Carry out a loop, or go on with one; returns its exit code. Raises what stops a stage, which is written down."""
    began()
    console = Console(highlight=False)
    if (place := place_of(config)) is None:
        directory = RunDirectory.create(config.run.dir, config.verb)
        directory.write_config(to_toml(config, sources))
        directory.write_manifest(manifest.collect(verb=config.verb, seed=config.train.seed, argv=sys.argv))
        state = State(directory.path, deciding=deciding(config))
        state.write()
    else:
        directory, state = RunDirectory(path=place), read(place, config)
        state.check()
        directory.append_event("resumed", finished=len(state.finished))
        console.print(f"going on in {escape(str(place))} with {len(state.finished)} stages finished", soft_wrap=True)
    with held(directory.path):
        return Loop(config, directory, state, console).carry_out()


class Loop:
    """One run in its directory."""

    def __init__(self, config: LoopConfig, directory: RunDirectory, state: State, console: Console) -> None:
        self._config, self._directory, self._state, self._console = config, directory, state, console
        named = config.model.model_name_or_path
        self._first = str(built_in(console)) if named is None else in_full(named)

    def carry_out(self) -> int:
        """Every stage that is not finished, the model, the report; 0, or the code of the stage that was stopped."""
        code, error = 0, None
        try:
            code = self._stages()
        except BaseException as caught:
            error = caught
            raise
        finally:
            self._conclude(code, error)
        return code

    def _stages(self) -> int:
        last = self._config.train.iterations
        wanted: list[tuple[int, Stage]] = [(iteration, stage) for iteration in range(1, last + 1) for stage in LEARNING]
        wanted.append((last, "export"))
        if self._config.train.measure_last:  # what the next iteration would begin with: with more of them the run goes on from here
            wanted.extend((last + 1, stage) for stage in LEARNING[:2])
        for iteration, stage in wanted:
            if self._state.get(iteration, stage) is None and (code := self._stage(iteration, stage)) != 0:
                return code
        return 0

    def _export(self, work: Work) -> None:
        """The last iteration's model as the run's: the same files under another name, for many gigabytes need not be there twice."""
        partial = self._directory.path / f".{MODEL}"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(work.directory / MODEL, partial, copy_function=os.link)
        shutil.rmtree(self._directory.model, ignore_errors=True)  # that of fewer iterations
        partial.rename(self._directory.model)

    def _stage(self, iteration: int, stage: Stage) -> int:
        """One stage, written down when it is finished."""
        started, work = time.monotonic(), self._work(iteration)
        last = self._config.train.iterations
        head = f"iteration {iteration} of {last}" if iteration <= last else "afterwards"
        self._console.print(f"[bold]{head}[/]: {DOING[stage]}", soft_wrap=True)
        code, figures, paths = 0, dict[str, Any](), list[Path]()
        if stage == "generate":
            if iteration == 1:
                try_out(work)
            code, paths = self._generated(work), [work.directory / GENERATED]
        elif stage == "score":
            figures, paths = score(work), [work.directory / SCORED]
        elif stage == "select":
            figures, paths = choose(work), [work.directory / ROWS]
        elif stage == "export":
            self._export(work)
            paths = [self._directory.model]
        else:
            code, figures = train(work, first=self._first, began=started)
            paths = [work.directory / MODEL]
        if code == 0:
            self._state.add(iteration, stage, paths, figures, seconds=time.monotonic() - started)
            self._directory.append_event("stage", iteration=iteration, stage=stage, **figures)
            self._tell(stage, figures)
        return code

    def _generated(self, work: Work) -> int:
        """Have the responses written. The vLLM engine comes and goes with a process: training finds devices and libraries untouched."""
        if self._config.rollout.engine == "vllm":
            return isolated(generate, work, debug=self._config.run.debug)
        generate(work)
        return 0

    def _work(self, iteration: int) -> Work:
        directory = self._place(iteration)
        directory.mkdir(mode=0o700, exist_ok=True)
        model = self._first if iteration == 1 else in_full(str(self._place(iteration - 1) / MODEL))
        return Work(config=self._config, iteration=iteration, model=model, directory=directory, condition=self._condition(iteration))

    def _condition(self, iteration: int) -> float | None:
        """The reward that the iteration asks for: nothing in the first, whose model has never been told one."""
        if not isinstance(self._config, ConditionalSFTConfig) or iteration == 1:
            return None
        before = [one for one in self._state.finished if one.iteration < iteration]
        return table.condition_after(self._config, before)

    def _place(self, iteration: int) -> Path:
        return self._directory.path / f"iteration_{iteration}"

    def _tell(self, stage: Stage, figures: Mapping[str, Any]) -> None:
        if stage == "score":
            words = f"reward {figures['reward_mean']:.3f}, of each prompt's best {figures['reward_best']:.3f}"
            self._console.print(f"  {words}", soft_wrap=True)
        elif stage == "select":
            counts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in figures.items() if count and name != "best_condition")
            self._console.print(f"  {counts}", soft_wrap=True)

    def _conclude(self, code: int, error: BaseException | None) -> None:
        """Metrics and report of what is finished; printed, too, where the run is."""
        finished, path = self._state.finished, self._directory.path
        whole = code == 0 and error is None
        outcome = (
            "finished" if whole else "stopped" if code in (INTERRUPTED, PREEMPTED) or isinstance(error, KeyboardInterrupt) else "failed"
        )
        lines = table.metrics(finished)
        for line in lines:
            check_names(line)
        replace_text(path / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in lines))
        again = shlex.join(["launch", self._config.verb, "--config", str(path / "config.toml"), "--resume", str(path)])
        model = self._directory.model if whole else None
        text = table.report(self._config, finished, outcome=outcome, directory=path, model=model, again=again)
        replace_text(path / REPORT, text)
        self._directory.append_event("concluded", outcome=outcome, code=code if error is None else exit_code(error))
        if finished:
            self._console.print()
            self._console.print(table.table(self._config, finished))
        if whole:
            self._console.print(
                f"\n[bold green]finished[/]  model [bold]{escape(str(self._directory.model))}[/]  report {escape(str(path / REPORT))}",
                soft_wrap=True,
            )
        else:
            self._console.print(f"\n[bold yellow]{outcome}[/]  go on with  [cyan]{escape(again)}[/]", soft_wrap=True)
