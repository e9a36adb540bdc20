"""Reward servers on loopback that answer as they are told, and how the tests ask them."""

import asyncio
import json
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from hone.rollout.errors import RewardError
from hone.rollout.rewards.http import HttpReward
from hone.rollout.rewards.result import Judgement, RewardItem

Answer = tuple[int, dict[str, str], bytes]


@dataclass(frozen=True)
class Asked:
    path: str
    headers: dict[str, str]
    rows: dict[str, list[Any]]


def scores(asked: Asked) -> Answer:
    """The reward of a response is its length."""
    lengths = [len(query) - len(prompt) for query, prompt in zip(asked.rows["query"], asked.rows["prompts"], strict=True)]
    return 200, {}, json.dumps({"rewards": lengths, "extra_logs": {"label": asked.rows["labels"]}}).encode()


@dataclass
class Server:
    """A reward server that answers by `say`; None breaks the connection."""

    say: Callable[[Asked], Answer | None] = scores
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked = Asked(self.path, dict(self.headers), rows)
                outer.asked.append(asked)
                answer = outer.say(asked)
                if answer is None:
                    self.close_connection = True
                    return
                status, headers, content = answer
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    self.wfile.write(content)
                except ConnectionError:
                    self.close_connection = True

            do_GET = do_POST

            def log_message(self, format: str, *args: object) -> None: ...

        class Listener(ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True

        self.listener = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.listener.server_address[1]}/get_reward"
        self.thread = threading.Thread(target=self.listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.listener.shutdown()
        self.listener.server_close()
        self.thread.join()


def client(*urls: str, **settings: Any) -> HttpReward:
    return HttpReward(**{"urls": urls, "timeout_s": 10.0, "retry_s": 20.0, **settings})


def items(count: int) -> list[RewardItem]:
    return [RewardItem(prompt_id=f"ab:0:{n}", query="p" + "r" * (n % 7), prompt="p", label=n) for n in range(count)]


def judge(reward: HttpReward, count: int = 1) -> list[Judgement]:
    return asyncio.run(reward.judge(items(count)))


def expected(count: int) -> list[Judgement]:
    return [Judgement(reward=float(n % 7), score=float(n % 7), extra_logs={"label": float(n)}) for n in range(count)]


def failure(url: str, count: int = 1, **settings: Any) -> str:
    with closing(client(url, **settings)) as reward, pytest.raises(RewardError) as caught:
        judge(reward, count)
    return str(caught.value)
