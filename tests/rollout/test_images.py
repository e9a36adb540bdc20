"""Images in rollouts: placeholders, the engine in this process, and environments that show some."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from hone.algos.batch import Attachment, SamplerContract
from hone.rollout.engines.transformers import TransformersEngine
from hone.rollout.env import Observation, Turn
from hone.rollout.errors import EngineError, EnvironmentFailure
from hone.rollout.pictures import Placeholders, collapsed
from hone.rollout.types import Prompt, Request
from tests.rollout.test_executor import ids
from tests.rollout.test_multi_turn import Scripted, collect, counting, multi_turn
from tests.vision import alone, picture, save_vision_model, show

SMALL, WIDE, TALL = picture(60, 40), picture(130, 70, seed=1), picture(50, 140, seed=2)
FAMILIES = ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("pictures")
    return {family: save_vision_model(root / family, family=family) for family in FAMILIES}


def asked(shown: tuple[list[int], tuple[Attachment, ...]], seed: int) -> Request:
    contract = SamplerContract(temperature=0.8, top_p=1.0, top_k=0, seed=seed, engine="", tokenizer="", template="")
    return Request(request_id=f"{len(shown[0])}:{seed}", tokens=tuple(shown[0]), max_new_tokens=9, contract=contract, images=shown[1])


def test_an_image_is_one_placeholder_for_vllm() -> None:
    images = [Attachment(start=1, count=3, data=b"a"), Attachment(start=5, count=1, data=b"b"), Attachment(start=6, count=2, data=b"c")]
    assert collapsed([9, 5, 5, 5, 8, 5, 5, 5, 5], images) == [9, 5, 8, 5, 5, 5]  # the last 5 is nobody's image
    assert collapsed([9, 8], []) == [9, 8]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_in_this_process_reports_what_transformers_has(models: dict[str, str], family: str) -> None:
    directory = models[family]
    processor, model = AutoProcessor.from_pretrained(directory), AutoModelForImageTextToText.from_pretrained(directory).eval()
    engine = TransformersEngine(model, eos_ids=[2], image_processor=AutoImageProcessor.from_pretrained(directory))
    # Prompts of several lengths, so that most are padded; two of the same ids show different pictures.
    turned = picture(60, 40, seed=5)
    shown = [
        show(processor, "a", SMALL, "?"),
        show(processor, "a", turned, "?"),
        show(processor, "text"),
        show(processor, WIDE, "and", TALL),
    ]
    requests = [asked(one, seed) for one in shown for seed in range(3)]
    for request, drawn in zip(requests, asyncio.run(engine.generate(requests)), strict=True):
        whole = [*request.tokens, *drawn.tokens]
        with torch.no_grad():
            # The row up to each token, so that an image token among those sampled is not taken for an image.
            fed = whole if processor.image_token_id not in drawn.tokens else whole[: len(request.tokens)]
            logits = alone(processor, model, fed, request.images)[len(request.tokens) - 1 :] / 0.8
        expected = logits.log_softmax(-1)[: len(drawn.tokens)].gather(1, torch.tensor(drawn.tokens)[: len(logits), None])[:, 0]
        assert_close(torch.tensor(drawn.logp)[: len(expected)], expected, rtol=1e-4, atol=1e-4)
    tokens, images = shown[3]
    with torch.no_grad():
        expected = alone(processor, model, tokens, images)[:-1].log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert_close(torch.tensor(asyncio.run(engine.prompt_logp(tokens, images))), expected, rtol=1e-4, atol=1e-4)


def test_what_the_engine_in_this_process_cannot_show_is_refused(models: dict[str, str]) -> None:
    directory = models["qwen2_5_vl"]
    processor, model = AutoProcessor.from_pretrained(directory), AutoModelForImageTextToText.from_pretrained(directory)
    tokens, images = show(processor, SMALL, "x")
    with pytest.raises(EngineError, match=r"serves a language model, and request .* has images"):
        asyncio.run(TransformersEngine(model, eos_ids=[2]).generate([asked((tokens, images), 0)]))
    seeing = TransformersEngine(model, eos_ids=[2], image_processor=AutoImageProcessor.from_pretrained(directory))
    with pytest.raises(EngineError, match=r"got 3 image tokens in request .* for images of 2"):
        asyncio.run(seeing.generate([asked(([*tokens, processor.image_token_id], images), 0)]))


class Halves:
    """An image processor's arithmetic: a token for every 10 x 10 pixels."""

    merge_size = 2

    def get_number_of_image_patches(self, height: int, width: int, kwargs: dict[str, Any]) -> int:
        return 4 * (height // 10) * (width // 10)


def test_an_environment_shows_images_and_the_row_has_their_places(tmp_path: Path) -> None:
    mark = ord("@")
    (tmp_path / "shown.png").write_bytes(picture(20, 20))
    grey = np.full((10, 30, 3), 90, dtype=np.uint8)
    first = Turn(terminated=False, feedback="X@Y@", images=[Image.fromarray(grey), str(tmp_path / "shown.png")])
    env = Scripted([first, Turn(terminated=True, reward=1.0)])
    own = Attachment(start=1, count=2, data=picture(20, 10))
    asked = Prompt(prompt_id="id", tokens=(ord("Q"), mark, mark), text="Q@", label=None, images=(own,))
    engine = counting()
    executor = multi_turn(engine, lambda: env, placeholders=Placeholders(Halves(), image_token=mark))
    ((sample,),) = (group.samples for group in collect(executor, [asked]))
    row = sample.trajectory
    assert row.tokens.tolist() == ids("Q@@a$X@@@Y@@@@b$")
    assert [(one.start, one.count) for one in row.attached] == [(1, 2), (6, 3), (10, 4)]
    assert row.attached[0] is own and row.attached[2].data == picture(20, 20)
    assert not row.action_mask[6:9].any()
    # Each request shows what was there when it was made.
    assert [[one.start for one in call[0].images] for call in engine.calls] == [[1], [1, 6, 10]]


def test_an_episode_may_begin_with_images_of_the_environments_own() -> None:
    begun = Observation(text="Q@!", images=[picture(30, 10)])
    env = Scripted([Turn(terminated=True, reward=1.0)], begin=lambda text: begun)
    executor = multi_turn(counting(), lambda: env, placeholders=Placeholders(Halves(), image_token=ord("@")))
    ((sample,),) = (group.samples for group in collect(executor, [Prompt(prompt_id="id", tokens=(ord("Q"),), text="Q", label=None)]))
    assert sample.trajectory.tokens.tolist() == ids("Q@@@!a$")
    assert [(one.start, one.count) for one in sample.trajectory.attached] == [(1, 3)]


@pytest.mark.parametrize(
    ("turn", "sees", "message"),
    [
        ({"feedback": "X", "images": [picture(20, 20)]}, True, "gave 1 images for 0 image tokens in the text; write the model's markup"),
        ({"feedback": "@", "images": []}, True, "gave 0 images for 1 image tokens in the text"),
        ({"feedback": "@", "images": [b"no image"]}, True, "gave an image that cannot be read"),
        ({"feedback": "@", "images": [7]}, True, r"gave 7 \(int\) is no image"),
        ({"feedback": "@", "images": [picture(20, 20)]}, False, "showed 1 images to a model that reads text only"),
        ({"feedback": "@", "images": "x.png"}, True, r"gave the images 'x.png' \(str\), not a list of them"),
    ],
)
def test_images_that_do_not_fit_are_the_environments_fault(turn: dict[str, Any], sees: bool, message: str) -> None:
    env = Scripted([Turn(terminated=False, **turn), Turn(terminated=True, reward=1.0)])
    placeholders = Placeholders(Halves(), image_token=ord("@")) if sees else None
    with pytest.raises(EnvironmentFailure, match=message):
        collect(
            multi_turn(counting(), lambda: env, placeholders=placeholders), [Prompt(prompt_id="id", tokens=(81,), text="Q", label=None)]
        )
