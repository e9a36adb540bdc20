"""The run's prompts: from the configuration to what the loop draws, with the tokenizer the model comes with."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hone.algos.batch import Attachment
from hone.datasets.config import DataConfig
from hone.datasets.records import PromptRecord
from hone.datasets.schemas import load_prompts, prompt_rows
from hone.datasets.stream import PromptStream, StreamState
from hone.datasets.tasks import arithmetic
from hone.datasets.tokenise import tokenise
from hone.datasets.tokenizer import load_processor, load_tokenizer, template_hash, tokenizer_hash
from hone.rollout.types import Prompt

if TYPE_CHECKING:
    import transformers

BUILTIN_ROWS = 10_000
"""Rows of the built-in task; there are 90 different sums, and a short run ends long before."""


@dataclass(frozen=True, kw_only=True)
class PromptData:
    """Prompts ready to be drawn, what was dropped on the way (id and reason), and how they were rendered.

    `first` are a few of them, not drawn: for the reward to be tried out on. `with_images` is one that has images, if there is any.
    """

    name: str
    stream: PromptStream
    rows: int
    dropped: tuple[tuple[str, str], ...]
    tokenizer: "transformers.PreTrainedTokenizerBase"
    tokenizer_hash: str
    template_hash: str
    first: tuple[Prompt, ...] = ()
    with_images: Prompt | None = None

    def steps(self) -> Iterator[list[Prompt]]:
        """The prompts of one step after another."""
        for draws in self.stream:
            yield [_prompt(draw.prompt_id, draw.record) for draw in draws]

    def more(self) -> Prompt | None:
        """One prompt beyond those of the step under way; None where the data has ended."""
        draws = self.stream.draw(1)
        return _prompt(draws[0].prompt_id, draws[0].record) if draws else None


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
    processor = load_processor(model) if any(row.images for row in rows.rows) else None
    prompts = tokenise(rows, tokenizer, config=config, max_new_tokens=max_new_tokens, processor=processor)
    if state is None:
        stream = PromptStream(prompts.records, batch_size=batch_size, seed=seed, num_episodes=num_episodes)
    else:
        stream = PromptStream.from_state(state, prompts.records)
    return PromptData(
        name=prompts.name,
        stream=stream,
        rows=len(prompts.records),
        dropped=tuple((row.uid, row.reason) for row in prompts.dropped),
        tokenizer=tokenizer,
        tokenizer_hash=tokenizer_hash(tokenizer),
        template_hash=template_hash(tokenizer, config=config),
        first=tuple(_prompt(record.uid, record) for record in prompts.records[:2]),
        with_images=next((_prompt(record.uid, record) for record in prompts.records if record.images), None),
    )


def _prompt(prompt_id: str, record: PromptRecord) -> Prompt:
    """A record as it is drawn, its images read now. Raises DataError for an image file that has changed since."""
    placed = zip(record.places, record.images, strict=True)
    images = tuple(Attachment(start=start, count=count, data=image.encoded()) for (start, count), image in placed)
    known = {"tokens": record.tokens, "text": record.text, "label": record.label, "given": record.given}
    return Prompt(prompt_id=prompt_id, images=images, **known)
