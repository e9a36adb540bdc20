"""What an evaluation measures: pass@k of every prompt, averaged over all of them and over each data source."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A prompt's figures: its data source ("" for none), and reward, length [tokens] and cut or not of each response."""

    source: str
    rewards: tuple[float, ...]
    tokens: tuple[int, ...]
    truncated: tuple[bool, ...]


def ks(asked: str | None, n: int) -> list[int]:
    """Each k of pass@k with `n` samples; ValueError says what is wrong with what was asked, and how to mend it."""
    if asked is None:
        return sorted({2**power for power in range(n.bit_length()) if 2**power <= n} | {n})
    words = [word.strip() for word in asked.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise ValueError(f"eval.k {asked} are not numbers from 1 with commas between; write for example --eval.k 1,4")
    found = sorted({int(word) for word in words})
    if found[-1] > n:
        mend = f"--rollout.n-samples-per-prompt {found[-1]} (and a temperature above 0), or a smaller --eval.k"
        raise ValueError(f"pass@{found[-1]} needs {found[-1]} samples of a prompt, and {n} are drawn; {mend}")
    return found


def figures(answered: Sequence[Answered], *, above: float, k: Sequence[int]) -> dict[str, Any]:
    """Over `answered` prompts: pass@k for each k with its standard error over prompts, mean reward, lengths and cuts.

    The estimator is `hone.algos.group_baselines.pass_at_k`; the error is the deviation of the prompts' values by the root of
    their number, 0 for one prompt.
    """
    import torch

    from hone.algos.group_baselines import pass_at_k

    correct = torch.tensor([sum(reward > above for reward in one.rewards) for one in answered])
    samples = torch.tensor([len(one.rewards) for one in answered])
    total = int(samples.sum())
    passed: dict[str, float] = {}
    for each in k:
        values = pass_at_k(correct, samples, k=each).double()
        passed[f"pass@{each}"] = float(values.mean())
        passed[f"pass@{each}_stderr"] = float(values.std() / math.sqrt(len(answered))) if len(answered) > 1 else 0.0
    return {
        "prompts": len(answered),
        "samples": total,
        **passed,
        "reward_mean": math.fsum(reward for one in answered for reward in one.rewards) / total,
        "tokens_mean": sum(sum(one.tokens) for one in answered) / total,
        "truncated_share": sum(sum(one.truncated) for one in answered) / total,
    }


def report(answered: Sequence[Answered], *, above: float, k: Sequence[int]) -> dict[str, Any]:
    """The figures of the whole, and of each data source in the order of their first prompts."""
    sources = dict.fromkeys(one.source for one in answered if one.source)
    own = {source: figures([one for one in answered if one.source == source], above=above, k=k) for source in sources}
    return {"whole": figures(answered, above=above, k=k), "sources": own}
