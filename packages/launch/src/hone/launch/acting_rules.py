"""Rules about acting: engines, and which groups are kept."""

from collections.abc import Iterator

from hone.launch.errors import Problem
from hone.launch.resolve import Resolved


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
