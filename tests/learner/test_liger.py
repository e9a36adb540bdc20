"""Liger's kernels: refused where they cannot run; on a GPU, the same log-probabilities and gradients as without."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from hone.learner import liger
from hone.learner.config import ActorConfig, DeepSpeedConfig
from hone.learner.errors import ModelError
from hone.learner.learner import Learner, RoleSpec
from hone.learner.packing import shards
from hone.learner.supervised import NextToken
from tests.learner.tiny import make_batch, save_model, score


def learner(model: str, *, use_liger_kernel: bool) -> Learner:
    return Learner(
        roles={"policy": RoleSpec(kind="policy", model=model, config=ActorConfig(), total_steps=10)},
        ds=DeepSpeedConfig(param_dtype="fp32", use_liger_kernel=use_liger_kernel),
        backend="single",
        rank=0,
        world_size=1,
        master_addr="127.0.0.1",
        master_port=0,
        seed=0,
        max_tokens=100,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="only a machine without CUDA refuses")
def test_without_a_gpu_it_is_refused_before_a_model_is_looked_for() -> None:
    with pytest.raises(ModelError, match=r"Liger's kernels run on CUDA only, .* drop --ds\.use-liger-kernel"):
        learner("no/such/model/anywhere", use_liger_kernel=True)


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"liger-kernel is not installed; .* hone-learner\[liger\]"):
        liger.check_liger(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("liger_kernel") is None, reason="needs CUDA and liger-kernel")
@pytest.mark.parametrize("kind", ["qwen3-tied", "llama-untied"])
def test_log_probabilities_and_gradients_are_the_same(tmp_path: Path, kind: str) -> None:
    model = save_model(tmp_path, kind)
    (shard,) = shards(score(make_batch([9, 21, 5, 14])), ranks=1, max_tokens=100)
    plain = learner(model, use_liger_kernel=False)
    expected, norm = plain.logp("policy", shard), plain.update_policy("policy", shard, NextToken()).grad_norm
    # Rotary embeddings are patched for the whole process, so the plain one comes first.
    ours = learner(model, use_liger_kernel=True)
    assert "Liger" in repr(ours.engines["policy"].module)
    assert_close(ours.logp("policy", shard), expected, rtol=1e-3, atol=1e-4)
    assert ours.update_policy("policy", shard, NextToken()).grad_norm == pytest.approx(norm, rel=1e-3)
