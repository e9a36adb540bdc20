"""Publishing in one process: an update that lies, loses a tensor or forgets its version stops the run and names what is stale."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hone.algos.batch import Batch
from hone.launch import local
from hone.launch.ahead import LoopThread
from hone.launch.cli import main
from hone.launch.local import ServedHere
from hone.launch.publish import Publisher
from hone.rollout.errors import EngineError, EngineLost, StaleWeights
from hone.rollout.fleet import Fleet, Limits
from hone.rollout.types import Completion, Request
from hone.rollout.weight_sync.source import FingerprintedSource

RUN = ["grpo", "--run.backend", "local", "--train.max-steps", "3"]


def _nothing(served: ServedHere, source: FingerprintedSource, honest: Callable[..., Any]) -> dict[str, str]:
    """Claims that everything arrived, and leaves the engine as it was."""
    for _ in source:
        pass
    served._received = dict(source.fingerprints)
    return source.fingerprints


def _altered(served: ServedHere, source: FingerprintedSource, honest: Callable[..., Any]) -> dict[str, str]:
    """One tensor is damaged on its way."""
    weights = served._engine.held()
    held = weights["model.layers.1.mlp.up_proj.weight"]
    sent = honest(served, source)
    with torch.no_grad():
        held[0, 0] += 1
    served._received = {name: local.fingerprint(tensor) for name, tensor in weights.items() if name in sent}
    return sent


@pytest.mark.parametrize(
    ("fault", "said"),
    [(_nothing, "still answers like version 0"), (_altered, "model.layers.1.mlp.up_proj.weight arrived altered")],
)
def test_stale_weights_end_the_run(
    fault: Callable[..., dict[str, str]],
    said: str,
    hone_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    honest = ServedHere.receive
    calls = []

    def receive(served: ServedHere, source: FingerprintedSource) -> dict[str, str]:
        calls.append(source)
        return honest(served, source) if len(calls) == 1 else fault(served, source, honest)

    monkeypatch.setattr(ServedHere, "receive", receive)
    assert main([*RUN, "--run.dir", str(tmp_path / "run")]) == 7
    assert len(calls) == 2
    error = capsys.readouterr().err
    assert said in error and "version 1" in error


def test_a_forgotten_version_ends_the_run(
    hone_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def forget(served: ServedHere, version: int) -> None:
        return None

    monkeypatch.setattr(ServedHere, "set_version", forget)
    assert main([*RUN, "--run.dir", str(tmp_path / "run")]) == 7
    assert "serves version 0 after the update to version 1" in capsys.readouterr().err


class Served:
    """An engine that answers like the weights it last received."""

    def __init__(self, name: str) -> None:
        self.name, self.received, self.label, self.said = name, 0.0, -1, []

    async def pause(self, mode: str) -> None:
        self.said.append("pause")

    async def resume(self) -> None:
        self.said.append("resume")

    async def set_version(self, version: int) -> None:
        self.label = version

    async def version(self) -> int:
        return self.label

    async def fingerprints(self) -> dict[str, str]:
        return {"weight": str(self.received)}

    async def suspects(self) -> list[str]:
        return []

    async def prompt_logp(self, tokens: Sequence[int], images: object = ()) -> list[float]:
        return [-self.received] * (len(tokens) - 1)

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        raise AssertionError("nothing is sampled here")

    async def check_health(self) -> None:
        pass

    def close(self) -> None:
        pass


class Learner:
    """A policy whose one weight is the number of the update; its sending end reaches the engines it was last connected to."""

    def __init__(self, *faults: EngineLost | None) -> None:
        self.weight, self.faults, self.engines = 1.0, list(faults), []
        self.connections: list[list[str]] = []

    def logp(self, role: str, batch: Batch) -> torch.Tensor:
        return torch.full((len(batch.tokens),), -self.weight)

    def connect(self, engines: Sequence[Served]) -> None:
        self.engines = list(engines)
        self.connections.append([engine.name for engine in engines])

    def send(self) -> dict[str, str]:
        fault = self.faults.pop(0) if self.faults else None
        for engine in self.engines:
            if fault is None or engine.name != fault.engine:
                engine.received = self.weight
        if fault is not None:
            raise fault
        return {"weight": str(self.weight)}


@contextmanager
def publishing(learner: Learner, engines: Sequence[Served], fresh: list[Served]) -> Iterator[tuple[Publisher, Fleet]]:
    async def replace(lost: Served) -> Served:
        engine = fresh.pop(0)
        await publisher.bring_up(engine)
        return engine

    fleet = Fleet(engines, replace=replace, limits=Limits(replacements=1))
    settings = {"send": learner.send, "connect": learner.connect, "vocabulary": 50, "tolerance": 1e-3, "seed": 0, "timeout_s": 60.0}
    with asyncio.Runner() as runner:
        publisher = Publisher(served=lambda: fleet, policy=learner, runner=runner, **settings)
        yield publisher, fleet


def test_an_engine_that_dies_in_an_update_is_replaced_and_all_are_updated_anew() -> None:
    first, second, fresh = Served("engine-0"), Served("engine-1"), Served("engine-0")
    learner = Learner(None, EngineLost("engine-0", "died during update_weights"))
    with publishing(learner, [first, second], [fresh]) as (publisher, fleet):
        publisher(1)
        learner.weight = 2.0
        publisher(2)
        assert len(learner.connections) == 3
        publisher(3)
    assert fleet.serving == [fresh, second] and (fresh.received, second.received, first.received) == (2.0, 2.0, 1.0)
    assert fresh.label == second.label == 3 and fresh.said.count("resume") == 3
    # The replacement alone first, then everyone; between updates of the same engines nothing is connected anew.
    assert learner.connections == [["engine-0", "engine-1"], ["engine-0"], ["engine-0", "engine-1"]]


def test_a_second_engine_that_stayed_behind_is_found() -> None:
    class Behind(Learner):
        def send(self) -> dict[str, str]:
            if self.weight == 2.0:
                self.engines = self.engines[:1]
            return super().send()

    learner = Behind()
    with publishing(learner, [Served("engine-0"), Served("engine-1")], []) as (publisher, _):
        publisher(1)
        learner.weight = 2.0
        with pytest.raises(StaleWeights, match="engine-1"):
            publisher(2)


def test_a_replacement_that_does_not_answer_like_the_policy_never_serves() -> None:
    class Deaf(Served):
        async def prompt_logp(self, tokens: Sequence[int], images: object = ()) -> list[float]:
            return [-9.0] * (len(tokens) - 1)

    learner = Learner(None, EngineLost("engine-0", "died"))
    with publishing(learner, [Served("engine-0"), Served("engine-1")], [Deaf("engine-0")]) as (publisher, fleet):
        publisher(1)
        publisher(2)
    assert [engine.name for engine in fleet.serving] == ["engine-1"]


def test_without_anyone_left_the_update_ends_with_who_was_lost() -> None:
    learner = Learner(EngineLost("engine-0", "died during update_weights"), EngineLost("engine-0", "died again"))
    told = r"lost: engine engine-0 died during update_weights; engine engine-0 died again"
    with publishing(learner, [Served("engine-0")], [Served("engine-0")]) as (publisher, _), pytest.raises(EngineError, match=told):
        publisher(1)


def test_engines_that_sleep_wake_with_their_weights_before_and_with_their_cache_after_they_are_sent() -> None:
    order: list[str] = []

    class Drowsy(Served):
        async def pause(self, mode: str) -> None:
            order.append(f"pause {mode}")

        async def set_version(self, version: int) -> None:
            order.append("version")
            await super().set_version(version)

        async def prompt_logp(self, tokens: Sequence[int], images: object = ()) -> list[float]:
            order.append("canary")
            return await super().prompt_logp(tokens, images)

    class Sending(Learner):
        def send(self) -> dict[str, str]:
            order.append("send")
            return super().send()

    async def wake(engines: Sequence[Served], tag: str) -> None:
        order.append(f"wake {tag}")

    learner, engine = Sending(), Drowsy("engine-0")
    settings = {
        "send": learner.send,
        "connect": learner.connect,
        "vocabulary": 50,
        "tolerance": 1e-3,
        "seed": 0,
        "timeout_s": 30.0,
        "wake": wake,
    }
    with asyncio.Runner() as runner:
        Publisher(served=lambda: Fleet([engine]), policy=learner, runner=runner, pause="wait", **settings)(1)
    assert order == ["pause wait", "wake weights", "send", "wake kv_cache", "version", "canary"]


def test_while_the_learner_is_at_work_no_engine_is_brought_up() -> None:
    # In the middle of a step its weights are no version's: an engine that got them would serve under a false name.
    learner, first, fresh = Learner(), Served("engine-0"), Served("engine-1")
    settings = {"send": learner.send, "connect": learner.connect, "vocabulary": 50, "tolerance": 1e-3, "seed": 0, "timeout_s": 30.0}
    runner = LoopThread()
    publisher = Publisher(served=lambda: Fleet([first]), policy=learner, runner=runner, **settings)
    publisher(1)

    async def begin() -> asyncio.Task[None]:
        return asyncio.ensure_future(publisher.bring_up(fresh))

    async def as_far_as_it_gets(task: asyncio.Task[None]) -> None:
        await asyncio.wait([task], timeout=0.3)

    publisher.hold()
    task = runner.run(begin())
    learner.weight = 1.5
    runner.run(as_far_as_it_gets(task))  # without the hold it would be over
    assert (fresh.label, fresh.received, fresh.said, task.done()) == (-1, 0.0, [], False)
    learner.weight = 2.0
    publisher(2)  # frees it

    async def over() -> None:
        await task

    runner.run(over())
    runner.close()
    assert (fresh.label, fresh.received) == (2, 2.0) and learner.connections[-1] in (["engine-0"], ["engine-1"])
