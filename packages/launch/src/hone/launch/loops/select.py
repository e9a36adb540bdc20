"""What an iteration learns from: scored responses, group by group, into rows for `sft` or `dpo`, with everything left out counted.

Flow: scored.jsonl -> groups (the responses to one prompt, in the order they were drawn) -> train.jsonl. Rows hold the ids that were
sampled; texts beside them are for a reader.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

Row = Mapping[str, Any]
Group = Sequence[Row]


@dataclass(kw_only=True)
class Chosen:
    """Rows to learn from, and how many groups gave none or were tied.

    `equal` groups earned the same throughout; `tied_best` and `tied_worst` had several responses with the highest (lowest) reward,
    of which the first drawn is taken; `below` had no response good enough; of `same` the best and the worst are the same response.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    equal: int = 0
    tied_best: int = 0
    tied_worst: int = 0
    below: int = 0
    same: int = 0

    def counts(self) -> dict[str, int]:
        """As figures."""
        own = {"equal": self.equal, "tied_best": self.tied_best, "tied_worst": self.tied_worst, "below": self.below, "same": self.same}
        return {"kept": len(self.rows), **own}


def groups(rows: Iterable[Row]) -> Iterator[Group]:
    """The rows of each prompt, which stand together."""
    for _, own in groupby(rows, key=lambda row: row["prompt_id"]):
        yield list(own)


def best(found: Iterable[Group], *, above: float | None) -> Chosen:
    """The best response to each prompt; of equals the first. With `above`, those alone whose reward is above it."""
    chosen = Chosen()
    for group in found:
        _count(chosen, group)
        top = _first(group, max)
        if above is not None and not top["reward"] > above:
            chosen.below += 1
            continue
        chosen.rows.append(_demonstration(top))
    return chosen


def pairs(found: Iterable[Group]) -> Chosen:
    """The best and the worst response to each prompt; a prompt whose responses all earned the same gives no pair."""
    chosen = Chosen()
    for group in found:
        _count(chosen, group)
        top, bottom = _first(group, max), _first(group, min)
        if top["reward"] == bottom["reward"]:
            continue
        if top["response_ids"] == bottom["response_ids"]:  # a reward that is not the same for the same response
            chosen.same += 1
            continue
        chosen.rows.append(
            {
                "prompt_id": top["prompt_id"],
                "prompt": top["prompt"],
                "chosen": top["response"],
                "rejected": bottom["response"],
                "chosen_reward": top["reward"],
                "rejected_reward": bottom["reward"],
                "prompt_ids": top["prompt_ids"],
                "chosen_ids": top["response_ids"],
                "rejected_ids": bottom["response_ids"],
            }
        )
    return chosen


def conditioned(found: Iterable[Group], *, normalize: bool, condition: Callable[[str, float], tuple[str, list[int]]]) -> Chosen:
    """Every response under its prompt with its reward in it; `condition(prompt, reward)` gives that prompt's text and ids.

    With `normalize`, rewards are z = (r - mean) / deviation over all responses, the deviation with n - 1; 0 where all are equal.
    """
    chosen, every = Chosen(), [list(group) for group in found]
    rewards = [row["reward"] for group in every for row in group]
    mean, deviation = 0.0, 1.0
    if normalize:
        mean = math.fsum(rewards) / len(rewards)
        deviation = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
    for group in every:
        _count(chosen, group)
        for row in group:
            told = (row["reward"] - mean) / deviation if deviation else 0.0
            text, ids = condition(row["prompt"], told)
            chosen.rows.append({**_demonstration(row), "condition": told, "prompt": text, "prompt_ids": ids})
    return chosen


def figures(found: Sequence[Group]) -> dict[str, float | int]:
    """What the responses of an iteration earned, whatever is learnt from: means over responses, `reward_best` over prompts."""
    rows = [row for group in found for row in group]
    rewards = [float(row["reward"]) for row in rows]
    return {
        "prompts": len(found),
        "samples": len(rows),
        "reward_mean": math.fsum(rewards) / len(rewards),
        "reward_std": statistics.stdev(rewards) if len(rewards) > 1 else 0.0,
        "reward_best": math.fsum(max(float(row["reward"]) for row in group) for group in found) / len(found),
        "length_mean": sum(row["length"] for row in rows) / len(rows),
        "truncated": sum(bool(row["truncated"]) for row in rows) / len(rows),
    }


def _count(chosen: Chosen, group: Group) -> None:
    """Groups of equals, and ties at either end of the others."""
    rewards = [row["reward"] for row in group]
    top, bottom = max(rewards), min(rewards)
    if top == bottom:
        chosen.equal += 1
        return
    chosen.tied_best += rewards.count(top) > 1
    chosen.tied_worst += rewards.count(bottom) > 1


def _first(group: Group, which: Callable[[Iterable[float]], float]) -> Row:
    rewards = [row["reward"] for row in group]
    return group[rewards.index(which(rewards))]


def _demonstration(row: Row) -> dict[str, Any]:
    return {
        "prompt_id": row["prompt_id"],
        "sample": row["sample"],
        "prompt": row["prompt"],
        "completion": row["response"],
        "reward": row["reward"],
        "prompt_ids": row["prompt_ids"],
        "completion_ids": row["response_ids"],
    }
