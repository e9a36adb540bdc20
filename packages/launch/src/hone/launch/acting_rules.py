"""Rules about acting: engines, which groups are kept, and rollout that does not wait for the learner."""

import os
from collections.abc import Iterator

from hone.launch.errors import Problem
from hone.launch.names import flag
from hone.launch.resolve import Resolved
from hone.launch.schema import value_of
from hone.rollout.config import SamplerConfig
from hone.rollout.sampling import sampler_of


def typed(source: str) -> bool:
    """Whether a value was typed for this run: a file may be that of an earlier run, which writes out every default."""
    return source.startswith("flag ")


def fleet(resolved: Resolved, _: int) -> Iterator[Problem]:
    """No more engines are needed than there are."""
    vllm = resolved.config.vllm
    if vllm.min_engines > vllm.num_engines:
        what = f"the run needs {vllm.min_engines} engines at least and has {vllm.num_engines}"
        mend = f"--vllm.min-engines {vllm.num_engines} or fewer, or more --vllm.num-engines"
        yield Problem(what=what, mend=mend, settings=("vllm.min_engines", "vllm.num_engines"))


def filtering(resolved: Resolved, _: int) -> Iterator[Problem]:
    """Dynamic sampling can keep a group, and reads what was typed for it."""
    rollout, name = resolved.config.rollout, "rollout.dynamic_filtering"
    low, high = rollout.dynamic_filtering_range
    if low >= high:
        what = f"no mean score lies strictly between {low:g} and {high:g}"
        yield Problem(what=what, mend="--rollout.dynamic-filtering-range LOW HIGH", settings=(f"{name}_range",))
    read = {"off": (), "variance": ("batches",), "range": ("range", "batches")}[rollout.dynamic_filtering]
    unread = [f"{name}_{one}" for one in ("range", "batches") if one not in read and typed(resolved.sources[f"{name}_{one}"])]
    if unread:
        what = f"{', '.join(unread)}: rollout.dynamic_filtering {rollout.dynamic_filtering} does not read it"
        yield Problem(what=what, mend="--rollout.dynamic-filtering range, or drop it", settings=(name, *unread))
    if rollout.n_samples_per_prompt < 2 and rollout.dynamic_filtering == "variance":
        what = "rewards of one sample do not vary: every group would be dropped"
        yield Problem(what=what, mend="--rollout.n-samples-per-prompt 8", settings=(name, "rollout.n_samples_per_prompt"))


def engines(resolved: Resolved, gpus: int) -> Iterator[Problem]:
    """What engines are to do, this machine's engines can."""
    vllm, sources = resolved.config.vllm, resolved.sources
    far = "vllm.num_engines" in sources and ("RAY_ADDRESS" in os.environ or resolved.config.actor.num_nodes > 1)
    asked = {"vllm.pipeline_parallel_size": vllm.pipeline_parallel_size > 1, "vllm.quantization": vllm.quantization != "none"}
    for name in (name for name, wanted in asked.items() if wanted and name in sources and not gpus and not far):
        what = f"{name} {getattr(vllm, name.partition('.')[2])} needs GPUs, and none is visible: vLLM has it on them only"
        yield Problem(what=what, mend=f"drop {flag(name)}", settings=(name,))
    if vllm.quantization != "none" and "vllm.sync_tolerance" in sources and vllm.sync_tolerance is None:
        what = (
            f"an engine in {vllm.quantization} differs from the learner by what quantisation takes away, and the check of every update of "
            "its weights does not know by how much"
        )
        mend = "--vllm.sync-tolerance 0.5 (or what your model shows), and --algo.correction.level token for the samples"
        yield Problem(what=what, mend=mend, settings=("vllm.quantization", "vllm.sync_tolerance"))


def sampler(resolved: Resolved, _: int) -> Iterator[Problem]:
    """How responses are drawn can be read."""
    rollout, name = resolved.config.rollout, "rollout.min_new_tokens"
    if rollout.min_new_tokens > rollout.max_new_tokens:
        what = f"no response has {rollout.min_new_tokens} tokens at least and {rollout.max_new_tokens} at most"
        yield Problem(what=what, mend=f"{flag(name)} {rollout.max_new_tokens} or less", settings=(name, "rollout.max_new_tokens"))
    try:
        sampler_of(rollout)
    except (ValueError, OSError) as error:
        at, _colon, told = str(error).partition(": ") if isinstance(error, ValueError) else ("structured_outputs", "", str(error))
        what, _semicolon, mend = told.partition("; ")
        names = [f"rollout.{one}" for one in ([at] if at in ("stop", "stop_token_ids") else grammars(rollout))]
        yield Problem(what=what, mend=mend or "name a file that can be read", settings=tuple(names))


def reproducible(resolved: Resolved, _: int) -> Iterator[Problem]:
    """Samples are drawn from the distribution whose log-probabilities the learner recomputes: that of the temperature, and no other."""
    rollout = resolved.config.rollout
    plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "min_new_tokens": 0, "repetition_penalty": 1.0}
    plain |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    told = [f"rollout.{name} {getattr(rollout, name):g}" for name, value in plain.items() if getattr(rollout, name) != value]
    told += [f"rollout.{name}" for name in grammars(rollout)]
    if told:
        what = (
            f"{', '.join(told)}: responses come from another distribution than the one the learner knows (the policy's, at "
            "rollout.temperature): ratios, corrections and the KL penalty would compare the two"
        )
        mend = "drop it for training; `launch generate` and `launch eval` take it"
        yield Problem(what=what, mend=mend, settings=tuple(one.partition(" ")[0] for one in told))


def grammars(rollout: SamplerConfig) -> list[str]:
    """The settings of grammars that were chosen."""
    return [f"structured_outputs.{name}" for name, value in vars(rollout.structured_outputs).items() if value]


def ahead(resolved: Resolved, _: int) -> Iterator[Problem]:
    """Rollout ahead of the learner has engines of its own, and reads what was typed for it."""
    config, sources = resolved.config, resolved.sources
    train, rollout = config.train, config.rollout
    enable, over = "train.async_enable", "rollout.over_sampling"
    asked = [name for name, on in ((enable, train.async_enable), (over, rollout.over_sampling > 1)) if on]
    for name in asked:
        if config.run.backend == "local":
            what = f"{name} needs engines that sample while others compute, and run.backend local has one process"
            yield Problem(what=what, mend="--run.backend ray, or drop it", settings=(name, "run.backend"))
        if config.ds.enable_sleep or config.vllm.enable_sleep:
            sleeper = "vllm.enable_sleep" if config.vllm.enable_sleep else "ds.enable_sleep"
            what = f"{sleeper} lets one side sleep while the other works, and with {name} both work at once"
            yield Problem(what=what, mend="drop one of them", settings=(sleeper, name))
    if train.async_enable and config.placement.engine == config.placement.policy:
        what = f"engines and policy share group {config.placement.policy}, and with {enable} both work at once"
        yield Problem(what=what, mend="--placement.engine rollout, or drop --train.async-enable", settings=("placement.engine", enable))
    if train.partial_rollout_enable and not train.async_enable:
        what = "train.partial_rollout_enable holds responses during an update, and without train.async_enable none is under way then"
        yield Problem(what=what, mend="add --train.async-enable, or drop it", settings=("train.partial_rollout_enable", enable))
    unread = {
        "train.async_queue_size": train.async_enable,
        "rollout.straggler_policy": rollout.over_sampling > 1,
        "rollout.max_staleness": bool(asked),
    }
    for name in (name for name, read in unread.items() if not read and typed(sources[name])):
        needed, mend = (enable, "--train.async-enable") if name.startswith("train.") else (over, "--rollout.over-sampling 1.5")
        yield Problem(what=f"{name} without {needed} does nothing", mend=f"add {mend}, or drop it", settings=(name, needed))
    if rollout.over_sampling > 1 and rollout.straggler_policy == "keep" and not train.partial_rollout_enable:
        what = "rollout.straggler_policy keep lets responses go on over an update, for which nothing holds them"
        mend = "add --train.async-enable --train.partial-rollout-enable, or --rollout.straggler-policy reissue"
        yield Problem(what=what, mend=mend, settings=("rollout.straggler_policy", "train.partial_rollout_enable"))
    queue = train.async_queue_size if train.async_enable else 0
    if asked and rollout.max_staleness is not None and rollout.max_staleness < queue:
        what = f"{queue} batches sampled ahead make samples {queue} versions old, and rollout.max_staleness is {rollout.max_staleness}"
        mend = f"--rollout.max-staleness {queue} or more, or a smaller --train.async-queue-size"
        yield Problem(what=what, mend=mend, settings=("rollout.max_staleness", "train.async_queue_size"))


def sleeping(resolved: Resolved, gpus: int) -> Iterator[Problem]:
    """Engines sleep where somebody else wants their GPU."""
    config, name = resolved.config, "vllm.enable_sleep"
    if not config.vllm.enable_sleep:
        if typed(resolved.sources["vllm.sleep_level"]):
            what = "vllm.sleep_level without vllm.enable_sleep does nothing"
            yield Problem(what=what, mend="add --vllm.enable-sleep, or drop it", settings=("vllm.sleep_level", name))
        return
    if config.placement.engine != config.placement.policy:
        what = "vllm.enable_sleep frees a GPU for the learner, and the engines have GPUs of their own"
        yield Problem(what=what, mend=f"--placement.engine {config.placement.policy}, or drop it", settings=(name, "placement.engine"))
    if not gpus and "RAY_ADDRESS" not in os.environ:
        what = "vllm.enable_sleep needs a GPU: vLLM does not sleep on a CPU"
        yield Problem(what=what, mend="drop it", settings=(name,))


def stale_samples(resolved: Resolved) -> Iterator[str]:
    """Samples of older policies without a correction."""
    if resolved.config.train.async_enable and value_of(resolved.config, "algo.correction.level") == "off":
        yield (
            "train.async_enable trains on samples of older policies, and algo.correction.level is off; "
            "--algo.correction.level token weights them"
        )
