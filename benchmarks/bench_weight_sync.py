"""Weights of a 0.5 B-parameter model from one process to another on one machine: shared memory beside gloo and Ray.

The list is Qwen2.5-0.5B's, 290 tensors of 494 M parameters in bf16. Ours: the learner's end as it runs, with fingerprints taken on
both sides; it ends when the other process has checked every tensor and can read it. The peers: one gloo broadcast per parameter over
loopback into tensors that are there already, as NCCL broadcasts of one parameter each are elsewhere; `ray.put` of the list, read by an
actor, by Ray's own way of sending tensors. `unverified` is ours without any fingerprint, copied as numpy copies: `share_of_verification` is
what is left. Every process computes with one thread, as `launch` shares out the cores of a machine.
"""

import multiprocessing
import socket
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
import torch.distributed as dist
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.bench_roof import beside
from hone.rollout.weight_sync import shared_memory
from hone.rollout.weight_sync.shared_memory import Mapping, SharedMemoryTrainer
from hone.rollout.weight_sync.source import FingerprintedSource, fingerprint

VOCABULARY, HIDDEN, INNER, KEYS, LAYERS = 151_936, 896, 4864, 128, 24


def shapes() -> dict[str, tuple[int, ...]]:
    """Of every tensor, by name."""
    layer = {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.q_proj.bias": (HIDDEN,),
        "self_attn.k_proj.weight": (KEYS, HIDDEN),
        "self_attn.k_proj.bias": (KEYS,),
        "self_attn.v_proj.weight": (KEYS, HIDDEN),
        "self_attn.v_proj.bias": (KEYS,),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (INNER, HIDDEN),
        "mlp.up_proj.weight": (INNER, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INNER),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    whole = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    whole |= {f"model.layers.{index}.{name}": shape for index in range(LAYERS) for name, shape in layer.items()}
    return whole | {"model.norm.weight": (HIDDEN,)}


class Receiver:
    """The process that receives, by whichever way it is told to."""

    def __init__(self) -> None:
        self.mapping: Mapping | None = None
        self.held: dict[str, Tensor] = {}

    def init(self, path: str) -> None:
        """Open the file."""
        self.mapping = Mapping(path)

    def begin(self) -> None:
        """A new update."""
        assert self.mapping is not None
        self.mapping.begin()

    def update(self, info: dict[str, Any], check: bool) -> None:
        """Find what a region holds, and check it."""
        assert self.mapping is not None
        unchanged = set(info["unchanged"])
        if info["ahead"] and check:
            self.mapping.ahead(*info["ahead"])
        for (name, tensor), sent in zip(self.mapping.tensors(SimpleNamespace(**info)), info["fingerprints"], strict=True):
            self.held[name] = tensor
            assert not check or name in unchanged or self.mapping.fingerprint(tensor) == sent, name

    def join(self, port: int) -> None:
        """Meet the sender over gloo, with room for everything."""
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=1, world_size=2)
        self.held = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes().items()}

    def broadcasts(self) -> None:
        """Receive one tensor after another."""
        for tensor in self.held.values():
            dist.broadcast(tensor.view(torch.uint8), 0)

    def told(self) -> dict[str, str]:
        """Fingerprints of what is held."""
        return {name: fingerprint(tensor) for name, tensor in self.held.items()}


class GpuReceiver:
    """The same on a GPU that both processes share: vLLM's own receiver as we extend it, or OpenRLHF's protocol."""

    def __init__(self) -> None:
        from hone.rollout.weight_sync.plugin import ipc_receiver

        self.held: dict[str, Tensor] = {name: torch.empty(shape, dtype=torch.bfloat16, device="cuda") for name, shape in shapes().items()}
        model = torch.nn.Module()
        model.load_weights = self._load  # pyright: ignore[reportAttributeAccessIssue] - all that a receiver asks of a model
        settings = SimpleNamespace(parallel_config=None, model_config=SimpleNamespace(dtype=torch.bfloat16))
        self.receiver: Any = ipc_receiver()(None, settings, torch.device("cuda", 0), model)

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return {name for name, tensor in weights if self.held[name].copy_(tensor) is not None}

    def call(self, method: str, *given: Any) -> None:
        """One of vLLM's four calls."""
        getattr(self.receiver, method)(*given)

    def init(self, info: dict[str, Any]) -> None:
        """The handshake."""
        self.receiver.init_transfer_engine(self.receiver.parse_init_info(info))

    def one(self, name: str, handle: tuple[Any, ...]) -> None:
        """One parameter by a handle of its own."""
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        self.held[name].copy_(rebuild_cuda_tensor(*handle))
        torch.cuda.synchronize()

    def told(self) -> dict[str, str]:
        """Fingerprints of what is held."""
        return {name: fingerprint(tensor) for name, tensor in self.held.items()}


def serve(pipe: Connection, receiver: type[Receiver] | type[GpuReceiver]) -> None:
    """Do what is asked, and say when it is done."""
    torch.set_num_threads(1)  # as the sender's: two cores, two processes
    here = receiver()
    while (asked := pipe.recv()) is not None:
        method, *given = asked
        pipe.send(getattr(here, method)(*given))


@dataclass
class Engine:
    """The receiving process as a trainer sees an engine."""

    pipe: Connection
    process: BaseProcess
    check: bool = True

    def ask(self, *asked: Any) -> Any:
        """What the process answers."""
        self.pipe.send(asked)
        return self.pipe.recv()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """The handshake."""
        self.ask("init", init_info["path"])

    def start_weight_update(self) -> None:
        """Begin."""
        self.ask("begin")

    def update_weights(self, update_info: Any) -> None:
        """One region."""
        self.ask("update", update_info, self.check)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Nothing is loaded here: what came can be read."""


def started(receiver: type[Receiver] | type[GpuReceiver] = Receiver) -> Engine:
    """A receiving process."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(there, receiver))
    process.start()
    return Engine(here, process)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Engine, Engine]]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    both = started(), started()
    yield both
    for engine in both:
        engine.pipe.send(None)
        engine.process.join()
    if dist.is_initialized():
        dist.destroy_process_group()


class Holder:
    """The actor that receives from Ray."""

    def receive(self, weights: dict[str, Tensor]) -> int:
        """How many numbers came."""
        return sum(tensor.numel() for tensor in weights.values())


@pytest.fixture
def holder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from hone.launch.processes import prepare_environment

    prepare_environment()
    monkeypatch.setenv("RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", "0")  # a setting of ours, not of those who put tensors
    with tempfile.TemporaryDirectory(prefix="hone-bench-") as scratch:
        settings = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error", "_temp_dir": scratch}
        ray.init(address="local", object_store_memory=5 << 29, num_cpus=2, **settings)
        yield ray.remote(Holder).remote()
        ray.shutdown()


def test_half_a_billion_parameters(
    benchmark: BenchmarkFixture, engines: tuple[Engine, Engine], holder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes().items()}
    ours_engine, gloo_engine = engines
    source = FingerprintedSource(weights.items())
    sending = SharedMemoryTrainer(client=ours_engine, source=source, rank=0)
    expected = {name: fingerprint(tensor) for name, tensor in weights.items()}

    def ours() -> dict[str, str]:
        return sending.send_weights()

    def copied(tensor: Tensor, target: Tensor, *_: object) -> str:
        np.copyto(target.numpy(), tensor.view(-1).view(torch.uint8).numpy())
        return ""

    def unverified() -> None:
        ours_engine.check = False
        with monkeypatch.context() as patch:
            patch.setattr(shared_memory, "copied", copied)
            sending.send_weights()
        ours_engine.check = True

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    gloo_engine.pipe.send(("join", port))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=2)
    gloo_engine.pipe.recv()

    def gloo() -> None:
        gloo_engine.pipe.send(("broadcasts",))
        for tensor in weights.values():
            dist.broadcast(tensor.view(torch.uint8), 0)
        gloo_engine.pipe.recv()

    def ray_put() -> int:
        return ray.get(holder.receive.remote(ray.put(weights)))

    assert ours() == expected and ours_engine.ask("told") == expected
    gloo()
    assert gloo_engine.ask("told") == expected
    assert ray_put() == sum(tensor.numel() for tensor in weights.values())
    unverified()
    largest = max(weights.values(), key=Tensor.numel)
    room, count = torch.empty_like(largest), sum(tensor.nbytes for tensor in weights.values()) / largest.nbytes

    def roof() -> None:
        for _ in range(round(count)):
            np.copyto(room.view(torch.uint8).numpy(), largest.view(torch.uint8).numpy())

    roof()
    beside(benchmark, ours, peers={"gloo": gloo, "ray_put": ray_put, "unverified": unverified}, roof=roof, rounds=7)
    info = benchmark.extra_info
    info["share_of_verification"] = 1 - info["unverified_ms"] / info["ours_ms"]
    info["gigabytes"] = sum(tensor.nbytes for tensor in weights.values()) / 1e9
    sending.close()


class Turns:
    """Two versions of the weights in turn, a new one at every pass."""

    def __init__(self, *versions: dict[str, Tensor]) -> None:
        self.versions, self.passes = versions, 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.passes += 1
        return iter(self.versions[self.passes % len(self.versions)].items())


def test_frozen_layers_left_out(benchmark: BenchmarkFixture, engines: tuple[Engine, Engine]) -> None:
    """The last quarter of the layers trains. What does not change is read once, and neither copied nor checked again."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes().items()}
    trained = {name for name in weights if any(f"layers.{index}." in name for index in range(3 * LAYERS // 4, LAYERS))}
    moved = {name: tensor + 1 if name in trained else tensor for name, tensor in weights.items()}
    by_parts, whole = engines
    delta = SharedMemoryTrainer(client=by_parts, source=FingerprintedSource(Turns(weights, moved)), rank=0, delta=True)
    full = SharedMemoryTrainer(client=whole, source=FingerprintedSource(Turns(weights, moved)), rank=0)
    for sending, engine in ((delta, by_parts), (full, whole)):
        sending.send_weights()
        sent = sending.send_weights()
        assert engine.ask("told") == sent
    some = torch.cat([weights[name].view(-1) for name in trained])
    room = torch.empty_like(some)
    beside(benchmark, delta.send_weights, peers={"everything": full.send_weights}, roof=lambda: room.copy_(some), rounds=7)
    benchmark.extra_info["share_of_bytes"] = some.nbytes / sum(tensor.nbytes for tensor in weights.values())
    delta.close()
    full.close()


@dataclass
class GpuEngine(Engine):
    """The receiving process on a GPU."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """The handshake."""
        self.ask("init", init_info)

    def start_weight_update(self) -> None:
        """Begin."""
        self.ask("call", "start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """One bucket."""
        self.ask("call", "update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End."""
        self.ask("call", "finish_weight_update")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA IPC needs a GPU that two processes share")
def test_ipc_on_one_gpu(benchmark: BenchmarkFixture) -> None:
    """Beside OpenRLHF's protocol: per parameter a copy, a handle, a call, and a wait for the device on both sides."""
    from torch.multiprocessing.reductions import reduce_tensor

    from hone.rollout.weight_sync import trainer

    weights = {name: torch.randn(shape, device="cuda", dtype=torch.bfloat16) for name, shape in shapes().items()}
    plain = started(GpuReceiver)
    engine = GpuEngine(plain.pipe, plain.process)
    sending = trainer("ipc", client=engine, source=weights.items(), rank=0, workers=1)

    def per_parameter() -> None:
        for name, tensor in weights.items():
            held = tensor.clone()
            engine.ask("one", name, reduce_tensor(held)[1])
            torch.cuda.synchronize()

    whole = torch.cat([tensor.view(-1) for tensor in weights.values()])
    expected = sending.send_weights()
    assert engine.ask("told") == expected
    per_parameter()
    assert engine.ask("told") == expected
    beside(benchmark, sending.send_weights, peers={"per_parameter": per_parameter}, roof=whole.clone, rounds=7, device="cuda")
    sending.close()
    engine.pipe.send(None)
    engine.process.join()
