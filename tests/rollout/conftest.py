"""Real vLLM engines over tiny models made here, shared by the session: a tied Qwen3 that can stop and an untied Llama that cannot."""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from hone.algos.batch import SamplerContract
from hone.rollout.config import VLLMConfig
from hone.rollout.engines.vllm import VLLMEngine
from hone.rollout.types import Request
from hone.rollout.weight_sync import trainer
from hone.rollout.weight_sync.protocol import Sent, Synced, Trainer, sync
from hone.rollout.weight_sync.verify import Canary, canary_tokens

VOCABULARY = 128
EOS = 1
CANARY = canary_tokens(VOCABULARY, seed=0, length=48)
Answer = TypeVar("Answer")


def tiny_model(kind: str, directory: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,  # distributions far from uniform: a weight in the wrong place shows
        "bos_token_id": None,
    }
    if kind == "tied":
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True, eos_token_id=EOS))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False, eos_token_id=None))
    model.save_pretrained(directory)
    return model.eval()


def logp_of(model: PreTrainedModel, tokens: Sequence[int], temperature: float = 1.0) -> Tensor:
    """The learner's log-probabilities of `tokens[1:]` [nats]."""
    with torch.no_grad():
        logits = model(torch.tensor([list(tokens)])).logits[0, :-1]
    return torch.log_softmax(logits / temperature, dim=-1).gather(1, torch.tensor(list(tokens[1:]))[:, None])[:, 0]


def request(prompt: Sequence[int], *, seed: int, length: int = 24, temperature: float = 1.0, top_k: int = 0) -> Request:
    contract = SamplerContract(temperature=temperature, top_p=1.0, top_k=top_k, seed=seed, engine="vllm", tokenizer="", template="")
    return Request(request_id=f"prompt-{prompt[0]}/sample-{seed}", tokens=tuple(prompt), max_new_tokens=length, contract=contract)


@dataclass
class Loop:
    """An event loop in a thread of its own, as an engine's actor has one."""

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def start(self, coroutine: Awaitable[Answer]) -> Future[Answer]:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)  # type: ignore[arg-type]

    def run(self, coroutine: Awaitable[Answer]) -> Answer:
        return self.start(coroutine).result()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@dataclass
class DirectClient:
    """The synchronous control plane of one engine in this process."""

    engine: VLLMEngine
    loop: Loop

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.loop.run(self.engine.init_weight_transfer_engine(init_info))

    def start_weight_update(self) -> None:
        self.loop.run(self.engine.start_weight_update())

    def update_weights(self, update_info: Any) -> None:
        self.loop.run(self.engine.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.loop.run(self.engine.finish_weight_update(weight_version))


@dataclass
class Parameters:
    """A model's parameters as a stream that can be run again."""

    model: PreTrainedModel

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, parameter.detach()) for name, parameter in self.model.named_parameters())


@dataclass
class Served:
    """A model and the engine that serves it; `version` and `canaries` are those of the last sync."""

    engine: VLLMEngine
    model: PreTrainedModel
    loop: Loop
    version: int = 0
    canaries: dict[str, Canary] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.client = DirectClient(self.engine, self.loop)
        self.trainer: Trainer = trainer("shared_memory", client=self.client, source=Parameters(self.model), rank=0, workers=1)

    def step(self, scale: float = 0.05) -> None:
        """Move every parameter, as an optimiser would."""
        generator = torch.Generator().manual_seed(self.version)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=generator)

    async def _send(self) -> Sent:
        fingerprints = await asyncio.to_thread(self.trainer.send_weights)
        return Sent(fingerprints=fingerprints, canary_logp=logp_of(self.model, CANARY).tolist())

    def sync(self, tolerance: float = 1e-3) -> Synced:
        self.version += 1
        synced = self.loop.run(
            sync([self.engine], version=self.version, send=self._send, canary=CANARY, tolerance=tolerance, previous=self.canaries)
        )
        self.canaries = synced.canaries
        return synced

    def in_the_worker(self, function: Callable[[Any], None]) -> None:
        """Run a function on the engine's worker, by vLLM's own remote call."""
        self.loop.run(self.engine._llm.collective_rpc(function))

    @contextmanager
    def through(self, client: DirectClient) -> Iterator[None]:
        """The trainer talks to this client for a while."""
        sending: Any = self.trainer
        sending._client = client
        try:
            yield
        finally:
            sending._client = self.client

    def generate(self, requests: Sequence[Request]) -> list[Any]:
        return self.loop.run(self.engine.generate(requests))


def start(directory: Path, name: str, *, max_model_len: int | None, reads_text: bool = False, lora_rank: int = 0) -> VLLMEngine:
    return VLLMEngine(
        model=str(directory),
        name=name,
        config=VLLMConfig(kv_cache_gib=0.125),
        max_model_len=max_model_len,
        dtype="float32",
        backend="shared_memory",
        threads=1,
        reads_text=reads_text,
        lora_rank=lora_rank,
    )


def _served(directory: Path, kind: str, *, max_model_len: int | None) -> Iterator[Served]:
    model = tiny_model(kind, directory)
    # Lets a test reach into the running worker by sending it a function; serving itself does without.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        environment = dict(os.environ)
        engine = start(directory, kind, max_model_len=max_model_len)
        assert dict(os.environ) == environment
        loop = Loop()
        served = Served(engine=engine, model=model, loop=loop)
        yield served
        served.trainer.close()
        loop.run(engine.shutdown())
        assert not [pid for pid in engine.pids() if Path(f"/proc/{pid}").exists()]
        loop.close()


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from _served(tmp_path_factory.mktemp("tied"), "tied", max_model_len=None)


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from _served(tmp_path_factory.mktemp("untied"), "untied", max_model_len=1024)
