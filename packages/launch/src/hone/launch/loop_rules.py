"""What stops a loop before it begins: the rules of its stages, asked of what each would be given, and those of the loop itself."""

import importlib.util
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hone.launch import offline_rules, preflight, rules, using_rules
from hone.launch.builtin import BuiltinModel
from hone.launch.errors import ENVIRONMENT, Problem, exit_code
from hone.launch.fitting import unfit
from hone.launch.loop_config import ConditionalSFTConfig, IterativeDPOConfig, LoopConfig, RejectionSamplingConfig
from hone.launch.loops import state
from hone.launch.loops.condition import fault
from hone.launch.model_directory import faults, holds_head
from hone.launch.resolve import Resolved
from hone.learner.errors import CheckpointError

REWARD = ("reward.model_name_or_path", "reward.remote_url")


def broken(resolved: Resolved, gpus: int) -> Iterator[Problem]:
    """Every rule a configuration breaks, with values and their sources filled in."""
    config: LoopConfig = resolved.config
    generating = replace(resolved, config=config.generating(config.model.model_name_or_path or ""))
    training = replace(resolved, config=config.training(config.model.model_name_or_path, rows="rows", directory=config.run.dir))
    yield from rules.broken(generating, gpus, using_rules.DRAWING)
    yield from rules.broken(training, gpus, offline_rules.TRAINING)
    yield from rules.broken(resolved, gpus, RULES)


def notes(resolved: Resolved, gpus: int) -> Iterator[str]:
    """What will run, but probably not as meant."""
    config: LoopConfig = resolved.config
    if not gpus and config.ds.param_dtype == "bf16":
        yield "ds.param_dtype bf16 is several times slower than fp32 without a GPU; --ds.param-dtype fp32"
    if config.rollout.engine == "transformers" and (
        idle := [name for name, source in resolved.sources.items() if name.startswith("vllm.") and source.startswith("flag ")]
    ):
        yield f"{', '.join(idle)}: rollout.engine transformers has no vLLM engine"


def lacking(resolved: Resolved, gpus: int) -> Iterator[Problem]:
    """Everything the configuration needs that is not there, or not as it must be."""
    config: LoopConfig = resolved.config
    checks = (
        _installation(config),
        _models(resolved),
        preflight.prompts(resolved),
        preflight.reward(config.generating("")),
        _place(config),
    )
    for problem in itertools.chain.from_iterable(checks):
        yield problem if problem.where else problem.at(resolved.where(problem.settings))


def _installation(config: LoopConfig) -> Iterator[Problem]:
    needed = {
        "vllm": (config.rollout.engine == "vllm", "--rollout.engine transformers, which does without"),
        "ray": (config.run.backend == "ray", "--run.backend local, which needs none of it"),
        "deepspeed": (config.run.backend == "ray", "--run.backend local, which needs none of it"),
    }
    for module, (wanted, otherwise) in needed.items():
        if wanted and importlib.util.find_spec(module) is None:
            yield Problem(what=f"{module} is not installed", mend=f"`uv sync`, or {otherwise}", code=ENVIRONMENT)


def _models(resolved: Resolved) -> Iterator[Problem]:
    config: LoopConfig = resolved.config
    longest, name = BuiltinModel().max_position_embeddings, "model.model_name_or_path"
    if config.model.model_name_or_path is None and config.data.max_len > longest:
        what = f"data.max_len {config.data.max_len} is more than the built-in model's {longest} positions"
        yield Problem(what=what, mend=f"--data.max-len {longest} or less, or --recipe laptop", settings=("data.max_len",))
    named = {name: config.model.model_name_or_path, REWARD[0]: config.reward.model_name_or_path}
    if isinstance(config, IterativeDPOConfig) and "ref_logp" in config.algo.needs:
        named["ref.model_name_or_path"] = config.ref.model_name_or_path
    for setting, path in named.items():
        if path is None:
            continue
        problems = list(faults(path, max_len=config.data.max_len))
        for problem in problems:
            yield replace(problem, settings=(setting,))
        place = Path(path).expanduser()
        if problems or not place.is_dir():
            continue
        if setting == name:
            yield from preflight.head_stride(config.training(path, rows=None, directory=None), str(place))
            yield from unfit(resolved, [("model", "policy", path)])
        elif setting == REWARD[0] and not holds_head(place, "score"):
            what = f"{path} has no trained head `score`, so it is no reward model"
            yield Problem(what=what, mend="name one that `launch rm` has written", settings=(setting,), code=ENVIRONMENT)


def _place(config: LoopConfig) -> Iterator[Problem]:
    """The run to go on with, or the place of a new one."""
    try:
        place = state.place_of(config)
        if place is not None:
            state.read(place, config)
    except CheckpointError as error:
        what, _, mend = str(error).partition("; ")
        names = ("ckpt.resume",) if config.ckpt.resume is not None else ("ckpt.load_enable", "run.dir")
        yield Problem(what=what, mend=mend, settings=names, code=exit_code(error))
        return
    if place is None:
        yield from preflight.run_directory(config.training(config.model.model_name_or_path, rows=None, directory=config.run.dir))


def _own(resolved: Resolved, _: int) -> Iterator[Problem]:
    config: LoopConfig = resolved.config
    model, function = config.reward.model_name_or_path, config.reward.remote_url
    yield from using_rules.described(resolved)
    if config.data.prompt_dataset is not None and model is None and function is None:
        what = "your own prompts need a reward: the built-in one judges only the built-in task"
        mend = "--reward.remote-url FILE.py with `def reward_func(queries, prompts, labels)`, or --reward.model-name-or-path DIR"
        yield Problem(what=what, mend=mend, settings=("reward.remote_url", "data.prompt_dataset"))
    if model is not None and function is not None:
        what = "a reward model and a reward function both say who judges"
        yield Problem(what=what, mend="drop one of them", settings=REWARD)
    if model is None and config.reward.normalize_enable:
        what = "reward.normalize_enable is for the scores of a reward model, and none is named"
        yield Problem(what=what, mend="add --reward.model-name-or-path DIR, or drop it", settings=("reward.normalize_enable", REWARD[0]))


def _samples(resolved: Resolved, _: int) -> Iterator[Problem]:
    config: LoopConfig = resolved.config
    n, compares = config.rollout.n_samples_per_prompt, isinstance(config, RejectionSamplingConfig | IterativeDPOConfig)
    if compares and n < 2:
        what = f"the best of {n} response is no choice: several are needed to choose among"
        yield Problem(what=what, mend="--rollout.n-samples-per-prompt 2 or more", settings=("rollout.n_samples_per_prompt",))
    if config.rollout.temperature == 0:
        what = "at temperature 0 all responses to a prompt are the same: there is nothing to choose among"
        yield Problem(what=what, mend="raise --rollout.temperature", settings=("rollout.temperature",))
    if isinstance(config, ConditionalSFTConfig) and (text := fault(config.condition.template)):
        what, mend = text.rsplit("; ", 1)
        yield Problem(what=what, mend=mend, settings=("condition.template",))


def _going_on(resolved: Resolved, _: int) -> Iterator[Problem]:
    config: LoopConfig = resolved.config
    if config.ckpt.load_enable and config.run.dir is None and config.ckpt.resume is None:
        what = "ckpt.load_enable goes on in run.dir, and none is named"
        yield Problem(what=what, mend="--run.dir DIR, or --resume latest", settings=("ckpt.load_enable", "run.dir"))
    if config.ckpt.load_enable and config.ckpt.resume is not None:
        what = "ckpt.resume and ckpt.load_enable both say where to go on"
        yield Problem(what=what, mend="drop --ckpt.load-enable", settings=("ckpt.load_enable", "ckpt.resume"))


RULES: tuple[rules.Rule, ...] = (_own, _samples, _going_on)
