"""`launch generate`: responses to prompts, into a file that a stopped run goes on with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from hone.launch.answering import answer, asked, index_of, samples_of
from hone.launch.interrupt import Interrupt
from hone.launch.observe.bar import bar
from hone.launch.responses import opened
from hone.launch.using_config import GenerateConfig
from hone.rollout.executor import Group


def run(config: GenerateConfig, sources: Mapping[str, str]) -> int:
    """Write every response; returns the exit code. Raises DataError, ModelError, RewardError and EngineError."""
    console = Console(highlight=False, markup=False)
    everything = asked(config, console)
    prompts, path = everything.prompts, Path(config.out).expanduser()
    greedy = config.rollout.temperature == 0
    n = config.best_of or (1 if greedy else config.rollout.n_samples_per_prompt)
    judged = config.best_of is not None or config.reward.remote_url is not None
    for uid, reason in everything.left_out:
        console.print(f"left out: {uid} ({reason})", soft_wrap=True)
    ids = [prompt.prompt_id for prompt in prompts]
    with opened(path, config, ids, rows_per_prompt=1 if config.best_of else n) as file:
        before = file.done
        if before:
            console.print(f"{before} of {len(prompts)} prompts are in {path} already", soft_wrap=True)
        if before < len(prompts):
            with Interrupt(lambda text: None), bar(unit="prompts", total=len(prompts), done=before) as progress:
                answer(
                    config,
                    everything,
                    prompts[before:],
                    n=n,
                    judged=judged,
                    bar=progress,
                    on_group=lambda group: file.append(rows(group, everything.data.tokenizer, best_of=config.best_of, judged=judged)),
                )
        file.finish()
    written = len(prompts) * (1 if config.best_of else n)
    console.print(f"{written} responses to {len(prompts)} prompts are in {path}", soft_wrap=True)
    return 0


def rows(group: Group, tokenizer: "transformers.PreTrainedTokenizerBase", *, best_of: int | None, judged: bool) -> list[dict[str, Any]]:
    """A row for each response to a prompt, or of `best_of` responses for the one of the highest reward, the first of equals."""
    samples = list(enumerate(samples_of(group)))
    rewards = [sample.reward for _, sample in samples]
    chosen = [samples[rewards.index(max(rewards))]] if best_of else samples
    found: list[dict[str, Any]] = []
    for number, sample in chosen:
        trajectory = sample.trajectory
        ids = trajectory.tokens[trajectory.action_mask].tolist()
        row: dict[str, Any] = {
            "prompt_id": group.prompt.prompt_id,
            "index": index_of(group.prompt.prompt_id),
            "sample": number,
            "prompt": sample.prompt_text,
            # As rewards see it: without the end of sequence.
            "response": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            "label": sample.label,
            "truncated": trajectory.truncated,
            "length": len(ids),
            "seed": trajectory.contract.seed,
        }
        if judged:
            row |= {"reward": sample.reward, "score": sample.score}
        if best_of:
            row |= {"best_of": best_of, "mean_reward": sum(rewards) / len(rewards)}
        found.append(row)
    return found
