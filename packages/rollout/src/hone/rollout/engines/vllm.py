"""vLLM as an engine: token ids in, token ids with log-probabilities and policy versions out. `vllm_start` makes it.

Flow: Request -> one vLLM request per sample -> Completion. vllm is imported when an engine is built, not when this
module is, so that a process may name the class without paying for the import.
"""

import asyncio
import itertools
import multiprocessing
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any, Literal

from hone.algos.batch import Attachment
from hone.rollout.config import VLLMConfig
from hone.rollout.engines.vllm_sampling import sampling_params
from hone.rollout.engines.vllm_start import environment, lora, started
from hone.rollout.errors import EngineError, EngineLost, StaleWeights
from hone.rollout.pictures import collapsed, decoded, sees
from hone.rollout.types import Completion, PauseMode, Request

# vLLM's label of the weights an engine starts with; ours is version 0.
_INITIAL_LABEL = "default"
# Grace for the engine core to end by itself before it is killed; it holds nothing that must be saved.
_SHUTDOWN_S = 5.0


class VLLMEngine:
    """One AsyncLLM and its engine core process; the methods are coroutines of one event loop (a Ray actor has just one).

    `backend` is how weights arrive ("shared_memory", "file", "ipc" or "nccl"); with a `lora_rank`, an adapter of at most that
    rank arrives alone and is served over the model. `threads` are the CPU threads of each worker; `max_model_len` [tokens]
    is the model's own where None; `eos_token_ids` are ids that end a response beside those of the model's configuration
    (the tokenizer's, say: the engine loads none, unless it `reads_text`, which takes one to end responses at a text or hold
    them to a grammar).
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
        reads_text: bool = False,
        lora_rank: int = 0,
    ) -> None:
        self.name = name
        self._reads_text = reads_text
        self._eos_token_ids = list(eos_token_ids)
        self._version = 0
        self._half_loaded = ""
        self._sleeps = config.enable_sleep
        self._asleep: set[str] = set()
        self._adapted, self._adapter = lora_rank > 0, None
        self._canaries = itertools.count()
        before = set(multiprocessing.active_children())
        with environment(config, backend=backend, threads=threads):
            try:
                self._sees = sees(model)
                more = {"enable_sleep_mode": config.enable_sleep, **(lora(lora_rank) if self._adapted else {})}
                self._llm = started(
                    model,
                    config,
                    max_model_len=max_model_len,
                    dtype=dtype,
                    backend=backend,
                    sees=self._sees,
                    reads_text=reads_text,
                    more=more,
                )
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
        params = sampling_params(request, engine=self.name, eos_token_ids=self._eos_token_ids, reads_text=self._reads_text)
        output = await self._last(request.tokens, params, request.request_id, request.images)
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

    async def stream(self, request: Request) -> AsyncGenerator[tuple[int, ...], None]:
        """The ids of one sample as they are drawn; closing the generator drops the request. Raises EngineError."""
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params = sampling_params(request, engine=self.name, eos_token_ids=self._eos_token_ids, reads_text=self._reads_text)
        params.output_kind = RequestOutputKind.DELTA
        try:
            prompt = tokens_input(list(request.tokens))
            async for output in self._llm.generate(prompt, params, request.request_id, lora_request=self._adapter):
                if ids := output.outputs[0].token_ids:
                    yield tuple(ids)
        except Exception as error:
            raise self._failure(f"while answering {request.request_id}", error) from error

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

    async def pause(self, mode: PauseMode = "keep") -> None:
        """Begin no new requests, and freeze those in flight (keep), return when they have ended (wait), or end them (abort)."""
        await self._asked("while pausing", self._llm.pause_generation(mode=mode, clear_cache=False))

    async def resume(self) -> None:
        """Go on; requests in flight recompute what they had cached."""
        await self._asked("while resuming", self._llm.resume_generation())

    async def sleep(self, level: Literal[1, 2]) -> None:
        """Give the GPU's memory back when what is in flight has ended: level 1 keeps the weights on the host, 2 drops them."""
        if not self._sleeps:
            raise EngineError(f"engine {self.name} cannot sleep: it was started without --vllm.enable-sleep")
        await self._asked("while falling asleep", self._llm.sleep(level, mode="wait"))
        self._asleep = {"weights", "kv_cache"}

    async def wake(self, tags: Sequence[Literal["weights", "kv_cache"]] = ("weights", "kv_cache")) -> None:
        """Take memory for these again; what is awake stays so. It samples again when all are; dropped weights must be sent first."""
        if asleep := [tag for tag in tags if tag in self._asleep]:
            await self._asked("while waking", self._llm.wake_up(asleep))
            self._asleep -= set(asleep)

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


def _number(label: str) -> int:
    """A version from vLLM's label of it."""
    return 0 if label == _INITIAL_LABEL else int(label)


def _first_line(error: Exception) -> str:
    """The message of an error in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
