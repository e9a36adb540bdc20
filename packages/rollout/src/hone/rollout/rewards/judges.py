"""The judge of a run from its settings: files, built-in rewards and servers, one or several with weights, tried out at the start.

`--reward.remote-url a.py,b.py` names two rewards; all URLs of the list together are one reward, whose servers share the load.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from hone.rollout.config import RewardConfig
from hone.rollout.errors import RewardError
from hone.rollout.rewards.address import check_url
from hone.rollout.rewards.function import check_reward_file
from hone.rollout.rewards.pool import RewardPool
from hone.rollout.rewards.result import Judgement, RewardItem
from hone.rollout.types import Prompt

SMOKE = "0"
"""The response of the smoke rows."""


@runtime_checkable
class Closable(Protocol):
    """A judge that holds processes or connections."""

    async def judge(self, items: Sequence[RewardItem]) -> list[Judgement]:
        """A judgement for each item, in order; raises RewardError."""
        ...

    def close(self) -> None:
        """Give them back."""
        ...


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """Several judges asked at once; the reward is the weighted sum of those that apply, and so is the score.

    With more than one, each one's reward is logged under its name, and its extra_logs under "<name>/<key>".
    """

    judges: tuple[Closable, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...]

    async def judge(self, items: Sequence[RewardItem]) -> list[Judgement]:
        """The combined judgements, in the order of `items`; the first failure is raised and cancels the rest."""
        running = [asyncio.ensure_future(judge.judge(items)) for judge in self.judges]
        try:
            columns = await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return [self._combined(item, judgements) for item, judgements in zip(items, zip(*columns, strict=True), strict=True)]

    def close(self) -> None:
        """Close every judge, whatever happens to the others."""
        failures: list[Exception] = []
        for judge in self.judges:
            try:
                judge.close()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _combined(self, item: RewardItem, judgements: Sequence[Judgement]) -> Judgement:
        parts = [part for part in zip(self.names, self.weights, judgements, strict=True) if part[2].applies]
        if not parts:
            raise RewardError(
                f"no reward applies to prompt {item.prompt_id!r}: {', '.join(self.names)} returned None; "
                "let one of them return a number for every response"
            )
        if len(self.judges) == 1 and self.weights == (1.0,):
            return judgements[0]
        reward = sum(weight * judgement.reward for _, weight, judgement in parts)
        score = sum(weight * judgement.score for _, weight, judgement in parts)
        if len(self.judges) == 1:
            return Judgement(reward=reward, score=score, extra_logs=judgements[0].extra_logs)
        figures = {name: judgement.reward for name, _, judgement in parts}
        for name, _, judgement in parts:
            figures |= {f"{name}/{key}": value for key, value in judgement.extra_logs.items()}
        return Judgement(reward=reward, score=score, extra_logs=figures)


def sources(remote_url: str) -> list[tuple[str, ...]]:
    """The rewards named by a comma-separated list: each a file, module or built-in alone, or all URLs together.

    RewardError where the list has an empty entry or an entry twice.
    """
    entries = [entry.strip() for entry in remote_url.split(",")]
    if "" in entries:
        raise RewardError(f"reward.remote_url {remote_url!r} has an empty entry; write FILE.py or FILE.py,OTHER.py")
    if len(set(entries)) < len(entries):
        raise RewardError("reward.remote_url names a reward twice; name it once, with a weight (--reward.weights)")
    urls = tuple(entry for entry in entries if "://" in entry)
    found: list[tuple[str, ...]] = []
    for entry in entries:
        if entry not in urls:
            found.append((entry,))
        elif entry == urls[0]:
            found.append(urls)
    return found


def weights(config: RewardConfig, count: int) -> tuple[float, ...]:
    """One finite weight for each of `count` rewards; RewardError where the setting has other than that."""
    if config.weights is None:
        return (1.0,) * count
    try:
        found = tuple(float(entry) for entry in config.weights.split(","))
    except ValueError:
        found = (math.nan,)
    if not all(map(math.isfinite, found)) or not any(found):
        raise RewardError(f"reward.weights {config.weights!r} are not numbers separated by commas (not all 0); write for example 1,0.5")
    if len(found) != count:
        raise RewardError(
            f"reward.weights has {len(found)} weights for {count} rewards (all URLs together are one); "
            "give one for each of reward.remote_url"
        )
    return found


def check(config: RewardConfig) -> None:
    """RewardError unless every reward of the settings could be one, as far as that shows without running or asking any of it."""
    found = [] if config.remote_url is None else sources(config.remote_url)
    weights(config, len(found) or 1)
    for reward in found:
        for source in reward:
            if "://" in source:
                check_url(source, allowed_hosts=config.allowed_hosts)
            else:
                check_reward_file(source)


def build(config: RewardConfig, *, default: str, log: Path | None = None) -> Weighted:
    """The judge of a run, its functions loaded; `default` is the source where the settings name none. Raises RewardError."""
    found = sources(config.remote_url or default)
    factors = weights(config, len(found))
    judges: list[Closable] = []
    try:
        for reward in found:
            judges.append(_judge(reward, config, log))
    except BaseException:
        for judge in judges:
            judge.close()
        raise
    return Weighted(judges=tuple(judges), names=_names(found), weights=factors)


def _judge(reward: tuple[str, ...], config: RewardConfig, log: Path | None) -> Closable:
    if "://" in reward[0]:
        from hone.rollout.rewards.http import HttpReward  # aiohttp, which a reward in a file does not need

        return HttpReward(
            urls=reward,
            timeout_s=config.timeout_s,
            retry_s=config.retry_s,
            rows_per_request=config.rows_per_request,
            max_in_flight=config.max_in_flight,
            allowed_hosts=config.allowed_hosts,
        )
    return RewardPool(reward[0], workers=config.num_workers, timeout_s=config.timeout_s, log=log)


def _names(found: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """A short name for each reward: of its file, its function, "http" for servers; numbered where two are the same."""
    names: list[str] = []
    for reward in found:
        source = reward[0]
        base = "http" if "://" in source else source.rpartition(":")[2] if ":" in source else Path(source).stem.rpartition(".")[2]
        taken = sum(name.partition("#")[0] == base for name in names)
        names.append(f"{base}#{taken + 1}" if taken else base)
    return tuple(names)


async def smoke(judge: Closable, prompts: Sequence[Prompt]) -> None:
    """Have a short response to each of `prompts` judged before anything heavy starts; RewardError if that cannot be done."""
    items = [
        RewardItem(
            prompt_id=prompt.prompt_id,
            query=prompt.text + SMOKE,
            prompt=prompt.text,
            label=prompt.label,
            response=SMOKE,
            columns=prompt.columns,
        )
        for prompt in prompts
    ]
    try:
        await judge.judge(items)
    except RewardError as error:
        raise RewardError(f"the reward failed on the smoke rows at the start: {error}") from error
