"""From sampled responses to what a learner rank holds: packed arrays beside the forms that other controllers send.

1,024 samples of log-normal lengths, as an engine hands them over. Ours: trajectories, packed, planned into micro-batches, one
put into Ray's object store, read by a rank in another process. The peers: a list of dictionaries of tensors, one per sample; and
OpenRLHF's padded tensors. A call ends when the rank has summed what it was sent, so that it did read it.
"""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.bench_roof import beside
from hone.algos.batch import SamplerContract, Trajectory, pack
from hone.launch.sent import Sent, sent
from hone.learner.packing import shards

CONTRACT = SamplerContract(temperature=1.0, top_p=1.0, top_k=0, seed=0, engine="e", tokenizer="t", template="c")
PROMPT = 128


class Rank:
    """A learner process as far as it receives."""

    def read(self, sent: Any) -> float:
        """The sum of all token ids, whatever they lie in."""
        if isinstance(sent, list):
            return float(sum(int(one["tokens"].sum()) for one in sent))
        return float((sent.shard().batch.tokens if isinstance(sent, Sent) else sent["tokens"]).sum())


@pytest.fixture(scope="module")
def rank() -> Iterator[Any]:
    from hone.launch.cluster import start  # its settings: zero copy, loopback, no reports

    with tempfile.TemporaryDirectory(prefix="hone-bench-") as scratch:
        start(Path(scratch))
        yield ray.remote(Rank).remote()
        ray.shutdown()


def sampled(rows: int) -> list[dict[str, Any]]:
    """What an engine answers: ids and log-probabilities as plain numbers."""
    generator = torch.Generator().manual_seed(0)
    lengths = (512 * torch.randn(rows, generator=generator).exp()).long().clamp(16, 4096).tolist()
    return [
        {
            "tokens": torch.randint(0, 150_000, (PROMPT + length,), generator=generator),
            "logp": -torch.rand(PROMPT + length, generator=generator),
        }
        for length in lengths
    ]


@pytest.mark.parametrize("rows", [1024])
def test_rank_holds_a_batch(benchmark: BenchmarkFixture, rank: Any, rows: int) -> None:
    answers = sampled(rows)
    expected = float(sum(int(one["tokens"].sum()) for one in answers))
    masks = [torch.arange(len(one["tokens"])) >= PROMPT for one in answers]
    trajectories = [
        Trajectory(
            prompt_id=str(index // 8),
            sample=index % 8,
            tokens=one["tokens"],
            action_mask=mask,
            rollout_logp=one["logp"],
            rewards=torch.zeros(len(mask)),
            version=torch.zeros(len(mask), dtype=torch.long),
            truncated=False,
            score=0.0,
            contract=CONTRACT,
        )
        for index, (one, mask) in enumerate(zip(answers, masks, strict=True))
    ]

    def through(given: Any) -> float:
        return ray.get(rank.read.remote(ray.put(given)))

    def ours() -> float:
        return through(travelling())

    def travelling() -> Sent:
        [shard] = shards(pack(trajectories), ranks=1, max_tokens=16_384)
        return sent(shard)

    def fields(one: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        return {
            "tokens": one["tokens"],
            "attention_mask": torch.ones_like(one["tokens"]),
            "action_mask": mask,
            "logp": one["logp"],
            "rewards": torch.zeros(1),
        }

    def list_of_dicts() -> float:
        return through([fields(one, mask) for one, mask in zip(answers, masks, strict=True)])

    def padded_batch() -> dict[str, Tensor]:
        each = [fields(one, mask) for one, mask in zip(answers, masks, strict=True)]
        return {name: pad_sequence([one[name] for one in each], batch_first=True) for name in each[0]}

    def padded() -> float:
        return through(padded_batch())

    assert ours() == list_of_dicts() == padded() == expected
    ours_bytes = sum(value.nbytes for value in travelling().tensors.values())
    padded_bytes = sum(value.nbytes for value in padded_batch().values())
    lengths = pack(trajectories).lengths
    benchmark.extra_info.update(
        tokens=int(lengths.sum()),
        padding=1 - float(lengths.sum()) / (rows * int(lengths.max())),
        ours_mib=ours_bytes / 2**20,
        padded_mib=padded_bytes / 2**20,
        share_of_padded_bytes=ours_bytes / padded_bytes,
    )
    source = torch.empty(math.ceil(ours_bytes / 8), dtype=torch.float64)
    beside(benchmark, ours, peers={"list_of_dicts": list_of_dicts, "padded": padded}, roof=source.clone, rounds=7)
