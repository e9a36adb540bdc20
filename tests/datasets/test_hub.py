"""Datasets of the hub: the real client against a stand-in on loopback that speaks the hub's own routes, and what it says when it fails."""

import functools
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hone.datasets.config import DataConfig
from hone.datasets.errors import DataError
from hone.datasets.hub import HubName, hub_name
from hone.datasets.reading import open_datasets
from hone.datasets.schemas import load_prompts

SHA = {"main": "a" * 40, "v1": "b" * 40}
FILES = {
    "a" * 40: {"README.md": "", "data/train.jsonl": '{"input": "new"}\n', "data/test.jsonl": '{"input": "held out"}\n'},
    "b" * 40: {"train.csv": "input\nold\n"},
}


class Hub(BaseHTTPRequestHandler):
    asked: "list[str]"

    def __init__(self, asked: list[str], *arguments: object) -> None:
        self.asked = asked
        super().__init__(*arguments)  # pyright: ignore[reportArgumentType]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        about = re.fullmatch(r"/api/datasets/own/sums(?:/revision/(\w+))?(?:\?.*)?", self.path)
        file = re.fullmatch(r"/datasets/own/sums/resolve/(\w{40})/(.+)", self.path)
        if about:
            sha = SHA.get(about[1] or "main", about[1])
            if sha not in FILES:
                return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            body = {"id": "own/sums", "sha": sha, "siblings": [{"rfilename": name} for name in FILES[sha]]}
            return self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if file and file[2] in FILES.get(file[1], {}):
            body = FILES[file[1]][file[2]].encode()
            return self._answer(200, body, {"ETag": f'"{file[1][0]}{file[2]}"', "X-Repo-Commit": file[1]})
        if "own/shut" in self.path:
            return self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub on loopback with one dataset of two commits; what it was asked for."""
    import huggingface_hub.constants as constants

    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, asked)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.chdir(tmp_path)
        yield asked
        server.shutdown()
        thread.join()


def prompts(name: str, **settings: object) -> tuple[str, list[str]]:
    found = load_prompts(DataConfig(prompt_dataset=name, **settings))
    return found.name, [str(row.prompt) for row in found.rows]


def test_a_name_of_the_hub_is_read_at_one_commit(hub: list[str]) -> None:
    assert prompts("own/sums") == ("own/sums@aaaaaaaaaaaa/train.jsonl", ["new"])
    assert prompts("own/sums", prompt_split="test")[1] == ["held out"]
    assert prompts("own/sums@v1") == ("own/sums@bbbbbbbbbbbb/train.csv", ["old"])
    assert prompts("own/sums@" + "b" * 40)[1] == ["old"]
    assert all("/main/" not in path for path in hub if "resolve" in path)  # files are asked for by commit, never by branch


def test_what_the_hub_does_not_have_is_told_with_the_ways_out(hub: list[str]) -> None:
    with pytest.raises(DataError, match=r"'own/nothing' is neither a file here nor a dataset of the hub; check the spelling"):
        prompts("own/nothing")
    with pytest.raises(DataError, match=r"'own/sums' has no revision 'v2'; name a commit, tag or branch"):
        prompts("own/sums@v2")
    with pytest.raises(DataError, match=r"'own/shut' is gated; ask for access on its page"):
        prompts("own/shut")
    with pytest.raises(
        DataError, match=r"'trian': hub dataset 'own/sums' has no such split, but 'test', 'train'; .*did you mean 'train'\?"
    ):
        prompts("own/sums", prompt_split="trian")
    with pytest.raises(DataError, match=r"^--data.dataset-split 'trian'"):  # under the flag where it was asked for
        open_datasets("own/sums", split="trian", split_flag="--data.dataset-split")
    with pytest.raises(DataError, match="has no configurations, and 'main' was asked for"):
        prompts("own/sums:main")


def test_without_a_network_the_download_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot be fetched: .*hf download --repo-type dataset own/sums"):
        prompts("own/sums")


def test_a_path_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_name("own/sums:main@v1.0") == HubName(repository="own/sums", config="main", revision="v1.0")
    assert hub_name("a/b/c") is hub_name("sums") is hub_name("/own/sums") is hub_name("./sums") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("data/sums", "nowhere/sums.jsonl"):
        with pytest.raises(DataError, match="does not exist"):
            prompts(name)
