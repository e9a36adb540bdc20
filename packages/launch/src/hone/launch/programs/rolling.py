"""Rollout ahead of the learner as a program wants it: prompts drawn into the ledger, and a checkpoint that holds what is open."""

import math
from collections.abc import Callable, Mapping

from hone.launch.ahead import Ahead, LoopThread
from hone.launch.config import PolicyGradientConfig
from hone.launch.observe.ledger import Ledger
from hone.launch.parts import Assembly
from hone.launch.prompts import PromptData
from hone.launch.saving import OPEN, Resumed
from hone.learner.errors import CheckpointError
from hone.rollout import kept_file
from hone.rollout.buffer import Buffer, Window
from hone.rollout.filtering import Filtering
from hone.rollout.producer import Kept, Producer
from hone.rollout.types import Prompt

SAMPLES_IN_FLIGHT = 1024
"""Samples that the engines hold at a time, as in a step that is sampled by itself."""
ENDED = "the run ended before a step took it"


def window(config: PolicyGradientConfig, *, steps: int) -> Window:
    """How much may be open in a run of so many steps, and how old it may be."""
    rollout, ahead = config.rollout, config.train.async_queue_size if config.train.async_enable else 0
    # Rounded first, for 1.1 times 10 is a little more than 11.
    extra = math.ceil(round(rollout.batch_size * (rollout.over_sampling - 1), 6)) if rollout.over_sampling > 1 else 0
    staleness = ahead + (extra > 0) if rollout.max_staleness is None else rollout.max_staleness
    return Window(batch=rollout.batch_size, ahead=ahead, staleness=staleness, extra=extra, last_step=steps)


def rolling(
    config: PolicyGradientConfig,
    parts: Assembly,
    prompts: PromptData,
    ledger: Ledger,
    *,
    steps: int,
    first: int,
    row_dropped: Callable[[str, str], None],
) -> Ahead:
    """A producer over the engines of `parts`, which goes on after step `first`; `row_dropped(uid, reason)` hears of unusable rows."""
    filtering = parts.executor if isinstance(parts.executor, Filtering) else None
    told = 0

    def draw(step: int) -> Prompt | None:
        nonlocal told
        prompt = prompts.more()
        passed_over = prompts.stream.passed_over
        for row in passed_over[told:]:
            row_dropped(row.uid, row.reason)
        told = len(passed_over)
        if prompt is not None:
            ledger.issue([prompt.prompt_id], step=step)
        return prompt

    assert isinstance(parts.runner, LoopThread), "rollout ahead of the learner needs an event loop that goes on"
    rollout = config.rollout
    producer = Producer(
        executor=parts.executor if filtering is None else filtering.executor,
        buffer=Buffer(window(config, steps=steps), version=first, taken=first),
        draw=draw,
        dropped=lambda prompt_id, step, reason: ledger.drop([prompt_id], step=step, reason=reason),
        stragglers=rollout.straggler_policy,
        overlaps=config.train.async_enable,
        verdict=None if filtering is None else filtering.verdict,
        most_rejected=rollout.dynamic_filtering_batches * rollout.batch_size,
        prompts_in_flight=max(1, SAMPLES_IN_FLIGHT // rollout.n_samples_per_prompt),
    )
    return Ahead(producer=producer, runner=parts.runner, hold=parts.hold, free=parts.free)


def texts(ahead: Ahead, others: Callable[[], Mapping[str, str | bytes]]) -> dict[str, str | bytes]:
    """What goes into a checkpoint, all of one moment: what is open, and whatever else is told of draws."""

    def told(kept: Kept) -> dict[str, str | bytes]:
        return {**others(), OPEN: kept_file.to_bytes(kept)}

    return ahead.at_rest(told)


def put_back(ahead: Ahead, resumed: Resumed, prompts: PromptData) -> None:
    """What a checkpoint holds of open prompts: finished groups as they are, prompts under way to be begun anew. Raises CheckpointError."""
    if not (resumed.path / OPEN).exists():
        return
    try:
        kept = kept_file.from_bytes(resumed.text(OPEN), prompts.drawn_before)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{resumed.path / OPEN} does not say what was open ({type(error).__name__}: {error})") from error
    ahead.producer.put_back(kept)
