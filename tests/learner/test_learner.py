"""One rank, several roles, real models: what an optimiser step must not depend on, and what it must refuse."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hone.algos.algorithms import PPO
from hone.algos.algorithms.terms import KLPenalty
from hone.learner.errors import ModelError, NumericsError
from hone.learner.learner import Learner
from hone.learner.packing import Shard, shards, unshard
from hone.learner.supervised import NextToken
from tests.learner.ranks import train, weights
from tests.learner.tiny import CONFIGS, make_batch, make_learner, save_model, score

LENGTHS = [7, 12, 3, 20, 9]
PLAIN_PPO = PPO(kl=KLPenalty(init_coef=0.0))


def whole(learner: Learner, role: str, batch, *, max_tokens: int) -> torch.Tensor:
    parts = shards(batch, ranks=1, max_tokens=max_tokens)
    return unshard(parts, [learner.logp(role, parts[0])], cu_seqlens=batch.cu_seqlens)


@pytest.mark.parametrize("kind", CONFIGS)
def test_on_policy_the_ratio_is_exactly_one(tmp_path: Path, kind: str) -> None:
    learner = make_learner({"policy": save_model(tmp_path, kind)})
    batch = make_batch(LENGTHS)
    batch = dataclasses.replace(batch, old_logp=whole(learner, "policy", batch, max_tokens=30))
    (shard,) = shards(score(batch), ranks=1, max_tokens=30)
    seen = []

    class Watch:
        def loss(self, outputs, scored):
            # The learner also asks for derivatives, at log-probabilities of its own, which no model stands behind.
            if not outputs.logp.is_leaf:
                seen.append((outputs.logp.detach() - scored.old_logp)[scored.action_mask])
            return PLAIN_PPO.loss(outputs, scored)

    result = learner.update_policy("policy", shard, Watch())
    assert len(seen) > 1 and not torch.cat(seen).any()
    assert result.metrics["ppo_kl"] == 0.0 and result.metrics["ppo_clip_ratio"] == 0.0


@pytest.mark.parametrize("kind", CONFIGS)
def test_micro_batching_changes_no_parameter(tmp_path: Path, kind: str) -> None:
    model = save_model(tmp_path, kind)
    outcomes = []
    for max_tokens in (42, 53, 85):
        learner = make_learner({"policy": model, "critic": model, "reference": model}, max_tokens=max_tokens)
        outcomes.append(train(learner, rank=0, world_size=1, max_tokens=max_tokens))
    for outcome in outcomes[1:]:
        for role in ("policy", "critic"):
            for name, weight in outcome[role].items():
                assert_close(weight, outcomes[0][role][name], rtol=1e-4, atol=5e-5, msg=lambda text, name=name: f"{name}: {text}")
        for got, expected in zip(outcome["metrics"], outcomes[0]["metrics"], strict=True):
            assert_close(got, expected, rtol=1e-4, atol=1e-5)
    # and the two steps did move every one of them
    start = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    assert all(not torch.equal(weight, start[name]) for name, weight in outcomes[0]["policy"].items())


def test_a_step_is_adamw_on_the_clipped_sum_of_gradients(tmp_path: Path) -> None:
    model = save_model(tmp_path, "llama-untied")
    learner = make_learner({"policy": model}, lr=1e-2)
    (shard,) = shards(score(make_batch(LENGTHS)), ranks=1, max_tokens=30)
    result = learner.update_policy("policy", shard, NextToken())

    plain = AutoModelForCausalLM.from_pretrained(model)
    batch, loss = shard.batch, torch.zeros(())
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        row = batch.tokens[start:end]
        logp = (plain(input_ids=row[None]).logits[0, :-1] / batch.temperature).log_softmax(-1).gather(1, row[1:, None])[:, 0]
        loss = loss - (batch.weights[start + 1 : end] * logp).sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    matrices = [parameter for parameter in plain.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in plain.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95)).step()  # warm-up is ceil(0.03 * 10) = 1 step, at the peak
    assert_close(torch.tensor([result.grad_norm, result.metrics["nll"]]), torch.stack([norm, loss.detach()]), rtol=1e-5, atol=1e-5)
    assert result.lr == 1e-2
    ours = weights(learner, "policy")
    for name, parameter in plain.named_parameters():
        # Adam's first step is lr * g / |g|: entries with a gradient near its eps may differ by more than rounding.
        assert_close(ours[name], parameter.detach(), rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_policy_critic_and_reference_share_a_process(tmp_path: Path) -> None:
    model = save_model(tmp_path, "qwen3-tied")
    learner = make_learner({"policy": model, "critic": model, "reference": model})
    batch = make_batch(LENGTHS)
    (shard,) = shards(score(batch), ranks=1, max_tokens=30)
    before = learner.logp("reference", shard)
    assert torch.equal(before, learner.logp("policy", shard))
    learner.update_policy("policy", shard, PLAIN_PPO)
    learner.update_critic("critic", shard, PLAIN_PPO)
    assert torch.equal(before, learner.logp("reference", shard))
    assert not torch.equal(before, learner.logp("policy", shard))
    assert learner.values("critic", shard)[shard.batch.action_mask].all()
    assert not learner.values("critic", shard)[~shard.batch.action_mask].any()
    assert not any(parameter.requires_grad for parameter in learner.engines["reference"].module.parameters())


def test_fillers_add_nothing(tmp_path: Path) -> None:
    model = save_model(tmp_path, "llama-untied")
    (shard,) = shards(score(make_batch(LENGTHS)), ranks=1, max_tokens=30)
    filled = dataclasses.replace(shard, micro_batches=(*shard.micro_batches, (0,)), fillers=frozenset({len(shard.micro_batches)}))
    plain, other = make_learner({"policy": model}), make_learner({"policy": model})
    assert torch.equal(plain.logp("policy", shard), other.logp("policy", filled))
    assert plain.update_policy("policy", shard, PLAIN_PPO) == other.update_policy("policy", filled, PLAIN_PPO)
    expected = weights(plain, "policy")
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(other, "policy").items())


def test_a_loss_sees_a_filler_without_weights_or_actions(tmp_path: Path) -> None:
    learner = make_learner({"policy": save_model(tmp_path, "llama-untied")})
    (shard,) = shards(score(make_batch([5, 6])), ranks=1, max_tokens=6)
    seen = []

    class Watch:
        def loss(self, outputs, scored):
            if not outputs.logp.is_leaf:
                seen.append((bool(scored.weights.any()), bool(scored.action_mask.any())))
            return NextToken().loss(outputs, scored)

    learner.update_policy("policy", dataclasses.replace(shard, fillers=frozenset({1})), Watch())
    assert seen == [(True, True), (False, False)]


def test_a_step_of_fillers_alone_moves_nothing_but_decay(tmp_path: Path) -> None:
    learner = make_learner({"policy": save_model(tmp_path, "llama-untied")})
    (shard,) = shards(score(make_batch([5])), ranks=1, max_tokens=30)
    result = learner.update_policy("policy", dataclasses.replace(shard, fillers=frozenset({0})), PLAIN_PPO)
    assert (result.grad_norm, result.metrics) == (0.0, {})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_leaves_the_parameters_untouched(tmp_path: Path, where: str, dtype: str) -> None:
    learner = make_learner({"policy": save_model(tmp_path, "qwen3-tied")}, dtype=dtype)
    (shard,) = shards(score(make_batch(LENGTHS)), ranks=1, max_tokens=30)
    learner.update_policy("policy", shard, PLAIN_PPO)
    before = weights(learner, "policy")
    if where == "loss":
        shard = dataclasses.replace(shard, batch=dataclasses.replace(shard.batch, advantages=shard.batch.advantages * float("nan")))
    else:
        parameter = learner.engines["policy"].module.named_weights()[3][1]
        parameter.register_hook(lambda gradient: gradient * float("inf"))
    said = {"loss": "a loss is not finite", "gradient": "the gradient norm is (inf|nan)"}[where]
    with pytest.raises(NumericsError, match=rf"policy: {said} at optimiser step 1; .* --actor\.adam\.lr"):
        learner.update_policy("policy", shard, PLAIN_PPO)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(learner, "policy").items())


def test_bf16_keeps_masters_that_small_updates_add_up_in(tmp_path: Path) -> None:
    # At 1e-5 a step is far below bf16's 8 bits for weights near 0.3; forty of them are not.
    learner = make_learner({"policy": save_model(tmp_path, "llama-untied")}, dtype="bf16", lr=1e-5)
    (shard,) = shards(score(make_batch(LENGTHS)), ranks=1, max_tokens=30)
    before = weights(learner, "policy")
    learner.update_policy("policy", shard, NextToken())
    engine = learner.engines["policy"]
    parameter, master = engine.masters[0]
    assert parameter.dtype == torch.bfloat16 and master.dtype == torch.float32
    assert torch.equal(parameter, master.bfloat16())
    name = "model.layers.0.self_attn.q_proj.weight"
    unmoved = (weights(learner, "policy")[name] == before[name]).float().mean()
    masters = dict(zip([one for one, _ in engine.module.named_weights()], [one for _, one in engine.masters], strict=True))
    assert unmoved > 0.9 and (masters[name].detach() != before[name]).float().mean() > 0.9


def test_fp16_scales_the_loss_and_leaves_out_the_steps_that_overflow(tmp_path: Path) -> None:
    model = save_model(tmp_path, "llama-untied")
    learner = make_learner({"policy": model}, dtype="fp16", lr=1e-3)
    exact = make_learner({"policy": model}, dtype="fp32", lr=1e-3)
    (shard,) = shards(score(make_batch(LENGTHS)), ranks=1, max_tokens=30)
    engine = learner.engines["policy"]
    engine.loss_scale.scale = 2**26  # far too high: the gradients of fp16 end at 65504
    before, scales = weights(learner, "policy"), []
    while not (result := learner.update_policy("policy", shard, NextToken())).applied:
        assert result.grad_norm in (float("inf"),) or result.grad_norm != result.grad_norm
        assert all(torch.equal(weight, before[name]) for name, weight in weights(learner, "policy").items())
        scales.append(engine.loss_scale.scale)
    assert scales and scales == [2**25 // 2**index for index in range(len(scales))] and engine.steps == 1
    # The bound on steps that are not finite is 0 here: an overflow that a lower scale mends is not one of them.
    assert engine.counters == {"steps": 1, "muon": 0, "skipped_in_a_row": 0, "loss_scale": scales[-1], "loss_scale_clean": 1}
    expected = exact.update_policy("policy", shard, NextToken())
    assert abs(result.grad_norm - expected.grad_norm) < 0.02 * expected.grad_norm
    assert engine.masters[0][1].dtype == torch.float32 and engine.masters[0][0].dtype == torch.float16
    engine.loss_scale.scale = 1
    parameter = engine.module.named_weights()[3][1]
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NumericsError, match="the gradient norm is nan"):
        learner.update_policy("policy", shard, NextToken())


def test_gradients_are_summed_in_the_format_that_was_asked_for(tmp_path: Path) -> None:
    norms = {}
    for accumulate in ("fp32", "bf16"):
        learner = make_learner({"policy": save_model(tmp_path, "llama-untied")}, dtype="bf16", grad_accum_dtype=accumulate)
        (shard,) = shards(score(make_batch(LENGTHS)), ranks=1, max_tokens=20)
        assert len(shard.micro_batches) > 2
        for index, _ in enumerate(shard.micro_batches):
            engine = learner.engines["policy"]
            part = learner._micro_batch(shard, index)
            engine.backward(NextToken().loss(learner._policy("policy", part, with_entropy=True), part).total, last=False)
        assert {one.dtype for one in engine.sums} == {torch.float32 if accumulate == "fp32" else torch.bfloat16}
        norms[accumulate] = engine.step().grad_norm
    assert norms["fp32"] != norms["bf16"] and abs(norms["fp32"] - norms["bf16"]) < 0.02 * norms["fp32"]


def test_supervised_learning_raises_the_likelihood(tmp_path: Path) -> None:
    learner = make_learner({"policy": save_model(tmp_path, "qwen3-tied")})
    (shard,) = shards(score(make_batch(LENGTHS)), ranks=1, max_tokens=30)
    losses = [learner.update_policy("policy", shard, NextToken()).metrics["nll"] for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_export_is_what_was_trained_with_its_tokenizer(tmp_path: Path, kind: str) -> None:
    model = Path(save_model(tmp_path / "model", kind))
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    (model / "chat_template.jinja").write_text("{{ messages }}")
    learner = make_learner({"policy": str(model)})
    (shard,) = shards(score(make_batch(LENGTHS)), ranks=1, max_tokens=30)
    learner.update_policy("policy", shard, PLAIN_PPO)
    learner.export("policy", str(tmp_path / "out" / "model"))
    exported = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").named_parameters())
    trained = weights(learner, "policy")
    assert trained.keys() == exported.keys()
    assert all(torch.equal(weight, exported[name]) for name, weight in trained.items())
    assert [(name, tuple(weight.shape)) for name, weight in trained.items()] == [
        (name, shape) for name, _, shape in learner.weight_names("policy")
    ]
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / "model" / name).read_bytes() == (model / name).read_bytes()


def test_what_cannot_work_is_said_at_once(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama-untied")
    with pytest.raises(ValueError, match="one rank, not 2; choose the deepspeed backend"):
        make_learner({"policy": model}, world_size=2)
    with pytest.raises(ModelError, match="no model directory"):
        make_learner({"policy": str(tmp_path / "none" / "such")})
    learner = make_learner({"policy": model}, max_tokens=16)
    batch = make_batch(LENGTHS)
    (shard,) = shards(batch, ranks=1, max_tokens=30)
    with pytest.raises(ValueError, match="exceeds this rank's 16"):
        learner.logp("policy", shard)
    with pytest.raises(ValueError, match="only be updated on a Scored batch or labelled rows; judge the Batch first"):
        learner.update_policy("policy", Shard(batch=batch, micro_batches=((0,),), fillers=frozenset(), rows=(0,)), PLAIN_PPO)
