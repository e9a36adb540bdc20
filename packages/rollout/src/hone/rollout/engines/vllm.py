"""vLLM as an engine: token ids in, token ids with log-probabilities and policy versions out. The only file that serves with vllm.

Flow: Request -> one vLLM request per sample -> Completion. vllm is imported when an engine is built, not when this
module is, so that a process may name the class without paying for the import.
"""

import asyncio
import itertools
import multiprocessing
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from hone.algos.batch import Attachment
from hone.rollout.config import VLLMConfig
from hone.rollout.errors import EngineError, EngineLost, StaleWeights
from hone.rollout.pictures import collapsed, decoded, sees
from hone.rollout.types import Completion, Request

# vLLM's label of the weights an engine starts with; ours is version 0.
_INITIAL_LABEL = "default"
# Smallest key-value block the CPU kernels take [tokens]; small blocks let short prompts share their prefix.
_CPU_BLOCK = 32
# Grace for the engine core to end by itself before it is killed; it holds nothing that must be saved.
_SHUTDOWN_S = 5.0


class VLLMEngine:
    """One AsyncLLM and its engine core process; the methods are coroutines of one event loop (a Ray actor has just one).

    `backend` is how weights arrive ("shared_memory", "file", "ipc" or "nccl"); with a `lora_rank`, an adapter of at most that
    rank arrives alone and is served over the model. `threads` are the CPU threads of each worker; `max_model_len` [tokens]
    is the model's own where None; `eos_token_ids` are ids that end a response beside those of the model's configuration
    (the tokenizer's, say: the engine loads none).
    """

    def __init__(
        self,
        *,
        model: str,
        name: str,
        config: VLLMConfig,
        max_model_len: int | None,
        dtype: Literal["float32", "bfloat16", "float16"],
        backend: Literal["shared_memory", "file", "ipc", "nccl"],
        threads: int,
        eos_token_ids: Sequence[int] = (),
        lora_rank: int = 0,
    ) -> None:
        self.name = name
        self._eos_token_ids = list(eos_token_ids)
        self._version = 0
        self._half_loaded = ""
        self._adapted, self._adapter = lora_rank > 0, None
        self._canaries = itertools.count()
        before = set(multiprocessing.active_children())
        with _environment(config, backend=backend, threads=threads):
            try:
                self._sees = sees(model)
                lora = _lora(lora_rank) if self._adapted else {}
                self._llm = _start(model, config, max_model_len=max_model_len, dtype=dtype, backend=backend, sees=self._sees, lora=lora)
            except Exception as error:
                raise EngineError(
                    f"engine {name} did not start on {model}: {_first_line(error)}; the cause stands in its log above"
                ) from error
        self._processes = [process for process in multiprocessing.active_children() if process not in before]

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Draw all samples of one prompt, in the order asked; EngineError names the engine and the requests."""
        if self._half_loaded:
            raise StaleWeights(f"engine {self.name} refuses to sample: {self._half_loaded}")
        tasks = [asyncio.ensure_future(self._sample(request)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        except Exception as error:
            names = ", ".join(request.request_id for request in requests)
            raise self._failure(f"while sampling {names}", error) from error
        finally:
            for task in tasks:
                task.cancel()

    async def _sample(self, request: Request) -> Completion:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        contract = request.contract
        output = await self._last(
            request.tokens,
            # One request per sample: vLLM seeds the n samples of one request with neighbouring numbers, which share streams.
            SamplingParams(
                temperature=0.0 if request.greedy else contract.temperature,
                top_p=contract.top_p,
                top_k=contract.top_k,
                seed=contract.seed,
                max_tokens=request.max_new_tokens,
                stop_token_ids=self._eos_token_ids,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            ),
            request.request_id,
            request.images,
        )
        sample = output.outputs[0]
        if sample.finish_reason not in ("stop", "length"):
            raise EngineError(f"request {request.request_id} ended with {sample.finish_reason!r} after {len(sample.token_ids)} tokens")
        return Completion(
            request_id=request.request_id,
            tokens=tuple(sample.token_ids),
            logp=tuple(sample.logprobs.logprobs),
            version=tuple(_number(span.version) for span in sample.weight_versions for _ in range(span.start, span.end)),
            finish_reason=sample.finish_reason,
            cached_tokens=output.num_cached_tokens,
        )

    async def prompt_logp(self, tokens: Sequence[int], images: Sequence[Attachment] = ()) -> list[float]:
        """Log-probabilities [nats] of `tokens[1:]` at temperature 1, recomputed under the weights served now (the canary)."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # Asking for prompt log-probabilities makes vLLM pass over its prefix cache; the one sampled token is not used.
        params = SamplingParams(
            max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        if self._half_loaded:
            raise StaleWeights(f"engine {self.name} refuses to answer: {self._half_loaded}")
        request_id = f"canary-{next(self._canaries)}"
        try:
            output = await self._last(tokens, params, request_id, images)
        except Exception as error:
            raise self._failure(f"while answering {request_id}", error) from error
        return list(output.prompt_logprobs.logprobs)

    async def _last(self, tokens: Sequence[int], params: Any, request_id: str, images: Sequence[Attachment]) -> Any:
        """The final output of one vLLM request; EngineError where the model was shown other ids than `tokens`."""
        from vllm.inputs import TokensPrompt, tokens_input

        if images and not self._sees:
            raise EngineError(f"engine {self.name} serves a language model, and request {request_id} has images; serve one that sees")
        # The prefix cache is keyed by tokens, not by weights: the salt keeps versions apart.
        salt = f"v{self._version}"
        if images:
            pictures = await asyncio.to_thread(decoded, images)
            ids = collapsed(tokens, images)
            prompt: Any = TokensPrompt(prompt_token_ids=ids, multi_modal_data={"image": pictures}, cache_salt=salt)
        else:
            prompt = tokens_input(list(tokens), cache_salt=salt)
        outputs: AsyncIterator[Any] = self._llm.generate(prompt, params, request_id, lora_request=self._adapter)
        output = [output async for output in outputs][-1]
        if list(output.prompt_token_ids) != list(tokens):
            expands = (
                "its processor expands images otherwise; use one version of transformers, and one model directory, for data and engines"
            )
            raise EngineError(
                f"engine {self.name} fed the model {len(output.prompt_token_ids)} ids in request {request_id} which are not the "
                f"{len(tokens)} of the prompt ({_difference(tokens, output.prompt_token_ids)}): "
                + (expands if images else "it answered another request, or changed this one")
            )
        return output

    async def pause(self) -> None:
        """Freeze the requests in flight and admit no new ones."""
        await self._asked("while pausing", self._llm.pause_generation(mode="keep", clear_cache=False))

    async def resume(self) -> None:
        """Go on; requests in flight recompute what they had cached."""
        await self._asked("while resuming", self._llm.resume_generation())

    async def set_version(self, version: int) -> None:
        """Label the weights served from now on, and forget every cached prefix; call it between pause and resume."""
        await self._asked("while labelling weights", self._llm.update_weight_version(str(version)))
        self._version = version
        if self._sees:
            # Features of images are kept by picture, not by weights.
            await self._asked("while forgetting images", self._llm.reset_encoder_cache())
        if not await self._asked("while clearing the prefix cache", self._llm.reset_prefix_cache(reset_running_requests=True)):
            raise EngineError(
                f"engine {self.name} kept its prefix cache across the update to version {version}; pause it before the update"
            )

    async def version(self) -> int:
        """The label of the weights served now, as the engine core knows it."""
        return _number(await self._asked("while telling its version", self._llm.get_weight_version()))

    async def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        """Open this end of the transport."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        request = WeightTransferInitRequest(init_info=dict(init_info))
        await self._asked("at the weight-transfer handshake", self._llm.init_weight_transfer_engine(request))

    async def start_weight_update(self) -> None:
        """Begin an update; until it is finished nothing may be sampled."""
        if self._half_loaded:
            await self._asked("while giving up an update", self._llm.collective_rpc("hone_abandon_update"))
        self._half_loaded = "an update of its weights was begun and not finished; send all weights again"
        if not self._adapted:
            await self._updated(self._llm.start_weight_update())

    async def update_weights(self, update_info: Any) -> None:
        """Receive; StaleWeights when anything of it fails."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        if self._adapted:
            await self._updated(self._load_adapter(update_info["adapter"], update_info["fingerprints"]))
        else:
            await self._updated(self._llm.update_weights(WeightTransferUpdateRequest(update_info=update_info)))

    async def _load_adapter(self, path: str, fingerprints: Mapping[str, str]) -> None:
        """Check the adapter that lies in `path`, and serve it in place of the last."""
        from vllm.lora.request import LoRARequest

        await self._llm.collective_rpc("hone_check_adapter", args=(path, dict(fingerprints)))
        # One id for all versions: requests in flight go on with the new adapter. What was cached under the old one is kept apart by
        # the salt of a request and forgotten by `set_version`, as with merged weights.
        request = LoRARequest(lora_name="policy", lora_int_id=1, lora_path=path, load_inplace=True)
        if not await self._llm.add_lora(request):
            raise EngineError("vLLM did not take the adapter")
        self._adapter = LoRARequest(lora_name="policy", lora_int_id=1, lora_path=path)

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Load what was received and end the update; label it when a version is given."""
        if not self._adapted:
            await self._updated(self._llm.finish_weight_update())
        self._half_loaded = ""
        if weight_version is not None:
            await self.set_version(int(weight_version))

    async def fingerprints(self) -> dict[str, str]:
        """Fingerprints the last update's receivers took of what they loaded; workers that disagree give a name all of theirs."""
        received = await self._asked("while telling fingerprints", self._llm.collective_rpc("hone_fingerprints"))
        names = dict.fromkeys(name for worker in received for name in worker)
        return {name: "/".join(sorted({worker.get(name, "missing") for worker in received})) for name in names}

    async def suspects(self) -> list[str]:
        """Parameters whose bytes the engine cannot vouch for after an update, most suspect first, with the reason."""
        answers = await self._asked("while telling suspects", self._llm.collective_rpc("hone_suspects"))
        return list(dict.fromkeys(name for worker in answers for name in worker))

    async def check_health(self) -> None:
        """Returns when the engine core and its workers have answered; EngineLost when the core is dead. One that hangs never answers."""
        await self._asked("at a health check", self._llm.collective_rpc("hone_alive"))

    def pids(self) -> list[int]:
        """Process ids of the engine core."""
        return [process.pid for process in self._processes if process.pid is not None]

    async def shutdown(self) -> None:
        """End the engine core; returns when its process is gone. Nothing can be asked of the engine afterwards."""
        self._llm.shutdown(timeout=_SHUTDOWN_S)
        for process in self._processes:
            process.kill()
            process.join()
        # vLLM closes its sockets and forgets the context they came from, which complains when it is collected.
        self._llm.engine_core.resources.ctx.destroy(linger=0)
        del self._llm  # its destructor would fail at the interpreter's end

    async def _asked(self, when: str, answer: Any) -> Any:
        """What a call to the engine core returns, or EngineError."""
        try:
            return await answer
        except Exception as error:
            raise self._failure(when, error) from error

    async def _updated(self, answer: Any) -> None:
        """One step of an update; StaleWeights, and no more sampling, when a living engine reports a failure."""
        try:
            await answer
        except Exception as error:
            if self._llm.errored:
                raise self._failure("during a weight update", error) from error
            self._half_loaded = f"an update of its weights failed ({_first_line(error)}); send all weights again, or restart it"
            raise StaleWeights(f"engine {self.name}: {self._half_loaded}") from error

    def _failure(self, when: str, error: Exception) -> EngineError:
        """The error to raise for one of vLLM's."""
        if isinstance(error, EngineError):
            return error
        if self._llm.errored:
            for process in self._processes:
                process.join(1)  # so that its exit code is known
            codes = ", ".join(f"pid {process.pid} exit code {process.exitcode}" for process in self._processes)
            return EngineLost(
                self.name,
                f"lost its vLLM core {when} ({codes}; -9 is mostly the machine out of memory); the cause stands in its log; where it "
                "happens again, lower vllm.kv-cache-gib or vllm.gpu-memory-utilization, or give it more memory",
            )
        return EngineError(f"engine {self.name} failed {when}: {type(error).__name__}: {_first_line(error)}")


def _difference(sent: Sequence[int], told: Sequence[int]) -> str:
    """Where two lists of ids first differ, with what stands around it."""
    place = next((place for place, (one, other) in enumerate(zip(sent, told, strict=False)) if one != other), min(len(sent), len(told)))
    window = slice(max(0, place - 8), place + 8)
    return f"id {place} of its prompt was {list(sent[window])} and came back as {list(told[window])}"


def _lora(rank: int) -> dict[str, Any]:
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


def _start(
    model: str, config: VLLMConfig, *, max_model_len: int | None, dtype: str, backend: str, sees: bool, lora: Mapping[str, Any]
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
        distributed_executor_backend="uni" if config.tensor_parallel_size == 1 else "mp",
        enforce_eager=config.enforce_eager,
        enable_prefix_caching=True,
        # Ids in, ids out: no tokenizer is needed, and none that disagrees with the learner's can creep in. Where there are images,
        # vLLM wants one to make up the largest picture that could come; what the model is fed is compared with what was asked.
        skip_tokenizer_init=not sees,
        limit_mm_per_prompt={"video": 0} if sees else {},
        # The model's stop ids count, its sampling defaults do not: the contract says how a sample is drawn.
        generation_config="vllm",
        # Log-probabilities of the distribution actually sampled from: temperature, top-p and top-k included.
        logprobs_mode="processed_logprobs",
        weight_transfer_config=WeightTransferConfig(backend=RECEIVERS[backend]),
        worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        disable_log_stats=True,
        **lora,
        **device,
    )
    return AsyncLLM.from_engine_args(args, usage_context=UsageContext.LLM_CLASS)


@contextmanager
def _environment(config: VLLMConfig, *, backend: str, threads: int) -> Iterator[None]:
    """Environment in which vLLM starts its processes; put back as it was, whatever vLLM itself sets."""
    if backend == "ipc":
        # CUDA memory handles are no plain data; vLLM hands them to its core only under this flag, which both ends read at every call.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    found = dict(os.environ)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Threads that spin while they wait starve whoever shares the cores: measured 15 times slower beside a busy learner.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ranks = config.tensor_parallel_size
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


def _number(label: str) -> int:
    """A version from vLLM's label of it."""
    return 0 if label == _INITIAL_LABEL else int(label)


def _first_line(error: Exception) -> str:
    """The message of an error in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
