"""The first stage of an iteration: its prompts, and the responses of the policy to them, in generated.jsonl.

The stages go from files to files: prompts -> generated.jsonl -> scored.jsonl (`judging.py`) -> train.jsonl -> a model (`training.py`).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from hone.datasets.errors import DataError
from hone.datasets.together import ids_of
from hone.launch.answering import Asked, answer, model_of, samples_of
from hone.launch.interrupt import Interrupt
from hone.launch.loop_config import ConditionalSFTConfig, LoopConfig
from hone.launch.loops.condition import filled
from hone.launch.observe.bar import bar
from hone.launch.observe.files import replaced
from hone.launch.plan import vocabulary
from hone.launch.programs.generate import rows as plain_rows
from hone.launch.prompts import prepare
from hone.launch.responses import opened
from hone.rollout.executor import Group
from hone.rollout.types import Prompt

GENERATED, SCORED, ROWS = "generated.jsonl", "scored.jsonl", "train.jsonl"


@dataclass(frozen=True, kw_only=True)
class Work:
    """An iteration: its number from 1, the model that answers, its directory, and the reward asked for, where prompts tell one."""

    config: LoopConfig
    iteration: int
    model: str
    directory: Path
    condition: float | None = None


def asked(work: Work) -> Asked:
    """The iteration's prompts as the policy reads them. Raises DataError, TokenizerError and ModelError."""
    config = work.config
    generating = config.generating(work.model)
    model = model_of(generating, Console(highlight=False))
    shared: dict[str, Any] = {"model": model, "seed": config.train.seed, "max_new_tokens": config.rollout.max_new_tokens}
    data = prepare(config.data, batch_size=config.rollout.batch_size, num_episodes=1, **shared)
    size = min(config.rollout.batch_size, data.rows)
    # One more for the rows that are passed over as they are drawn.
    episodes = -(-work.iteration * size // data.rows) + 1
    data = prepare(config.data, batch_size=size, num_episodes=episodes, **shared)
    vocabulary({"policy": model}, data.tokenizer)
    steps = data.steps()
    drawn = [next(steps) for _ in range(work.iteration)][-1]
    left_out = (*data.dropped, *((row.uid, row.reason) for row in data.stream.passed_over))
    return Asked(model=model, data=data, prompts=tuple(drawn), left_out=left_out)


def conditioned(work: Work, asked: Asked) -> Asked:
    """The prompts with the reward that is asked for, where one is."""
    if work.condition is None:
        return asked
    told = Conditioner(work.config, asked)
    prompts: list[Prompt] = []
    for prompt in asked.prompts:
        text, ids = told(prompt.text, work.condition)
        prompts.append(replace(prompt, text=text, tokens=tuple(ids)))
    return replace(asked, prompts=tuple(prompts))


class Conditioner:
    """Puts a reward into rendered prompts and tokenises them as prompts are. Raises DataError for what cannot be read or is too long."""

    def __init__(self, config: LoopConfig, asked: Asked) -> None:
        assert isinstance(config, ConditionalSFTConfig), "only one of the loops tells rewards"
        self._template, self._data = config.condition.template, config.data
        self._tokenizer, self._room = asked.data.tokenizer, config.data.max_len - config.rollout.max_new_tokens

    def __call__(self, prompt: str, reward: float) -> tuple[str, list[int]]:
        """The text that is learnt or asked, and its ids."""
        text = filled(self._template, prompt, reward)
        (ids,) = ids_of([text], self._tokenizer, special=not self._data.apply_chat_template)
        unknown = self._tokenizer.unk_token_id
        if unknown is not None and unknown in ids:
            raise DataError(f"--condition.template gives {text!r}, which has characters outside the model's vocabulary; use others")
        if len(ids) > self._room:
            raise DataError(
                f"a prompt has {len(ids)} tokens with its reward, and --data.max-len {self._data.max_len} leaves {self._room}; raise it"
            )
        return text, ids


def generate(work: Work) -> None:
    """The responses to the iteration's prompts, written as they come; what an earlier attempt has written is gone on with."""
    config = work.config.generating(work.model, str(work.directory / GENERATED))
    plain = asked(work)
    everything = conditioned(work, plain)
    texts = {prompt.prompt_id: prompt.text for prompt in plain.prompts}
    n, prompts = work.config.rollout.n_samples_per_prompt, everything.prompts
    with opened(work.directory / GENERATED, config, [prompt.prompt_id for prompt in prompts], rows_per_prompt=n) as file:
        if file.done == len(prompts):
            return
        with Interrupt(lambda text: None), bar(unit="prompts", total=len(prompts), done=file.done) as progress:
            answer(
                config,
                everything,
                prompts[file.done :],
                n=n,
                judged=False,
                bar=progress,
                on_group=lambda group: file.append(_rows(group, everything, texts)),
            )


def _rows(group: Group, everything: Asked, texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows as `launch generate` writes them, with the ids that were sampled and the response's text as it was, special tokens included."""
    rows = plain_rows(group, everything.data.tokenizer, best_of=None, judged=False)
    for row, sample in zip(rows, samples_of(group), strict=True):
        trajectory = sample.trajectory
        plain = texts[group.prompt.prompt_id]
        row |= {"prompt": plain, "sampled": sample.response_text, **({} if plain == sample.prompt_text else {"asked": sample.prompt_text})}
        row |= {"prompt_ids": list(group.prompt.tokens), "response_ids": trajectory.tokens[trajectory.action_mask].tolist()}
    return rows


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A whole file of JSON lines, or none."""
    with replaced(path) as file:
        for row in rows:
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
