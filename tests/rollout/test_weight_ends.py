"""The two ends of the weight transfer apart from an engine: fingerprints, the learner's end, vLLM's receivers as we extend them."""

import errno
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hone.rollout.errors import EngineError, EngineLost
from hone.rollout.weight_sync import compiled_sums, source, trainer
from hone.rollout.weight_sync.protocol import FanOut
from hone.rollout.weight_sync.shared_memory import Mapping, SharedMemoryTrainer
from hone.rollout.weight_sync.source import PIECE, FingerprintedSource, copied, fingerprint

# vllm, while it is imported, scripts a function by torch's old way.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


# Fingerprints


def test_a_fingerprint_is_what_its_definition_says() -> None:
    # Two words, one short of a chunk, and three bytes behind them, in Python's own integers.
    data = torch.arange(19, dtype=torch.uint8)
    total = 0
    for index, word in enumerate((data[:8], data[8:16]), start=1):
        x = index * -7046029254386353131 % 2**64
        x = (x ^ (x >> 29)) * -4658895280553007687 % 2**64 | 1
        total += int.from_bytes(bytes(word.tolist()), "little") * x
    content = b"torch.uint8 (19,)" + (total % 2**64).to_bytes(8, "little") + bytes([16, 17, 18])
    assert fingerprint(data) == hashlib.blake2b(content, digest_size=8).hexdigest()


def test_the_bytes_count_and_not_how_they_lie_in_memory() -> None:
    tensor = torch.randn(300, 70, generator=torch.Generator().manual_seed(0))
    assert fingerprint(tensor) == fingerprint(tensor.t().contiguous().t()) == fingerprint(torch.cat([torch.zeros(1, 70), tensor])[1:])
    odd = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert fingerprint(odd[1:]) == fingerprint(odd[1:].clone())


@pytest.mark.parametrize("words", [1, 1_023, 1_024, 1_025, 70_000, 300_000])
def test_compiled_sums_are_plain_ones(words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="compiled sums need numba (hone-algos[fast])")
    data = torch.randint(-(2**62), 2**62, (words,), generator=torch.Generator().manual_seed(words)).view(torch.uint8)[: 8 * words - 3]
    asked = []
    plain = fingerprint(data)
    monkeypatch.setattr(source, "COMPILED_WORDS", 1)
    monkeypatch.setattr(compiled_sums, "in_threads", lambda *a, run=compiled_sums.in_threads, **b: asked.append(1) or run(*a, **b))
    assert fingerprint(data) == plain and asked
    target = torch.zeros(data.numel(), dtype=torch.uint8)
    assert copied(data, target) == plain and torch.equal(target, data)


@given(size=st.integers(1, 40_000), at=st.integers(0), bit=st.integers(0, 31), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_one_flipped_bit_changes_the_fingerprint(size: int, at: int, bit: int, dtype: torch.dtype) -> None:
    tensor = torch.zeros(size, dtype=dtype)
    before = fingerprint(tensor)
    raw = tensor.view(torch.uint8)
    raw[at % raw.numel()] ^= 1 << bit % 8
    assert fingerprint(tensor) != before


def test_shape_dtype_and_order_change_the_fingerprint() -> None:
    square = torch.arange(16.0).view(4, 4)
    others = [square.t(), square.view(2, 8), square.view(torch.int32), square.flip(0), square.bfloat16()]
    assert len({fingerprint(one) for one in [square, *others]}) == 6


# The learner's end


@dataclass
class Loading:
    """A client that reads the file as an engine would, and keeps what it read."""

    opened: int = -1
    path: str = ""
    mode: int = 0
    calls: list[str] = field(default_factory=list)
    read: dict[str, bytes] = field(default_factory=dict)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.path = init_info["path"]
        self.opened = os.open(self.path, os.O_RDONLY)
        self.mode = os.fstat(self.opened).st_mode & 0o777

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, update_info: Any) -> None:
        self.calls.append("update")
        for name, shape, dtype, offset in zip(*(update_info[key] for key in ("names", "shapes", "dtype_names", "offsets")), strict=True):
            self.read[name] = os.pread(self.opened, torch.Size(shape).numel() * getattr(torch, dtype).itemsize, offset)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append("finish")


@dataclass
class Weights:
    """A stream of tensors that can be run again, counting its passes."""

    tensors: dict[str, Tensor]
    passes: int = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.passes += 1
        return iter(self.tensors.items())


def test_the_file_is_private_unlinked_reused_and_holds_the_bytes() -> None:
    weights = Weights({"a": torch.arange(5.0), "b": torch.ones(3, 7, dtype=torch.bfloat16), "none": torch.empty(0), "c": torch.tensor(2)})
    client = Loading()
    sending = trainer("shared_memory", client=client, source=weights, rank=0, workers=1)
    assert client.mode == 0o600
    assert not Path(client.path).exists()
    for scale in (1, 3):
        weights.tensors["a"] *= scale
        assert sending.send_weights() == {name: fingerprint(tensor) for name, tensor in weights.tensors.items()}
        assert client.read == {name: bytes(tensor.reshape(-1).view(torch.uint8).tolist()) for name, tensor in weights.tensors.items()}
    assert client.calls == ["start", "update", "finish"] * 2
    sending.close()
    os.close(client.opened)


@dataclass
class Reading:
    """A client that maps the file and takes fingerprints as an engine does; `damage` is done to the memory at a call."""

    damage: Callable[[Any, int], None] = lambda _info, _file: None
    mapping: Mapping | None = None
    found: dict[str, str] = field(default_factory=dict)
    heard: list[dict[str, Any]] = field(default_factory=list)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.file = os.open(init_info["path"], os.O_RDWR)
        self.mapping = Mapping(init_info["path"])

    def start_weight_update(self) -> None:
        assert self.mapping is not None
        self.mapping.begin()

    def update_weights(self, update_info: Any) -> None:
        assert self.mapping is not None
        self.heard.append(update_info)
        self.damage(update_info, self.file)
        if update_info["ahead"]:
            self.mapping.ahead(*update_info["ahead"])
        for name, tensor in self.mapping.tensors(SimpleNamespace(**update_info)):
            self.found[name] = self.mapping.fingerprint(tensor)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        pass


LARGE = {"small": torch.arange(1_000.0), "large": torch.arange(70_001.0), "after": torch.arange(7.0)}


def test_a_tensor_larger_than_a_region_is_checked_as_it_grows() -> None:
    client = Reading()
    sending = SharedMemoryTrainer(client=client, source=FingerprintedSource(LARGE.items()), rank=0, region_bytes=8 * PIECE)
    for _ in range(3):
        client.found, client.heard = {}, []
        assert sending.send_weights() == client.found == {name: fingerprint(tensor) for name, tensor in LARGE.items()}
        ready = [info["ahead"][1] for info in client.heard if info["ahead"]]
        assert ready == list(range(8 * PIECE, LARGE["large"].nbytes, 8 * PIECE))
    sending.close()


@pytest.mark.parametrize("at", [5, 8 * PIECE + 3, 4 * 70_000])
def test_damage_anywhere_in_a_large_tensor_is_seen(at: int) -> None:
    def damage(info: Any, file: int) -> None:
        if "large" in client.found or not (info["ahead"] or "large" in info["names"]):
            return
        begin, ready = info["ahead"] or (info["offsets"][info["names"].index("large")], LARGE["large"].nbytes)
        if ready - 8 * PIECE <= at < ready:
            os.pwrite(file, bytes([os.pread(file, 1, begin + at)[0] ^ 1]), begin + at)

    client = Reading(damage)
    sending = SharedMemoryTrainer(client=client, source=FingerprintedSource(LARGE.items()), rank=0, region_bytes=8 * PIECE)
    sent = sending.send_weights()
    assert [name for name in sent if client.found[name] != sent[name]] == ["large"]
    sending.close()


def test_other_ranks_gather_and_do_nothing_else() -> None:
    weights, client = Weights({"a": torch.ones(2)}), Loading()
    sending = trainer("shared_memory", client=client, source=weights, rank=1, workers=1)
    assert sending.send_weights() == {}
    assert (weights.passes, client.calls, client.path) == (1, [], "")


def test_full_shared_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    sending = SharedMemoryTrainer(client=Loading(), source=FingerprintedSource({"a": torch.ones(4)}.items()), rank=0)
    with pytest.raises(EngineError, match=r"shared memory is full: .*--shm-size"):
        sending.send_weights()
    sending.close()


def test_a_name_that_comes_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' twice"):
        list(FingerprintedSource([("a", torch.ones(1)), ("a", torch.zeros(1))]))


def test_metadata_comes_from_one_pass() -> None:
    weights = Weights({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)})
    source = FingerprintedSource(weights)
    assert [(one.name, one.dtype, one.shape) for one in source.metadata()] == [("a", torch.float32, (2, 3)), ("b", torch.bfloat16, (4,))]
    source.metadata()
    assert weights.passes == 1


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'rdma'.*shared_memory, file, ipc or nccl"):
        trainer("rdma", client=Loading(), source=[], rank=0, workers=1)


def test_the_learners_end_does_not_import_vllm() -> None:
    code = "import sys, hone.rollout.weight_sync, hone.rollout.engines.vllm; assert 'vllm' not in sys.modules and 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})


def test_several_engines_take_each_call_at_once_and_nccl_ranks_in_turn() -> None:
    together = threading.Barrier(2, timeout=30)

    class Meeting(Loading):
        """Answers only when the other engine is being asked, too."""

        def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
            together.wait()
            self.calls.append(f"init at {init_info['rank_offset']} of {init_info['world_size']}")

        def update_weights(self, update_info: Any) -> None:
            together.wait()
            self.calls.append("update")

    engines = [Meeting(), Meeting()]
    client = FanOut(engines, ranks_per_engine=2)
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 5})
    client.start_weight_update()
    client.update_weights({})
    client.finish_weight_update()
    assert [engine.calls for engine in engines] == [[f"init at {first} of 5", "start", "update", "finish"] for first in (1, 3)]


class Dying:
    """A client whose engine is lost at one of the calls."""

    def __init__(self, name: str, *, at: str = "") -> None:
        self.name, self.at, self.calls = name, at, []

    def __getattr__(self, method: str) -> Any:
        def call(*_: Any) -> None:
            self.calls.append(method)
            if method == self.at:
                raise EngineLost(self.name, f"died during {method}")

        return call


@pytest.mark.parametrize("at", ["start_weight_update", "update_weights", "finish_weight_update"])
def test_an_engine_lost_in_an_update_does_not_leave_the_others_half_loaded(at: str) -> None:
    dying, sound = Dying("engine-0", at=at), Dying("engine-1")
    client = FanOut([dying, sound], ranks_per_engine=1)
    client.start_weight_update()
    client.update_weights({})
    with pytest.raises(EngineLost, match="engine engine-0 died"):
        client.finish_weight_update()
    assert sound.calls == ["start_weight_update", "update_weights", "finish_weight_update"]
    assert dying.calls[-1] == at  # it is not asked again
    alone = FanOut([Dying("engine-0", at="update_weights")], ranks_per_engine=1)
    with pytest.raises(EngineLost, match="died during update_weights"):
        alone.update_weights({})


def test_vllms_own_receivers_record_what_reaches_the_model() -> None:
    from hone.rollout.weight_sync.plugin import Recording

    class Model(nn.Module):
        def load_weights(self, weights: Any) -> set[str]:
            return {f"fused.{name}" for name, _ in weights}

    class Receiver:
        """Stands for vLLM's nccl or ipc receiver, of which only the calls on the model matter."""

        def __init__(self) -> None:
            self.model, self.model_config = Model(), None

        def start_weight_update(self) -> None:
            pass

        def receive_weights(self, chunk: dict[str, Tensor]) -> None:
            self.model.load_weights(list(chunk.items()))

    class Recorder(Recording, Receiver):
        pass

    receiver = Recorder()
    for _ in range(2):
        receiver.start_weight_update()
        receiver.receive_weights({"a": torch.ones(2)})
        receiver.receive_weights({"b": torch.zeros(3)})
        assert receiver.received == {"a": fingerprint(torch.ones(2)), "b": fingerprint(torch.zeros(3))}
        assert receiver.loaded == {"fused.a", "fused.b"}
    assert "load_weights" not in vars(receiver.model)


ORPHAN = """
import multiprocessing, os, signal, time

def child(pipe):
    from hone.rollout.weight_sync.plugin import register
    register()
    pipe.send(os.getpid())
    time.sleep(600)

if __name__ == "__main__":
    here, there = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=child, args=(there,)).start()
    print(here.recv(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc whether a process is gone")
def test_vllms_processes_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    with (tmp_path / "printed").open("w+") as printed:  # a file: the orphan would hold a pipe open
        subprocess.run([sys.executable, str(script)], stdout=printed, stderr=subprocess.DEVNULL, check=False)
        printed.seek(0)
        status = Path(f"/proc/{int(printed.read())}/status")
    deadline = time.monotonic() + 30
    # A dead process whose new parent has not collected it yet is listed as a zombie.
    while status.exists() and "(zombie)" not in status.read_text():
        assert time.monotonic() < deadline, "the engine's process outlived its parent"
        time.sleep(0.05)
