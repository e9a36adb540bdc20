"""The reward server's own limits, where a request must be held up to reach them."""

import asyncio
from collections.abc import Sequence

from aiohttp.test_utils import TestClient, TestServer

from hone.launch.reward_server import PATH, RewardServer
from hone.rollout.rewards.result import Judgement, RewardItem


class Held:
    """Judges when it is let."""

    def __init__(self) -> None:
        self.asked, self.let = asyncio.Event(), asyncio.Event()

    async def judge(self, items: Sequence[RewardItem]) -> list[Judgement]:
        self.asked.set()
        await self.let.wait()
        return [Judgement(reward=1.0, score=1.0, extra_logs={}) for _ in items]


async def _statuses() -> list[int]:
    judge = Held()
    server = RewardServer(judge, token="", max_rows=9, max_bytes=999, max_waiting=1)
    async with TestClient(TestServer(server.application(), host="127.0.0.1")) as client:
        first = asyncio.create_task(client.post(PATH, json={"query": ["a"]}))
        await judge.asked.wait()
        beyond = asyncio.create_task(client.post(PATH, json={"query": ["b"]}))
        done, _ = await asyncio.wait([beyond], timeout=20)  # one that is taken waits for the judge
        judge.let.set()
        after = await client.post(PATH, json={"query": ["c"]})
        return [(await first).status, (await beyond).status if done else 0, after.status]


def test_a_request_beyond_those_that_may_wait_is_sent_away_until_one_is_answered() -> None:
    assert asyncio.run(_statuses()) == [200, 503, 200]
