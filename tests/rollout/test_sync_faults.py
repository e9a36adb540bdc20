"""Planted faults of a weight sync against a real engine: every one is caught, and two hundred clean syncs raise none.

1. What is dropped, swapped, stale, transposed, scaled, of the wrong type or different in one bit on its way is named.
2. What goes wrong behind the bytes (a tied head, a load that does nothing or ends in the middle, a tensor the loader leaves out or
   mixes up) is caught by the canary, and named where the engine can know.
3. A forgotten version and a kept prefix cache are caught, or can do no harm.
4. After each of them nothing is served from a half-loaded engine, and one full sync mends it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from hone.rollout.errors import EngineError, StaleWeights
from tests.rollout.conftest import DirectClient, Served, logp_of, request

# vllm, while it is imported, scripts a function by torch's old way.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

UP, GATE, OUT = (f"model.layers.1.{name}.weight" for name in ("mlp.up_proj", "mlp.gate_proj", "self_attn.o_proj"))
LISTS = ("names", "dtype_names", "shapes", "offsets", "fingerprints")


@dataclass
class Way:
    """An announcement on its way to the engine, and the memory it speaks of."""

    info: dict[str, Any]
    memory: Tensor
    before: dict[str, Tensor]
    """The weights of the version before."""

    def entry(self, name: str) -> int:
        return self.info["names"].index(name)

    def bytes_of(self, name: str) -> Tensor:
        """The tensor as it lies in shared memory."""
        index = self.entry(name)
        size = self.before[name].nbytes
        start = self.info["offsets"][index]
        return self.memory[start : start + size].view(torch.float32).view(self.before[name].shape)


def dropped(way: Way) -> None:
    index = way.entry(UP)
    for key in LISTS:
        del way.info[key][index]


def swapped(way: Way) -> None:
    one, other = way.entry(UP), way.entry(GATE)
    offsets = way.info["offsets"]
    offsets[one], offsets[other] = offsets[other], offsets[one]


def stale(way: Way) -> None:
    way.bytes_of(UP).copy_(way.before[UP])


def transposed(way: Way) -> None:
    held = way.bytes_of(OUT)
    held.copy_(held.t().clone())


def transposed_shape(way: Way) -> None:
    way.info["shapes"][way.entry(UP)].reverse()


def wrong_type(way: Way) -> None:
    way.info["dtype_names"][way.entry(UP)] = "int32"


def one_bit(way: Way) -> None:
    way.bytes_of(UP).view(torch.int32)[3, 5] ^= 1


def scaled(way: Way) -> None:
    way.bytes_of(UP).mul_(1.001)


NOT_SENT = "of 21 tensors that came are not what was sent: "
ON_THE_WAY = {
    "dropped": (dropped, rf"of 21 tensors sent, {UP} never arrived"),
    "swapped": (swapped, rf"2 {NOT_SENT}.*{GATE}, {UP}"),
    "stale": (stale, rf"1 {NOT_SENT}{UP}"),
    "transposed": (transposed, rf"1 {NOT_SENT}{OUT}"),
    "transposed in shape": (transposed_shape, rf"1 {NOT_SENT}{UP}"),
    "wrong type": (wrong_type, rf"1 {NOT_SENT}{UP}"),
    "one bit": (one_bit, rf"1 {NOT_SENT}{UP}"),
    "scaled": (scaled, rf"1 {NOT_SENT}{UP}"),
}


@dataclass
class Tampering(DirectClient):
    """Does something to every announcement before it is passed on."""

    plant: Callable[[Way], None] = lambda way: None
    memory: Tensor = field(default_factory=lambda: torch.empty(0))
    before: dict[str, Tensor] = field(default_factory=dict)

    def update_weights(self, update_info: Any) -> None:
        self.plant(Way(update_info, self.memory, self.before))
        super().update_weights(update_info)


@pytest.mark.parametrize("fault", ON_THE_WAY)
def test_what_happens_to_a_tensor_on_its_way_is_named(untied: Served, fault: str) -> None:
    plant, said = ON_THE_WAY[fault]
    untied.sync()
    before = {name: parameter.detach().clone() for name, parameter in untied.model.named_parameters()}
    untied.step()
    sending: Any = untied.trainer
    [(start, memory)] = sending._mapped
    assert start == 0
    client = Tampering(engine=untied.engine, loop=untied.loop, plant=plant, memory=memory, before=before)
    with untied.through(client), pytest.raises(StaleWeights, match=said):
        untied.sync()
    assert untied.sync().gap < 1e-4


def left_out(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in weights if name != "model.layers.1.input_layernorm.weight")


def mixed_up(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    held = dict(weights)
    up, gate = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"
    held[up], held[gate] = held[gate], held[up]
    return iter(held.items())


def ended_in_the_middle(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """After three of the tensors: queries and keys of a layer have come, its values have not."""
    for index, pair in enumerate(weights):
        if index == 3:
            raise RuntimeError("killed")
        yield pair


def nothing(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return iter(())


BEHIND_THE_BYTES = {
    "a tensor left out": (left_out, r"most suspect: model.layers.1.input_layernorm.weight \(not loaded\)"),
    "two mixed up": (mixed_up, r"tensors arrived intact, yet .*does not answer like version \d+ either"),
    "nothing applied": (nothing, r"still answers like version \d+: .* changed nothing"),
    "killed after 3 of 21": (ended_in_the_middle, "an update of its weights failed .*killed"),
}


def load_through(change: Callable[[Iterable[tuple[str, Tensor]]], Iterator[tuple[str, Tensor]]]) -> Callable[[Any], None]:
    def patch(worker: Any) -> None:
        model = worker.weight_transfer_engine.model
        load = type(model).load_weights
        model.load_weights = lambda weights: load(model, change(weights))

    return patch


@pytest.mark.parametrize("fault", BEHIND_THE_BYTES)
def test_what_happens_behind_the_bytes_is_caught(untied: Served, fault: str) -> None:
    change, said = BEHIND_THE_BYTES[fault]
    untied.sync()
    untied.in_the_worker(load_through(change))
    untied.step()
    with pytest.raises(StaleWeights, match=said):
        untied.sync()
    if change is ended_in_the_middle:
        with pytest.raises(StaleWeights, match="engine untied refuses to sample"):
            untied.generate([request((5,), seed=1)])
        with pytest.raises(StaleWeights, match="engine untied refuses to answer"):
            untied.loop.run(untied.engine.prompt_logp([5, 6]))
    untied.in_the_worker(lambda worker: delattr(worker.weight_transfer_engine.model, "load_weights"))
    assert untied.sync().gap < 1e-4


def test_a_tied_head_forgotten_is_named(tied: Served) -> None:
    tied.sync()
    tied.in_the_worker(lambda worker: setattr(worker.weight_transfer_engine, "mend_tied_heads", lambda: None))
    tied.step()
    with pytest.raises(StaleWeights, match=r"most suspect: lm_head\.weight"):
        tied.sync()
    tied.in_the_worker(lambda worker: delattr(worker.weight_transfer_engine, "mend_tied_heads"))
    assert tied.sync().gap < 1e-4


def test_a_wrong_version_echo_is_caught(untied: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    untied.sync()

    async def forgotten(label: str) -> None:
        return None

    untied.step()
    with monkeypatch.context() as patch, pytest.raises(StaleWeights, match=rf"serves version {untied.version} after the update to version"):
        patch.setattr(untied.engine._llm, "update_weight_version", forgotten)
        untied.sync()
    assert untied.sync().gap < 1e-4


@pytest.mark.parametrize("honest", [True, False], ids=["refused", "a lie"])
def test_a_prefix_cache_that_is_kept_is_an_error_or_harmless(untied: Served, monkeypatch: pytest.MonkeyPatch, honest: bool) -> None:
    prompt = tuple(range(20, 90))
    asked = [request(prompt, seed=1, length=2)]
    untied.sync()
    untied.generate(asked)
    assert untied.generate(asked)[0].cached_tokens == 64
    untied.step()

    async def kept(**_: Any) -> bool:
        return not honest

    with monkeypatch.context() as patch:
        patch.setattr(untied.engine._llm, "reset_prefix_cache", kept)
        if honest:
            with pytest.raises(EngineError, match="kept its prefix cache across the update"):
                untied.sync()
        else:
            untied.sync()
            (drawn,) = untied.generate(asked)
            assert drawn.cached_tokens == 0
            assert_close(torch.tensor(drawn.logp), logp_of(untied.model, prompt + drawn.tokens)[69:], rtol=0, atol=1e-4)
    assert untied.sync().gap < 1e-4


def test_an_update_that_the_learner_gave_up_leaves_nothing_behind(untied: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    untied.sync()
    untied.step()
    sending: Any = untied.trainer

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield from list(untied.model.named_parameters())[:5]
        raise RuntimeError("the learner is out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(sending._source, "plain", broken)
        untied.sync()
    with pytest.raises(StaleWeights, match="begun and not finished"):
        untied.generate([request((5,), seed=1)])
    assert untied.sync().gap < 1e-4


def test_two_hundred_clean_syncs_raise_nothing(tied: Served, untied: Served) -> None:
    largest = 0.0
    for turn in range(200):
        served = (tied, untied)[turn % 2]
        generator = torch.Generator().manual_seed(turn)
        with torch.no_grad():
            for parameter in served.model.parameters():
                drawn = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + drawn if parameter.ndim == 1 else drawn)
        largest = max(largest, served.sync().gap)
    assert largest < 1e-4
