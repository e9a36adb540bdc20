"""Every command of a policy-gradient algorithm: from a settled configuration to a trained model, everything written down on the way.

Order: prompts -> run directory -> model -> parts -> loop -> export -> report -> the end of every process.
"""

import asyncio
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from hone.launch.agent import agent_of
from hone.launch.ahead import Ahead
from hone.launch.config import PolicyGradientConfig
from hone.launch.gap import GapExceeded
from hone.launch.interrupt import Interrupt
from hone.launch.observe import manifest
from hone.launch.observe.display import Display
from hone.launch.observe.ledger import LedgerError, replay
from hone.launch.observe.peak_memory import PeakMemory
from hone.launch.observe.progress import READY, RunInfo
from hone.launch.observe.run_directory import RunDirectory, read_events
from hone.launch.parts import Assembly
from hone.launch.plan import in_full, make_plan, models_of
from hone.launch.processes import prepare_environment
from hone.launch.programs.conduct import Stage, began, built_in, conduct
from hone.launch.programs.keeping import Keeper
from hone.launch.programs.learnt import check_learnt
from hone.launch.programs.rolling import ENDED, put_back, rolling, texts
from hone.launch.prompts import PromptData, prepare
from hone.launch.rollout_rows import rows
from hone.launch.saving import EVENTS, METRICS, OPEN, STATE, Checkpoints, LoopState, Resumed, check_start, place_asked, take_up
from hone.launch.toml import to_toml
from hone.launch.train import Start, Step, train
from hone.launch.train_async import train_async
from hone.learner.errors import CheckpointError
from hone.rollout.agents.loading import Agent
from hone.rollout.endpoint.rollout import Caller
from hone.rollout.rewards import judges
from hone.rollout.types import Prompt

NOTES = {
    "engine_lost": "{error}",
    "engine_replaced": "{engine} was replaced; it has the current weights and serves",
    "replacement_failed": "a replacement of {engine} failed: {error}",
    "engine_retired": "{engine} is not replaced any more (--vllm.max-replacements)",
    "calls_reissued": "asked again elsewhere: {requests}",
    "episode_retried": "an episode of prompt {prompt} is begun anew, {reason}",
}
"""What befalls engines and episodes, by the kind of its event, as the display says it."""
BUILTIN_REWARD = "hone.datasets.tasks.arithmetic"


def run(config: PolicyGradientConfig, sources: Mapping[str, str]) -> int:
    """Carry out a run; returns its exit code, or raises what stopped it (the run directory then tells, too)."""
    start = began()
    console = Console(highlight=False)
    asked = config.actor.model_name_or_path
    model = str(built_in(console)) if asked is None else in_full(asked)
    resumed = _take_up(config, model) if config.ckpt.load_enable or config.ckpt.resume is not None else None
    prompts = prepare(
        config.data,
        model=model,
        batch_size=config.rollout.batch_size,
        num_episodes=config.train.num_episodes,
        seed=config.train.seed,
        max_new_tokens=config.rollout.max_new_tokens,
        state=None if resumed is None else resumed.state.stream,
    )
    steps = min(prompts.stream.steps, config.train.max_steps or prompts.stream.steps)
    check_start(resumed, steps=steps, path=config.ckpt.path)
    directory = RunDirectory.create(config.run.dir, config.algo.name)
    if resumed is not None:
        directory.go_on_from(resumed.text(METRICS), resumed.text(EVENTS))
        directory.append_event("resumed", step=resumed.state.step, checkpoint=str(resumed.path), passed_over=list(resumed.passed_over))
    directory.write_config(to_toml(config, sources))
    directory.write_manifest(manifest.collect(verb=config.algo.name, seed=config.train.seed, argv=sys.argv))
    info = RunInfo(verb=config.algo.name, model=model, data=prompts.name, directory=str(directory.path), total_steps=steps)

    def carry_out(stage: Stage, interrupt: Interrupt) -> Literal["finished", "stopped"]:
        session = Session(
            config=config,
            model=model,
            prompts=prompts,
            steps=steps,
            directory=directory,
            display=stage.display,
            memory=stage.memory,
            scratch=stage.scratch,
            resumed=resumed,
        )
        return session.carry_out(interrupt)

    next_commands = _next_commands(config, str(directory.model), str(directory.path))
    return conduct(directory, info, carry_out, console=console, began=start, next_commands=next_commands)


class Session:
    """One run between its first process and its last."""

    def __init__(
        self,
        *,
        config: PolicyGradientConfig,
        model: str,
        prompts: PromptData,
        steps: int,
        directory: RunDirectory,
        display: Display,
        memory: PeakMemory,
        scratch: Path,
        resumed: Resumed | None = None,
    ) -> None:
        self._resumed = resumed
        self._scratch = scratch
        self._config, self._model, self._prompts, self._steps = config, model, prompts, steps
        self._directory, self._display, self._memory = directory, display, memory
        self._keeper = Keeper(directory, display, role="policy")
        self._ledger = replay(read_events(directory.path)[0], directory.append_event)
        self._done = self._first = 0 if resumed is None else resumed.state.step

    def carry_out(self, interrupt: Interrupt) -> Literal["finished", "stopped"]:
        """Build the parts, run the loop, export; "finished", or "stopped" where Ctrl-C asked for it."""
        for uid, reason in () if self._resumed else self._prompts.dropped:
            self._directory.append_event("row_dropped", uid=uid, reason=reason)
        if dropped := self._prompts.dropped:
            total = self._prompts.rows + len(dropped)
            self._display.note(f"{len(dropped)} of {total} rows are left out, the first: {dropped[0][1]} (all in events.jsonl)")
        with ExitStack() as stack:
            parts = self._build(self._judge(stack))
            stack.push(partial(self._keeper.close, parts))
            if self._resumed is not None:
                for group in parts.role_groups:
                    group.restore(str(self._resumed.path.resolve()))
                for reason in self._resumed.passed_over:
                    self._display.note(f"a newer checkpoint was passed over: {reason}")
                self._display.note(f"going on after step {self._first}, from {self._resumed.path}")
            ahead = self._ahead(parts, stack) if self._config.ahead else None
            interrupt.patient = True
            try:
                outcome = self._loop(parts, ahead, interrupt)
            except Exception as error:
                if isinstance(error, GapExceeded):
                    self._directory.append_event("gap_exceeded", **error.evidence)
                if self._done > self._first:
                    self._keeper.rescue(parts, step=self._done + 1)
                raise
            if outcome == "finished":
                check_learnt(self._directory, {"policy": "train/actor_skipped", "critic": "train/critic_skipped"})
            self._keeper.export(parts, self._directory.model)
            if self._config.train.enable_ema:
                self._keeper.export(parts, self._directory.path / "model_ema", average=True)
        totals = self._ledger.verify()
        if totals.open:
            raise LedgerError(
                f"{totals.open} prompts were drawn and neither trained nor dropped: {', '.join(self._ledger.open_prompts[:10])}"
            )
        return outcome

    def _judge(self, stack: ExitStack) -> judges.Weighted | Agent | Caller:
        """Who gives the rewards: an agent or its environment, or reward functions and servers, ended by `stack`."""
        config = self._config
        if who := agent_of(config, self._model, self._prompts, on_start=self._display.startup, note=self._display.note):
            judge = self._rewards(stack) if isinstance(who, Caller) and config.reward.remote_url is not None else None
            return replace(who, judge=judge) if isinstance(who, Caller) else who
        return self._rewards(stack)

    def _rewards(self, stack: ExitStack) -> judges.Weighted:
        config = self._config
        self._display.startup("reward", "loading the function")
        judge = judges.build(config.reward, default=BUILTIN_REWARD, log=self._directory.logs / "reward.log")
        stack.callback(judge.close)
        asyncio.run(judges.smoke(judge, self._prompts.first))
        self._display.startup("reward", READY)
        return judge

    def _build(self, judge: judges.Weighted | Agent | Caller) -> Assembly:
        config = self._config
        if config.run.backend == "ray":
            prepare_environment()
            from hone.launch.cluster import build
        else:
            from hone.launch.local import build
        plan = make_plan(
            config,
            model=self._model,
            prompts=self._prompts,
            steps=self._steps,
            judge=judge,
            logs=self._directory.logs,
            scratch=self._scratch,
            on_start=self._display.startup,
            on_phase=self._display.phase,
            on_event=self._happened,
            on_rejected=lambda group, reason: self._dropped(group.prompt, reason),
            on_failed=self._failed,
            on_retried=lambda prompt, reason: self._happened("episode_retried", prompt=prompt.prompt_id, reason=reason),
            more=self._one_more,
        )
        return build(plan)

    def _ahead(self, parts: Assembly, stack: ExitStack) -> Ahead:
        """Rollout that does not wait for the learner, with what a checkpoint holds of it; `stack` ends it."""

        def row_dropped(uid: str, reason: str) -> None:
            self._directory.append_event("row_dropped", uid=uid, reason=reason)

        ahead = rolling(self._config, parts, self._prompts, self._ledger, steps=self._steps, first=self._first, row_dropped=row_dropped)
        stack.push(lambda kind, error, trace: ahead.end(ENDED if error is None else ""))
        if self._resumed is not None:
            put_back(ahead, self._resumed, self._prompts)
        return ahead

    def _loop(self, parts: Assembly, ahead: Ahead | None, interrupt: Interrupt) -> Literal["finished", "stopped"]:
        config = self._config
        parts.source = partial(self._issued, parts.source)
        loop = train if ahead is None else partial(train_async, rollout=ahead)
        steps = loop(
            config.algo,
            parts,
            batch_size=config.train.batch_size,
            max_epochs=config.train.max_epochs,
            max_steps=self._steps,
            critic_only_steps=config.critic.freezing_steps,
            seed=config.train.seed,
            start=Start() if self._resumed is None else Start(step=self._first, shuffle=self._resumed.state.shuffle),
            max_gap=config.rollout.max_gap,
        )
        root = self._directory.checkpoints if config.ckpt.path is None else Path(config.ckpt.path)
        saves = Checkpoints(parts.role_groups, root, keep=config.ckpt.max_num, event=self._keeper.saved)
        for step in steps:
            self._ledger.train([group.prompt.prompt_id for group in step.groups], step=step.number)
            self._directory.write_rollouts(step.number, rows(step.groups))
            metrics = {"step": step.number, **step.metrics, "perf/peak_memory_gb": self._memory.peak_gb}
            self._directory.append_metrics(metrics)
            self._display.step(metrics)
            self._done = step.number
            saves.poll(wait=False)
            stopping = interrupt.asked and step.number < self._steps
            if config.ckpt.save_steps > 0 and (step.number % config.ckpt.save_steps == 0 or stopping):
                told = partial(self._texts, step)
                saves.begin(step.number, told() if ahead is None else texts(ahead, told))
                if config.ckpt.save_hf:
                    self._keeper.export(parts, self._directory.checkpoints / f"step_{step.number}_hf")
            if stopping:
                saves.poll(wait=True)
                return "stopped"
        saves.poll(wait=True)
        return "finished"

    def _texts(self, step: Step) -> dict[str, str]:
        """What goes into a checkpoint beside the roles: the loop's state, and what the run has written about itself so far."""
        state = LoopState(step=step.number, algorithm=self._config.algo.name, stream=self._prompts.stream.state(), shuffle=step.shuffle)
        written = {name: (self._directory.path / name).read_text(encoding="utf-8") for name in (METRICS, EVENTS)}
        return {STATE: state.text(), **written}

    def _happened(self, kind: str, **fields: Any) -> None:
        """What befell an engine or an episode: written down and shown."""
        self._directory.append_event(kind, **fields)
        self._display.note(NOTES[kind].format(**fields))

    def _one_more(self) -> Prompt | None:
        """A prompt in the place of one that was filtered out, entered into the ledger."""
        prompt = self._prompts.more()
        if prompt is not None:
            self._ledger.issue([prompt.prompt_id], step=self._done + 1)
        return prompt

    def _failed(self, prompt: Prompt, reason: str) -> None:
        """A group that its environment or its judge cost: in the ledger as every prompt, and shown."""
        self._dropped(prompt, reason)
        self._display.note(f"the group of prompt {prompt.prompt_id} is dropped, {reason}")

    def _dropped(self, prompt: Prompt, reason: str) -> None:
        self._ledger.drop([prompt.prompt_id], step=self._done + 1, reason=reason)

    def _issued(self, source: Callable[[], Iterator[list[Prompt]]]) -> Iterator[list[Prompt]]:
        """The prompts of each step, entered into the ledger as they are drawn."""
        told = 0
        for number, prompts in enumerate(source(), start=self._first + 1):
            passed_over = self._prompts.stream.passed_over
            for row in passed_over[told:]:
                self._directory.append_event("row_dropped", uid=row.uid, reason=row.reason)
            told = len(passed_over)
            self._ledger.issue([prompt.prompt_id for prompt in prompts], step=number)
            yield prompts


def _take_up(config: PolicyGradientConfig, model: str) -> Resumed:
    """The checkpoint to go on from, before anything is loaded. Raises CheckpointError."""
    root, step = place_asked(config.ckpt, verb=config.algo.name)
    resumed = take_up(
        root,
        algorithm=config.algo.name,
        batch_size=config.rollout.batch_size,
        seed=config.train.seed,
        num_episodes=config.train.num_episodes,
        models=models_of(config, model),
        step=step,
    )
    if not config.ahead and (resumed.path / OPEN).exists():
        raise CheckpointError(
            f"{resumed.path} is of a run that samples ahead of its learner, and has prompts under way; go on with --train.async-enable, or "
            "with --rollout.over-sampling, as it did"
        )
    return resumed


def _next_commands(config: PolicyGradientConfig, model: str, directory: str) -> tuple[str, ...]:
    """What a person may want to type now."""
    other = "grpo" if config.algo.name == "ppo" else "ppo"
    teacher = config.ref.model_name_or_path
    again = f"uv run launch {config.algo.name} --actor.model-name-or-path {model}"
    again += "" if teacher is None else f" --ref.model-name-or-path {teacher}"
    own = "uv run launch ppo --actor.model-name-or-path DIR --data.prompt-dataset FILE.jsonl --reward.remote-url reward.py"
    return (f"less {directory}/report.md", f"uv run launch {other}", again if config.data.prompt_dataset is None else own)
