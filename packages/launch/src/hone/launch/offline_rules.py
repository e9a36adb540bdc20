"""Rules of the programs that learn from labelled rows; those that they share with all others stand in `rules.py`."""

import re
from collections.abc import Iterator
from pathlib import Path

from hone.datasets.chat import template_problems
from hone.datasets.offline_config import StepData
from hone.launch import rules
from hone.launch.errors import Problem
from hone.launch.names import closest
from hone.launch.offline_config import KDConfig, KTOConfig, OfflineConfig
from hone.launch.resolve import Resolved

FIGURES = {
    "sft": ("loss", "nll"),
    "kd": ("loss", "distillation_loss", "nll"),
    "rm": ("loss", "rm_loss", "accuracy", "chosen_reward", "rejected_reward", "reward_margin"),
    "dpo": ("loss", "preference_loss", "accuracy", "chosen_reward", "rejected_reward", "reward_margin"),
    "kto": ("loss", "preference_loss", "chosen_reward", "rejected_reward", "reward_margin"),
    "prm": ("loss", "prm_loss", "accuracy"),
}
"""What every evaluation of a command measures."""
PAIRED = ("rm", "dpo")
KEYS = (
    *("dataset_probs", "dataset_split", "input_key", "output_key", "prompt_key", "chosen_key", "rejected_key", "margin_key", "label_key"),
    *("steps_key", "input_template"),
)


def broken(resolved: Resolved, gpus: int) -> Iterator[Problem]:
    """Every rule a configuration breaks on a machine with so many GPUs, with values and their sources filled in."""
    yield from rules.broken(resolved, gpus, RULES)


def notes(resolved: Resolved, gpus: int) -> Iterator[str]:
    """What will run, but probably not as meant."""
    config: OfflineConfig = resolved.config
    if not gpus and config.ds.param_dtype == "bf16":
        yield "ds.param_dtype bf16 is several times slower than fp32 without a GPU; --ds.param-dtype fp32"
    if config.model.num_gpus_per_node == 1 and gpus > 1 and config.run.backend == "local":
        yield f"{gpus} GPUs are visible and one is used; --model.num-gpus-per-node {gpus}"


def _rows(resolved: Resolved, _: int) -> Iterator[Problem]:
    config: OfflineConfig = resolved.config
    data, train, ring = config.data, config.train, config.ds.ring_attn_size
    together = 2 if config.verb in PAIRED else 1
    if train.max_tokens_per_gpu * ring < together * data.max_len:
        rows = f"a row of {data.max_len} tokens does" if together == 1 else f"the two answers of a pair, {data.max_len} tokens each, do"
        what = f"{rows} not fit a micro-batch of {train.max_tokens_per_gpu * ring}"
        mend = f"--train.max-tokens-per-gpu {-(-together * data.max_len // ring)} or more, or lower --data.max-len"
        yield Problem(what=what, mend=mend, settings=("train.max_tokens_per_gpu", "data.max_len"))
    if train.micro_batch_size is not None and train.micro_batch_size < together:
        what = f"a micro-batch of {train.micro_batch_size} row holds no pair, which has two"
        yield Problem(what=what, mend="--train.micro-batch-size 2 or more", settings=("train.micro_batch_size",))
    shares = max(1, rules.ranks(config) // config.ds.ranks_per_shard)
    if train.batch_size < shares:
        what = f"{shares} ranks share an optimiser step of {train.batch_size} rows: some would have none"
        names = ("train.batch_size", "model.num_nodes", "model.num_gpus_per_node")
        yield Problem(what=what, mend=f"--train.batch-size {shares} or more, or fewer ranks", settings=names)


def _own(resolved: Resolved, _: int) -> Iterator[Problem]:
    config: OfflineConfig = resolved.config
    mine, rows = config.model.model_name_or_path, config.data.dataset
    if rows is not None and mine is None:
        what = "the built-in model reads only the digits and signs of the built-in task, not your rows"
        mend = "name a model for your rows: --model.model-name-or-path DIR"
        yield Problem(what=what, mend=mend, settings=("model.model_name_or_path", "data.dataset"))
    if rows is None and config.eval.dataset is not None:
        what = "rows to be measured on, and none to learn from"
        yield Problem(what=what, mend="add --data.dataset FILE.jsonl", settings=("eval.dataset", "data.dataset"))
    if rows is None:
        for name in (f"data.{key}" for key in KEYS):
            if name in resolved.sources and resolved.sources[name].startswith("flag "):
                what = f"{name} describes your own rows, and there are none"
                yield Problem(what=what, mend="add --data.dataset FILE.jsonl, or drop it", settings=(name, "data.dataset"))
    for problem in template_problems(config.data) if not isinstance(config.data, StepData) else ():
        what, mend = problem.rsplit("; ", 1)
        yield Problem(what=what, mend=mend, settings=("data.input_template", "data.apply_chat_template"))


def _evaluation(resolved: Resolved, _: int) -> Iterator[Problem]:
    config: OfflineConfig = resolved.config
    if config.eval.steps == 0:
        what = "eval.steps 0 says neither when nor never"
        yield Problem(what=what, mend="-1 for once an epoch, or a number of steps from 1", settings=("eval.steps",))
    if config.eval.dataset is None and config.data.dataset is not None and resolved.sources["eval.steps"].startswith("flag "):
        what = "eval.steps says when rows are measured, and there are none"
        yield Problem(what=what, mend="add --eval.dataset FILE.jsonl, or drop it", settings=("eval.steps", "eval.dataset"))
    key, known = config.ckpt.best_metric_key, [f"eval/{name}" for name in FIGURES[config.verb]]
    if key != "none" and key not in known:
        near = closest(key, known)
        mend = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}, or none"
        what = f"no evaluation of `launch {config.verb}` measures {key}"
        yield Problem(what=what, mend=mend, settings=("ckpt.best_metric_key",))


def _programs(resolved: Resolved, _: int) -> Iterator[Problem]:
    config: OfflineConfig = resolved.config
    if isinstance(config, KDConfig):
        teacher, student = config.teacher.model_name_or_path, config.model.model_name_or_path
        name = "teacher.model_name_or_path"
        if teacher is None and not (student is None and config.data.dataset is None):
            mend = "--teacher.model-name-or-path DIR, a model that shares the student's tokenizer"
            yield Problem(what="a student needs a teacher, and none is named", mend=mend, settings=(name,))
        elif teacher is not None and student is not None and Path(teacher).expanduser().resolve() == Path(student).expanduser().resolve():
            what = "the teacher is the student itself: there is nothing to learn"
            yield Problem(
                what=what, mend="name another model with --teacher.model-name-or-path", settings=(name, "model.model_name_or_path")
            )
    if isinstance(config, KTOConfig) and config.train.batch_size < 2:
        what = "KTO's anchor is a mean over the rows of a step, and a step has one"
        yield Problem(what=what, mend="--train.batch-size 2 or more", settings=("train.batch_size",))
    if isinstance(config.data, StepData):
        tokens = config.data.reward_tokens
        if tokens is not None and not re.fullmatch(r"[^,]+,[^,]+", tokens):
            what = f"data.reward_tokens {tokens!r} are not two tokens with a comma between"
            yield Problem(what=what, mend="--data.reward-tokens GOOD,BAD", settings=("data.reward_tokens",))


def _devices(resolved: Resolved, gpus: int) -> Iterator[Problem]:
    config: OfflineConfig = resolved.config
    if gpus and config.run.backend == "ray" and not rules.spans_machines(config) and rules.ranks(config) > gpus:
        what = f"{rules.ranks(config)} GPUs asked, {gpus} visible"
        yield Problem(what=what, mend=f"--model.num-gpus-per-node {gpus} or less", settings=("model.num_gpus_per_node",))


TRAINING: tuple[rules.Rule, ...] = (_rows, _devices, *rules.SHARED)
"""What a training must keep whatever its rows are."""
RULES: tuple[rules.Rule, ...] = (_own, _evaluation, _programs, *TRAINING)
