"""Mixtures of experts: the balancing loss of a whole step, experts by their checkpoint names, frozen routers, and what is refused."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from hone.learner.errors import ModelError
from hone.learner.learner import Learner
from hone.learner.packing import shards
from hone.learner.roles import StepResult
from hone.learner.supervised import NextToken
from tests.learner.test_adapters import logp, plain_logp, save, update, weights
from tests.learner.tiny import MIXTURE, SHAPE, make_batch, make_learner, save_config, save_model, score

MIXTURES = {"qwen3-moe": MIXTURE, "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, tie_word_embeddings=False)}
LENGTHS = [9, 4, 13, 6, 2]
COEF = 3.0
"""Large, so that a loss taken over the wrong tokens cannot hide behind the policy's."""


@pytest.fixture(scope="module", params=MIXTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_config(tmp_path_factory.mktemp("model"), MIXTURES[request.param])


def step(learner: Learner, *, max_tokens: int, role: str = "policy") -> tuple[StepResult, dict[str, torch.Tensor]]:
    """A step's result, and the gradients it was taken with."""
    engine, gradients = learner.engines[role], {}
    original = engine.step

    def watched() -> Any:
        gradients.update({name: one.grad.clone() for name, one in engine.module.named_weights()})
        return original()

    engine.step = watched
    (shard,) = shards(score(make_batch(LENGTHS, temperature=1.0)), ranks=1, max_tokens=max_tokens)
    return learner.update_policy(role, shard, NextToken()), gradients


def test_the_loss_is_transformers_own_over_the_whole_step_however_it_is_cut(model: str) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    batch, rows, losses = score(make_batch(LENGTHS, temperature=1.0)), [], []
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        output = plain(input_ids=batch.tokens[None, start:end], output_router_logits=True)
        rows.append(output.router_logits)
        found = output.logits[0, :-1].log_softmax(-1).gather(1, batch.tokens[start + 1 : end, None])[:, 0]
        losses.append(-(batch.weights * batch.action_mask)[start + 1 : end] @ found)
    expected = load_balancing_loss_func(tuple(torch.cat(layer) for layer in zip(*rows, strict=True)), 4, 2)
    (sum(losses) + COEF * expected).backward()

    for max_tokens in (64, 13):
        learner = make_learner({"policy": model}, max_tokens=max_tokens, trained={"aux_loss_coef": COEF})
        result, gradients = step(learner, max_tokens=max_tokens)
        assert_close(result.metrics["aux_loss"], float(expected.detach()), rtol=1e-5, atol=0)
        assert 1 <= result.metrics["max_expert_load"] <= 2
        for name, parameter in plain.named_parameters():
            assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    # The mean of what each micro-batch would say is another number, so the test could have failed.
    with torch.no_grad():
        apart = sum(load_balancing_loss_func(logits, 4, 2) * len(logits[0]) for logits in rows) / sum(LENGTHS)
        assert abs(float(apart - expected)) > 0.01


def test_without_a_coefficient_nothing_is_counted(model: str) -> None:
    result, _ = step(make_learner({"policy": model}), max_tokens=64)
    assert not {"aux_loss", "max_expert_load"} & result.metrics.keys()


def test_weights_go_out_by_the_checkpoints_names(model: str, tmp_path: Path) -> None:
    learner = make_learner({"policy": model})
    stored = load_file(Path(model) / "model.safetensors")
    handed_out = weights(learner)
    assert handed_out.keys() == stored.keys() and any(".experts.3." in name for name in stored)
    assert all(torch.equal(weight, stored[name]) for name, weight in handed_out.items())
    layout = {name: (dtype, shape) for name, dtype, shape in learner.weight_names("policy")}
    assert list(layout) == list(handed_out)
    assert layout == {name: (weight.dtype, tuple(weight.shape)) for name, weight in handed_out.items()}
    update(learner)
    learner.export("policy", str(tmp_path))
    assert_close(plain_logp(AutoModelForCausalLM.from_pretrained(tmp_path)), logp(learner), rtol=1e-4, atol=1e-4)


def test_a_critic_of_experts_balances_comes_back_and_goes_on(model: str, tmp_path: Path) -> None:
    learner = make_learner({"critic": model}, trained={"aux_loss_coef": COEF})
    update(learner, "critic")
    learner.export("critic", str(tmp_path / "export"))
    handed_out = weights(learner, "critic")
    assert handed_out.keys() == load_file(tmp_path / "export" / "model.safetensors").keys()
    assert any(".experts.3." in name for name in handed_out) and all(name.startswith(("model.", "score.")) for name in handed_out)
    again = make_learner({"critic": str(tmp_path / "export")})
    assert all(torch.equal(weight, handed_out[name]) for name, weight in weights(again, "critic").items())
    path = save(learner, tmp_path / "checkpoints")
    resumed = make_learner({"critic": model}, trained={"aux_loss_coef": COEF})
    resumed.restore(path)
    for one in (learner, resumed):
        update(one, "critic")
    after = weights(learner, "critic")
    assert all(torch.equal(weight, after[name]) for name, weight in weights(resumed, "critic").items())


def test_a_frozen_router_stays(model: str) -> None:
    learner = make_learner({"policy": model}, trained={"freeze": "*.mlp.gate.*", "aux_loss_coef": COEF})
    before = weights(learner)
    update(learner)
    changed = {name: not torch.equal(weight, before[name]) for name, weight in weights(learner).items()}
    routers = [name for name in changed if name.endswith(".gate.weight")]
    assert len(routers) == 2 and not any(changed[name] for name in routers)
    assert all(moved for name, moved in changed.items() if name not in routers)


def test_a_balancing_loss_needs_routers(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"LlamaModel\) has no routers .*aux-loss-coef"):
        make_learner({"policy": save_model(tmp_path, "llama-untied")}, trained={"aux_loss_coef": 0.01})
