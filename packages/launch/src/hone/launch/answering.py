"""Prompts to judged responses without training: one engine, in this process or vLLM's, and the executor that training has, too."""

import asyncio
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from hone.datasets.tokenizer import load_tokenizer
from hone.launch.builtin import cache_directory
from hone.launch.machine import visible_gpus
from hone.launch.observe.bar import Bar
from hone.launch.plan import in_full, stop_ids, vocabulary
from hone.launch.processes import Descendants, adopt_orphans, keep_bytecode
from hone.launch.programs.conduct import built_in
from hone.launch.prompts import PromptData, prepare
from hone.launch.using_config import AnsweringConfig, UsingConfig
from hone.rollout.config import RolloutConfig, SamplerConfig
from hone.rollout.engines.vllm import VLLMEngine
from hone.rollout.executor import Group, Sample, SingleTurn
from hone.rollout.rewards import judges
from hone.rollout.rewards.result import Judgement, RewardItem
from hone.rollout.sampling import reads_text
from hone.rollout.types import Engine, Prompt

BUILTIN_REWARD = "hone.datasets.tasks.arithmetic"
SAMPLES_PER_CALL = 64
"""Samples that the engine in this process decodes together; progress is told after each such call."""
SAMPLES_IN_FLIGHT = 1024
"""Samples vLLM holds at a time."""
SAMPLES_PER_ROUND = 8192
"""Samples that are asked for before any further prompt is looked at."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be answered: the prompts in the order of the data, what of it was left out (id and reason), and how they were rendered."""

    model: str
    data: PromptData
    prompts: tuple[Prompt, ...]
    left_out: tuple[tuple[str, str], ...]


class Unjudged:
    """In place of a judge where nobody asked for one: it says nothing about any response."""

    async def judge(self, items: Sequence[RewardItem]) -> list[Judgement]:
        """A judgement that does not apply for each item."""
        return [Judgement(reward=math.nan, score=math.nan, extra_logs={}, applies=False) for _ in items]

    def close(self) -> None:
        """Nothing is held."""


def model_of(config: UsingConfig, console: Console) -> str:
    """The model that answers: the one named, or the built-in one, made now if this is the first time."""
    keep_bytecode(cache_directory() / "bytecode")
    adopt_orphans()
    transformers.utils.logging.disable_progress_bar()
    named = config.model.model_name_or_path
    return str(built_in(console)) if named is None else in_full(named)


def asked(config: AnsweringConfig, console: Console) -> Asked:
    """Read, render and tokenise the prompts. Raises DataError, TokenizerError and ModelError."""
    model, rollout = model_of(config, console), config.rollout
    data = prepare(config.data, model=model, batch_size=1024, num_episodes=1, seed=rollout.seed, max_new_tokens=rollout.max_new_tokens)
    vocabulary({"policy": model}, data.tokenizer)
    prompts = sorted((prompt for step in data.steps() for prompt in step), key=lambda prompt: index_of(prompt.prompt_id))
    left_out = (*data.dropped, *((row.uid, row.reason) for row in data.stream.passed_over))
    return Asked(model=model, data=data, prompts=tuple(prompts), left_out=left_out)


def index_of(prompt_id: str) -> int:
    """The place of a prompt in its data, from 0: the last part of its id."""
    return int(prompt_id.rpartition(":")[2])


def samples_of(group: Group) -> tuple[Sample, ...]:
    """What was drawn for a prompt; at temperature 0 the one greedy response."""
    return group.samples if group.greedy is None else (group.greedy,)


def answer(
    config: AnsweringConfig,
    asked: Asked,
    prompts: Sequence[Prompt],
    *,
    n: int,
    judged: bool,
    bar: Bar,
    on_group: Callable[[Group], None],
    log: Path | None = None,
) -> None:
    """Answer `prompts`, `n` times each, and judge what comes; `on_group` gets the groups in their order, each as soon as it can.

    Raises RewardError and EngineError. At temperature 0 there is one response, for all `n` would be the same.
    """
    greedy = config.rollout.temperature == 0
    rollout = RolloutConfig(
        n_samples_per_prompt=0 if greedy else n,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature or 1.0,
        timeout_s=config.rollout.timeout_s,
        **{field.name: getattr(config.rollout, field.name) for field in fields(SamplerConfig)},
    )
    local = config.run.backend == "local"
    tokenizer: Any = asked.data.tokenizer  # transformers says of decode that it may return a list
    with Descendants(), asyncio.Runner() as runner, judge_of(config, judged=judged, log=log) as judge:
        if judged:
            bar.say("trying the reward out")
            runner.run(judges.smoke(judge, prompts[:2]))
        with serving(config, asked.model, runner, eos_ids=stop_ids(asked.model, asked.data.tokenizer), bar=bar) as engine:
            executor = SingleTurn(
                engine=engine,
                judge=judge,
                tokenizer=tokenizer,
                config=rollout,
                run_seed=config.rollout.seed,
                max_len=config.data.max_len,
                engine_version=engine.name,
                tokenizer_hash=asked.data.tokenizer_hash,
                template_hash=asked.data.template_hash,
                prompts_per_call=max(1, SAMPLES_PER_CALL // n) if local else 1,
                samples_in_flight=SAMPLES_IN_FLIGHT,
                greedy=greedy,
            )
            bar.say("answering")
            round_of = max(1, SAMPLES_PER_ROUND // n)
            for start in range(0, len(prompts), round_of):
                part = prompts[start : start + round_of]
                runner.run(executor.collect(part, step=0, on_group=InOrder(part, bar, on_group)))


class InOrder:
    """Hands groups on in the order of their prompts, each as soon as those before it are there."""

    def __init__(self, prompts: Sequence[Prompt], bar: Bar, on_group: Callable[[Group], None]) -> None:
        self._ids = [prompt.prompt_id for prompt in prompts]
        self._bar, self._on_group = bar, on_group
        self._held: dict[str, Group] = {}
        self._next = 0

    def __call__(self, group: Group) -> None:
        """A group is finished."""
        self._held[group.prompt.prompt_id] = group
        self._bar.advance(1)
        while self._next < len(self._ids) and self._ids[self._next] in self._held:
            self._on_group(self._held.pop(self._ids[self._next]))
            self._next += 1


@contextmanager
def judge_of(config: AnsweringConfig, *, judged: bool, log: Path | None) -> Iterator[judges.Closable]:
    """The judge, its processes started; they end with the block."""
    if not judged:
        yield Unjudged()
        return
    judge = judges.build(config.reward, default=BUILTIN_REWARD, log=log)
    try:
        yield judge
    finally:
        judge.close()


@contextmanager
def serving(config: AnsweringConfig, model: str, runner: asyncio.Runner, *, eos_ids: Sequence[int], bar: Bar) -> Iterator[Engine]:
    """The engine, its model loaded; it ends with the block. Raises EngineError."""
    bar.say(f"loading {model}")
    if config.run.backend == "local":
        yield _local(config, model, eos_ids)
        return
    engine = runner.run(_vllm(config, model, eos_ids))
    try:
        yield engine
    finally:
        runner.run(engine.shutdown())


def _local(config: AnsweringConfig, model: str, eos_ids: Sequence[int]) -> Engine:
    import torch

    from hone.launch.local import loaded
    from hone.learner.model_files import resolve
    from hone.learner.roles import DTYPES
    from hone.rollout.engines.transformers import TransformersEngine

    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    parts = loaded(resolve(model), DTYPES[config.model.param_dtype])
    parts["model"].to("cuda" if visible_gpus() else "cpu")
    tokenizer: Any = load_tokenizer(model) if reads_text(config.rollout) else None
    return TransformersEngine(**parts, tokenizer=tokenizer, eos_ids=eos_ids, name=f"transformers {transformers.__version__}")


async def _vllm(config: AnsweringConfig, model: str, eos_ids: Sequence[int]) -> VLLMEngine:
    return VLLMEngine(
        model=model,
        name="vllm",
        config=config.vllm,
        max_model_len=config.data.max_len,
        dtype="float32" if config.model.param_dtype == "fp32" else "bfloat16",
        backend="nccl" if visible_gpus() else "shared_memory",
        threads=config.run.threads or os.cpu_count() or 1,
        eos_token_ids=eos_ids,
        reads_text=reads_text(config.rollout),
    )
