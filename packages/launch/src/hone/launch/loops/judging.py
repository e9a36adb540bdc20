"""The second stage of an iteration: every response with its reward, by a function, a server or a reward model, in scored.jsonl."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from hone.launch.answering import judge_of
from hone.launch.interrupt import Interrupt
from hone.launch.loops import select
from hone.launch.loops.stages import GENERATED, SCORED, Work, asked, read, write
from hone.launch.observe.bar import bar
from hone.rollout.rewards import judges
from hone.rollout.rewards.result import RewardItem
from hone.rollout.types import Prompt

ITEMS_PER_CALL = 256
"""Responses that the judge is asked for at a time; progress is told after each such call."""


def score(work: Work) -> dict[str, Any]:
    """Judge every response; what they earned. Judges read the prompt as the data has it. Raises RewardError and ModelError."""
    known = {prompt.prompt_id: prompt for prompt in asked(work).prompts}
    rows = read(work.directory / GENERATED)
    scored: list[dict[str, Any]] = []
    with Interrupt(lambda text: None), asyncio.Runner() as runner, bar(unit="responses", total=len(rows)) as progress:
        progress.say("loading the reward")
        with judging(work) as judge:
            progress.say("judging")
            for start in range(0, len(rows), ITEMS_PER_CALL):
                part = rows[start : start + ITEMS_PER_CALL]
                judgements = runner.run(judge.judge([_item(row, known[row["prompt_id"]]) for row in part]))
                scored += [{**row, "reward": one.reward, "score": one.score} for row, one in zip(part, judgements, strict=True)]
                progress.advance(len(part))
    write(work.directory / SCORED, scored)
    return select.figures(list(select.groups(scored)))


def try_out(work: Work) -> None:
    """Have a function or a server judge two short responses, before anything is generated. Raises RewardError."""
    if work.config.reward.model_name_or_path is None:
        with asyncio.Runner() as runner, judging(work) as judge:
            runner.run(judges.smoke(judge, asked(work).prompts[:2]))


@contextmanager
def judging(work: Work) -> Iterator[judges.Closable]:
    """The judge, for as long as the block runs; a reward model gives its memory back behind it."""
    reward = work.config.reward
    if reward.model_name_or_path is None:
        with judge_of(work.config.generating(work.model), judged=True, log=work.directory / "reward.log") as judge:
            yield judge
        return
    from hone.launch.scoring import RewardModel

    model = RewardModel(
        reward.model_name_or_path,
        dtype=work.config.ds.param_dtype,
        max_len=work.config.data.max_len,
        normalize=reward.normalize_enable,
        batch_size=reward.batch_size,
    )
    try:
        yield model
    finally:
        model.close()
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _item(row: Mapping[str, Any], prompt: Prompt) -> RewardItem:
    return RewardItem(
        prompt_id=prompt.prompt_id,
        query=prompt.text + row["sampled"],
        prompt=prompt.text,
        label=prompt.label,
        response=row["response"],
        columns=prompt.columns,
    )
