"""The configuration of `launch chat`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from hone.algos.ranges import Range
from hone.launch.using_config import ServingRunConfig, UsingConfig
from hone.rollout.config import VLLMConfig


@dataclass(frozen=True, kw_only=True)
class ChatDataConfig:
    """How the conversation is rendered."""

    tokenizer_chat_template: str | None = None
    """Template in place of the tokenizer's: a file of Jinja, or one of chatml, llama3, gemma."""
    chat_template_kwargs: str | None = None
    """What the template is given by name, a JSON object: {"enable_thinking": false}."""
    max_len: Annotated[int, Range(low=2)] | None = None
    """Longest conversation, the answer included [tokens]; without it, the model's positions."""


@dataclass(frozen=True, kw_only=True)
class ChatSamplingConfig:
    """How an answer is drawn; /set changes each on the way."""

    max_new_tokens: Annotated[int, Range(low=1)] = 1024
    """Longest answer [tokens]; a longer one is cut, and said to be."""
    temperature: Annotated[float, Range(low=0, high=2)] = 0.7
    """Sampling temperature; 0 takes the likeliest token each time."""
    top_p: Annotated[float, Range(low=0, high=1, open_low=True)] = 0.95
    """Share of the probability, the likeliest tokens first, that an answer is drawn from."""
    seed: Annotated[int, Range(low=0, high=2**32 - 1)] = 42
    """Seed of the answers, together with their number: the same words get the same answers again."""


@dataclass(frozen=True, kw_only=True)
class ChatConfig(UsingConfig):
    """A conversation in the terminal."""

    verb = "chat"
    built_in_unless = ("model.model_name_or_path",)

    engine: Literal["vllm", "transformers"] = "vllm"
    """vllm: one vLLM engine; transformers: in this process, which starts in seconds and needs no vLLM."""
    system: str | None = None
    """The system message the conversation begins with."""
    raw: bool = False
    """Talk without a chat template, as base models want it: what is typed and answered is one text, which each line goes on with where it
    stands, its white space included; an answer that came to its end, or /reset, has the next line begin another."""
    data: ChatDataConfig = field(default_factory=ChatDataConfig)
    """How the conversation is rendered."""
    rollout: ChatSamplingConfig = field(default_factory=ChatSamplingConfig)
    """How an answer is drawn; /set changes each on the way."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    """The inference engine."""
    run: ServingRunConfig = field(default_factory=ServingRunConfig)
    """Where and how it is carried out."""
