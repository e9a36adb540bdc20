"""Weights that arrived, and the ways in which they may not have.

1. After every update the engine answers exactly as the learner does, tied head or not, and says what it received.
2. A tied head left behind, an update that changes nothing, a tensor altered on the way, a forgotten version: each stops
   the sync with StaleWeights that names the engine and what is stale, and a full sync afterwards mends it.
"""

import asyncio
import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from hone.rollout.errors import EngineError, EngineLost, StaleWeights
from hone.rollout.weight_sync.protocol import Sent, sync
from hone.rollout.weight_sync.source import fingerprint
from hone.rollout.weight_sync.verify import Canary, canary_tokens, tolerance, verify
from tests.rollout.conftest import CANARY, DirectClient, Served, logp_of, request

# vllm, while it is imported, scripts a function by torch's old way.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
HEAD = "lm_head.weight (tied to the embedding, packed apart from it)"


# Real engines


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_three_updates_in_a_row_are_served_as_sent(kind: str, request: pytest.FixtureRequest) -> None:
    served: Served = request.getfixturevalue(kind)
    for _ in range(3):
        served.step()
        synced = served.sync()
        answered = torch.tensor(served.loop.run(served.engine.prompt_logp(CANARY)))
        assert_close(answered, logp_of(served.model, CANARY), rtol=0, atol=1e-4)
        assert synced.gap < 1e-4
        assert served.loop.run(served.engine.version()) == served.version
        expected = {name: fingerprint(parameter.detach()) for name, parameter in served.model.named_parameters()}
        assert served.loop.run(served.engine.fingerprints()) == expected


def test_a_prefix_cached_under_old_weights_is_not_used_under_new_ones(tied: Served) -> None:
    prompt = tuple(range(20, 90))
    asked = [request(prompt, seed=1, length=2)]
    tied.generate(asked)
    assert tied.generate(asked)[0].cached_tokens == 64
    tied.step()
    tied.sync()
    (drawn,) = tied.generate(asked)
    assert drawn.cached_tokens == 0
    assert_close(torch.tensor(drawn.logp), logp_of(tied.model, prompt + drawn.tokens)[69:], rtol=0, atol=1e-4)


def test_a_tied_head_left_behind_is_named_and_a_full_sync_mends_it(tied: Served) -> None:
    tied.sync()
    tied.in_the_worker(lambda worker: setattr(worker.weight_transfer_engine, "mend_tied_heads", lambda: None))
    tied.step()
    with pytest.raises(StaleWeights) as stale:
        tied.sync()
    message = str(stale.value)
    assert "engine tied" in message and "tensors arrived intact" in message
    assert f"does not answer like version {tied.version - 1} either" in message
    assert f"most suspect: {HEAD}" in message
    tied.in_the_worker(lambda worker: delattr(worker.weight_transfer_engine, "mend_tied_heads"))
    assert tied.sync().gap < 1e-4


def test_an_update_that_is_received_but_not_applied_is_detected(untied: Served) -> None:
    untied.sync()
    untied.in_the_worker(lambda worker: setattr(worker.weight_transfer_engine.model, "load_weights", lambda weights: set()))
    untied.step()
    with pytest.raises(StaleWeights, match=f"engine untied.*still answers like version {untied.version}: .* changed nothing"):
        untied.sync()
    untied.in_the_worker(lambda worker: delattr(worker.weight_transfer_engine.model, "load_weights"))
    assert untied.sync().gap < 1e-4


def test_a_small_update_that_is_not_applied_is_detected_within_the_tolerance(untied: Served) -> None:
    untied.sync()
    untied.in_the_worker(lambda worker: setattr(worker.weight_transfer_engine.model, "load_weights", lambda weights: set()))
    untied.step(scale=1e-4)
    assert (logp_of(untied.model, CANARY) - torch.tensor(untied.canaries["untied"].learner)).abs().max() < 0.1
    with pytest.raises(StaleWeights, match=f"still answers like version {untied.version}"):
        untied.sync(tolerance=0.1)
    untied.in_the_worker(lambda worker: delattr(worker.weight_transfer_engine.model, "load_weights"))
    assert untied.sync().gap < 1e-4


@dataclass
class Tampering(DirectClient):
    """Changes one byte of one tensor in shared memory after the trainer wrote it."""

    file: int = -1
    name: str = ""

    def update_weights(self, update_info: Any) -> None:
        offset = update_info["offsets"][update_info["names"].index(self.name)]
        (byte,) = os.pread(self.file, 1, offset)
        os.pwrite(self.file, bytes([byte ^ 1]), offset)
        super().update_weights(update_info)


def test_a_tensor_altered_on_the_way_is_named_and_nothing_is_sampled_until_a_full_sync(untied: Served) -> None:
    untied.sync()
    altered = "model.layers.1.mlp.up_proj.weight"
    sending: Any = untied.trainer
    untied.step()
    with untied.through(Tampering(engine=untied.engine, loop=untied.loop, file=sending._file, name=altered)):
        with pytest.raises(StaleWeights, match=f"engine untied: .*1 of 21 tensors .* not what was sent: {altered}"):
            untied.sync()
        with pytest.raises(StaleWeights, match="engine untied refuses to sample"):
            untied.generate([request((5,), seed=1)])
    assert untied.sync().gap < 1e-4
    assert len(untied.generate([request((5,), seed=1)])[0].tokens) == 24


class Deaf(DirectClient):
    """Answers every update with success and passes nothing on."""

    def update_weights(self, update_info: Any) -> None:
        pass


def test_an_update_that_never_reaches_the_engine_is_detected(untied: Served) -> None:
    untied.sync()
    untied.step()
    message = r"engine untied, version \d+: of 21 tensors sent, model.embed_tokens.weight, .* and 13 more never arrived"
    with untied.through(Deaf(engine=untied.engine, loop=untied.loop)), pytest.raises(StaleWeights, match=message):
        untied.sync()
    assert untied.sync().gap < 1e-4


# The order of a sync


@dataclass
class Recorded:
    """An engine and a client of which only the order of calls matters."""

    name: str = "recorded"
    calls: list[str] = field(default_factory=list)
    refuses: bool = False

    async def pause(self, mode: str) -> None:
        self.calls.append("pause")

    async def resume(self) -> None:
        self.calls.append("resume")

    async def set_version(self, version: int) -> None:
        self.calls.append(f"version {version}")

    async def version(self) -> int:
        return 4

    async def fingerprints(self) -> dict[str, str]:
        return {"w": "1"}

    async def suspects(self) -> list[str]:
        return ["w (packed)"]

    async def prompt_logp(self, tokens: Any, images: Any = ()) -> list[float]:
        self.calls.append("canary")
        return [-1.0]

    async def send(self) -> Sent:
        self.calls.append("send")
        if self.refuses:
            raise EngineError("it died")
        return Sent(fingerprints={"w": "1"}, canary_logp=[-1.0])


def test_a_sync_keeps_its_order() -> None:
    engine = Recorded()
    synced = asyncio.run(sync([engine], version=4, send=engine.send, canary=[1, 2], tolerance=1e-3, previous={}))
    assert engine.calls == ["pause", "send", "version 4", "resume", "canary"]
    assert synced.canaries == {"recorded": Canary(version=4, learner=(-1.0,), engine=(-1.0,))}


def test_engines_stay_paused_when_sending_fails() -> None:
    engine = Recorded(refuses=True)
    with pytest.raises(EngineError, match="it died"):
        asyncio.run(sync([engine], version=4, send=engine.send, canary=[1, 2], tolerance=1e-3, previous={}))
    assert engine.calls == ["pause", "send"]


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        ("pause", "pausing for version 4"),
        ("set_version", "labelling version 4"),
        ("resume", "resuming with version 4"),
        ("prompt_logp", "verifying version 4"),
    ],
)
def test_an_engine_that_never_answers_a_phase_is_lost_with_its_name(phase: str, said: str) -> None:
    engine, never = Recorded(), asyncio.Event()

    async def silent(*_: Any) -> None:
        await never.wait()

    setattr(engine, phase, silent)
    with pytest.raises(EngineLost, match=rf"engine recorded did not answer within 0.05 s .*the controller waits for it, {said}") as lost:
        asyncio.run(sync([engine], version=4, send=engine.send, canary=[1, 2], tolerance=1e-3, previous={}, timeout_s=0.05))
    assert lost.value.engine == "recorded"


def test_an_engine_that_waits_for_its_requests_is_not_lost_for_it() -> None:
    engine = Recorded()

    async def patient(mode: str) -> None:
        await asyncio.sleep(0.1)

    setattr(engine, "pause", patient)  # noqa: B010 - a method of a dataclass
    settings: dict[str, Any] = {"canary": [1, 2], "tolerance": 1e-3, "previous": {}, "timeout_s": 0.05}
    assert asyncio.run(sync([engine], version=4, send=engine.send, pause="wait", **settings)).version == 4


def test_an_engine_that_never_comes_to_the_end_of_its_requests_is_lost() -> None:
    engine, never = Recorded(), asyncio.Event()

    async def silent(mode: str) -> None:
        await never.wait()

    setattr(engine, "pause", silent)  # noqa: B010 - a method of a dataclass
    settings: dict[str, Any] = {"canary": [1, 2], "tolerance": 1e-3, "previous": {}, "timeout_s": 0.05, "drain_s": 0.1}
    with pytest.raises(EngineLost, match=r"within 0.05 s \(--vllm.sync-timeout-s\) and 0.1 s for its requests \(--rollout.timeout-s\)"):
        asyncio.run(sync([engine], version=4, send=engine.send, pause="wait", **settings))


def test_a_time_limit_of_the_engines_own_is_not_mistaken_for_the_deadline() -> None:
    engine = Recorded()

    async def slow(mode: str) -> None:
        raise TimeoutError("its own")

    setattr(engine, "pause", slow)  # noqa: B010 - a method of a dataclass
    with pytest.raises(TimeoutError, match="its own"):
        asyncio.run(sync([engine], version=4, send=engine.send, canary=[1, 2], tolerance=1e-3, previous={}))


# What verify says

AGREED: dict[str, Any] = {
    "engine": "e1",
    "expected_version": 7,
    "engine_version": 7,
    "sent": {"a": "1", "b": "2"},
    "received": {"a": "1", "b": "2"},
    "canary_learner": [-1.0, -2.0],
    "canary_engine": [-1.0, -2.0005],
    "tolerance": 1e-3,
    "previous": Canary(version=6, learner=(-3.0, -4.0), engine=(-3.0, -4.0)),
    "suspects": ["lm_head.weight (tied)"],
}


def test_agreement_returns_the_canarys_largest_gap() -> None:
    assert verify(**AGREED) == pytest.approx(5e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"engine_version": 6}, "engine e1 serves version 6 after the update to version 7"),
        ({"received": {"a": "1"}}, "of 2 tensors sent, b never arrived"),
        ({"received": {"a": "1", "b": "3"}}, "of 2 tensors sent, b arrived altered"),
        ({"received": {"a": "1", "b": "2", "c": "3"}}, "of 2 tensors sent, c arrived unsent"),
        ({"canary_engine": [-1.0, -2.5]}, r"up to 0.5 nats \(tolerance 0.001\); it does not answer like version 6 .* lm_head.weight"),
        ({"canary_engine": [-1.0, -2.5], "previous": None}, r"up to 0.5 nats .*; most suspect: lm_head.weight"),
        ({"canary_engine": [-3.0, -4.0]}, "up to 2 nats .*; it still answers like version 6: .* changed nothing"),
        ({"canary_engine": [-3.0, -4.0], "tolerance": 5.0}, "it still answers like version 6"),
        ({"canary_engine": [-1.0, float("nan")]}, "up to inf nats"),
        ({"canary_engine": [-1.0]}, "up to inf nats"),
    ],
)
def test_every_disagreement_says_what_is_stale(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(StaleWeights, match=message):
        verify(**(AGREED | changed))


def test_an_engine_that_stands_still_because_the_learner_does_is_fine() -> None:
    unchanged = {"canary_learner": [-3.0, -4.0], "canary_engine": [-3.0, -4.0]}
    assert verify(**(AGREED | unchanged)) == 0.0


def test_tolerances_and_canaries() -> None:
    assert (tolerance("float32"), tolerance("bfloat16"), tolerance("float32", 0.5)) == (1e-3, 0.1, 0.5)
    tokens = canary_tokens(1000, seed=3, length=64)
    assert tokens == canary_tokens(1000, seed=3, length=64) != canary_tokens(1000, seed=4, length=64)
    assert len(tokens) == 64 and all(0 <= token < 1000 for token in tokens) and len(set(tokens)) > 50
