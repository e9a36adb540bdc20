"""Rules that join several settings: pure, each a generator of problems over a resolved configuration and the GPUs present.

A problem names its settings, the first being the one to mend; whoever runs the rules drops those that touch a setting whose
value was refused already.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hone.datasets.chat import template_problems
from hone.launch.acting_rules import ahead, engines, filtering, fleet, reproducible, sampler, sleeping, stale_samples, typed
from hone.launch.commands import AnyConfig
from hone.launch.errors import Problem
from hone.launch.groups import compares_samples
from hone.launch.names import flag
from hone.launch.resolve import ROLES, Resolved
from hone.launch.schema import shown, value_of
from hone.launch.sync_rules import travelling

Rule = Callable[[Resolved, int], Iterator[Problem]]


def broken(resolved: Resolved, gpus: int, rules: Sequence[Rule] = ()) -> Iterator[Problem]:
    """Every rule a configuration breaks on a machine with so many GPUs, with values and their sources filled in."""
    for rule in rules or RULES:
        for problem in rule(resolved, gpus):
            if not resolved.bad.intersection(problem.settings):
                yield problem.at(resolved.where(problem.settings))


def notes(resolved: Resolved, gpus: int) -> Iterator[str]:
    """What will run, but probably not as meant."""
    config, sources = resolved.config, resolved.sources
    if not gpus and config.ds.param_dtype == "bf16":
        yield "ds.param_dtype bf16 is several times slower than fp32 without a GPU; --ds.param-dtype fp32"
    yield from stale_samples(resolved)
    if not gpus and config.ds.enable_sleep:
        yield "ds.enable_sleep without a GPU moves memory to where it is already: it takes time and frees nothing"
    if "ref_logp" not in config.algo.needs and config.ref.model_name_or_path is not None:
        yield "ref.model_name_or_path is not read: algo.kl.init_coef is 0, so there is no KL penalty"
    length, longest = config.algo.reduction.length, config.rollout.max_new_tokens
    if length is not None and length < longest:
        yield (
            f"algo.reduction.length {length} is meant to be the longest response, and rollout.max_new_tokens is {longest}; "
            f"--algo.reduction.length {longest}"
        )
    if config.run.backend == "local" and (idle := [name for name, source in sources.items() if name.startswith("vllm.") and typed(source)]):
        yield f"{', '.join(idle)}: run.backend local has no vLLM engine"


def ranks(config: AnyConfig, group: str | None = None) -> int:
    """Processes that train the policy (or whatever the program trains), or that host the model of another group."""
    model = getattr(config, group or config.groups[0])
    return model.num_nodes * model.num_gpus_per_node


def _batches(resolved: Resolved, _: int) -> Iterator[Problem]:
    train, rollout = resolved.config.train, resolved.config.rollout
    samples = rollout.batch_size * rollout.n_samples_per_prompt
    names = ("train.batch_size", "rollout.batch_size", "rollout.n_samples_per_prompt")
    made = f"the {samples} samples of a rollout ({rollout.batch_size} prompts x {rollout.n_samples_per_prompt})"
    if train.batch_size > samples:
        mend = f"--train.batch-size {samples} or a divisor of it, or a larger rollout"
        yield Problem(what=f"train.batch_size {train.batch_size} is more than {made}", mend=mend, settings=names)
    elif samples % train.batch_size:
        below = next(size for size in range(train.batch_size, 0, -1) if samples % size == 0)
        above = next(size for size in range(train.batch_size, samples + 1) if samples % size == 0)
        mend = f"nearest --train.batch-size {below} or {above}"
        yield Problem(what=f"train.batch_size {train.batch_size} does not divide {made}", mend=mend, settings=names)
    shares = max(1, ranks(resolved.config) // resolved.config.ds.ranks_per_shard)
    if train.batch_size < shares:
        what = f"{shares} learner ranks share an optimiser step of {train.batch_size} samples: some would have none"
        names = ("train.batch_size", "actor.num_nodes", "actor.num_gpus_per_node")
        yield Problem(what=what, mend=f"--train.batch-size {shares} or more, or fewer ranks", settings=names)


def _groups(resolved: Resolved, _: int) -> Iterator[Problem]:
    n = resolved.config.rollout.n_samples_per_prompt
    if n < 2 and compares_samples(resolved.config.algo):
        what = f"a group baseline needs at least 2 samples of a prompt, not {n}: every advantage would be 0"
        yield Problem(what=what, mend="--rollout.n-samples-per-prompt 8, or `launch ppo`", settings=("rollout.n_samples_per_prompt",))


def _lengths(resolved: Resolved, _: int) -> Iterator[Problem]:
    data, rollout, train = resolved.config.data, resolved.config.rollout, resolved.config.train
    if data.max_len <= rollout.max_new_tokens:
        what = f"a response of {rollout.max_new_tokens} tokens leaves no room for a prompt within data.max_len {data.max_len}"
        mend = "raise --data.max-len, or lower --rollout.max-new-tokens"
        yield Problem(what=what, mend=mend, settings=("data.max_len", "rollout.max_new_tokens"))
    ring = resolved.config.ds.ring_attn_size
    if train.max_tokens_per_gpu * ring < data.max_len:
        what = f"a sample of {data.max_len} tokens does not fit a micro-batch of {train.max_tokens_per_gpu * ring}"
        mend = f"--train.max-tokens-per-gpu {-(-data.max_len // ring)} or more, or lower --data.max-len"
        yield Problem(what=what, mend=mend, settings=("train.max_tokens_per_gpu", "data.max_len"))


def _rings(resolved: Resolved, gpus: int) -> Iterator[Problem]:
    config = resolved.config
    size = config.ds.ring_attn_size
    if uneven := [group for group in config.groups if ranks(config, group) % size]:
        told = ", ".join(f"{group} {ranks(config, group)}" for group in uneven)
        what = f"learner ranks do not fall into rings of {size}: {told}"
        names = ("ds.ring_attn_size", *(f"{group}.{setting}" for group in uneven for setting in ("num_nodes", "num_gpus_per_node")))
        yield Problem(what=what, mend="a --ds.ring-attn-size that divides the ranks of each, or more ranks", settings=names)
    ours = {"ds.ring_attn_head_stride": config.ds.ring_attn_head_stride is None, "ds.ring_attn_impl": config.ds.ring_attn_impl == "own"}
    for name in (name for name, ordinary in ours.items() if not ordinary and size == 1 and typed(resolved.sources[name])):
        mend = f"raise --ds.ring-attn-size, or drop {flag(name)}"
        yield Problem(what=f"{name} without a ring does nothing", mend=mend, settings=(name, "ds.ring_attn_size"))
    if size > 1 and not ours["ds.ring_attn_impl"]:
        told, mend = "ds.ring_attn_impl ring-flash-attn", "--ds.ring-attn-impl own"
        if config.ds.param_dtype == "fp32":
            what, names = f"{told} computes in bf16 and fp16 only, not in ds.param_dtype fp32", ("ds.ring_attn_impl", "ds.param_dtype")
            yield Problem(what=what, mend=f"--ds.param-dtype bf16, or {mend}", settings=names)
        if not gpus and not spans_machines(config):
            yield Problem(what=f"{told} runs on CUDA only, and there is no GPU here", mend=mend, settings=("ds.ring_attn_impl",))


def _tensor_parallel(resolved: Resolved, _: int) -> Iterator[Problem]:
    config = resolved.config
    ds, name = config.ds, "ds.tensor_parallel_size"
    size = ds.tensor_parallel_size
    if size == 1:
        return
    if uneven := [group for group in config.groups if ranks(config, group) % ds.ranks_per_shard]:
        told = ", ".join(f"{group} {ranks(config, group)}" for group in uneven)
        rings = "" if ds.ring_attn_size == 1 else f" in rings of {ds.ring_attn_size}"
        what = f"learner ranks do not fall into models over {size} ranks{rings}: {told}"
        names = (name, *(f"{group}.{setting}" for group in uneven for setting in ("num_nodes", "num_gpus_per_node")))
        yield Problem(what=what, mend="a --ds.tensor-parallel-size that divides the ranks of each, or more ranks", settings=names)
    for setting, chosen, mend in (
        ("ds.lora.rank", ds.lora.rank > 0, "--ds.lora.rank 0"),
        ("ds.load_in_4bit", ds.load_in_4bit, "drop --ds.load-in-4bit"),
        ("ds.use_liger_kernel", ds.use_liger_kernel, "drop --ds.use-liger-kernel"),
        ("ds.zpg", ds.zpg > 1, "--ds.zpg 1"),
        ("ds.deepcompile", ds.deepcompile, "drop --ds.deepcompile"),
        *((f"{group}.optim", True, f"--{group}.optim adam") for group in _muons(config)),
    ):
        if chosen:
            what = f"{setting} is not there yet for a model over {size} ranks"
            yield Problem(what=what, mend=f"{mend}, or --ds.tensor-parallel-size 1", settings=(setting, name))


def _muons(config: AnyConfig) -> list[str]:
    """Groups whose matrices Muon steps."""
    return [group for group in config.groups if getattr(getattr(config, group), "optim", "adam") == "muon"]


def _models_in_parts(resolved: Resolved, _: int) -> Iterator[Problem]:
    config = resolved.config
    ds, adapters = config.ds, ("ds.lora.alpha", "ds.lora.dropout", "ds.lora.target_modules")
    if ds.load_in_4bit and not ds.lora.rank:
        what = "ds.load_in_4bit freezes the weights, and ds.lora.rank 0 adds no adapters: nothing would train"
        yield Problem(what=what, mend="--ds.lora.rank 16, or drop --ds.load-in-4bit", settings=("ds.load_in_4bit", "ds.lora.rank"))
    if ds.load_in_4bit and ds.zero_stage == 3:
        what = "ds.zero_stage 3 cuts parameters anywhere, and the weights of ds.load_in_4bit only make sense whole"
        yield Problem(what=what, mend="--ds.zero-stage 2, or drop --ds.load-in-4bit", settings=("ds.zero_stage", "ds.load_in_4bit"))
    if not ds.lora.rank and (idle := [name for name in adapters if typed(resolved.sources[name])]):
        what = f"{', '.join(idle)} without adapters does nothing"
        yield Problem(what=what, mend="--ds.lora.rank 16, or drop it", settings=(*idle, "ds.lora.rank"))


def _penalty(resolved: Resolved, _: int) -> Iterator[Problem]:
    use_loss, coef = "algo.kl.use_loss", "algo.kl.init_coef"
    if not {use_loss, coef} <= resolved.sources.keys():
        return
    if value_of(resolved.config, use_loss) and value_of(resolved.config, coef) == 0 and typed(resolved.sources[use_loss]):
        what = "a KL penalty in the loss with weight 0 does nothing"
        mend = "raise --algo.kl.init-coef, or drop --algo.kl.use-loss"
        yield Problem(what=what, mend=mend, settings=(use_loss, coef))


def _teacher(resolved: Resolved, _: int) -> Iterator[Problem]:
    config, name = resolved.config, "ref.model_name_or_path"
    if "ref_logp" not in config.algo.needs or "algo.kl.init_coef" in resolved.sources:
        return  # no reference, or that of a penalty, which may be the policy as it began
    teacher, student = config.ref.model_name_or_path, config.actor.model_name_or_path
    mend = f"{flag(name)} DIR, a model that shares the policy's tokenizer"
    if teacher is None:
        yield Problem(what="the reference model is the teacher here, and none is named", mend=mend, settings=(name,))
    elif student is not None and Path(teacher).expanduser().resolve() == Path(student).expanduser().resolve():
        what = "the teacher is the policy itself: every advantage would be 0"
        yield Problem(what=what, mend=mend, settings=(name, "actor.model_name_or_path"))


def _correction(resolved: Resolved, _: int) -> Iterator[Problem]:
    level, second_moment = (value_of(resolved.config, f"algo.correction.{name}") for name in ("level", "second_moment"))
    unread = {
        "off": ("mode", "low", "high", "token_cap", *(["normalize"] if second_moment is None else [])),
        "token": ("token_cap",),
        "sequence": ("token_cap",),
        "geometric": ("mode",),
    }[str(level)]
    if said := [name for name in (f"algo.correction.{one}" for one in unread) if typed(resolved.sources[name])]:
        what = f"algo.correction.level {level} does not read {', '.join(said)}"
        mend = "add --algo.correction.level token, or drop what it is not to read" if level == "off" else "drop it, or choose another level"
        yield Problem(what=what, mend=mend, settings=(*said, "algo.correction.level"))


def _prompts(resolved: Resolved, _: int) -> Iterator[Problem]:
    data, sources = resolved.config.data, resolved.sources
    for problem in template_problems(data):
        what, mend = problem.rsplit("; ", 1)  # the last one: a template may have some of its own
        yield Problem(what=what, mend=mend, settings=_template_settings(problem, data.apply_chat_template))
    if data.prompt_dataset is None:
        for name in ("data.prompt_probs", "data.prompt_split", "data.input_key", "data.label_key", "data.input_template"):
            if typed(sources[name]):
                what = f"{name} describes a prompt dataset, and there is none"
                yield Problem(what=what, mend="add --data.prompt-dataset FILE.jsonl, or drop it", settings=(name, "data.prompt_dataset"))


def _template_settings(problem: str, chat: bool) -> tuple[str, ...]:
    first = problem.partition(" ")[0].removeprefix("--").replace("-", "_")
    return (first, *(["data.apply_chat_template"] * (chat or first != "data.input_template")))


def _own_parts(resolved: Resolved, _: int) -> Iterator[Problem]:
    config = resolved.config
    if config.data.prompt_dataset is None:
        return
    if config.actor.model_name_or_path is None:
        what = "the built-in model reads only the digits and signs of the built-in task, not your prompts"
        mend = "name a model for your prompts: --actor.model-name-or-path DIR"
        yield Problem(what=what, mend=mend, settings=("actor.model_name_or_path", "data.prompt_dataset"))
    rollout = config.rollout
    if config.reward.remote_url is None and rollout.agent_func_path is None and rollout.agent_command is None:
        what = "your own prompts need a reward: the built-in one judges only the built-in task"
        mend = "add --reward.remote-url FILE.py with `def reward_func(queries, prompts, labels)`, or --rollout.agent-func-path FILE.py"
        yield Problem(what=what, mend=mend, settings=("reward.remote_url", "data.prompt_dataset"))


def _judges(resolved: Resolved, _: int) -> Iterator[Problem]:
    config = resolved.config
    if config.rollout.agent_func_path is not None and config.reward.remote_url is not None:
        what = "an environment gives the rewards of its episodes, and there is a reward function, too"
        yield Problem(what=what, mend="drop one of them", settings=("rollout.agent_func_path", "reward.remote_url"))
    if config.rollout.agent_func_path is not None and config.rollout.agent_command is not None:
        what = "a file and a command both say who acts"
        yield Problem(what=what, mend="drop one of them", settings=("rollout.agent_command", "rollout.agent_func_path"))


def _steps(resolved: Resolved, _: int) -> Iterator[Problem]:
    config = resolved.config
    if config.ckpt.save_steps == 0:
        what = "ckpt.save_steps 0 says neither when nor never"
        yield Problem(what=what, mend="-1 to save at the end only, or a number of steps from 1", settings=("ckpt.save_steps",))
    if config.ckpt.resume is not None and config.ckpt.load_enable:
        what = "ckpt.resume and ckpt.load_enable both say where to go on from"
        yield Problem(what=what, mend="drop --ckpt.load-enable", settings=("ckpt.load_enable", "ckpt.resume"))
    if "values" in config.algo.needs and config.train.max_steps and config.critic.freezing_steps >= config.train.max_steps:
        what = f"the policy would never learn: it stands still for {config.critic.freezing_steps} steps of {config.train.max_steps}"
        mend = f"--critic.freezing-steps below {config.train.max_steps}, or raise --train.max-steps"
        yield Problem(what=what, mend=mend, settings=("critic.freezing_steps", "train.max_steps"))


def _placement(resolved: Resolved, _: int) -> Iterator[Problem]:
    config = resolved.config
    roles = {role: getattr(config.placement, role) for role in (*ROLES, "engine") if f"placement.{role}" in resolved.sources}
    for role, group in roles.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", group):
            mend = "letters, digits, and _ . - after the first; at most 64"
            yield Problem(what=f"{shown(group)} is no name for a group", mend=mend, settings=(f"placement.{role}",))
    learners = {role: group for role, group in roles.items() if role in ROLES}
    for group in dict.fromkeys(learners.values()):
        members = [ROLES[role] for role, place in learners.items() if place == group]
        sizes = {name: (getattr(config, name).num_nodes, getattr(config, name).num_gpus_per_node) for name in members}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} {nodes} x {devices}" for name, (nodes, devices) in sizes.items())
            names = tuple(f"{name}.{size}" for name in members for size in ("num_nodes", "num_gpus_per_node"))
            mend = "give them the same size, or a group of their own with --placement.ROLE NAME"
            yield Problem(
                what=f"roles of group {group} share its processes, but ask for different sizes: {told}", mend=mend, settings=names
            )


def _backend(resolved: Resolved, gpus: int) -> Iterator[Problem]:
    config = resolved.config
    if config.run.backend == "local":
        if config.ds.zero_stage > 0:
            what = f"run.backend local has one process and no DeepSpeed: there is nothing to shard with zero_stage {config.ds.zero_stage}"
            yield Problem(what=what, mend="--ds.zero-stage 0, or --run.backend ray", settings=("ds.zero_stage", "run.backend"))
        crowds = {group: ranks(config, group) for group in config.groups if ranks(config, group) > 1}
        if crowds:
            what = f"run.backend local has one process, not {max(crowds.values())} ranks ({', '.join(crowds)})"
            names = (*(f"{group}.{size}" for group in crowds for size in ("num_nodes", "num_gpus_per_node")), "run.backend")
            yield Problem(what=what, mend="--run.backend ray, or one rank", settings=names)
    if not gpus and "vllm.sync_backend" in resolved.sources and config.vllm.sync_backend in ("ipc", "nccl") and not spans_machines(config):
        what = f"vllm.sync_backend {config.vllm.sync_backend} moves weights between GPUs, and none is visible"
        yield Problem(what=what, mend="--vllm.sync-backend auto", settings=("vllm.sync_backend",))


def _formats(resolved: Resolved, gpus: int) -> Iterator[Problem]:
    config = resolved.config
    params, sums = config.ds.param_dtype, config.ds.grad_accum_dtype
    if sums not in ("fp32", params):
        what = f"gradients of {params} parameters cannot be summed in {sums}"
        names = ("ds.grad_accum_dtype", "ds.param_dtype")
        yield Problem(what=what, mend="--ds.grad-accum-dtype fp32, or that of the parameters", settings=names)
    if config.ds.adam_offload and config.ds.zero_stage == 0 and params == "fp32":
        what = "ds.adam_offload needs sharded optimiser states, which ds.zero_stage 0 has not"
        yield Problem(what=what, mend="--ds.zero-stage 1, 2 or 3", settings=("ds.adam_offload", "ds.zero_stage"))
    if config.ds.cpu_adam == "deepspeed" and not config.ds.adam_offload:
        what = "ds.cpu_adam deepspeed steps what is offloaded, and ds.adam_offload is off"
        yield Problem(what=what, mend="add --ds.adam-offload, or drop it", settings=("ds.cpu_adam", "ds.adam_offload"))
    if config.ds.cpu_adam == "deepspeed" and (muons := _muons(config)):
        what = f"ds.cpu_adam deepspeed is AdamW alone, and {muons[0]}.optim is muon, which steps with torch"
        yield Problem(what=what, mend="--ds.cpu-adam torch", settings=("ds.cpu_adam", f"{muons[0]}.optim"))
    if config.ds.param_offload and config.ds.zero_stage != 3:
        what = f"ds.param_offload needs sharded parameters, which ds.zero_stage {config.ds.zero_stage} has not"
        yield Problem(what=what, mend="--ds.zero-stage 3, or drop --ds.param-offload", settings=("ds.param_offload", "ds.zero_stage"))
    if config.ds.deepcompile and (offloaded := [name for name in ("ds.adam_offload", "ds.param_offload") if getattr(config.ds, name[3:])]):
        what = f"ds.deepcompile keeps on the device what {offloaded[0]} holds on the host"
        yield Problem(what=what, mend="drop either", settings=("ds.deepcompile", *offloaded))
    if config.ds.deepcompile and (config.ds.lora.rank or config.ds.load_in_4bit):
        yield Problem(
            what="ds.deepcompile is for whole models", mend="drop it, or --ds.lora.rank 0", settings=("ds.deepcompile", "ds.lora.rank")
        )
    if config.ds.deepcompile and config.ds.zero_stage == 3 and not gpus and not spans_machines(config):
        what = "ds.deepcompile knows the gathers of ds.zero_stage 3 on CUDA only, and there is no GPU here"
        yield Problem(what=what, mend="--ds.zero-stage 2, or drop --ds.deepcompile", settings=("ds.deepcompile", "ds.zero_stage"))
    uneven = [group for group in config.groups if ranks(config, group) % config.ds.zpg]
    if config.ds.zpg > 1 and (config.ds.zero_stage != 3 or uneven):
        what = f"ds.zpg {config.ds.zpg} needs ds.zero_stage 3 and a number of ranks that it divides, in every group"
        names = ("ds.zpg", "ds.zero_stage", f"{config.groups[0]}.num_nodes", f"{config.groups[0]}.num_gpus_per_node")
        yield Problem(what=what, mend="--ds.zero-stage 3 with such a number of ranks, or drop --ds.zpg", settings=names)
    for group in ("actor", "critic", "model"):
        idle = tuple(name for name, source in resolved.sources.items() if name.startswith(f"{group}.muon.") and source.startswith("flag "))
        if idle and getattr(config, group).optim != "muon":
            what = f"{', '.join(idle)}: {group}.optim adam does not read it"
            yield Problem(what=what, mend=f"--{group}.optim muon, or drop it", settings=(*idle, f"{group}.optim"))
    offload = {"ds.adam_offload": config.ds.adam_offload, "ds.param_offload": config.ds.param_offload}
    theirs = {**offload, "ds.zpg": config.ds.zpg > 1, "ds.overlap_comm": config.ds.overlap_comm, "ds.deepcompile": config.ds.deepcompile}
    if config.run.backend == "local" and (asked := tuple(name for name, value in theirs.items() if value)):
        what = f"run.backend local has no DeepSpeed, whose {', '.join(asked)} is"
        yield Problem(what=what, mend="drop it, or --run.backend ray", settings=(*asked, "run.backend"))
    if params == "fp16" and not gpus and not spans_machines(config) and config.run.backend == "ray":
        what = "ds.param_dtype fp16 needs a GPU here: vLLM has no fp16 on a CPU, DeepSpeed only on few"
        yield Problem(what=what, mend="--ds.param-dtype fp32", settings=("ds.param_dtype",))


def _devices(resolved: Resolved, gpus: int) -> Iterator[Problem]:
    config = resolved.config
    if not gpus or spans_machines(config) or config.run.backend == "local":
        return
    asked: dict[str, tuple[int, list[str]]] = {}
    for role in (*ROLES, "engine"):
        if f"placement.{role}" not in resolved.sources:
            continue
        size = config.vllm.num_engines * config.vllm.devices if role == "engine" else getattr(config, ROLES[role]).num_gpus_per_node
        before, members = asked.get(getattr(config.placement, role), (0, []))
        asked[getattr(config.placement, role)] = (max(before, size), [*members, role])
    total = sum(size for size, _ in asked.values())
    if total > gpus:
        rows = "\n".join(f"  {group:<12} {size:>3}  {', '.join(members)}" for group, (size, members) in asked.items())
        what = f"{total} GPUs asked, {gpus} visible\n{rows}"
        names = ("actor.num_gpus_per_node", "vllm.num_engines", "vllm.tensor_parallel_size")
        mend = f"lower {', '.join(flag(name) for name in names)}, or share GPUs with --placement.engine {config.placement.policy}"
        yield Problem(what=what, mend=mend, settings=names)


def spans_machines(config: AnyConfig) -> bool:
    """Whether devices of other machines count, which cannot be seen from here."""
    return "RAY_ADDRESS" in os.environ or getattr(config, config.groups[0]).num_nodes > 1


SHARED: tuple[Rule, ...] = (_rings, _tensor_parallel, _models_in_parts, _steps, _backend, _formats)
"""What every program that trains must keep."""

RULES: tuple[Rule, ...] = (
    _batches,
    fleet,
    engines,
    filtering,
    sampler,
    reproducible,
    ahead,
    sleeping,
    _groups,
    _lengths,
    _rings,
    _tensor_parallel,
    _models_in_parts,
    _penalty,
    _teacher,
    _correction,
    _prompts,
    _own_parts,
    _judges,
    _steps,
    _placement,
    _backend,
    travelling,
    _formats,
    _devices,
)
