"""The run's prompts: from the configuration to what the loop draws, with the tokenizer the model comes with."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hone.algos.batch import Attachment
from hone.datasets.config import DataConfig
from hone.datasets.records import Dropped, PromptRecord
from hone.datasets.schemas import load_prompts, prompt_rows
from hone.datasets.stream import PromptStream, StreamState
from hone.datasets.tasks import arithmetic
from hone.datasets.templates import use_template
from hone.datasets.tokenise import tokenise
from hone.datasets.tokenizer import load_processor, load_tokenizer, template_hash, tokenizer_hash
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

    def drawn_before(self, prompt_ids: Collection[str]) -> dict[str, Prompt]:
        """Prompts of an earlier run that were drawn and not trained. Raises DataError for ids that were not drawn."""
        return {draw.prompt_id: _prompt(draw.prompt_id, draw.record) for draw in self.stream.drawn_before(prompt_ids)}


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
    processor = load_processor(model) if rows.with_images else None
    if processor is None or config.tokenizer_chat_template is not None:
        use_template(tokenizer, config)
    hashed = tokenizer_hash(tokenizer)
    prompts = tokenise(rows, tokenizer, config=config, max_new_tokens=max_new_tokens, tokenizer_hash=hashed, processor=processor)
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
        with_images=_with_images(records) if rows.with_images else None,
        first=tuple(_prompt(record.uid, record) for record in first if isinstance(record, PromptRecord)),
    )


def _with_images(records: Iterable[PromptRecord | Dropped]) -> Prompt | None:
    return next((_prompt(one.uid, one) for one in records if isinstance(one, PromptRecord) and one.images), None)


def _prompt(prompt_id: str, record: PromptRecord) -> Prompt:
    """A record as it is drawn, its images read now. Raises DataError for an image file that has changed since."""
    placed = zip(record.places, record.images, strict=True)
    images = tuple(Attachment(start=start, count=count, data=image.encoded()) for (start, count), image in placed)
    known = {"tokens": record.tokens, "text": record.text, "label": record.label, "given": record.given, "columns": record.columns}
    return Prompt(prompt_id=prompt_id, images=images, **known)
