"""Rules about acting: engines, and which groups are kept."""

from collections.abc import Iterator

from hone.launch.errors import Problem
from hone.launch.names import flag
from hone.launch.resolve import Resolved
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


def sampler(resolved: Resolved, _: int) -> Iterator[Problem]:
    """How responses are drawn can be read."""
    rollout, name = resolved.config.rollout, "rollout.min_new_tokens"
    if rollout.min_new_tokens > rollout.max_new_tokens:
        what = f"no response has {rollout.min_new_tokens} tokens at least and {rollout.max_new_tokens} at most"
        yield Problem(what=what, mend=f"{flag(name)} {rollout.max_new_tokens} or less", settings=(name, "rollout.max_new_tokens"))
    try:
        sampler_of(rollout)
    except (ValueError, OSError) as error:
        at, _, told = str(error).partition(": ") if isinstance(error, ValueError) else ("structured_outputs", "", str(error))
        what, _, mend = told.partition("; ")
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
