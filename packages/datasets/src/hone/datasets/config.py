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

    @property
    def tokenizer_chat_template(self) -> str | None:
        """Template in place of the tokenizer's."""
        ...

    @property
    def chat_template_kwargs(self) -> str | None:
        """What the template is given by name, a JSON object."""
        ...


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts and how they are rendered."""

    prompt_dataset: str | None = None
    """Prompts: a file (JSON lines, JSON, CSV, Parquet, Arrow), a saved dataset, a folder of files, or OWNER/NAME[:CONFIGURATION]
    [@REVISION] of the hub, or reasoning-gym:TASK[@SEED]; several separated by commas. Without one, the built-in arithmetic task."""
    prompt_probs: str | None = None
    """Shares of the draws of several datasets, such as 0.7,0.3, summing to 1; an epoch ends when each has been drawn whole.
    Without them, an epoch is all rows once."""
    prompt_split: str = "train"
    """Split of every dataset, or a part of one: train[:1000], train[10%:20%], test[-500:]. A file alone is its own train."""
    input_key: str = "input"
    """Column of the prompt: a string, or a list of chat messages. Where no row has an `input`, the one of the layout the rows
    have: `prompt` (TRL, verl), `messages`, `question` (GSM8K) or `problem` (MATH)."""
    label_key: str | None = None
    """Column handed to the reward function as the label, or a path into one: reward_model.ground_truth. The layouts of
    verl, GSM8K and MATH have theirs without asking. TRL's and verl's reward functions get the other columns by name."""
    image_key: str | None = "images"
    """Column of a prompt's images: paths, data URIs or bytes, one for each "<image>" or image part; rows need not have any."""
    input_template: str | None = None
    """Text with one {} that a string prompt is put into; other braces stand for themselves."""
    apply_chat_template: bool = False
    """Render prompts with the tokenizer's chat template; a string becomes one user message."""
    tokenizer_chat_template: str | None = None
    """Template in place of the tokenizer's: a file of Jinja, or one of chatml, llama3, gemma. Needs apply_chat_template."""
    chat_template_kwargs: str | None = None
    """What the template is given by name, a JSON object: {"enable_thinking": false}. Needs apply_chat_template."""
    max_len: Annotated[int, Range(low=2)] = 2048
    """Longest prompt and response together [tokens]."""
    max_samples: Annotated[int, Range(low=1)] = 100_000_000
    """Rows used of each dataset, from the start of its split."""
