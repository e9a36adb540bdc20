"""The run's prompts: from the configuration to what the loop draws, with the tokenizer the model comes with."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hone.datasets.config import DataConfig
from hone.datasets.records import PromptRecord
from hone.datasets.schemas import load_prompts, prompt_rows
from hone.datasets.stream import PromptStream, StreamState
from hone.datasets.tasks import arithmetic
from hone.datasets.templates import use_template
from hone.datasets.tokenise import tokenise
from hone.datasets.tokenizer import load_tokenizer, template_hash, tokenizer_hash
from hone.rollout.types import Prompt

if TYPE_CHECKING:
    import transformers

BUILTIN_ROWS = 10_000
"""Rows of the built-in task; there are 90 different sums, and a short run ends long before."""

FIRST = 2
"""Prompts that a reward is tried out on."""


@dataclass(frozen=True, kw_only=True)
class PromptData:
    """Prompts ready to be drawn, what was dropped on the way (id and reason), and how they were rendered.

    `first` are a few of them, not drawn: for the reward to be tried out on.
    """

    name: str
    stream: PromptStream
    rows: int
    dropped: tuple[tuple[str, str], ...]
    tokenizer: "transformers.PreTrainedTokenizerBase"
    tokenizer_hash: str
    template_hash: str
    first: tuple[Prompt, ...] = ()

    def steps(self) -> Iterator[list[Prompt]]:
        """The prompts of one step after another."""
        for draws in self.stream:
            yield [_prompt(draw.record, draw.prompt_id) for draw in draws]


def prepare(
    config: DataConfig, *, model: str, batch_size: int, num_episodes: int, seed: int, max_new_tokens: int, state: StreamState | None = None
) -> PromptData:
    """Read, validate, render and tokenise every prompt; with `state`, go on where a run was saved.

    Raises DataError (rows, and rows that are not those of the saved run), TokenizerError (the model's tokenizer).
    """
    if config.prompt_dataset is None:
        source = arithmetic.source(seed, min(BUILTIN_ROWS, config.max_samples))
        rows = prompt_rows(source, input_key="prompt", label_key="label", chat=config.apply_chat_template)
    else:
        rows = load_prompts(config)
    tokenizer = load_tokenizer(model)
    use_template(tokenizer, config)
    hashed = tokenizer_hash(tokenizer)
    prompts = tokenise(rows, tokenizer, config=config, max_new_tokens=max_new_tokens, tokenizer_hash=hashed)
    records, shares = prompts.records, {"sizes": prompts.sizes, "weights": prompts.weights}
    if state is None:
        stream = PromptStream(records, batch_size=batch_size, seed=seed, num_episodes=num_episodes, **shares)
    else:
        stream = PromptStream.from_state(state, records, **shares)
    first = records.take(range(min(FIRST, len(records))))
    return PromptData(
        name=prompts.name,
        stream=stream,
        rows=len(prompts.records),
        dropped=tuple((row.uid, row.reason) for row in prompts.dropped),
        tokenizer=tokenizer,
        tokenizer_hash=hashed,
        template_hash=template_hash(tokenizer, config=config),
        first=tuple(_prompt(record, record.uid) for record in first if isinstance(record, PromptRecord)),
    )


def _prompt(record: PromptRecord, prompt_id: str) -> Prompt:
    return Prompt(prompt_id=prompt_id, tokens=record.tokens, text=record.text, label=record.label, columns=record.columns)
