"""Reward and process heads, and losses over whole logits: against transformers' own models and plain autograd."""

import dataclasses
import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from hone.algos.algorithms.distillation import Distillation
from hone.algos.algorithms.process_reward_model import ProcessRewardModel
from hone.algos.algorithms.reward_model import RewardModel
from hone.algos.algorithms.sft import SFT
from hone.algos.batch import Packed
from hone.algos.offline import weighed_pairs
from hone.learner.checkpoint.export import export
from hone.learner.config import ActorConfig, AdamConfig, DeepSpeedConfig, RefConfig
from hone.learner.errors import ModelError
from hone.learner.learner import Learner
from hone.learner.packing import shards
from hone.learner.roles import RoleSpec
from tests.learner.checkpoint_ranks import save
from tests.learner.offline_ranks import ALGORITHMS, rows_of
from tests.learner.tiny import CONFIGS, VOCABULARY, in_chunks, save_model


def learner(kind: str, model: str, *, lr: float | None = 0.1, max_tokens: int = 200, **ds: object) -> Learner:
    config = RefConfig() if lr is None else ActorConfig(adam=AdamConfig(lr=lr, eps=1.0), max_norm=1e9, lr_warmup_ratio=0.0)
    return Learner(
        roles={"it": RoleSpec(kind=kind, model=model, config=config, total_steps=10)},
        ds=DeepSpeedConfig(param_dtype="fp32", **ds),
        backend="single",
        rank=0,
        world_size=1,
        master_addr="127.0.0.1",
        master_port=0,
        seed=0,
        max_tokens=max_tokens,
    )


def trained(tmp_path: Path, kind: str = "llama-untied") -> tuple[Learner, str]:
    """A reward model after some steps, and its export."""
    model = learner("reward", save_model(tmp_path / "model", kind))
    (shard,) = shards(rows_of("rm"), ranks=1, max_tokens=200)
    for _ in range(3):
        model.update_offline("it", shard, RewardModel())
    model.export("it", str(tmp_path / "export"))
    return model, str(tmp_path / "export")


def padded(rows) -> tuple[Tensor, Tensor]:
    """Input ids, right-padded with a token of no row, and the attention mask."""
    cut = [rows.tokens[start:end] for start, end in pairwise(rows.cu_seqlens.tolist())]
    ids = torch.nn.utils.rnn.pad_sequence(cut, batch_first=True, padding_value=0)
    return ids, torch.arange(ids.shape[1])[None] < rows.lengths[:, None]


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_exported_reward_model_scores_as_transformers_own(tmp_path: Path, kind: str) -> None:
    model, export = trained(tmp_path, kind)
    rows = rows_of("rm")
    rows = dataclasses.replace(rows, tokens=rows.tokens.clamp(min=1))  # 0 pads below
    (shard,) = shards(rows, ranks=1, max_tokens=200)
    plain = AutoModelForSequenceClassification.from_pretrained(export, attn_implementation="eager")
    plain.config.pad_token_id = 0
    ids, attended = padded(rows)
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=attended.long()).logits[:, 0]
    assert_close(model.scores("it", shard), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01
    again = learner("reward", export, lr=None, max_tokens=30)  # packed otherwise
    alone = Packed(**{field.name: getattr(rows, field.name) for field in dataclasses.fields(Packed)})  # each by itself, not in pairs
    (cut,) = shards(alone, ranks=1, max_tokens=30)
    assert len(cut.micro_batches) > 3
    assert_close(again.scores("it", cut), expected, rtol=1e-4, atol=1e-5)


def test_a_reward_models_step_is_adamw_on_the_pairs_margins(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", "qwen3-tied")
    model = learner("reward", directory, max_tokens=34)
    (shard,) = shards(rows_of("rm"), ranks=1, max_tokens=34)
    # The zero head first learns alone; the second step reaches the transformer.
    losses = [model.update_offline("it", shard, RewardModel()).metrics["rm_loss"] for _ in range(2)]

    plain = AutoModelForSequenceClassification.from_pretrained(save_model(tmp_path / "again", "qwen3-tied"), num_labels=1)
    torch.nn.init.zeros_(plain.score.weight)
    optimiser = torch.optim.AdamW(plain.parameters(), lr=0.1, betas=(0.9, 0.95), eps=1.0, weight_decay=0.0)
    rows, expected = rows_of("rm"), []
    for step in range(2):
        optimiser.param_groups[0]["lr"] = model.engines["it"].training.lr(step)
        scores = [plain(input_ids=rows.tokens[None, start:end]).logits[0, 0] for start, end in pairwise(rows.cu_seqlens.tolist())]
        per_pair = [torch.nn.functional.softplus(rows.margins[2 * i] - scores[2 * i] + scores[2 * i + 1]) for i in range(4)]
        loss = torch.stack(per_pair).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        expected.append(loss.detach())
    assert_close(torch.tensor(losses), torch.stack(expected), rtol=1e-5, atol=1e-6)
    for name, weight in model.weights("it"):
        assert_close(weight, dict(plain.named_parameters())[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_statistics_travel_in_the_configuration_and_normalise(tmp_path: Path) -> None:
    model, export = trained(tmp_path)
    (shard,) = shards(rows_of("rm"), ranks=1, max_tokens=200)
    raw = model.scores("it", shard)
    with pytest.raises(ModelError, match=r"no mean and std.*--ds\.normalize-reward off"):
        learner("reward", export, lr=None, normalize_reward=True)
    model.keep_statistics("it", raw)
    model.export("it", export)
    settings = json.loads((Path(export) / "config.json").read_text())
    assert (settings["mean"], settings["std"]) == pytest.approx((float(raw.mean()), float(raw.std())), rel=1e-5)
    normalised = learner("reward", export, lr=None, normalize_reward=True)
    assert_close(normalised.scores("it", shard), (raw - raw.mean()) / raw.std(), rtol=1e-4, atol=1e-5)
    assert_close(learner("reward", export, lr=None).scores("it", shard), raw)
    with pytest.raises(ValueError, match="no reward model with raw scores"):
        normalised.keep_statistics("it", raw)
    with pytest.raises(ValueError, match="1 scores, 0 of them not finite"):
        model.keep_statistics("it", raw[:1])
    # A critic that begins as this model says the normalised score before the token that would follow.
    critic = learner("critic", export, lr=None, normalize_reward=True)
    plain = learner("critic", export, lr=None)
    mask, values = shard.batch.action_mask, plain.values("it", shard)
    assert_close(critic.values("it", shard)[mask], ((values - raw.mean()) / raw.std())[mask], rtol=1e-4, atol=1e-5)
    assert not critic.values("it", shard)[~mask].any()
    # Statistics of a model that goes on training are no longer its own.
    learner("reward", export).export("it", str(tmp_path / "further"))
    assert "mean" not in json.loads((tmp_path / "further" / "config.json").read_text())


def test_a_head_by_another_name_is_found_again(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", "llama-untied")
    model = learner("reward", directory, value_head_prefix="value_head")
    (shard,) = shards(rows_of("rm"), ranks=1, max_tokens=200)
    model.update_offline("it", shard, RewardModel())
    model.export("it", str(tmp_path / "export"))
    assert "value_head.weight" in load_file(tmp_path / "export" / "model.safetensors")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["value_head_prefix"] == "value_head"
    assert_close(learner("reward", str(tmp_path / "export"), lr=None).scores("it", shard), model.scores("it", shard))


def test_wrong_and_missing_heads_are_refused(tmp_path: Path) -> None:
    directory = Path(save_model(tmp_path / "model", "llama-untied"))
    with pytest.raises(ModelError, match=r"has no score\.weight, and a reward model that is not trained has nothing to say"):
        learner("reward", str(directory), lr=None)
    tensors = load_file(directory / "model.safetensors")
    shutil.copytree(directory, tmp_path / "wrong")
    save_file({**tensors, "score.weight": torch.zeros(3, 32)}, tmp_path / "wrong" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"score\.weight has shape \(3, 32\), a reward head of 1 label has \(1, 32\)"):
        learner("reward", str(tmp_path / "wrong"))
    with pytest.raises(ModelError, match=r"score\.weight has shape \(3, 32\), a process head of 2 labels has \(2, 32\)"):
        learner("process", str(tmp_path / "wrong"))


def test_an_algorithm_and_a_model_of_different_kinds_are_refused(tmp_path: Path) -> None:
    model = learner("reward", save_model(tmp_path / "model", "llama-untied"))
    (shard,) = shards(rows_of("sft"), ranks=1, max_tokens=200)
    with pytest.raises(ValueError, match=r"sft cannot train it, a reward model: .* take a policy"):
        model.update_offline("it", shard, SFT())
    (unweighed,) = shards(rows_of("sft"), ranks=1, max_tokens=200)
    rows = {field.name: getattr(unweighed.batch, field.name) for field in dataclasses.fields(unweighed.batch) if field.name != "weights"}
    from hone.algos.batch import Packed

    with pytest.raises(ValueError, match="can only be updated on a Scored batch or labelled rows; judge the Packed first"):
        model.update_offline("it", dataclasses.replace(unweighed, batch=Packed(**rows)), RewardModel())
    assert weighed_pairs(Packed(**rows)).rows == 8


def test_an_exported_process_model_is_transformers_token_classifier(tmp_path: Path) -> None:
    model = learner("process", save_model(tmp_path / "model", "qwen3-tied"), max_tokens=40)
    (shard,) = shards(rows_of("prm"), ranks=1, max_tokens=40)
    for _ in range(3):
        model.update_offline("it", shard, ProcessRewardModel())
    model.export("it", str(tmp_path / "export"))
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path / "export", attn_implementation="eager").eval()
    logits, mask = model.label_logits("it", shard), shard.batch.action_mask
    with torch.no_grad():
        rows = [plain(input_ids=shard.batch.tokens[None, start:end]).logits[0] for start, end in pairwise(shard.batch.cu_seqlens.tolist())]
    assert_close(logits[mask], torch.cat(rows)[mask], rtol=1e-4, atol=1e-5)
    assert logits[mask].std() > 0.01 and not logits[~mask].any()
    again = learner("process", str(tmp_path / "export"), lr=None)
    assert_close(again.label_logits("it", shard), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["prm by tokens", "kd", "kd of top tokens"])
def test_losses_over_logits_in_chunks_are_those_over_all_of_them(tmp_path: Path, name: str) -> None:
    """The same loss on the full table of logits of transformers' own model, differentiated by autograd."""
    directory = save_model(tmp_path / "model", "llama-untied")
    model, rows, (_, algo) = learner("policy", directory), rows_of(name), ALGORITHMS[name]
    in_chunks(model.engines["it"].module.head, 5)
    (shard,) = shards(rows, ranks=1, max_tokens=200)
    # One micro-batch, in the order of the batch: the reference below knows no packing.
    shard = dataclasses.replace(shard, micro_batches=(tuple(range(8)),))
    engine, seen = model.engines["it"], {}
    step = engine.step
    engine.step = lambda: (seen.update({name: weight.grad.clone() for name, weight in engine.module.named_weights()}), step())[1]
    result = model.update_offline("it", shard, algo)

    plain = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    own = [plain(input_ids=rows.tokens[None, start:end]).logits[0] for start, end in pairwise(rows.cu_seqlens.tolist())]
    shift = 0 if name == "prm by tokens" else 1
    logits = torch.cat([row if shift == 0 else torch.cat([row[:1] * 0, row[:-1]]) for row in own])
    loss = algo.logits_loss(logits, rows)
    loss.total.backward()
    told = {"loss": loss.total.detach(), **loss.metrics}
    assert_close(result.metrics, {name: float(value) for name, value in told.items()}, rtol=1e-4, atol=1e-5)
    for weight, parameter in plain.named_parameters():
        assert_close(seen[weight], parameter.grad, rtol=1e-3, atol=1e-6, msg=lambda text, weight=weight: f"{weight}: {text}")


def test_statistics_are_in_a_checkpoint_and_in_what_is_exported_from_it(tmp_path: Path) -> None:
    model, _ = trained(tmp_path)
    (shard,) = shards(rows_of("rm"), ranks=1, max_tokens=200)
    raw = model.scores("it", shard)
    before = save(model, tmp_path / "ckpt", 1)
    model.keep_statistics("it", raw)
    after = save(model, tmp_path / "ckpt", 2)
    again = learner("reward", str(tmp_path / "model"))
    config = again.engines["it"].module.adaptable()[0].config
    again.restore(str(after))
    assert (config.mean, config.std) == pytest.approx((float(raw.mean()), float(raw.std())), rel=1e-5)
    assert torch.equal(again.scores("it", shard), raw)
    export(after, tmp_path / "out", role="it")
    normalised = learner("reward", str(tmp_path / "out"), lr=None, normalize_reward=True)
    assert_close(normalised.scores("it", shard), (raw - raw.mean()) / raw.std(), rtol=1e-4, atol=1e-5)
    # A checkpoint from before they were taken has none, and takes none over.
    again.restore(str(before))
    assert not {"mean", "std"} & config.__dict__.keys()


def test_a_teachers_top_tokens_are_those_of_its_distribution(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", "llama-untied")
    teacher, rows = learner("policy", directory, lr=None, max_tokens=50), rows_of("sft")
    (shard,) = shards(rows, ranks=1, max_tokens=50)
    tokens, logp = teacher.top_logp("it", shard, k=4, temperature=2.0)
    plain = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    with torch.no_grad():
        bounds = pairwise(shard.batch.cu_seqlens.tolist())
        own = [plain(input_ids=shard.batch.tokens[None, start:end]).logits[0].roll(1, 0) for start, end in bounds]
    best, mask = (torch.cat(own) / 2).log_softmax(-1).topk(4, -1), shard.batch.action_mask
    assert torch.equal(tokens[mask], best.indices[mask])
    assert_close(logp[mask], best.values[mask], rtol=1e-4, atol=1e-5)
    assert int(tokens.max()) < VOCABULARY and not logp[~mask].any()
    assert Distillation().temperature == 1.0
