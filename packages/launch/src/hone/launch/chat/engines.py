"""Engines that answer one prompt token by token: transformers in this process, or vLLM with its engine core in another."""

import asyncio
import os
import signal
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import transformers
from torch import Tensor

from hone.algos.batch import SamplerContract
from hone.launch.chat_config import ChatConfig, ChatSamplingConfig
from hone.launch.machine import visible_gpus
from hone.learner.model_files import resolve
from hone.rollout.engines.vllm import VLLMEngine
from hone.rollout.types import Request


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt's ids, the longest answer [tokens], how to draw it, and a number of its own."""

    tokens: Sequence[int]
    most: int
    sampling: ChatSamplingConfig
    number: int

    @property
    def seed(self) -> int:
        """Of this answer."""
        return (self.sampling.seed * 1_000_003 + self.number) % 2**63


@runtime_checkable
class ChatEngine(Protocol):
    """What answers."""

    def stream(self, asked: Asked) -> Generator[Sequence[int], None, None]:
        """The ids of an answer as they are drawn, the one that ends it included; closing the iterator stops the drawing."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class InThisProcess:
    """A transformers model, a token at a time."""

    def __init__(self, model: str, *, dtype: torch.dtype, eos_ids: Collection[int]) -> None:
        kind: Any = transformers.AutoModelForCausalLM
        self._model: Any = kind.from_pretrained(resolve(model), dtype=dtype).eval().to("cuda" if visible_gpus() else "cpu")
        self._eos_ids = frozenset(eos_ids)

    def stream(self, asked: Asked) -> Generator[Sequence[int], None, None]:
        """See `ChatEngine`."""
        device = next(self._model.parameters()).device
        generator = torch.Generator().manual_seed(asked.seed)
        ids, cache = torch.tensor([list(asked.tokens)], device=device), None
        for _ in range(asked.most):
            # Not around the yield: whoever reads would find gradients switched off.
            with torch.no_grad():
                output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            token = drawn(output.logits[0, -1].float().cpu(), asked.sampling, generator)
            yield [token]
            if token in self._eos_ids:
                return
            ids = torch.tensor([[token]], device=device)

    def close(self) -> None:
        """Nothing to end."""


def drawn(logits: Tensor, sampling: ChatSamplingConfig, generator: torch.Generator) -> int:
    """One id: the likeliest at temperature 0, else one of the fewest likeliest tokens that have `top_p` of the probability."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    likely, order = torch.softmax(logits.double() / sampling.temperature, dim=-1).sort(descending=True)
    kept = likely.cumsum(0) - likely < sampling.top_p
    return int(order[torch.multinomial(likely * kept, 1, generator=generator)])


class Served:
    """A vLLM engine; Ctrl-C at the terminal does not reach its core, for it is to end an answer and not the engine."""

    def __init__(self, config: ChatConfig, model: str, *, max_len: int, eos_ids: Sequence[int]) -> None:
        self._runner = asyncio.Runner()
        self._name = 0
        dtype: Literal["float32", "bfloat16"] = "float32" if config.model.param_dtype == "fp32" else "bfloat16"

        async def started() -> VLLMEngine:
            return VLLMEngine(
                model=model,
                name="vllm",
                config=config.vllm,
                max_model_len=max_len,
                dtype=dtype,
                backend="nccl" if visible_gpus() else "shared_memory",
                threads=config.run.threads or os.cpu_count() or 1,
                eos_token_ids=eos_ids,
            )

        # Processes inherit what is blocked: the terminal sends Ctrl-C to all of them.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._engine = self._runner.run(started())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)

    def stream(self, asked: Asked) -> Generator[Sequence[int], None, None]:
        """See `ChatEngine`."""
        self._name += 1
        sampling = asked.sampling
        request = Request(
            request_id=f"chat-{self._name}",
            tokens=tuple(asked.tokens),
            max_new_tokens=asked.most,
            contract=SamplerContract(
                temperature=sampling.temperature or 1.0,
                top_p=sampling.top_p,
                top_k=0,
                seed=asked.seed,
                engine=self._engine.name,
                tokenizer="",
                template="",
            ),
            greedy=sampling.temperature == 0,
        )
        answer = self._engine.stream(request)

        async def following() -> Sequence[int] | None:
            return await anext(answer, None)

        try:
            # Ctrl-C in here cancels the wait, and with it the request; outside of it there is nothing to cancel.
            while (ids := self._runner.run(following())) is not None:
                yield ids
        finally:
            self._runner.run(answer.aclose())

    def close(self) -> None:
        """End the engine's process."""
        self._runner.run(self._engine.shutdown())
        self._runner.close()
