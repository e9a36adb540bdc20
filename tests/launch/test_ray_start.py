"""Ray that starts slowly: once more, then in words."""

import pytest
import ray

from hone.launch import cluster
from hone.launch.errors import ENVIRONMENT, exit_code
from hone.launch.remote import RankLost

SLOW = Exception("The current node timed out during startup. This could happen because some of the raylet failed to startup")


@pytest.mark.parametrize(("faults", "ends"), [([], 1), ([SLOW], 2)])
def test_a_slow_start_is_tried_once_more(faults: list[Exception], ends: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, ended = _patched(faults, monkeypatch)
    cluster._init(address="local")
    assert asked == [{"address": "local"}] * ends and len(ended) == ends - 1


def test_two_slow_starts_end_the_run_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, ended = _patched([SLOW, SLOW], monkeypatch)
    with pytest.raises(RankLost, match="did not start within 30 s, twice: this machine is too busy") as caught:
        cluster._init()
    assert len(asked) == len(ended) == 2 and exit_code(caught.value) == ENVIRONMENT


def test_another_fault_of_ray_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, ended = _patched([ValueError("no such address")], monkeypatch)
    with pytest.raises(ValueError, match="no such address"):
        cluster._init()
    assert len(asked) == 1 and not ended


def _patched(faults: list[Exception], monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, object]], list[None]]:
    waiting, asked, ended = list(faults), [], []

    def init(**settings: object) -> None:
        asked.append(settings)
        if waiting:
            raise waiting.pop(0)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(None))
    return asked, ended
