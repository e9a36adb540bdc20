"""Many rollouts at a time, with log-normal latency: nothing is lost, and what the process holds stays in bounds.

1. 10,000 single-turn samples, 1,000 episodes of an environment and 1,000 agents over HTTP go on at once; each gets its own answers.
2. Memory grows by what the samples are, and a second round adds nothing to it; descriptors come back.
3. No HTTP timeout cuts an episode short: not a reply that takes long, nor a pause between two calls.
"""

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from hone.rollout.endpoint import server
from hone.rollout.executor import Group
from tests.rollout import loads

# Trajectory, texts and judgement of a sample, with what asyncio holds for it while it is under way [bytes].
SAMPLE = 40 * 2**10
AGENT = 400 * 2**10


def collected(executor: Any, count: int) -> tuple[list[Group], loads.Held]:
    """Two rounds of rollouts; the second round's groups, and what was held above the end of the first."""

    async def both() -> tuple[list[Group], loads.Held]:
        finished: list[str] = []
        first = await executor.collect(loads.prompts(count), step=1, on_group=lambda group: finished.append(group.prompt.prompt_id))
        assert sorted(finished) == [group.prompt.prompt_id for group in first] == [prompt.prompt_id for prompt in loads.prompts(count)]
        del first
        gc.collect()
        async with loads.watched(every_s=0.05) as held:
            groups = await executor.collect(loads.prompts(count), step=2)
        return groups, held

    return asyncio.run(both())


@pytest.mark.parametrize(
    ("make", "count", "calls", "expected"),
    [
        (loads.single_turn, 10_000, 1, lambda n: f"{n:06d}"[::-1] + "$"),
        (
            loads.multi_turn,
            1_000,
            loads.TURNS,
            # Said backwards, told between brackets, said backwards again.
            lambda n: "{1}$[{1}]{0}$[{0}]{1}$[{1}]{0}$".format(f"{n:06d}", f"{n:06d}"[::-1]),
        ),
    ],
    ids=["10000 samples", "1000 episodes"],
)
def test_nothing_is_lost_and_memory_is_bounded(make: Callable[..., Any], count: int, calls: int, expected: Callable[[int], str]) -> None:
    executor = make(together=count, median_s=0.4, longest_s=3.0)
    descriptors = psutil.Process().num_fds()
    groups, held = collected(executor, count)
    assert executor.engine.answered == 2 * count * calls and executor.engine.in_flight == 0
    assert [group.prompt.label for group in groups] == list(range(count))
    assert [group.samples[0].response_text for group in groups] == [expected(n) for n in range(count)]
    assert executor.engine.most == count, "they did not go on at once"
    assert held.memory < count * SAMPLE
    assert held.descriptors <= 4 and psutil.Process().num_fds() <= descriptors + 1


def test_a_thousand_agents_over_http_each_hear_their_own_answers() -> None:
    count, descriptors = 1_000, psutil.Process().num_fds()
    visitors = loads.Visitors()
    executor = loads.calling(visitors, agents=count, together=count, median_s=0.4, longest_s=3.0)
    groups, held = collected(executor, count)
    assert executor.engine.answered == 2 * count * loads.TURNS and executor.engine.in_flight == 0
    for n, group in enumerate(groups):
        # The last two characters of each question, twice played.
        assert visitors.heard[n] == 2 * [f"q{n}"[-2:], "t0", "t1", "t2"]
        (sample,) = group.samples
        assert sample.segments == (sample.trajectory,) and sample.extra_logs["endpoint/calls"] == loads.TURNS
        assert int(sample.trajectory.action_mask.sum()) == 3 * loads.TURNS  # two letters and the end
    assert executor.engine.most == count, "they did not go on at once"
    assert held.memory < count * AGENT
    # Two ends of a connection each, both in this process.
    assert held.descriptors <= 2 * count + 16 and psutil.Process().num_fds() <= descriptors + 1


def test_no_timeout_of_the_server_cuts_an_episode_short(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    runner = server.web.AppRunner

    def seen(*arguments: Any, **settings: Any) -> Any:
        made.append(settings)
        return runner(*arguments, **settings)

    monkeypatch.setattr(server.web, "AppRunner", seen)
    executor = loads.calling(loads.Visitors(), agents=1, median_s=0.01, longest_s=0.1)
    (group,) = asyncio.run(executor.collect(loads.prompts(1), step=1))
    assert group.samples[0].reward == 1.0
    # An agent may be busy for days between two calls, where aiohttp would hang up after an hour; nothing else there counts seconds.
    assert made == [{"handler_cancellation": True, "access_log": None, "shutdown_timeout": 1.0, "keepalive_timeout": 7 * 24 * 3600.0}]
