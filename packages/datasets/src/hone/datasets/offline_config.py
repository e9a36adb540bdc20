"""Settings of labelled data, one dataclass for each kind of program; columns without a name are found by those that are usual."""

from dataclasses import dataclass
from typing import Annotated

from hone.algos.ranges import Range


@dataclass(frozen=True, kw_only=True)
class LabelledData:
    """What every kind of labelled data has."""

    dataset: str | None = None
    """A file (JSON lines, JSON, CSV, Parquet, Arrow), a saved dataset, a folder of files, or OWNER/NAME[:CONFIGURATION][@REVISION] of
    the hub; several separated by commas. Without one, rows of the built-in arithmetic task."""
    dataset_probs: str | None = None
    """Shares of the draws of several datasets, such as 0.7,0.3, summing to 1; an epoch ends when each has been drawn whole.
    Without them, an epoch is all rows once."""
    dataset_split: str = "train"
    """Split of every dataset, or a part of one: train[:1000], train[10%:20%], test[-500:]. A file alone is its own train."""
    input_template: str | None = None
    """Text with one {} that a string prompt is put into; other braces stand for themselves."""
    apply_chat_template: bool = False
    """Render prompts and answers with the tokenizer's chat template; a string prompt becomes one user message."""
    tokenizer_chat_template: str | None = None
    """Template in place of the tokenizer's: a file of Jinja, or one of chatml, llama3, gemma. Needs apply_chat_template."""
    chat_template_kwargs: str | None = None
    """What the template is given by name, a JSON object: {"enable_thinking": false}. Needs apply_chat_template."""
    max_len: Annotated[int, Range(low=2)] = 2048
    """Longest row [tokens]; an answer that does not fit is cut, and then has no end token to learn."""
    max_samples: Annotated[int, Range(low=1)] = 100_000_000
    """Rows used of each dataset, from the start of its split."""


@dataclass(frozen=True, kw_only=True)
class DemonstrationData(LabelledData):
    """Demonstrations: a prompt and its answer, or a conversation."""

    input_key: str | None = None
    """Column of the prompt (a string, or messages) or of the conversation; without it: messages, conversations, prompt, question, ..."""
    output_key: str | None = None
    """Column of the answer (a string, or messages); without it: completion, response, output, answer, ..."""


@dataclass(frozen=True, kw_only=True)
class SFTData(DemonstrationData):
    """Demonstrations, or documents."""

    pretrain_mode: bool = False
    """Documents (`data.input_key`, else text) as they stand: every token is trained on, documents fill rows of `data.max_len` together."""


@dataclass(frozen=True, kw_only=True)
class PairData(LabelledData):
    """Two answers to each prompt, one preferred."""

    prompt_key: str | None = None
    """Column of the prompt; without it prompt, question, ..., and where there is none, what both answers begin with."""
    chosen_key: str = "chosen"
    """Column of the preferred answer: a string, or messages."""
    rejected_key: str = "rejected"
    """Column of the other answer."""


@dataclass(frozen=True, kw_only=True)
class MarginPairData(PairData):
    """Two answers to each prompt, one preferred, and by how much."""

    margin_key: str | None = None
    """Column of how much better the chosen answer is [reward]; without it margin, where there is one."""


@dataclass(frozen=True, kw_only=True)
class JudgedData(DemonstrationData):
    """Answers judged good or bad, one by one."""

    label_key: str = "label"
    """Column that says whether the answer is good: true or false, 1 or 0."""


@dataclass(frozen=True, kw_only=True)
class StepData(LabelledData):
    """Solutions whose steps are judged."""

    input_key: str | None = None
    """Column of the prompt, where steps are a list, or of the whole text, where a token marks their ends; else prompt, question, input."""
    steps_key: str | None = None
    """Column of the list of steps; without it completions or steps."""
    label_key: str | None = None
    """Column of the labels, one a step: true or false, the share of good in [0, 1], or a reward token; without it labels or label."""
    placeholder_token: str | None = None
    """Text that ends each step within the input, one token of the tokenizer; without it, steps are a list."""
    reward_tokens: str | None = None
    """Two tokens with a comma between, good and bad, that a language model is to say where a step ends; without it, a classifier."""
    step_separator: str = "\n"
    """Text put behind each step of a list; its last token is where the step is judged."""
