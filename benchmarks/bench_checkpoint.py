"""How long a save keeps training waiting: the snapshot beside torch.save, safetensors and torch's distributed checkpoint, same state.

The state is that of AdamW in fp32 over a model of 90 M parameters: masters and two moments, 1.08 GB. The roof is one memory copy of it
between buffers that are there already. Parity: what the writer leaves is the state, bit for bit.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from safetensors.torch import save_file
from torch.distributed import checkpoint as distributed_checkpoint

from benchmarks.bench_roof import beside
from hone.learner.checkpoint.files import Files
from hone.learner.checkpoint.pieces import Piece
from hone.learner.checkpoint.shard_file import RoleReader, file_name, lay_out
from hone.learner.checkpoint.snapshot import Writer

SHAPE, LAYERS = (3000, 1000), 30
SECTIONS = ("master", "optimiser.exp_avg", "optimiser.exp_avg_sq")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)  # gigabytes, which pytest would keep for three sessions


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # that is what a peer without ranks says
def test_stall(benchmark: BenchmarkFixture, place: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {f"{section}/layers.{layer}.weight": torch.randn(SHAPE, generator=generator) for layer in range(LAYERS) for section in SECTIONS}
    pieces = [
        Piece(section=key.partition("/")[0], name=key.partition("/")[2], shape=SHAPE, start=0, values=tensor.view(-1))
        for key, tensor in state.items()
    ]
    layout = [(f"layers.{layer}.weight", list(SHAPE)) for layer in range(LAYERS)]
    about = {"role": "policy", "rank": 0, "world_size": 1, "counters": {}, "layout": layout}
    writer, target = Writer(Files(), pinned=False), place / file_name("policy", rank=0, world_size=1)

    def settle() -> None:
        """The last save reaches the disk, as it does between two saves of a run: `background_write_ms`, which is in nobody else's time."""
        outcome = writer.outcome(wait=True)
        assert outcome is None or not outcome.error
        target.unlink(missing_ok=True)

    def ours() -> None:
        writer.save({target: lay_out(pieces, about)})

    def torch_save() -> None:
        torch.save(state, place / "peer.pt")

    def safetensors_save() -> None:
        save_file(state, place / "peer.safetensors")

    def distributed_save() -> None:
        shutil.rmtree(place / "peer", ignore_errors=True)
        distributed_checkpoint.save(dict(state), checkpoint_id=place / "peer", no_dist=True)

    ours()
    assert not writer.outcome(wait=True).error
    reader = RoleReader(place, "policy")
    assert all(torch.equal(reader.whole(piece.section, piece.name), state[piece.key]) for piece in pieces)
    settle()
    whole = torch.cat([tensor.view(-1) for tensor in state.values()])
    copy = whole.clone()
    peers = {"background_write": settle, "torch_save": torch_save, "safetensors": safetensors_save, "distributed": distributed_save}
    beside(benchmark, ours, peers=peers, roof=lambda: copy.copy_(whole), rounds=3)
    settle()
    benchmark.extra_info["gigabytes"] = sum(tensor.nbytes for tensor in state.values()) / 1e9
