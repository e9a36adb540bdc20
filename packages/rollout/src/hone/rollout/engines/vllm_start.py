"""How a vLLM engine is started: its settings, and the environment its processes begin in."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from hone.rollout.config import VLLMConfig

# Smallest key-value block the CPU kernels take [tokens]; small blocks let short prompts share their prefix.
_CPU_BLOCK = 32


def lora(rank: int) -> dict[str, Any]:
    """Settings of vLLM for one adapter of this rank; it makes room for ranks of its own choice only."""
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    ranks = sorted(get_args(MaxLoRARanks))
    room = next((one for one in ranks if one >= rank), None)
    if room is None:
        raise ValueError(
            f"vLLM serves adapters up to rank {ranks[-1]}, not {rank}; drop --vllm.sync-adapters-only, so that they are merged"
        )
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}


def started(
    model: str,
    config: VLLMConfig,
    *,
    max_model_len: int | None,
    dtype: str,
    backend: str,
    sees: bool,
    reads_text: bool,
    more: Mapping[str, Any],
) -> Any:
    """A running AsyncLLM."""
    from vllm import AsyncEngineArgs
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    from hone.rollout.weight_sync.plugin import RECEIVERS, WorkerExtension

    on_cpu = current_platform.is_cpu()
    device: dict[str, Any] = (
        # A prompt cut in two by the token budget kills vLLM's core on the CPU ("CPU Generator does not use offset"):
        # it takes back the seeded random draw of the unfinished half, which only a GPU's generator can. So never cut one.
        {"kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30), "block_size": _CPU_BLOCK, "enable_chunked_prefill": False}
        if on_cpu
        else {"gpu_memory_utilization": config.gpu_memory_utilization}
    )
    args = AsyncEngineArgs(
        model=model,
        dtype=dtype,  # pyright: ignore[reportArgumentType] - one of the two literals of the constructor
        max_model_len=max_model_len,  # pyright: ignore[reportArgumentType] - None is vLLM's own default, annotated away
        tensor_parallel_size=config.tensor_parallel_size,
        pipeline_parallel_size=config.pipeline_parallel_size,
        distributed_executor_backend="uni" if config.devices == 1 else "mp",
        quantization=None if config.quantization == "none" else config.quantization,
        enforce_eager=config.enforce_eager,
        enable_prefix_caching=config.enable_prefix_caching,
        # Ids in, ids out: no tokenizer is needed, and none that disagrees with the learner's can creep in. Where there are images,
        # vLLM wants one to make up the largest picture that could come; what the model is fed is compared with what was asked.
        # One that reads text only looks at the ids that were drawn: they stay as they are.
        skip_tokenizer_init=not (sees or reads_text),
        limit_mm_per_prompt={"video": 0} if sees else {},
        # The model's stop ids count, its sampling defaults do not: the contract says how a sample is drawn.
        generation_config="vllm",
        # Log-probabilities of the distribution actually sampled from: temperature, top-p and top-k included.
        logprobs_mode="processed_logprobs",
        weight_transfer_config=WeightTransferConfig(backend=RECEIVERS[backend]),
        worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        disable_log_stats=True,
        **more,
        **device,
    )
    return AsyncLLM.from_engine_args(args, usage_context=UsageContext.LLM_CLASS)


@contextmanager
def environment(config: VLLMConfig, *, backend: str, threads: int) -> Iterator[None]:
    """Environment in which vLLM starts its processes; put back as it was, whatever vLLM itself sets."""
    if backend == "ipc":
        # CUDA memory handles are no plain data; vLLM hands them to its core only under this flag, which both ends read at every call.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    found = dict(os.environ)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # standard output is for answers
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Threads that spin while they wait starve whoever shares the cores: measured 15 times slower beside a busy learner.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ranks = config.devices
    on_cpu = backend == "shared_memory" or (backend == "file" and not torch.cuda.is_available())
    if on_cpu and ranks == 1:
        # Only so does vLLM leave the one CPU worker in the engine core's process; AsyncLLM starts that process all the same.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    elif on_cpu:
        # vLLM binds each rank to a NUMA node of its own and dies when there are fewer; so hand out cores instead.
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, min(threads, len(cores) // ranks))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(
            ",".join(str(cores[(rank * share + core) % len(cores)]) for core in range(share)) for rank in range(ranks)
        )
    try:
        yield
    finally:
        for key in os.environ.keys() - found.keys():
            del os.environ[key]
        os.environ.update(found)
