"""Rewards over HTTP: what it locks, against real servers on loopback.

1. The wire is OpenRLHF's; judgements come back in the order asked; connections are kept; servers share the load.
2. 408, 429, 5xx, timeouts and broken connections are tried again, with pauses, under the same request id, until a deadline.
3. Everything else is one error at once: other 4xx, redirects (never followed), HTML, wrong shapes, too long an answer.
4. A server that is away for a while costs time, never a reward; one that is away for ever ends the run.
5. The token comes from the environment and appears in no message; hosts and addresses that are not meant are refused.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from hone.rollout.config import RewardConfig
from hone.rollout.errors import RewardError
from hone.rollout.rewards import http, judges
from hone.rollout.rewards.result import RewardItem
from hone.rollout.types import Prompt
from tests.rollout.reward_servers import Answer, Asked, Server, client, expected, failure, items, judge, scores

PROMPTS = [Prompt(prompt_id=f"ab:0:{n}", tokens=(1,), text="p", label=n) for n in range(2)]


@pytest.fixture
def server() -> Iterator[Server]:
    with closing(Server()) as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(http, "_LONGEST_PAUSE_S", 0.1)


def test_the_wire_is_openrlhfs_and_the_order_is_kept(server: Server) -> None:
    with closing(client(server.url)) as reward:
        assert judge(reward, 100) == expected(100)
        assert judge(reward, 3) == expected(3)
    first = server.asked[0]
    assert first.path == "/get_reward"
    assert set(first.rows) == {"query", "prompts", "labels"}
    assert sum(len(asked.rows["query"]) for asked in server.asked) == 103
    assert all(len(values) <= 16 for asked in server.asked for values in asked.rows.values())
    assert "Authorization" not in first.headers


def test_connections_are_kept(server: Server) -> None:
    with closing(client(server.url, rows_per_request=1, max_in_flight=4)) as reward:
        assert judge(reward, 200) == expected(200)
        assert judge(reward, 200) == expected(200)
        assert reward.counts.requests == 400
        assert reward.counts.connections <= 4


def test_requests_in_flight_are_bounded(server: Server) -> None:
    under_way, most, lock = [0], [0], threading.Lock()

    def slow(asked: Asked) -> Answer:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        time.sleep(0.02)
        with lock:
            under_way[0] -= 1
        return scores(asked)

    server.say = slow
    with closing(client(server.url, rows_per_request=1, max_in_flight=3)) as reward:
        assert judge(reward, 30) == expected(30)
    assert most[0] == 3


def test_servers_share_the_load_and_one_that_fails_is_left_alone(server: Server) -> None:
    with closing(Server()) as second, closing(client(server.url, second.url, rows_per_request=1, max_in_flight=8)) as reward:
        assert judge(reward, 64) == expected(64)
        assert min(len(server.asked), len(second.asked)) >= 16
        second.say = lambda _: (503, {"Retry-After": "30"}, b"")
        before = len(second.asked)
        started = time.monotonic()
        assert judge(reward, 64) == expected(64)
        assert judge(reward, 64) == expected(64)
        assert time.monotonic() - started < 10
        assert len(second.asked) - before <= 40


@pytest.mark.parametrize(
    "fault", [(408, {}, b""), (429, {"Retry-After": "0.01"}, b"slow down"), (500, {}, b""), (502, {}, b"<html>"), (503, {}, b""), None]
)
def test_what_may_pass_is_tried_again_under_the_same_id(server: Server, fault: Answer | None) -> None:
    left = [2]

    def say(asked: Asked) -> Answer | None:
        if left[0]:
            left[0] -= 1
            return fault
        return scores(asked)

    server.say = say
    with closing(client(server.url)) as reward:
        assert judge(reward, 4) == expected(4)
        assert reward.counts.retries == 2
    assert len({asked.headers["X-Request-Id"] for asked in server.asked}) == 1


def test_faults_at_random_change_no_reward(server: Server) -> None:
    """F14: three requests in ten meet a 500, a 503, a 429 or a broken connection."""
    seen, lock = [0], threading.Lock()

    def say(asked: Asked) -> Answer | None:
        with lock:
            seen[0] += 1
            number = seen[0]
        faults: dict[int, Answer | None] = {1: (500, {}, b""), 4: (503, {}, b""), 7: None}
        return faults[number % 10] if number % 10 in faults else scores(asked)

    server.say = say
    with closing(client(server.url, rows_per_request=1, max_in_flight=8)) as reward:
        assert judge(reward, 300) == expected(300)
        assert reward.counts.retries > 50


def test_a_server_that_hangs_is_tried_again(server: Server) -> None:
    hang, go_on = [True], threading.Event()

    def say(asked: Asked) -> Answer:
        if hang.pop() if hang else False:
            go_on.wait(20)
        return scores(asked)

    server.say = say
    with closing(client(server.url, timeout_s=0.5)) as reward:
        assert judge(reward, 2) == expected(2)
        assert reward.counts.retries == 1
    go_on.set()


def test_a_pause_that_was_asked_for_is_kept(server: Server) -> None:
    times: list[float] = []

    def say(asked: Asked) -> Answer:
        times.append(time.monotonic())
        return scores(asked) if len(times) > 1 else (429, {"Retry-After": "0.7"}, b"")

    server.say = say
    with closing(client(server.url)) as reward:
        assert judge(reward) == expected(1)
    assert times[1] - times[0] >= 0.69


def test_a_server_that_is_away_for_a_while_costs_time_and_no_reward() -> None:
    """F15: it breaks every connection for a second."""
    down = threading.Event()
    server = Server(say=lambda asked: None if down.is_set() else scores(asked))
    with closing(server), closing(client(server.url)) as reward:
        assert judge(reward) == expected(1)
        down.set()
        threading.Timer(1.0, down.clear).start()
        started = time.monotonic()
        assert judge(reward, 20) == expected(20)
        assert time.monotonic() - started >= 0.9


def test_a_server_that_is_away_for_ever_ends_the_run(server: Server) -> None:
    """F16"""
    with closing(client(server.url, retry_s=1.0)) as reward:
        assert judge(reward) == expected(1)
        server.say = lambda _: (503, {}, b"no workers left")
        with pytest.raises(RewardError, match=r"answered 503 \(no workers left\) for prompt 'ab:0:0'; \d+ attempts in .* --reward.retry-s"):
            judge(reward)


def test_nobody_at_the_url_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_FIRST_CONTACT_S", 0.5)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refused
        message = failure(f"http://127.0.0.1:{taken.getsockname()[1]}/get_reward", retry_s=1000.0)
    assert "could not be reached" in message
    assert "refused" in message.lower()
    assert "or check its URL, and start it before the run" in message and "--reward.retry-s" not in message


@pytest.mark.parametrize("first", [None, (503, {}, b"loading")], ids=["slow", "loading its model"])
def test_a_first_answer_may_take_as_long_as_any(first: Answer | None, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_FIRST_CONTACT_S", 0.1)
    begun = time.monotonic()

    def say(asked: Asked) -> Answer:
        if first is not None and time.monotonic() - begun < 0.6:
            return first
        time.sleep(0.6 if first is None else 0.0)
        return scores(asked)

    server.say = say
    with closing(client(server.url)) as reward:
        assert judge(reward) == expected(1)
        assert (reward.counts.retries == 0) == (first is None)


def test_too_slow_an_answer_names_what_bounds_it(server: Server) -> None:
    go_on = threading.Event()

    def say(asked: Asked) -> Answer:
        go_on.wait(20)
        return scores(asked)

    server.say = say
    message = failure(server.url, timeout_s=0.2, retry_s=0.5)
    assert "did not answer within" in message and "or raise --reward.timeout-s and --reward.retry-s" in message
    go_on.set()


def test_a_connection_that_is_never_made_is_told_as_one(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_FIRST_CONTACT_S", 0.1)
    monkeypatch.setattr(http, "_CONNECT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        # Connections beyond the backlog are neither taken nor refused.
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        message = failure(f"http://127.0.0.1:{full.getsockname()[1]}/get_reward", retry_s=1000.0)
        for one in waiting:
            one.close()
    assert "could not be reached (no connection within 0.2 s)" in message and "check its URL" in message


HTML = b"<!DOCTYPE html><html><body>It works!</body></html>"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {}, b"not here"), r"answered 404 \(not here\); check the path: OpenRLHF's servers listen at /get_reward"),
        ((401, {}, b""), "set HONE_REWARD_TOKEN in the environment"),
        ((413, {}, b""), "lower --reward.rows-per-request"),
        ((422, {}, b'{"detail": "query"}'), "the server must take"),
        ((418, {}, b""), "see the server's log"),
        ((302, {"Location": "http://user:pass@elsewhere/x?key=1"}, b""), r"redirects \(302\) to http://elsewhere/x; redirects are not"),
        ((200, {"Content-Type": "text/html"}, HTML), r"answered with a web page .*It works.*check the URL's path"),
        ((200, {}, b""), r"answered with no JSON \(nothing\)"),
        ((200, {}, b"[" * 100_000), "no JSON"),
        ((200, {}, b"[1.0]"), r"returned \[1.0\] for prompt"),
        ((200, {}, b'{"reward": [1]}'), r'returned {"reward": \[1\]}'),
        ((200, {}, b'{"rewards": [1]}'), r'returned 1 values in "rewards" .* expected a list of 2, .*--reward.rows-per-request 1'),
        ((200, {}, b'{"rewards": 1}'), r'returned 1 in "rewards"'),
        ((200, {}, b'{"rewards": [1, NaN]}'), r"returned nan in \"rewards\" for prompt 'ab:0:1'"),
        ((200, {}, b'{"rewards": [1, null]}'), r"returned None \(NoneType\) in \"rewards\" for prompt 'ab:0:1'"),
        ((200, {}, b'{"rewards": [1, "2"]}'), r"\(str\)"),
        ((200, {}, b'{"rewards": [1, 2], "scores": [1]}'), '1 values in "scores"'),
        ((200, {}, b'{"rewards": [1, 2], "extra_logs": {"a": [1]}}'), "1 values in \"extra_logs\" under 'a'"),
        ((200, {}, b'{"rewards": [1, 2], "extra_logs": [1]}'), 'in "extra_logs"'),
    ],
)
def test_what_will_not_pass_is_one_error_at_once(server: Server, answer: Answer, message: str) -> None:
    server.say = lambda _: answer
    found = failure(server.url, 2)
    assert pytest.raises(RewardError, match=message).matches(RewardError(found)), found
    assert "127.0.0.1" in found
    assert "user:pass" not in found
    assert len(server.asked) == 1


def test_a_redirect_is_not_followed(server: Server) -> None:
    with closing(Server()) as inner:
        server.say = lambda _: (307, {"Location": inner.url}, b"")
        failure(server.url)
        assert inner.asked == []


def test_too_long_an_answer_is_cut(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LARGEST_ANSWER", 1 << 20)
    server.say = lambda _: (200, {}, b" " * (1 << 21))
    assert "more than 1 MiB" in failure(server.url)


def test_a_label_that_json_lacks_is_named(server: Server) -> None:
    with closing(client(server.url)) as reward, pytest.raises(RewardError, match=r"label of prompt 'x' .* cannot be sent as JSON"):
        asyncio.run(reward.judge([RewardItem(prompt_id="x", query="q", prompt="", label={1, 2})]))
    assert server.asked == []


def test_the_token_is_sent_and_never_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HONE_REWARD_TOKEN", "sentinel-4711")
    server.say = lambda asked: (400, {}, f"bad {asked.headers['Authorization']}".encode())
    message = failure(server.url)
    assert server.asked[0].headers["Authorization"] == "Bearer sentinel-4711"
    assert "bad Bearer ***" in message
    assert "sentinel" not in message
    monkeypatch.setenv("HONE_REWARD_TOKEN", "two\nlines")
    with pytest.raises(RewardError, match="characters no bearer token has") as caught:
        client(server.url)
    assert "two" not in str(caught.value)


def test_proxies_of_the_environment_are_not_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with closing(client(server.url)) as reward:
        assert judge(reward) == expected(1)


class Lookup:
    """Names to addresses, in turn."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[dict[str, Any]]:
        address = self.addresses.pop(0)
        return [{"hostname": host, "host": address, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}]

    async def close(self) -> None: ...


def test_a_refused_address_is_an_error_at_once_and_nothing_is_asked(server: Server) -> None:
    port = server.listener.server_address[1]
    message = failure(f"http://metadata.example.org:{port}/x", lookup=Lookup("169.254.169.254"))
    assert "is at 169.254.169.254" in message
    assert server.asked == []


def test_close_cancels_what_is_under_way(server: Server) -> None:
    go_on = threading.Event()
    server.say = lambda asked: scores(asked) if go_on.wait(20) else None
    reward = client(server.url)

    async def scenario() -> list[object]:
        waiting = asyncio.create_task(reward.judge(items(2)))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(reward.close)
        return list(await asyncio.gather(waiting, return_exceptions=True))

    assert isinstance(asyncio.run(scenario())[0], asyncio.CancelledError | RewardError)
    reward.close()
    with pytest.raises(RewardError, match="is closed"):
        judge(reward)
    go_on.set()


def test_a_server_and_a_weight_from_the_settings(server: Server) -> None:
    config = RewardConfig(remote_url=server.url, weights="3")
    with closing(judges.build(config, default="unused")) as reward:
        asyncio.run(judges.smoke(reward, PROMPTS))
        assert [one.reward for one in asyncio.run(reward.judge(items(3)))] == [0.0, 3.0, 6.0]
    server.say = lambda _: (200, {}, b'{"rewards": [1]}')
    with (
        closing(judges.build(config, default="unused")) as reward,
        pytest.raises(RewardError, match=r"failed on the smoke rows at the start: .*1 values"),
    ):
        asyncio.run(judges.smoke(reward, PROMPTS))
