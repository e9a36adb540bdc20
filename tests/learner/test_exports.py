"""An exported model, from a run or from a checkpoint of any of its steps, says in transformers and in vLLM what the learner said."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast, Qwen3Config

from hone.algos.algorithms import PPO
from hone.algos.algorithms.terms import KLPenalty
from hone.learner.checkpoint import directory as checkpoints
from hone.learner.checkpoint.export import export
from hone.learner.checkpoint.files import Files
from hone.learner.config import LoraConfig
from hone.learner.errors import CheckpointError
from hone.learner.learner import Learner
from hone.learner.packing import Shard, shards
from tests.learner.checkpoint_ranks import save
from tests.learner.one_step import MODELS
from tests.learner.tiny import SHAPE, VOCABULARY, make_batch, make_learner, save_config, score

LENGTHS = [9, 4, 13]
ALGO = PPO(kl=KLPenalty(init_coef=0.0))
ROLES = ("policy", "critic")
SERVED = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "moe_intermediate_size": 32}
"""What vLLM's CPU kernels need: heads of 32 or more."""
pytestmark = pytest.mark.timeout(600)


def shard(*, seed: int = 1) -> Shard:
    return shards(score(make_batch(LENGTHS, temperature=1.0), seed=seed), ranks=1, max_tokens=64)[0]


def everywhere(part: Shard) -> Shard:
    """The rows with every token but the first an action: the state after each is asked for, but that after a row's last."""
    mask = torch.ones(sum(LENGTHS), dtype=torch.bool)
    return dataclasses.replace(part, batch=dataclasses.replace(part.batch, action_mask=mask))


def rows(flat: Tensor) -> list[Tensor]:
    return list(flat.split(LENGTHS))


def said_by(learner: Learner) -> dict[str, list[Tensor]]:
    """The learner's own log-probabilities of each row's tokens but the first, and the value of the state before each row's last token."""
    part = everywhere(shard())
    return {
        "policy": [row[1:] for row in rows(learner.logp("policy", part))],
        "critic": [row[-1] for row in rows(learner.values("critic", part))],
    }


def trained(root: Path, name: str) -> dict[str, Any]:
    """Two steps, a checkpoint after each; what the learner said after the first, and its own export of then."""
    config = copy.deepcopy(MODELS[name])
    for setting, value in SERVED.items():
        setattr(config, setting, value)
    model = save_config(root / "start", config)
    words = Tokenizer(WordLevel({f"t{number}": number for number in range(VOCABULARY)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(root / "start")
    learner = make_learner(dict.fromkeys((*ROLES, "reference"), model), lr=1e-2)
    result: dict[str, Any] = {"root": root}
    for step in (1, 2):
        learner.update_policy("policy", shard(seed=step), ALGO)
        learner.update_critic("critic", shard(seed=step), ALGO)
        save(learner, root / "ckpt", step)
        if step == 1:
            result["said"] = said_by(learner)
            for role in ROLES:
                learner.export(role, str(root / role))
    learner.close()
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {name: trained(tmp_path_factory.mktemp(name), name) for name in MODELS}


@pytest.fixture(params=MODELS)
def run(request: pytest.FixtureRequest, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return runs[request.param]


@pytest.mark.parametrize("role", ROLES)
def test_a_checkpoint_exports_what_the_run_exported_at_that_step(run: dict[str, Any], role: str, tmp_path: Path) -> None:
    root = run["root"]
    assert export(root / "ckpt" / "step_1", tmp_path / "one", role=role) == root / "ckpt" / "step_1"
    assert export(root / "ckpt", tmp_path / "two", role=role) == root / "ckpt" / "step_2"
    online, one, two = (load_file(directory / "model.safetensors") for directory in (root / role, tmp_path / "one", tmp_path / "two"))
    assert online.keys() == one.keys() == two.keys()
    assert all(torch.equal(tensor, one[name]) for name, tensor in online.items())
    assert any(not torch.equal(tensor, two[name]) for name, tensor in online.items())
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (root / role / name).read_bytes()


def test_transformers_says_what_the_learner_said(run: dict[str, Any]) -> None:
    policy = AutoModelForCausalLM.from_pretrained(run["root"] / "policy", attn_implementation="eager")
    critic, loading = AutoModelForSequenceClassification.from_pretrained(run["root"] / "critic", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    critic.config.pad_token_id = critic.config.vocab_size + 1
    for row, logp, value in zip(rows(shard().batch.tokens), *(run["said"][role] for role in ROLES), strict=True):
        with torch.no_grad():
            own = policy(input_ids=row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None])[:, 0]
            assert_close(own, logp, rtol=1e-5, atol=1e-5)
            # The classifier scores a row's last token, which is the state before the next: here, before the one left off.
            assert_close(critic(input_ids=row[None, :-1]).logits[0, 0], value, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def vllm_says(runs: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every export of every model in one process of vLLM."""
    place = tmp_path_factory.mktemp("vllm")
    spec = {"tokens": [row.tolist() for row in rows(shard().batch.tokens)], "out": str(place / "said.json")}
    spec |= {kind: [str(run["root"] / role) for run in runs.values()] for kind, role in (("policies", "policy"), ("critics", "critic"))}
    (place / "spec.json").write_text(json.dumps(spec))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.learner.vllm_reads", str(place / "spec.json")]
    with (place / "log").open("w") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=580).returncode
    if code:
        pytest.fail((place / "log").read_text()[-6000:])
    return json.loads((place / "said.json").read_text())


def test_vllm_says_what_the_learner_said(run: dict[str, Any], vllm_says: dict[str, Any]) -> None:
    policy, critic = (vllm_says[str(run["root"] / role)] for role in ROLES)
    for row, logp in zip(policy, run["said"]["policy"], strict=True):
        assert_close(torch.tensor(row), logp, rtol=1e-5, atol=1e-4)
    values = torch.stack(run["said"]["critic"])
    assert values.abs().min() > 1e-3, "a head of zeros shows nothing"
    assert_close(torch.tensor(critic), values, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_exported_is_said_before_a_model_is_read(run: dict[str, Any], tmp_path: Path) -> None:
    step = run["root"] / "ckpt" / "step_1"
    with pytest.raises(CheckpointError, match=r"no reference that was trained; it has critic, policy: name one with --role"):
        export(step, tmp_path / "out", role="reference")
    with pytest.raises(CheckpointError, match="is not an empty directory"):
        export(step, step)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        export(tmp_path / "nowhere", tmp_path / "out")
    checkpoints.begin(Files(), tmp_path / "half", 3)
    with pytest.raises(CheckpointError, match="half-written"):
        export(tmp_path / "half", tmp_path / "out")
    (run["root"] / "start").rename(run["root"] / "moved")
    try:
        with pytest.raises(CheckpointError, match=r"which is not there any more; say where it is with --model DIR"):
            export(step, tmp_path / "out")
        export(step, tmp_path / "out", model=str(run["root"] / "moved"))
    finally:
        (run["root"] / "moved").rename(run["root"] / "start")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (run["root"] / "policy" / "model.safetensors").read_bytes()


def same_files(one: Path, other: Path) -> None:
    names = sorted(str(file.relative_to(one)) for file in one.rglob("*") if file.is_file())
    assert names == sorted(str(file.relative_to(other)) for file in other.rglob("*") if file.is_file())
    assert [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()] == []


def test_the_average_of_a_checkpoint_is_exported_as_the_run_exports_it(tmp_path: Path) -> None:
    model = save_config(tmp_path / "start", MODELS["tied"])
    learner = make_learner(dict.fromkeys(ROLES, model), lr=1e-2, ema_beta=0.5)
    for step in range(2):
        learner.update_policy("policy", shard(seed=step), ALGO)
        learner.update_critic("critic", shard(seed=step), ALGO)
    path = save(learner, tmp_path / "ckpt", 1)
    for role in ROLES:
        learner.export(role, str(tmp_path / f"{role}-run"), average=True)
        export(path, tmp_path / f"{role}-checkpoint", role=role, average=True)
        same_files(tmp_path / f"{role}-run", tmp_path / f"{role}-checkpoint")
    learner.export("policy", str(tmp_path / "last"))
    last, average = (load_file(tmp_path / name / "model.safetensors") for name in ("last", "policy-run"))
    assert not torch.equal(last["model.norm.weight"], average["model.norm.weight"])
    export(path, tmp_path / "weights")
    same_files(tmp_path / "last", tmp_path / "weights")
    plain = make_learner({"policy": model})
    with pytest.raises(CheckpointError, match=r"has no moving average of its policy; .*--train\.enable-ema"):
        export(save(plain, tmp_path / "without", 1), tmp_path / "none", average=True)


@pytest.mark.parametrize("four_bit", [False, pytest.param(True, marks=pytest.mark.skipif(not find_spec("bitsandbytes"), reason="extra"))])
def test_adapters_of_a_checkpoint_are_exported_as_the_run_exports_them(tmp_path: Path, four_bit: bool) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}  # of four bits whole blocks of 64
    model = save_config(tmp_path / "start", Qwen3Config(**{**SHAPE, **wide}, tie_word_embeddings=True))
    ds = {"lora": LoraConfig(rank=3, alpha=6), "load_in_4bit": four_bit}
    learner = make_learner(dict.fromkeys(ROLES, model), lr=1e-2, ds=ds)
    for step in range(2):
        learner.update_policy("policy", shard(seed=step), ALGO)
        learner.update_critic("critic", shard(seed=step), ALGO)
    path = save(learner, tmp_path / "ckpt", 1)
    for role in ROLES:
        learner.export(role, str(tmp_path / f"{role}-run"))
        export(path, tmp_path / f"{role}-checkpoint", role=role)
        same_files(tmp_path / f"{role}-run", tmp_path / f"{role}-checkpoint")
    adapter = load_file(tmp_path / "policy-checkpoint" / "adapter" / "adapter_model.safetensors")
    assert adapter and all(tensor.any() for tensor in adapter.values())
