"""Images of prompts: every way to write one comes to the same ids as the model's own processor, and every fault is told by line."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoProcessor

from hone.datasets.config import DataConfig
from hone.datasets.errors import DataError, TokenizerError
from hone.datasets.images import picture
from hone.datasets.records import Prompts, Row, Source
from hone.datasets.schemas import load_prompts, prompt_rows
from hone.datasets.stream import PromptStream
from hone.datasets.tokenise import tokenise
from hone.datasets.tokenizer import SEEING, load_processor, load_tokenizer
from tests.vision import picture as png
from tests.vision import save_vision_model

SMALL, WIDE = png(60, 40), png(130, 70, seed=1)
CHAT = {"apply_chat_template": True, "max_len": 256}


@pytest.fixture(scope="module", params=SEEING)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vision_model(tmp_path_factory.mktemp("seeing") / request.param, family=request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vision_model(tmp_path_factory.mktemp("one"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "small.png").write_bytes(SMALL)
    (tmp_path / "wide.png").write_bytes(WIDE)
    return tmp_path


def written(folder: Path, *rows: dict[str, Any], **settings: Any) -> DataConfig:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(prompt_dataset=str(folder / "rows.jsonl"), **{**CHAT, **settings})


def ready(config: DataConfig, model: str) -> Prompts:
    return tokenise(load_prompts(config), load_tokenizer(model), config=config, max_new_tokens=8, processor=load_processor(model))


def faults(folder: Path, *rows: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_prompts(written(folder, *rows, **settings))
    return str(caught.value).replace(f"{folder}/", "")


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_every_layout_comes_to_the_ids_of_the_models_own_processor(model: str, folder: Path) -> None:
    asked = {"type": "text", "text": "what?"}
    same = [
        {"input": "<image>what?", "images": ["small.png"]},
        {"input": "what?", "images": "small.png"},  # no mark: images first
        {"input": "what?", "images": [{"bytes": as_base64(SMALL), "path": None}]},
        {"input": [{"role": "user", "content": "<image>what?"}], "images": [{"path": str(folder / "small.png")}]},
        {"input": [{"role": "user", "content": [{"type": "image"}, asked]}], "images": [as_base64(SMALL)]},
        {"input": [{"role": "user", "content": [{"type": "image", "image": "small.png"}, asked]}]},
        {
            "input": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + as_base64(SMALL)}}, asked],
                }
            ]
        },
    ]
    two = {"input": "<image> or <image>?", "images": ["wide.png", "small.png"]}
    records = ready(written(folder, *same, two, {"input": "what?"}), model).records
    processor = AutoProcessor.from_pretrained(model)
    opened = {name: Image.open(folder / name) for name in ("small.png", "wide.png")}

    def own(names: list[str], *parts: str) -> list[int]:
        content = [{"type": "image"} if part == "image" else {"type": "text", "text": part} for part in parts]
        text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        return processor(text=[text], images=[opened[name] for name in names] or None)["input_ids"][0]

    assert [list(record.tokens) for record in records[:7]] == [own(["small.png"], "image", "what?")] * 7
    assert list(records[7].tokens) == own(["wide.png", "small.png"], "image", " or ", "image", "?")
    assert list(records[8].tokens) == own([], "what?") and not records[8].images
    for record in records:
        placeholders = {place for start, count in record.places for place in range(start, start + count)}
        assert placeholders == {index for index, id_ in enumerate(record.tokens) if id_ == processor.image_token_id}
        assert len(record.places) == len(record.images)
    assert [image.encoded() for image in records[7].images] == [WIDE, SMALL]


def test_values_that_are_no_text_are_images_too(folder: Path) -> None:
    for value in (SMALL, bytearray(SMALL), Image.open(io.BytesIO(SMALL)), {"bytes": SMALL, "path": "x.png"}, {"image": "small.png"}):
        source = Source(name="rows", fingerprint="0" * 12, rows=(Row(line=1, columns={"input": "a", "images": [value]}),))
        (row,) = prompt_rows(source, input_key="input", label_key=None, chat=True, image_key="images", folder=folder).rows
        (image,) = row.images
        assert (image.width, image.height) == (60, 40)
        assert Image.open(io.BytesIO(image.encoded())).tobytes() == Image.open(io.BytesIO(SMALL)).tobytes()


def test_pictures_are_shown_upright_and_opaque(tmp_path: Path) -> None:
    plain = Image.open(io.BytesIO(SMALL))
    turned = Image.Exif()
    turned[274] = 6  # the first row is the right side
    plain.save(tmp_path / "turned.jpg", exif=turned)
    seen = picture("turned.jpg", folder=tmp_path)
    assert (seen.width, seen.height) == Image.open(io.BytesIO(seen.encoded())).size == (40, 60)
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    clear.save(tmp_path / "clear.png")
    seen = Image.open(io.BytesIO(picture("clear.png", folder=tmp_path).encoded()))
    assert seen.mode == "RGB" and seen.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("row", "fault", "detail"),
    [
        (
            {"images": ["smal.png"]},
            "an image file that is not there (1 row); mend the path; relative ones begin at the data's file",
            "smal.png",
        ),
        (
            {"images": ["rows.jsonl"]},
            "an image that cannot be read (1 row); replace it",
            "'rows.jsonl': not an image in a format that is known",
        ),
        ({"images": ["cut.png"]}, "an image that cannot be read (1 row); replace it", "'cut.png': "),
        ({"images": ["https://example.org/x.png"]}, "an image by URL (1 row); download it", "'https://example.org/x.png'"),
        ({"images": ["data:image/png,abc"]}, "a data URI that is not base64 (1 row)", "'data:image/png,abc'"),
        ({"images": [{"bytes": "?"}]}, "an image that is not base64 (1 row)", "'?': "),
        ({"images": [7]}, "a value that is no image (1 row); write a path, a data URI", "7"),
        (
            {"images": ["small.png"], "input": "<image> and <image>"},
            "images and their places differ in number (1 row)",
            "1 images for 2 places",
        ),
        ({"images": ["small.png"] * 2, "input": "<image>?"}, "images and their places differ in number (1 row)", "2 images for 1 places"),
        (
            {"images": ["small.png"], "input": [{"role": "user", "content": "hi"}]},
            "images and their places differ in number (1 row); give 'images' one image for every <image>",
            "1 images for 0 places",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "image"}]}]},
            "images and their places differ in number",
            "0 images for 1 places",
        ),
    ],
)
def test_what_is_wrong_with_an_image_is_told_by_line(folder: Path, row: dict[str, Any], fault: str, detail: str) -> None:
    (folder / "cut.png").write_bytes(SMALL[: len(SMALL) // 2])
    message = faults(folder, {"input": "fine"}, {"input": "hi", **row})
    assert message.splitlines()[1].startswith(f"  {fault}"), message
    assert message.splitlines()[2].startswith(f"    rows.jsonl:2: {detail}"), message


def test_images_need_a_chat_template_and_a_model_that_sees(folder: Path, one: str, tmp_path: Path) -> None:
    row = {"input": "hi", "images": ["small.png"]}
    assert "images without a chat template (1 row); turn on --data.apply-chat-template" in faults(folder, row, apply_chat_template=False)
    assert not load_prompts(written(folder, row, apply_chat_template=False, image_key=None)).rows[0].images
    blind = tmp_path / "blind"
    blind.mkdir()
    (blind / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TokenizerError, match="is a model of type 'llama', which is not shown any here; name one of type qwen2_vl"):
        load_processor(str(blind))
    with pytest.raises(
        DataError, match=r"rendered prompt has another number of image tokens than images[^\n]*\n[^\n]*:1: 2 image tokens for 1"
    ):
        ready(written(folder, {"input": "<|image_pad|>", "images": ["small.png"]}), one)
    (folder / "long.png").write_bytes(png(2000, 4))
    with pytest.raises(
        DataError, match=r"an image that the processor of [^\n]* refuses[^\n]*\n[^\n]*:1: 2000 x 4 pixels: absolute aspect ratio"
    ):
        ready(written(folder, {"input": "thin", "images": ["long.png"]}), one)


def test_a_file_that_changes_is_other_data(folder: Path, one: str) -> None:
    config = written(folder, {"input": "hi", "images": ["small.png"]})
    records = ready(config, one).records
    (folder / "small.png").write_bytes(png(60, 40, seed=9))
    with pytest.raises(DataError, match=r"small\.png is not what it was when the data was read"):
        records[0].images[0].encoded()
    state = PromptStream(records, batch_size=1, seed=0, num_episodes=1).state()
    with pytest.raises(DataError, match="the data has changed since the run was saved"):
        PromptStream.from_state(state, ready(config, one).records)
