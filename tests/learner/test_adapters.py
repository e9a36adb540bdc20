"""LoRA adapters: the mathematics, what is handed out and written, what a checkpoint demands, and what is refused."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.func import functional_call
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hone.algos.algorithms import PPO
from hone.algos.batch import Scored
from hone.learner.checkpoint import directory as checkpoints
from hone.learner.checkpoint.files import Files
from hone.learner.config import LoraConfig
from hone.learner.errors import CheckpointError, ModelError
from hone.learner.learner import Learner
from hone.learner.packing import shards
from hone.learner.published import is_adapter
from hone.learner.supervised import NextToken
from tests.learner.tiny import CONFIGS, make_batch, make_learner, save_model, score

LORA = LoraConfig(rank=3, alpha=6)
ROLES = ("policy", "critic")
LENGTHS = [9, 4, 13]


def learner_of(model: str, *roles: str, lora: LoraConfig = LORA, **settings: Any) -> Learner:
    return make_learner(dict.fromkeys(roles or ("policy",), model), ds={"lora": lora}, **settings)


def scored() -> Scored:
    return score(make_batch(LENGTHS, temperature=1.0))


def randomise(learner: Learner, role: str) -> None:
    """Adapters that do something: B is zero to begin with."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in learner.engines[role].module.named_weights():
        if is_adapter(name):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def weights(learner: Learner, role: str = "policy") -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.weights(role)}


def update(learner: Learner, role: str = "policy") -> None:
    (shard,) = shards(scored(), ranks=1, max_tokens=64)
    if role == "policy":
        learner.update_policy(role, shard, NextToken())
    else:
        learner.update_critic(role, shard, PPO())


def logp(learner: Learner) -> torch.Tensor:
    (shard,) = shards(make_batch(LENGTHS, temperature=1.0), ranks=1, max_tokens=64)
    return learner.logp("policy", shard)


def plain_logp(model: Any) -> torch.Tensor:
    """Of the batch's action tokens by transformers alone, row by row; zero elsewhere."""
    batch, rows = make_batch(LENGTHS, temperature=1.0), []
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        row = batch.tokens[start:end]
        found = model(input_ids=row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None])[:, 0]
        rows.append(torch.cat([found.new_zeros(1), found]) * batch.action_mask[start:end])
    return torch.cat(rows)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_step_is_that_of_a_plain_model_with_the_products_written_out(tmp_path: Path, kind: str) -> None:
    directory = save_model(tmp_path, kind)
    learner = learner_of(directory)
    randomise(learner, "policy")
    module = learner.engines["policy"].module
    pairs = {name: parameter.detach().clone().requires_grad_() for name, parameter in module.named_weights() if is_adapter(name)}
    assert len(pairs) == 2 * 7 * 2  # A and B of seven linear layers in two blocks

    plain = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    base = {name: parameter.detach() for name, parameter in plain.named_parameters()}
    written_out = dict(base)
    for name in base:
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in pairs:
            written_out[name] = base[name] + (6 / 3) * pairs[f"{stem}.lora_B.weight"] @ pairs[f"{stem}.lora_A.weight"]
    batch = scored()
    losses = []
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        row = batch.tokens[start:end]
        found = functional_call(plain, written_out, kwargs={"input_ids": row[None]}).logits[0, :-1].log_softmax(-1)
        used = batch.weights[start + 1 : end] * batch.action_mask[start + 1 : end]
        losses.append(-(used * found.gather(1, row[1:, None])[:, 0]).sum())
    torch.stack(losses).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in pairs.items()}

    engine = learner.engines["policy"]
    (shard,) = shards(batch, ranks=1, max_tokens=64)
    seen: dict[str, torch.Tensor] = {}
    original = engine.step

    def step() -> Any:
        seen.update({name: one.grad.clone() for name, one in module.named_weights() if one.grad is not None})
        return original()

    engine.step = step
    info = learner.update_policy("policy", shard, NextToken())
    assert seen.keys() == gradients.keys()
    order = [name for name, _ in module.named_weights()]
    for name in sorted(gradients, key=order.index):
        # The batch's rows are packed in another order, so sums round otherwise.
        assert_close(seen[name], gradients[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    norm = torch.stack([one.norm() for one in gradients.values()]).norm()
    assert_close(info.grad_norm, float(norm), rtol=1e-5, atol=0)
    optimiser = torch.optim.AdamW(pairs.values(), lr=info.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    for name, parameter in pairs.items():
        parameter.grad = gradients[name] * min(1.0, 0.5 / float(norm))
    optimiser.step()
    for name, parameter in module.named_weights():
        if name in pairs:
            assert_close(parameter.detach(), pairs[name].detach(), rtol=1e-4, atol=1e-3 * info.lr)
        else:
            assert torch.equal(parameter, base[name]), name


def test_fresh_adapters_change_nothing_and_merged_ones_are_the_model(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", "qwen3-tied")
    plain, learner = make_learner({"policy": directory}), learner_of(directory)
    assert torch.equal(logp(learner), logp(plain))
    assert all(torch.equal(one, other) for one, other in zip(weights(learner).values(), weights(plain).values(), strict=True))
    assert learner.weight_names("policy") == plain.weight_names("policy")
    randomise(learner, "policy")
    before = {piece.key: piece.values.clone() for piece in learner.engines["policy"].pieces()}
    expected = logp(learner)
    assert float((expected - logp(plain)).abs().max()) > 0.1, "the adapters do nothing"
    learner.export("policy", str(tmp_path / "export"))
    assert set(load_file(tmp_path / "export" / "model.safetensors")) == set(load_file(tmp_path / "model" / "model.safetensors"))
    assert_close(plain_logp(AutoModelForCausalLM.from_pretrained(tmp_path / "export")), expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(piece.values, before[piece.key]) for piece in learner.engines["policy"].pieces())
    assert torch.equal(logp(learner), expected)


def test_an_exported_adapter_loads_in_peft(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", "llama-untied")
    learner = learner_of(directory, *ROLES, lora=LoraConfig(rank=2, target_modules="q_proj,layers.1.mlp.down_proj"))
    for role in ROLES:
        update(learner, role)
        learner.export(role, str(tmp_path / role))
    own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "policy" / "adapter")
    assert_close(plain_logp(own), logp(learner), rtol=1e-4, atol=1e-5)
    # The critic's head trains beside the adapter, and travels with it.
    classifier = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, pad_token_id=60)
    classifier = PeftModel.from_pretrained(classifier, tmp_path / "critic" / "adapter")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic", pad_token_id=60)
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        value = merged(input_ids=tokens).logits
        assert float(value.abs()) > 1e-3
        assert_close(classifier(input_ids=tokens).logits, value, rtol=1e-4, atol=1e-5)


def test_dropout_of_an_adapter_works_in_updates_alone(tmp_path: Path) -> None:
    directory = save_model(tmp_path, "llama-untied")
    with_dropout, without = (learner_of(directory, lora=LoraConfig(rank=3, dropout=dropout)) for dropout in (0.5, 0.0))
    for learner in (with_dropout, without):
        randomise(learner, "policy")
    assert torch.equal(logp(with_dropout), logp(without))
    update(with_dropout)
    update(without)
    assert not torch.equal(logp(with_dropout), logp(without))
    assert torch.equal(logp(with_dropout), logp(with_dropout))


def save(learner: Learner, root: Path) -> str:
    partial = checkpoints.begin(Files(), root, 1)
    learner.save(str(partial))
    outcome = learner.saved(wait=True)
    assert outcome is not None and not outcome.error
    return str(checkpoints.complete(Files(), partial, outcome.files, {}))


def test_a_checkpoint_holds_adapters_and_fits_no_other_settings(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", "qwen3-tied")
    learner = learner_of(directory, *ROLES)
    for role in ROLES:
        update(learner, role)
    path = save(learner, tmp_path / "checkpoints")
    names = {piece.name for role in ROLES for piece in learner.engines[role].pieces()}
    assert all(is_adapter(name) or name == "score.weight" for name in names), "only what trains has a state"
    for role in ROLES:
        update(learner, role)

    again = learner_of(directory, *ROLES)
    again.restore(path)
    for role in ROLES:
        update(again, role)
        assert all(
            torch.equal(one, other) for one, other in zip(weights(again, role).values(), weights(learner, role).values(), strict=True)
        )
        kept = {piece.key: piece.values for piece in learner.engines[role].pieces()}
        assert all(torch.equal(piece.values, kept[piece.key]) for piece in again.engines[role].pieces())

    for lora, what in {
        LoraConfig(): r"another model.*lora_A",
        LoraConfig(rank=4, alpha=6): r"another model.*lora_A.weight, \(3, 32\) there and \(4, 32\) here",
        LoraConfig(rank=3, alpha=7): r"another lora.alpha \(6 there, 7 here\)",
        LoraConfig(rank=3, alpha=6, target_modules="q_proj"): "another model",
    }.items():
        with pytest.raises(CheckpointError, match=what):
            learner_of(directory, *ROLES, lora=lora).restore(path)
    with pytest.raises(CheckpointError, match="another frozen weights"):
        learner_of(save_model(tmp_path / "other", "qwen3-tied", seed=1), *ROLES).restore(path)
    plain = save(make_learner(dict.fromkeys(ROLES, directory)), tmp_path / "plain")
    with pytest.raises(CheckpointError, match="another model"):
        learner_of(directory, *ROLES).restore(plain)


def test_targets_that_match_nothing_are_told_before_weights_are_read(tmp_path: Path) -> None:
    directory = save_model(tmp_path, "llama-untied")
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    said = r"--ds.lora.target-modules {} matches none of .*they are called q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    for target in ("query", "lm_head", "embed_tokens"):
        for role in ROLES:
            with pytest.raises(ModelError, match=said.format(target)):
                learner_of(directory, role, lora=LoraConfig(rank=2, target_modules=f"q_proj,{target}"))


def test_frozen_parts_stay_and_all_else_trains(tmp_path: Path) -> None:
    directory = save_model(tmp_path, "qwen3-tied")
    learner = make_learner({"policy": directory, "critic": directory}, trained={"freeze": "*.layers.0.*, *norm.weight"})
    for role in ROLES:
        before = weights(learner, role)
        update(learner, role)
        update(learner, role)  # a fresh head of zeros gives the critic's body no gradient at first
        for name, weight in weights(learner, role).items():
            assert torch.equal(weight, before[name]) == (".layers.0." in name or name.endswith("norm.weight")), name
    assert not any(".layers.0." in piece.name for piece in learner.engines["policy"].pieces())


def test_patterns_of_frozen_parts_that_cannot_be_meant(tmp_path: Path) -> None:
    directory = save_model(tmp_path, "llama-untied")
    (tmp_path / "model.safetensors").write_bytes(b"torn")  # nothing is read
    with pytest.raises(ModelError, match=r"no parameter that matches '\*\.router\.\*'.*called like model\.embed_tokens\.weight"):
        make_learner({"policy": directory}, trained={"freeze": "*.mlp.*,*.router.*"})
    with pytest.raises(ModelError, match="nothing left to train: \\* match all of it"):
        make_learner({"policy": directory}, trained={"freeze": "*"})
