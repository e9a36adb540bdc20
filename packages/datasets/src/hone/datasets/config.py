"""Settings of the data."""

from dataclasses import dataclass
from typing import Annotated, Protocol, runtime_checkable

from hone.algos.ranges import Range


@runtime_checkable
class Templates(Protocol):
    """Settings that say how a prompt is rendered."""

    @property
    def input_template(self) -> str | None:
        """Text with one {} that a string prompt is put into."""
        ...

    @property
    def apply_chat_template(self) -> bool:
        """Whether the tokenizer's chat template renders prompts."""
        ...


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts and how they are rendered."""

    prompt_dataset: str | None = None
    """A JSON-lines file of prompts; without one, the built-in arithmetic task."""
    input_key: str = "input"
    """Column of the prompt: a string, or a list of chat messages."""
    label_key: str | None = None
    """Column handed to the reward function as the label."""
    image_key: str | None = "images"
    """Column of a prompt's images: paths, data URIs or bytes, one for each "<image>" or image part; rows need not have any."""
    input_template: str | None = None
    """Text with one {} that a string prompt is put into; other braces stand for themselves."""
    apply_chat_template: bool = False
    """Render prompts with the tokenizer's chat template; a string becomes one user message."""
    max_len: Annotated[int, Range(low=2)] = 2048
    """Longest prompt and response together [tokens]."""
    max_samples: Annotated[int, Range(low=1)] = 100_000_000
    """Rows used, from the start of the file."""
