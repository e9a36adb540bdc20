"""OpenRLHF's reward server: POST /get_reward {"query", "prompts", "labels"} -> {"rewards", "scores", "extra_logs"}.

Nothing of a request is written to a log: only how many there were.
"""

import hmac
import json
import math
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from hone.rollout.errors import RewardError
from hone.rollout.executor import Judge
from hone.rollout.rewards.result import Judgement, RewardItem

PATH = "/get_reward"


class RewardServer:
    """Answers by `judge`; `token` is asked for where it is not empty. `requests` and `rows` count what was answered."""

    def __init__(self, judge: Judge, *, token: str, max_rows: int, max_bytes: int, max_waiting: int) -> None:
        self._judge, self._token = judge, token
        self._max_rows, self._max_bytes, self._max_waiting = max_rows, max_bytes, max_waiting
        self._waiting = 0
        self.requests = self.rows = 0

    def application(self) -> web.Application:
        """The aiohttp application."""
        application = web.Application(client_max_size=self._max_bytes)
        application.router.add_post(PATH, self._get_reward)
        return application

    async def _get_reward(self, request: web.Request) -> web.Response:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if self._token and not hmac.compare_digest(given.encode(), self._token.encode()):
            return _refused(401, "a bearer token is needed, and this is not it")
        if self._waiting >= self._max_waiting:
            return _refused(503, f"{self._waiting} requests are waiting already", retry=True)
        self._waiting += 1
        try:
            return await self._answer(await request.read())
        finally:
            self._waiting -= 1

    async def _answer(self, body: bytes) -> web.Response:
        try:
            items = read(json.loads(body))
        except (ValueError, RecursionError) as error:
            return _refused(422, str(error)[:500])
        if len(items) > self._max_rows:
            return _refused(413, f"{len(items)} rows, at most {self._max_rows} in one request")
        try:
            judged = await self._judge.judge(items) if items else []
        except RewardError as error:
            return _refused(400, str(error))
        if any(not one.applies or not math.isfinite(one.reward) for one in judged):
            return _refused(400, "the reward of a row is no finite number, or the function says nothing about it")
        self.requests += 1
        self.rows += len(items)
        return web.json_response(written(judged))


def read(body: object) -> list[RewardItem]:
    """The rows of a request; ValueError says what is wrong with it. `prompts` and `labels` may be left out."""
    if not isinstance(body, dict) or "query" not in body:
        raise ValueError('expected {"query": [...], "prompts": [...], "labels": [...]}')
    queries = body["query"] if isinstance(body["query"], list) else [body["query"]]
    columns: list[list[object]] = [queries]
    for name, missing in (("prompts", ""), ("labels", None)):
        column = body.get(name)
        own: list[object] = [missing] * len(queries) if column is None else column if isinstance(column, list) else [column]
        if len(own) != len(queries):
            raise ValueError(f'{len(own)} values in "{name}" for {len(queries)} in "query"')
        columns.append(own)
    for name, column in (("query", queries), ("prompts", columns[1])):
        if not all(isinstance(one, str) for one in column):
            raise ValueError(f'a value in "{name}" is not text')
        for place, one in enumerate(column):
            if not _is_unicode(str(one)):
                raise ValueError(f'value {place} in "{name}" has half of a surrogate pair, which is no character')
    rows = zip(*columns, strict=True)
    return [
        RewardItem(prompt_id=f"row {number}", query=str(query), prompt=str(prompt), label=label)
        for number, (query, prompt, label) in enumerate(rows)
    ]


def _is_unicode(text: str) -> bool:
    """Whether every character is one: JSON may write half of a surrogate pair, which no tokenizer takes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def written(judged: Sequence[Judgement]) -> dict[str, Any]:
    """The judgements as the answer to a request; figures that every row has are among them."""
    names = [name for name in (judged[0].extra_logs if judged else ()) if all(name in one.extra_logs for one in judged)]
    return {
        "rewards": [one.reward for one in judged],
        "scores": [one.score for one in judged],
        "extra_logs": {name: [one.extra_logs[name] for one in judged] for name in names},
    }


async def listen(server: RewardServer, *, host: str, port: int) -> tuple[web.AppRunner, int]:
    """The server, listening, and its port. Raises OSError where that address cannot be had."""
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=5.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except BaseException:
        await runner.cleanup()
        raise
    return runner, int(runner.addresses[0][1])


def _refused(status: int, what: str, *, retry: bool = False) -> web.Response:
    return web.json_response({"error": what}, status=status, headers={"Retry-After": "1"} if retry else None)
