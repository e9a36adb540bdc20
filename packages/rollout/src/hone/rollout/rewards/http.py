"""Rewards over HTTP, with OpenRLHF's contract: POST {"query", "prompts", "labels"} -> {"rewards", "scores"?, "extra_logs"?}.

Responses -> requests of some rows -> the server with the fewest requests in flight -> judgements, checked one by one.
Connections are kept. A request is repeated, with growing random pauses, only when the server is away (transport errors,
timeouts) or says it is overloaded or broken (408, 429, 5xx), and only until its deadline; then the run ends, and no reward
is ever invented. One thread with an event loop of its own, so that the caller's loop may come and go.
"""

import asyncio
import json
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from hone.rollout.errors import RewardError
from hone.rollout.rewards.address import check_url, shown_url
from hone.rollout.rewards.resolver import CheckedResolver
from hone.rollout.rewards.result import Judgement, RewardItem, checked, refused

TOKEN = "HONE_REWARD_TOKEN"
"""Environment variable with the bearer token of the reward servers."""

LARGEST_ANSWER = 16 * 2**20
"""A longer answer is cut off and refused [bytes]."""

# A server that nobody ever reached is more likely misspelt than away for a while: it is given this long to be there [s]. One that
# is there and slow, or still loading its model, has all the time of a request.
_FIRST_CONTACT_S = 10.0
_CONNECT_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 15.0
_OVERLOADED = frozenset({408, 429})
_HINTS = {
    401: f"set {TOKEN} in the environment to the server's token",
    403: f"set {TOKEN} in the environment to a token that may judge",
    404: "check the path: OpenRLHF's servers listen at /get_reward",
    405: "check the path: the server must take POST there, as OpenRLHF's do at /get_reward",
    413: "lower --reward.rows-per-request",
    422: 'the server must take {"query": [...], "prompts": [...], "labels": [...]}',
}


class _Again(Exception):
    """An attempt failed in a way that another may not; `after_s` is the pause the server asked for, `reached` False where no
    connection was made, and `mend` what helps beside a server that runs.
    """

    def __init__(self, what: str, after_s: float | None = None, *, reached: bool = True, mend: str = "raise --reward.retry-s") -> None:
        super().__init__(what)
        self.after_s, self.reached, self.mend = after_s, reached, mend


@dataclass(kw_only=True)
class _Server:
    """One URL: `resting_until` (monotonic seconds) keeps others ahead of it after a failure."""

    url: str
    shown: str
    gate: asyncio.Semaphore
    in_flight: int = 0
    resting_until: float = 0.0
    reached: bool = False


@dataclass(kw_only=True)
class Counts:
    """What the client has done so far."""

    requests: int = 0
    retries: int = 0
    connections: int = 0


@dataclass(kw_only=True)
class HttpReward:
    """A judge that asks reward servers; `urls` share the load.

    `timeout_s` bounds one attempt and `retry_s` a request with all its attempts [s]; `rows_per_request` responses go
    together, `max_in_flight` requests to each server at a time. Raises RewardError for URLs that are refused.
    """

    urls: Sequence[str]
    timeout_s: float
    retry_s: float
    rows_per_request: int = 16
    max_in_flight: int = 64
    allowed_hosts: str | None = None
    lookup: Any = None
    counts: Counts = field(default_factory=Counts, init=False)

    def __post_init__(self) -> None:
        parts = [check_url(url, allowed_hosts=self.allowed_hosts) for url in self.urls]
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", **_bearer()}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward-http", daemon=True)
        self._thread.start()
        self._session = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        self._servers = [
            _Server(url=url, shown=shown_url(part), gate=asyncio.Semaphore(self.max_in_flight))
            for url, part in zip(self.urls, parts, strict=True)
        ]
        self._closed = False

    async def judge(self, items: Sequence[RewardItem]) -> list[Judgement]:
        """The judgements, in the order of `items`; the first failure is raised as RewardError and cancels the rest."""
        if self._closed:
            raise RewardError("the reward client is closed; it judges nothing more")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._judge(list(items)), self._loop))

    def close(self) -> None:
        """Cancel what is under way and close the connections. May be called twice."""
        if not self._closed:
            self._closed = True
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _open(self) -> aiohttp.ClientSession:
        async def connected(*_: object) -> None:
            self.counts.connections += 1

        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(connected)
        resolver = CheckedResolver(allowed_hosts=self.allowed_hosts, lookup=self.lookup)
        connector = aiohttp.TCPConnector(limit=0, limit_per_host=0, resolver=resolver, ttl_dns_cache=30, keepalive_timeout=60)
        limits = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
        return aiohttp.ClientSession(
            connector=connector, timeout=limits, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False, trace_configs=[trace]
        )

    async def _end(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._session.close()

    async def _judge(self, items: list[RewardItem]) -> list[Judgement]:
        parts = [items[start : start + self.rows_per_request] for start in range(0, len(items), self.rows_per_request)]
        tasks = [asyncio.ensure_future(self._request(part)) for part in parts]
        try:
            return [judgement for part in await asyncio.gather(*tasks) for judgement in part]
        finally:
            for task in tasks:
                task.cancel()

    async def _request(self, items: list[RewardItem]) -> list[Judgement]:
        body = _body(items)
        # The same for every attempt, so that a server can tell a repetition.
        request_id = uuid.uuid4().hex
        begun: float | None = None
        attempt = 0
        while True:
            server = min(self._servers, key=lambda one: (one.resting_until > time.monotonic(), one.in_flight))
            server.in_flight += 1
            try:
                async with server.gate:
                    # Waiting for its turn is not the server's fault: the clock starts with the first attempt.
                    begun = time.monotonic() if begun is None else begun
                    allowed_s = max(min(self.timeout_s, begun + self.retry_s - time.monotonic()), 0.05)
                    answer = await self._attempt(server, body, request_id, allowed_s)
                return judgements(answer, items, server=server.shown)
            except _Again as failure:
                attempt += 1
                server.reached |= failure.reached
                pause_s = self._pause_s(server, attempt, failure)
                strange = not any(one.reached for one in self._servers)
                if time.monotonic() + pause_s >= (begun or 0.0) + (min(self.retry_s, _FIRST_CONTACT_S) if strange else self.retry_s):
                    mend = "check its URL, and start it before the run" if strange else failure.mend
                    raise RewardError(
                        f"reward server {server.shown} {failure} for prompt {items[0].prompt_id!r}; {attempt} attempts in "
                        f"{time.monotonic() - (begun or 0.0):.1f} s. See that it runs and answers, or {mend}; "
                        "a reward that fails stops the run, it is never counted as zero"
                    ) from failure
                self.counts.retries += 1
            finally:
                server.in_flight -= 1
            await asyncio.sleep(pause_s)

    def _pause_s(self, server: _Server, attempt: int, failure: _Again) -> float:
        """Seconds until the next attempt: growing, random so that many requests do not come back at once; 0 if another server is well."""
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(attempt - 1, 10)) * random.uniform(0.5, 1.0)
        pause_s = max(pause_s, failure.after_s or 0.0)
        now = time.monotonic()
        server.resting_until = now + pause_s
        return 0.0 if any(one.resting_until <= now for one in self._servers) else pause_s

    async def _attempt(self, server: _Server, body: bytes, request_id: str, timeout_s: float) -> object:
        """The JSON one server answered; _Again where another attempt may do better, RewardError where none would."""
        try:
            async with asyncio.timeout(timeout_s):
                self.counts.requests += 1
                headers = {**self._headers, "X-Request-Id": request_id}
                async with self._session.post(server.url, data=body, headers=headers, allow_redirects=False) as response:
                    server.reached = True
                    return await self._read(server, response)
        except aiohttp.ConnectionTimeoutError as error:  # a TimeoutError, too
            raise _Again(f"could not be reached (no connection within {_CONNECT_S:g} s)", reached=False) from error
        except TimeoutError as error:
            raise _Again(f"did not answer within {timeout_s:.3g} s", mend="raise --reward.timeout-s and --reward.retry-s") from error
        except aiohttp.ClientConnectorError as error:
            number = error.os_error.errno
            reason = os.strerror(number) if number and number > 0 else _excerpt(str(error.os_error))
            raise _Again(f"could not be reached ({reason})", reached=False) from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError) as error:
            reason = _excerpt(f"{type(error).__name__}: {error}")
            raise _Again(f"could not be reached ({reason})") from error
        except aiohttp.ClientError as error:
            raise RewardError(
                f"reward server {server.shown} does not speak HTTP: {type(error).__name__}: {_excerpt(str(error))}"
            ) from error

    async def _read(self, server: _Server, response: aiohttp.ClientResponse) -> object:
        content = bytearray()
        async for chunk in response.content.iter_chunked(1 << 16):
            content += chunk
            if len(content) > LARGEST_ANSWER:
                response.close()
                raise RewardError(f"reward server {server.shown} answers with more than {LARGEST_ANSWER // 2**20} MiB; send rewards only")
        status, text = response.status, self._without_token(content.decode("utf-8", "replace"))
        if status in _OVERLOADED or status >= 500:
            raise _Again(f"answered {status} ({_excerpt(text)})", _retry_after(response.headers.get("Retry-After")))
        if 300 <= status < 400:
            to = shown_url(urlsplit(response.headers.get("Location", "")))
            raise RewardError(
                f"reward server {server.shown} redirects ({status}) to {_excerpt(to)}; redirects are not followed, give that URL"
            )
        if status != 200:
            hint = _HINTS.get(status, "see the server's log")
            raise RewardError(f"reward server {server.shown} answered {status} ({_excerpt(text)}); {hint}")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            kind = "a web page" if re.match(r"\s*<(!doctype|html)", text, re.IGNORECASE) else "no JSON"
            what = f"reward server {server.shown} answered with {kind} ({_excerpt(text)})"
            raise RewardError(f'{what}; expected {{"rewards": [...]}}: check the URL\'s path') from error
        return found

    def _without_token(self, text: str) -> str:
        token = self._headers.get("Authorization", "").removeprefix("Bearer ")
        return text.replace(token, "***") if token else text


def judgements(answer: object, items: Sequence[RewardItem], *, server: str) -> list[Judgement]:
    """The judgements in a server's answer, one for each of `items`; RewardError where it holds none, too few or too many."""
    name = f"at {server}"

    def column(values: object, key: str) -> list[object]:
        if isinstance(values, list) and len(values) == len(items):
            return values
        if len(items) == 1 and not isinstance(values, list):
            return [values]
        what = f"{len(values)} values in {key}" if isinstance(values, list) else f"{_excerpt(repr(values))} in {key}"
        expected = f"a list of {len(items)}, one for each query (or set --reward.rows-per-request 1)"
        raise refused(name, what, prompt_id=items[0].prompt_id, expected=expected)

    if not isinstance(answer, Mapping) or "rewards" not in answer:
        expected = '{"rewards": [...], "scores": [...] (optional), "extra_logs": {name: [...]} (optional)}'
        raise refused(name, _excerpt(json.dumps(answer)), prompt_id=items[0].prompt_id, expected=expected)
    rewards = column(answer["rewards"], '"rewards"')
    scores = [None] * len(items) if answer.get("scores") is None else column(answer["scores"], '"scores"')
    logs = answer.get("extra_logs") or {}
    if not isinstance(logs, Mapping):
        raise refused(name, f'{_excerpt(repr(logs))} in "extra_logs"', prompt_id=items[0].prompt_id, expected="an object of lists by name")
    figures = {str(key): column(values, f'"extra_logs" under {key!r}') for key, values in logs.items()}
    return [
        checked(
            {"rewards": rewards[row], "scores": scores[row], "extra_logs": {key: values[row] for key, values in figures.items()}},
            function=name,
            prompt_id=item.prompt_id,
        )
        for row, item in enumerate(items)
    ]


def _body(items: Sequence[RewardItem]) -> bytes:
    rows = {
        "query": [item.query for item in items],
        "prompts": [item.prompt for item in items],
        "labels": [item.label for item in items],
    }
    try:
        return json.dumps(rows).encode()
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"the label of prompt {items[0].prompt_id!r} or one after it cannot be sent as JSON: {error}; mend the rows"
        ) from error


def _bearer() -> dict[str, str]:
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        return {}
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise RewardError(f"{TOKEN} holds characters no bearer token has (spaces, line breaks or beyond ASCII); set it again")
    return {"Authorization": f"Bearer {token}"}


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None where it is neither."""
    if value is None:
        return None
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value.strip()):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _excerpt(text: str, length: int = 200) -> str:
    kept = "".join(character if character.isprintable() else " " for character in text[: 4 * length])
    kept = " ".join(kept.split())
    return (kept if len(kept) <= length else f"{kept[:length]}...") or "nothing"
