"""Images in the learner: packed rows as transformers' own forward has each alone, gradients too, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, AutoProcessor

from hone.algos.algorithms import DrGRPO
from hone.algos.batch import Attachment, Batch, select
from hone.learner.config import LoraConfig
from hone.learner.errors import ModelError
from hone.learner.model import load_critic, load_policy
from hone.learner.packing import shards
from tests.learner.tiny import make_learner, save_model, score
from tests.vision import alone, picture, save_vision_model, show

FAMILIES = ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"]
SMALL, WIDE, TALL = picture(60, 40), picture(130, 70, seed=1), picture(50, 140, seed=2)
Row = tuple[list[int], tuple[Attachment, ...], int]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("vision")
    return {family: save_vision_model(root / family, family=family) for family in FAMILIES}


def rows_of(model: str) -> list[Row]:
    """Ids, images, and how many of the ids at the end were written by the policy."""
    processor = AutoProcessor.from_pretrained(model)
    shown = [
        show(processor, "a", SMALL, "what?"),
        show(processor, "text alone"),
        show(processor, WIDE, "and", TALL, "?"),
        show(processor, TALL),
    ]
    # One that writes the image token itself: no image stands for it.
    written = [[90, 91, 92], [93, 94], [100, 101, 102, 103], [88, 89]]
    return [(ids + more, attached, len(more)) for (ids, attached), more in zip(shown, written, strict=True)]


def batch_of(rows: list[Row], temperature: float = 0.8) -> Batch:
    lengths = [len(ids) for ids, _, _ in rows]
    total = sum(lengths)
    mask = torch.cat([torch.arange(len(ids)) >= len(ids) - written for ids, _, written in rows])
    return Batch(
        tokens=torch.tensor([id_ for ids, _, _ in rows for id_ in ids]),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        action_mask=mask,
        rollout_logp=torch.zeros(total),
        rewards=torch.zeros(total),
        version=torch.zeros(total, dtype=torch.long),
        group=torch.arange(len(rows)),
        truncated=torch.zeros(len(rows), dtype=torch.bool),
        temperature=temperature,
        attached=tuple(attached for _, attached, _ in rows),
    )


def expected_logp(model: Any, directory: str, rows: list[Row], temperature: float = 0.8) -> torch.Tensor:
    """Of every written token, zero elsewhere, one row at a time."""
    processor, found = AutoProcessor.from_pretrained(directory), []
    for ids, attached, written in rows:
        logp = (alone(processor, model, ids, attached)[:-1] / temperature).log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        found.append(torch.cat([torch.zeros(len(ids) - written), logp[len(ids) - written - 1 :]]))
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_with_images_are_as_transformers_has_each_alone(models: dict[str, str], family: str) -> None:
    rows, learner = rows_of(models[family]), make_learner({"policy": models[family]}, max_tokens=128)
    plain = AutoModelForImageTextToText.from_pretrained(models[family]).eval()
    with torch.no_grad():
        expected = expected_logp(plain, models[family], rows)
        blind = expected_logp(plain, models[family], [(ids, (), written) for ids, _, written in rows])
    batch = batch_of(rows)
    assert_close(learner.logp("policy", shards(batch, ranks=1, max_tokens=128)[0]), expected, rtol=1e-4, atol=1e-5)
    assert (blind - expected).abs().max() > 0.1  # the images do count
    # Other company, another order, images and text in micro-batches of their own.
    turned = shards(select(batch, [3, 1, 0, 2]), ranks=1, max_tokens=33)[0]
    assert len(turned.micro_batches) == 3
    parts = expected.split(batch.lengths.tolist())
    assert_close(learner.logp("policy", turned), torch.cat([parts[row] for row in (3, 1, 0, 2)]), rtol=1e-4, atol=1e-5)


def test_an_image_token_that_the_policy_wrote_is_no_image(models: dict[str, str]) -> None:
    model = models["qwen2_5_vl"]
    image = AutoProcessor.from_pretrained(model).image_token_id
    ids, attached, _ = rows_of(model)[0]
    plain = AutoModelForImageTextToText.from_pretrained(model).eval()
    # Nobody's forward takes such a row whole, but that of its beginning says how likely the image token was.
    with torch.no_grad():
        likely = (alone(AutoProcessor.from_pretrained(model), plain, ids, attached)[-1] / 0.8).log_softmax(-1)[image]
    learner = make_learner({"policy": model}, max_tokens=128)
    one = learner.logp("policy", shards(batch_of([([*ids, image], attached, 1)]), ranks=1, max_tokens=128)[0])
    more = learner.logp("policy", shards(batch_of([([*ids, image, 90], attached, 2)]), ranks=1, max_tokens=128)[0])
    assert_close(one[-1], likely, rtol=1e-4, atol=1e-5)
    assert_close(more[-2], likely, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_one_row_at_a_time(models: dict[str, str], family: str, recompute: bool) -> None:
    rows = rows_of(models[family])
    weights = torch.randn(len(batch_of(rows).tokens), generator=torch.Generator().manual_seed(0))
    plain = AutoModelForImageTextToText.from_pretrained(models[family]).eval()
    (expected_logp(plain, models[family], rows) * weights).sum().backward()
    model = load_policy(models[family], dtype=torch.float32, device=torch.device("cpu"), gradient_checkpointing=recompute)
    batch = batch_of(rows)
    for part in ([0, 1], [2], [3]):
        own = select(batch, part)
        logp, _ = model(own.tokens, own.position_ids, own.cu_seqlens, own.action_mask, 0.8, False, attached=own.attached)
        bounds = batch.cu_seqlens.tolist()
        (logp * torch.cat([weights[bounds[row] : bounds[row + 1]] for row in part])).sum().backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in model.causal_lm.named_parameters():
        assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    tower = [one for name, one in gradients.items() if ".visual." in name and one is not None]
    assert all(one.abs().max() > 0 for one in tower)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_images_every_parameter_has_a_gradient_and_the_towers_is_zero(models: dict[str, str], family: str) -> None:
    model = load_policy(models[family], dtype=torch.float32, device=torch.device("cpu"))
    text = batch_of([rows_of(models[family])[1]])
    for attached in ((), ((),)):
        logp, _ = model(text.tokens, text.position_ids, text.cu_seqlens, text.action_mask, 0.8, False, attached=attached)
        logp.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.abs().max() == 0) == (".visual." in name), name


def test_a_frozen_tower_stays_and_an_adapted_one_trains(models: dict[str, str]) -> None:
    model = models["qwen2_5_vl"]
    scored = score(batch_of(rows_of(model)))
    shard = shards(scored, ranks=1, max_tokens=64)[0]
    cases: list[tuple[dict[str, Any], bool]] = [
        ({"trained": {"freeze": "model.visual.*"}}, False),
        ({"ds": {"lora": LoraConfig(rank=2)}}, True),
    ]
    for settings, moves in cases:
        learner = make_learner({"policy": model}, max_tokens=64, **settings)
        before = {name: tensor.clone() for name, tensor in learner.weights("policy")}
        learner.update_policy("policy", shard, DrGRPO())
        learner.update_policy("policy", shard, DrGRPO())
        moved = {name for name, tensor in learner.weights("policy") if not torch.equal(tensor, before[name])}
        assert any(".visual." in name for name in moved) == moves
        assert any(".language_model." in name for name in moved)


def test_an_exported_model_is_read_by_transformers_and_sees(models: dict[str, str], tmp_path: Path) -> None:
    rows, learner = rows_of(models["qwen2_5_vl"]), make_learner({"policy": models["qwen2_5_vl"]}, max_tokens=128)
    batch = batch_of(rows)
    learner.update_policy("policy", shards(score(batch), ranks=1, max_tokens=128)[0], DrGRPO())
    learner.export("policy", str(tmp_path / "model"))
    loaded: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", output_loading_info=True)
    plain, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        expected = expected_logp(plain.eval(), str(tmp_path / "model"), rows)  # with the processor that was exported, too
    assert_close(learner.logp("policy", shards(batch, ranks=1, max_tokens=128)[0]), expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused_in_words(models: dict[str, str], tmp_path: Path) -> None:
    model = models["qwen2_5_vl"]
    ids, (one,), written = rows_of(model)[0]
    wrong = batch_of([(ids, (Attachment(start=one.start, count=one.count - 1, data=one.data),), written)])
    learner = make_learner({"policy": model}, max_tokens=128)
    with pytest.raises(ValueError, match=r"the image at token \d+ of the micro-batch has 2 features for 1 tokens"):
        learner.logp("policy", shards(wrong, ranks=1, max_tokens=128)[0])
    text = make_learner({"policy": save_model(tmp_path / "text", "qwen3-tied")}, max_tokens=128)
    small = batch_of([([1, 2, 3], (Attachment(start=1, count=1, data=SMALL),), 1)])
    with pytest.raises(ValueError, match="rows have images, and Qwen3Model reads text only"):
        text.logp("policy", shards(small, ranks=1, max_tokens=128)[0])
    with pytest.raises(ModelError, match="cannot be a critic"):
        load_critic(model, dtype=torch.float32, device=torch.device("cpu"), value_head_prefix="score")
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in Path(model).iterdir():
        if file.name != "processor_config.json":
            (bare / file.name).symlink_to(file)
    with pytest.raises(ModelError, match="without a usable image processor"):
        load_policy(str(bare), dtype=torch.float32, device=torch.device("cpu"))
