"""Rules about how weights travel to the engines."""

from collections.abc import Iterator

from hone.launch.errors import Problem
from hone.launch.names import flag
from hone.launch.resolve import Resolved

_BACKEND, _DELTA, _ADAPTERS = "vllm.sync_backend", "vllm.sync_delta", "vllm.sync_adapters_only"


def travelling(resolved: Resolved, gpus: int) -> Iterator[Problem]:
    """What is asked of the transport is what it can do."""
    config = resolved.config
    vllm, lora = config.vllm, config.ds.lora
    if config.run.backend == "local":
        unread = [name for name in ("dtype", "sync_delta", "sync_adapters_only") if getattr(vllm, name) not in ("auto", False)]
        if unread or vllm.sync_backend == "file":
            names = [f"vllm.{name}" for name in unread] or [_BACKEND]
            what = f"{', '.join(names)}: run.backend local has its engine in the same process, and copies the weights over"
            yield Problem(what=what, mend="--run.backend ray, or drop it", settings=(*names, "run.backend"))
        return
    if vllm.sync_delta and (vllm.sync_backend not in ("auto", "shared_memory") or (vllm.sync_backend == "auto" and gpus)):
        how = vllm.sync_backend if vllm.sync_backend != "auto" else "auto, with GPUs,"
        what = f"vllm.sync_delta leaves layers out of shared memory only; vllm.sync_backend {how} sends all of them"
        yield Problem(what=what, mend="--vllm.sync-backend shared_memory, or drop it", settings=(_DELTA, _BACKEND))
    if vllm.enable_sleep and vllm.sleep_level == 2 and (vllm.sync_delta or vllm.sync_adapters_only):
        name = _DELTA if vllm.sync_delta else _ADAPTERS
        what = f"{name} leaves out weights that an engine has, and vllm.sleep_level 2 drops them"
        yield Problem(what=what, mend=f"--vllm.sleep-level 1, or drop {flag(name)}", settings=(name, "vllm.sleep_level"))
    if not vllm.sync_adapters_only:
        return
    if not lora.rank:
        what = "vllm.sync_adapters_only sends nothing but a LoRA adapter, and ds.lora.rank 0 trains none"
        yield Problem(what=what, mend="--ds.lora.rank 16, or drop it", settings=(_ADAPTERS, "ds.lora.rank"))
    if config.ds.load_in_4bit:
        what = "vllm.sync_adapters_only: engines would serve the adapter over the model in full, the learner trains it over 4-bit weights"
        yield Problem(what=what, mend="drop --vllm.sync-adapters-only, or --ds.load-in-4bit", settings=(_ADAPTERS, "ds.load_in_4bit"))
    if vllm.sync_delta:
        what = "vllm.sync_adapters_only sends the whole adapter every time: there is nothing for vllm.sync_delta to leave out"
        yield Problem(what=what, mend="drop one of them", settings=(_ADAPTERS, _DELTA))
