"""One model over several ranks, piece by piece: the head over a cut vocabulary, the layers, the cut checkpoints, and what is refused.

Ranks are threads here; real ones take whole steps in `test_one_step`, `test_engines`, `test_offline_ranks`, `test_checkpoint_resume`.
"""

import copy
import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from hone.algos.batch import Packed
from hone.learner.checkpoint.pieces import Piece
from hone.learner.checkpoint.rectangles import rectangles
from hone.learner.checkpoint.shard_file import RoleReader, file_name, lay_out
from hone.learner.errors import CheckpointError, ModelError
from hone.learner.heads import TokenHead
from hone.learner.kernels.vocabulary import Vocabulary
from hone.learner.model import CriticModel, PolicyModel, load_critic, load_policy
from hone.learner.over_logits import LossOverLogits, TopLogp
from hone.learner.tensor_parallel import layers
from hone.learner.tensor_parallel import split as splitting
from hone.learner.tensor_parallel.cut import Cut, bounds, cut_of
from hone.learner.tensor_parallel.split import split
from tests.learner.offline_ranks import ALGORITHMS, rows_of
from tests.learner.tiny import CONFIGS, MIXTURE, SHAPE, make_batch, make_learner, save_config, save_model
from tests.learner.virtual_ring import QueueWire, on_ring

LENGTHS = [7, 12, 1, 20, 9]
H, V = 8, 61
CPU = torch.device("cpu")


def rows() -> Packed:
    batch = make_batch(LENGTHS)
    return Packed(**{one.name: getattr(batch, one.name) for one in dataclasses.fields(Packed)})


def numbers(*, bias: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {"hidden": torch.randn(sum(LENGTHS), H, generator=generator), "weight": torch.randn(V, H, generator=generator)}
    return made | ({"bias": torch.randn(V, generator=generator)} if bias else {})


def head_over(wire: QueueWire | None, made: dict[str, Tensor], *, softcap: float | None) -> TokenHead:
    """The head with these weights: whole, or a rank's part of it."""
    output = nn.Linear(H, V, bias="bias" in made)
    head = TokenHead(output, softcap=softcap, chunk_bytes=4 * 3 * V)
    own = dict(made)
    if wire is not None:
        cut = Cut(wire=wire, shape=(V, H), dim=0)
        own |= {name: cut.own(made[name]) for name in ("weight", "bias") if name in made}
        head.cut(nn.Parameter(own["weight"]), nn.Parameter(own["bias"]) if "bias" in made else None, Vocabulary(cut=cut))
        return head
    head.weight = nn.Parameter(own["weight"].clone())
    head.bias = nn.Parameter(own["bias"].clone()) if "bias" in made else None
    return head


def asked(head: TokenHead, made: dict[str, Tensor], **more: Any) -> dict[str, Tensor]:
    """Log-probabilities and entropies, and the gradients of a sum over them, slopes told beforehand or not."""
    part, hidden = rows(), made["hidden"].clone().requires_grad_()
    by_logp, by_entropy = torch.randn(2, len(part.tokens), generator=torch.Generator().manual_seed(2))
    slopes = (lambda logp, entropy, positions: (by_logp[positions], by_entropy[positions])) if more.pop("told") else None
    logp, entropy = head(hidden, part.tokens, part.cu_seqlens, part.action_mask, 0.7, True, None, slopes)
    assert entropy is not None
    (logp * by_logp + entropy * by_entropy).sum().backward()
    found = {"logp": logp.detach(), "entropy": entropy.detach(), "by_hidden": hidden.grad, "by_weight": head.weight.grad}
    return found | ({} if head.bias is None else {"by_bias": head.bias.grad})


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, 3.0)])
@pytest.mark.parametrize("size", [2, 3])
def test_the_head_over_a_cut_vocabulary_is_the_whole_head(size: int, bias: bool, softcap: float | None, told: bool) -> None:
    made = numbers(bias=bias)
    whole = asked(head_over(None, made, softcap=softcap), made, told=told)
    ranks, _ = on_ring(size, lambda wire: asked(head_over(wire, made, softcap=softcap), made, told=told))
    assert whole["logp"].abs().sum() > 1 and all(whole[name].abs().sum() > 1e-2 for name in whole)
    for rank in ranks:
        for name in ("logp", "entropy", "by_hidden"):
            assert torch.equal(rank[name], ranks[0][name]), name
            assert_close(rank[name], whole[name], rtol=1e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    for name in whole.keys() & {"by_weight", "by_bias"}:
        assert_close(torch.cat([rank[name] for rank in ranks]), whole[name], rtol=1e-5, atol=5e-6)


def test_readers_of_whole_logits_read_a_cut_vocabulary() -> None:
    (_, algo), part = ALGORITHMS["kd"], rows_of("kd")
    made = numbers(bias=True) | {"hidden": torch.randn(len(part.tokens), H, generator=torch.Generator().manual_seed(4))}

    def read(wire: QueueWire | None) -> dict[str, Tensor]:
        head, hidden = head_over(wire, made, softcap=3.0), made["hidden"].clone().requires_grad_()
        inputs = (hidden, part.tokens, part.cu_seqlens, part.action_mask, 1.0, False, None, None)
        tokens, logp = head(*inputs, TopLogp(part, k=4, temperature=2.0))
        total, _ = head(*inputs, LossOverLogits(part, algo))
        total.backward()
        assert head.bias is not None
        parts = {"by_weight": head.weight.grad, "by_bias": head.bias.grad}
        return {"tokens": tokens, "logp": logp, "total": total.detach(), "by_hidden": hidden.grad, **parts}

    whole = read(None)
    ranks, _ = on_ring(2, read)
    assert whole["by_weight"].abs().sum() > 1e-2
    for name in ("tokens", "logp", "total", "by_hidden"):
        for rank in ranks:
            assert_close(rank[name], whole[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    for name in ("by_weight", "by_bias"):
        assert_close(torch.cat([rank[name] for rank in ranks]), whole[name], rtol=1e-5, atol=1e-5)


MODELS = {
    **CONFIGS,
    "biases": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "padding": LlamaConfig(**SHAPE, pad_token_id=40, attention_bias=True, mlp_bias=True),
}


def loaded(directory: str, kind: str) -> PolicyModel | CriticModel:
    if kind == "policy":
        return load_policy(directory, dtype=torch.float32, device=CPU)
    critic = load_critic(directory, dtype=torch.float32, device=CPU, value_head_prefix="score")
    nn.init.normal_(critic.value_head.weight)
    return critic


def said(model: PolicyModel | CriticModel) -> tuple[Tensor, dict[str, Tensor]]:
    """What a model says of some rows, and every parameter's gradient of it, by name."""
    part = make_batch(LENGTHS)
    inputs = (part.tokens, part.position_ids, part.cu_seqlens, part.action_mask)
    found = model(*inputs, 0.8, False)[0] if isinstance(model, PolicyModel) else model(*inputs)
    (found * torch.sin(torch.arange(len(found)) + 1.0)).sum().backward()
    return found.detach(), {name: one.grad for name, one in model.named_weights() if one.grad is not None}


@pytest.mark.parametrize("kind", ["policy", "critic"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_over_two_ranks_says_what_it_says_whole(name: str, kind: str, tmp_path: Path) -> None:
    model = loaded(save_config(tmp_path / name, MODELS[name]), kind)
    for parameter in model.parameters():  # biases and norms as well: fresh ones are alike
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    copies = [copy.deepcopy(model) for _ in range(2)]
    expected, gradients = said(model)

    def rank_of(wire: QueueWire) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        split(copies[wire.rank], name, wire=wire)
        found, own = said(copies[wire.rank])
        cuts = {name: cut for name, one in copies[wire.rank].named_weights() if (cut := cut_of(one)) is not None}
        weights = {name: tensor.clone() for layer in copies[wire.rank].published() for name, tensor in layer.values()}
        return found, {name: one if name not in cuts else cuts[name].whole(one) for name, one in own.items()}, weights

    ranks, _ = on_ring(2, rank_of)
    assert expected.abs().sum() > 1
    held = [sum(one.numel() for one in part.parameters()) for part in copies]
    assert max(held) < 0.6 * sum(one.numel() for one in model.parameters())
    for found, own, weights in ranks:
        assert_close(found, expected, rtol=1e-5, atol=2e-5)
        assert own.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            # Against the largest of all: what a bias adds to every key changes no attention, so its gradient is rounding.
            largest = max(float(one.abs().max()) for one in gradients.values())
            assert_close(own[parameter], gradient, rtol=1e-4, atol=1e-5 * largest, msg=lambda text, which=parameter: f"{which}: {text}")
        published = {name: tensor for layer in model.published() for name, tensor in layer.values()}
        assert weights.keys() == published.keys() and all(torch.equal(one, published[name]) for name, one in weights.items())


def refusal(directory: str, *, size: int = 2) -> str:
    """What both ranks say of a model that cannot be cut."""
    models = [loaded(directory, "policy") for _ in range(size)]

    def rank_of(wire: QueueWire) -> str:
        with pytest.raises(ModelError) as raised:
            split(models[wire.rank], "the model", wire=wire)
        return str(raised.value)

    (message, *others), _ = on_ring(size, rank_of)
    assert set(others) == {message}
    return message


def test_architectures_that_are_not_cut_are_refused_by_name(tmp_path: Path) -> None:
    assert "mlp.experts of Qwen3MoeModel, a Qwen3MoeExperts, would be cut" in refusal(save_config(tmp_path / "moe", MIXTURE))
    small = GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    assert "no tensor-parallel plan for GPT2Model; --ds.tensor-parallel-size 1" in refusal(save_config(tmp_path / "gpt2", small))


def test_a_plan_that_misses_a_layer_or_a_sum_is_found_out_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, right = save_model(tmp_path / "model", "qwen3-tied"), splitting.styles_of
    missed = "layers.1.self_attn.q_norm"
    with monkeypatch.context() as patch:
        patch.setattr(splitting, "styles_of", lambda *given: {one: style for one, style in right(*given).items() if one != missed})
        assert f"the gradient of {missed}.weight differ from the whole model's" in refusal(directory)
    monkeypatch.setattr(layers, "add_over_ring", lambda part, wire: part)
    assert "differ from the whole model's" in refusal(directory)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tensor_parallel_size": 2}, "1 ranks do not fall into groups of 2; --ds.tensor-parallel-size must divide"),
        ({"tensor_parallel_size": 3, "world_size": 3}, "--ds.tensor-parallel-size 3 does not divide the 4 attention heads of .*choose of"),
        ({"tensor_parallel_size": 4, "world_size": 4}, "does not divide the 2 key heads of .*; choose of"),
        ({"tensor_parallel_size": 2, "ring": 2, "world_size": 6}, "6 ranks do not fall into rings of 2 times 2"),
        ({"tensor_parallel_size": 2, "world_size": 2, "optim": "muon"}, "--ds.tensor-parallel-size 2: choose .*optim adam"),
        ({"tensor_parallel_size": 2, "world_size": 2, "zpg": 2}, "choose --ds.zpg 1"),
    ],
)
def test_what_cannot_be_cut_is_said_before_a_process_group_is_made(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "qwen3-tied")
    with pytest.raises(ValueError, match=said):
        make_learner({"policy": model}, backend="deepspeed", **settings)


def test_parts_are_as_even_as_they_can_be() -> None:
    assert bounds(61, 2) == (0, 30, 61) and bounds(7, 3) == (0, 2, 4, 7)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_range_of_any_columns_is_read_from_any_other_cuts(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    matrix = torch.arange(float(height * width)).view(height, width)
    edges = sorted({0, width, *data.draw(st.lists(st.integers(0, width), max_size=2))})
    directory, pieces = tmp_path_factory.mktemp("cuts"), []
    for low, high in pairwise(edges):
        block = matrix[:, low:high].flatten()
        ends = sorted({0, len(block), *data.draw(st.lists(st.integers(0, len(block)), max_size=2))})
        columns = None if (low, high) == (0, width) and data.draw(st.booleans()) else (low, high)
        pieces += [
            Piece(section="master", name="w", shape=(height, width), start=begin, values=block[begin:end], columns=columns)
            for begin, end in pairwise(ends)
        ]
    for rank, piece in enumerate(pieces):
        layout = lay_out([piece], {"rank": rank, "world_size": len(pieces), "counters": {}, "layout": [["w", [height, width]]]})
        (directory / file_name("policy", rank=rank, world_size=len(pieces))).write_bytes(layout.header + piece.values.numpy().tobytes())
    low = data.draw(st.integers(0, width - 1))
    high = data.draw(st.integers(low + 1, width))
    columns = None if (low, high) == (0, width) and data.draw(st.booleans()) else (low, high)
    block = matrix[:, low:high].flatten()
    start = data.draw(st.integers(0, len(block) - 1))
    numel = data.draw(st.integers(1, len(block) - start))
    reader = RoleReader(directory, "policy")
    assert torch.equal(reader.read("master", "w", start=start, numel=numel, columns=columns), block[start : start + numel])
    assert torch.equal(reader.whole("master", "w"), matrix)
    with pytest.raises(CheckpointError):
        reader.read("master", "w", start=0, numel=len(block) + 1, columns=columns)
    assert sum(one.numel for one in rectangles(start, numel, (low, high))) == numel
