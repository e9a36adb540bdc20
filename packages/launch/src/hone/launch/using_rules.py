"""What stops a command that uses a model before it begins: settings that do not go together, and what they point at."""

import importlib.util
import ipaddress
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hone.datasets.chat import template_problems
from hone.launch import acting_rules, preflight, rules
from hone.launch.builtin import BuiltinModel
from hone.launch.chat_config import ChatConfig
from hone.launch.errors import ENVIRONMENT, Problem
from hone.launch.loop_config import LoopConfig
from hone.launch.measured import ks
from hone.launch.model_directory import faults
from hone.launch.resolve import Resolved
from hone.launch.responses import outcome_of
from hone.launch.using_config import AnsweringConfig, EvalConfig, GenerateConfig, ServeRMConfig, UsingConfig

PROMPTS = ("data.input_key", "data.label_key", "data.input_template")


def broken(resolved: Resolved, gpus: int) -> Iterator[Problem]:
    """Every rule a configuration breaks, with values and their sources filled in."""
    yield from rules.broken(resolved, gpus, RULES)


def notes(resolved: Resolved, gpus: int) -> Iterator[str]:
    """What will run, but probably not as meant."""
    config: UsingConfig = resolved.config
    if not gpus and config.model.param_dtype == "bf16" and not isinstance(config, ServeRMConfig):
        yield "model.param_dtype bf16 is several times slower than fp32 without a GPU; --model.param-dtype fp32"
    if isinstance(config, AnsweringConfig) and config.rollout.temperature == 0 and _count(config) > 1:
        yield "at temperature 0 every response to a prompt is the same: one is drawn"
    if isinstance(config, ServeRMConfig) and not _loopback(config.server.host) and not os.environ.get("HONE_REWARD_TOKEN"):
        yield f"whoever reaches {config.server.host} can ask for rewards; set HONE_REWARD_TOKEN in the environment to a secret"


def lacking(resolved: Resolved, gpus: int) -> Iterator[Problem]:
    """Everything the configuration needs that is not there, or not as it must be."""
    config: UsingConfig = resolved.config
    checks = [_installation(config), _model(config)]
    if isinstance(config, AnsweringConfig):
        checks += [preflight.prompts(resolved), preflight.reward(config)]
    if isinstance(config, ServeRMConfig):
        checks.append(preflight.reward(config))
    if isinstance(config, EvalConfig):
        checks.append(preflight.run_directory(config))
    if isinstance(config, GenerateConfig):
        checks.append(_out(config))
    for problem in itertools.chain.from_iterable(checks):
        yield problem if problem.where else problem.at(resolved.where(problem.settings))


def _count(config: AnsweringConfig) -> int:
    """Samples of a prompt."""
    return (config.best_of if isinstance(config, GenerateConfig) else None) or config.rollout.n_samples_per_prompt


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _installation(config: UsingConfig) -> Iterator[Problem]:
    if isinstance(config, ChatConfig) and config.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        yield Problem(what="vllm is not installed", mend="`uv sync`, or --engine transformers, which does without", code=ENVIRONMENT)
    if isinstance(config, AnsweringConfig) and config.run.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        yield Problem(what="vllm is not installed", mend="`uv sync`, or --run.backend local, which does without", code=ENVIRONMENT)


def _model(config: UsingConfig) -> Iterator[Problem]:
    name, path = "model.model_name_or_path", config.model.model_name_or_path
    length = (config.data.max_len if isinstance(config, AnsweringConfig | ChatConfig) else None) or 1
    longest = BuiltinModel().max_position_embeddings
    if path is not None:
        for problem in faults(path, max_len=length):
            yield replace(problem, settings=(name,))
    elif length > longest and isinstance(config, AnsweringConfig | ChatConfig):
        what = f"data.max_len {length} is more than the built-in model's {longest} positions"
        yield Problem(what=what, mend=f"--data.max-len {longest} or less, or --recipe laptop", settings=("data.max_len",))


def _out(config: GenerateConfig) -> Iterator[Problem]:
    path = Path(config.out).expanduser()
    if path.suffix not in (".jsonl", ".parquet"):
        what = f"{config.out} ends in neither .jsonl nor .parquet, which say how responses are written"
        yield Problem(what=what, mend="--out responses.jsonl", settings=("out",))
    elif not path.parent.is_dir():
        yield Problem(what=f"there is no directory {path.parent}", mend="make it, or choose another --out", settings=("out",))
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        what = f"nothing can be written in {path.parent}"
        yield Problem(what=what, mend="choose another --out", settings=("out",), code=ENVIRONMENT)
    elif refusal := outcome_of(path, config).refusal:
        yield replace(refusal, settings=("out",))


def _lengths(resolved: Resolved, _: int) -> Iterator[Problem]:
    config: UsingConfig = resolved.config
    if isinstance(config, AnsweringConfig) and config.data.max_len <= config.rollout.max_new_tokens:
        what = f"a response of {config.rollout.max_new_tokens} tokens leaves no room for a prompt within data.max_len {config.data.max_len}"
        mend = "raise --data.max-len, or lower --rollout.max-new-tokens"
        yield Problem(what=what, mend=mend, settings=("data.max_len", "rollout.max_new_tokens"))


def described(resolved: Resolved) -> Iterator[Problem]:
    """What is said of prompts and does not go together, or has none to speak of; and a model that cannot read them."""
    config: AnsweringConfig | LoopConfig = resolved.config
    for problem in template_problems(config.data):
        what, mend = problem.rsplit("; ", 1)
        yield Problem(what=what, mend=mend, settings=("data.input_template", "data.apply_chat_template"))
    if config.data.prompt_dataset is None:
        for name in PROMPTS:
            if resolved.sources[name].startswith("flag "):
                what = f"{name} describes a prompt dataset, and there is none"
                yield Problem(what=what, mend="add --data.prompt-dataset FILE.jsonl, or drop it", settings=(name, "data.prompt_dataset"))
        return
    if config.model.model_name_or_path is None:
        what = "the built-in model reads only the digits and signs of the built-in task, not your prompts"
        mend = "name a model for your prompts: --model.model-name-or-path DIR"
        yield Problem(what=what, mend=mend, settings=("model.model_name_or_path", "data.prompt_dataset"))


def _own(resolved: Resolved, _: int) -> Iterator[Problem]:
    config: UsingConfig = resolved.config
    if not isinstance(config, AnsweringConfig):
        return
    yield from described(resolved)
    if config.data.prompt_dataset is None:
        return
    judged = isinstance(config, EvalConfig) or (isinstance(config, GenerateConfig) and config.best_of is not None)
    if judged and config.reward.remote_url is None:
        what = "your own prompts need a reward: the built-in one judges only the built-in task"
        mend = "add --reward.remote-url FILE.py with `def reward_func(queries, prompts, labels)`, builtin:gsm8k or builtin:math"
        yield Problem(what=what, mend=mend, settings=("reward.remote_url", "data.prompt_dataset"))


def _counts(resolved: Resolved, _: int) -> Iterator[Problem]:
    config: UsingConfig = resolved.config
    if isinstance(config, GenerateConfig) and config.best_of is not None:
        if config.rollout.n_samples_per_prompt != 1:
            what = "best_of writes one response of each prompt, and rollout.n_samples_per_prompt asks for several"
            yield Problem(what=what, mend="drop one of them", settings=("rollout.n_samples_per_prompt", "best_of"))
        if config.rollout.temperature == 0 and config.best_of > 1:
            what = "at temperature 0 all responses to a prompt are the same: there is no best one"
            yield Problem(what=what, mend="raise --rollout.temperature, or drop --best-of", settings=("rollout.temperature", "best_of"))
    if isinstance(config, EvalConfig):
        n = 1 if config.rollout.temperature == 0 else config.rollout.n_samples_per_prompt
        try:
            ks(config.eval.k, n)
        except ValueError as error:
            what, mend = str(error).split("; ", 1)
            yield Problem(what=what, mend=mend, settings=("eval.k", "rollout.n_samples_per_prompt"))


def _sampler(resolved: Resolved, gpus: int) -> Iterator[Problem]:
    config: UsingConfig = resolved.config
    if not isinstance(config, AnsweringConfig):
        return
    yield from acting_rules.engines(resolved, gpus)
    yield from acting_rules.sampler(resolved, gpus)
    if config.run.backend == "local" and (named := acting_rules.grammars(config.rollout)):
        what = "run.backend local holds no response to a grammar"
        yield Problem(what=what, mend="--run.backend vllm, or drop it", settings=(f"rollout.{named[0]}", "run.backend"))


def _served(resolved: Resolved, _: int) -> Iterator[Problem]:
    config: UsingConfig = resolved.config
    if not isinstance(config, ServeRMConfig):
        return
    model, function = config.model.model_name_or_path, config.reward.remote_url
    names = ("model.model_name_or_path", "reward.remote_url")
    if model is None and function is None:
        mend = "--model.model-name-or-path DIR of a reward model, or --reward.remote-url FILE.py"
        yield Problem(what="nothing to serve: neither a reward model nor a reward function is named", mend=mend, settings=names)
    if model is not None and function is not None:
        yield Problem(what="a reward model and a reward function both say who judges", mend="drop one of them", settings=names)
    if function is not None and "://" in function:
        what = "reward.remote_url names a server, and a server is what this starts"
        yield Problem(what=what, mend="name a function: FILE.py, builtin:math", settings=("reward.remote_url",))


DRAWING: tuple[rules.Rule, ...] = (_lengths, _sampler)
"""What must hold wherever responses are drawn."""
RULES: tuple[rules.Rule, ...] = (_lengths, _own, _counts, _sampler, _served)
