"""Images that agents send: a row has the ids of the whole rendering, with every placeholder, and the files with their places."""

import asyncio
import base64
import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import aiohttp
import anthropic
import openai
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from hone.algos.batch import Attachment
from hone.rollout.agents.calling import FunctionAgent
from hone.rollout.config import RolloutConfig
from hone.rollout.endpoint import anthropic_wire
from hone.rollout.endpoint import server as server_module
from hone.rollout.endpoint.errors import Refused
from hone.rollout.endpoint.rollout import Calling
from hone.rollout.endpoint.server import serving
from hone.rollout.endpoint.templates import served_template
from hone.rollout.engines.transformers import TransformersEngine
from hone.rollout.pictures import Placeholders, encoded
from hone.rollout.types import Completion, Prompt, Request
from tests.rollout.chatting import CHATML, END, TOOL, Talk, assistant, echoed, user, wrote
from tests.rollout.test_images import Halves
from tests.vision import alone, picture, save_vision_model

WIDE, TALL, OTHER = picture(30, 10), picture(20, 20, seed=1), picture(30, 10, seed=2)
COUNTS = {WIDE: 3, TALL: 4, OTHER: 3}
PARTS = (
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}[@]{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
)
SEEING = CHATML.replace("{{ message.content }}", PARTS)
NUMBERED = SEEING.replace("[@]", "{% set seen.n = seen.n + 1 %}[{{ seen.n }}@]")
NUMBERED = "{% set seen = namespace(n=0) %}" + NUMBERED


def url(data: bytes, kind: str = "png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}


def block(data: bytes) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(data).decode()}}


def said(*parts: str | dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]}


def eyes(letters: PreTrainedTokenizerFast) -> Placeholders:
    return Placeholders(Halves(), image_token=letters.convert_tokens_to_ids("@"))


def seeing(*replies: str, template: str = SEEING, **settings: Any) -> Talk:
    return Talk([reply + END for reply in replies], template=template, sees=eyes, **settings)


def expected(talk: Talk, text: str, *images: bytes) -> tuple[list[int], list[Attachment]]:
    """Ids of a rendered conversation, written out with one @ an image, and the images' places."""
    ids: list[int] = []
    attached: list[Attachment] = []
    pieces = text.split("@")
    for piece, image in zip(pieces, [*images, None], strict=True):
        ids += talk.ids(piece)
        if image is not None:
            attached.append(Attachment(start=len(ids), count=COUNTS[image], data=image))
            ids += talk.ids("@") * COUNTS[image]
    return ids, attached


@pytest.mark.parametrize("history", ["verbatim", "template"])
@pytest.mark.parametrize(("template", "marks"), [(SEEING, ("[@]", "[@]", "[@]")), (NUMBERED, ("[1@]", "[2@]", "[3@]"))])
def test_images_of_two_turns_stand_where_the_template_has_them(template: str, marks: tuple[str, ...], history: str) -> None:
    talk = seeing("12", "3", "4", template=template, history=history)
    begun = said("a", url(WIDE), "b")
    first = talk.ask(begun)
    more = [begun, echoed(first), said(url(TALL), url(WIDE, "jpeg"), "?")]
    second = talk.ask(*more)
    third = talk.ask(*more, echoed(second), user("and?"))
    assert [node.place.how for node in (first, second, third)] == ["root", "append", "append"]
    text = (
        f"<|im_start|>user\na{marks[0]}b{END}\n<|im_start|>assistant\n12{END}\n"
        f"<|im_start|>user\n{marks[1]}{marks[2]}?{END}\n<|im_start|>assistant\n3{END}\n"
        f"<|im_start|>user\nand?{END}\n<|im_start|>assistant\n4{END}"
    )
    ids, attached = expected(talk, text, WIDE, TALL, WIDE)
    (segment,) = talk.segments()
    assert (list(segment.tokens), list(segment.images)) == (ids, attached)
    assert talk.text([token for token, own in zip(segment.tokens, segment.mask, strict=True) if own]) == f"12{END}3{END}4{END}"
    # Each request shows what was there when it was made; an image sent again is the same object.
    assert [list(call[0].images) for call in talk.engine.calls] == [attached[:1], attached, attached]
    assert segment.images[0].data is segment.images[2].data


def test_another_image_of_the_same_size_is_another_history() -> None:
    talk = seeing("1", "2", "3", "4")
    first = talk.ask(said("a", url(WIDE)))
    second = talk.ask(said("a", url(OTHER)), echoed(first), user("b"))
    third = talk.ask(said("a", url(OTHER)))
    assert second.place.prompt[: len(first.ids)] == first.ids and third.place.prompt == first.place.prompt
    assert second.place.parent is None and third.place.parent is None
    assert [segment.images[0].data for segment in talk.segments()] == [WIDE, OTHER, OTHER]
    # None is another sample of what was drawn before: each has its seed by what it shows, in whatever order they come.
    assert all("#0:" in call[0].request_id for call in talk.engine.calls) and not talk.session.tree.counts["calls_resample"]
    # What is rendered anew keeps its place only where it shows the same.
    anew = talk.ask(said("a", url(WIDE)), assistant("1"), assistant("x"), user("b"))
    assert anew.place.parent is first and anew.place.how == "rerender" and anew.place.images == first.place.images


def test_who_goes_on_by_ids_goes_on_with_the_images() -> None:
    talk = seeing("1", "2")
    first = talk.ask(said("a", url(WIDE)))
    second = asyncio.run(talk.session.answer(server_module.COMPLETIONS.read({"prompt": [*first.ids, *talk.ids("more")]})[0]))[0]
    assert second.place.parent is first and second.place.images == first.place.images == talk.engine.calls[1][0].images


@pytest.mark.parametrize("failed", [False, True])
def test_tools_may_answer_with_images(failed: bool) -> None:
    talk = seeing(wrote(1, 2), "3")
    tools = [{"name": "add", "description": "Adds two numbers.", "input_schema": TOOL["function"]["parameters"]}]
    begun = {"role": "user", "content": [{"type": "text", "text": "q"}, block(TALL)]}
    ask = partial(anthropic_wire.read, counting=True)
    (first,) = asyncio.run(talk.session.answer(ask({"system": "s", "messages": [begun], "tools": tools})[0]))
    (call,) = first.reply.tool_calls
    answer = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "see"}, block(WIDE)], "is_error": failed}
    used = {"role": "assistant", "content": [{"type": "tool_use", "id": call.id, "name": "add", "input": {"a": 1, "b": 2}}]}
    body = {
        "system": "s",
        "messages": [begun, used, {"role": "user", "content": [answer, {"type": "text", "text": "so?"}]}],
        "tools": tools,
    }
    (second,) = asyncio.run(talk.session.answer(ask(body)[0]))
    assert second.place.how == "append"
    told = "Error: see" if failed else "see"
    text = f"\n<|im_start|>user\n<tool_response>{told}[@]</tool_response>{END}\n<|im_start|>user\nso?{END}\n<|im_start|>assistant\n"
    assert list(second.place.prompt[len(first.ids) :]) == expected(talk, text, WIDE)[0]
    assert [(one.count, one.data) for one in second.place.images] == [(4, TALL), (3, WIDE)]
    body["messages"][2]["content"][0]["content"][1] = {"type": "image", "source": {"type": "url", "url": "https://a.b/c.png"}}
    with pytest.raises(Refused, match=r"image 1 of messages\[2\].content is a link \(https://a.b/c.png\), and none is fetched"):
        ask(body)


def test_an_image_is_shown_upright_and_opaque() -> None:
    turned, seen = Image.new("RGB", (4, 2), "red"), io.BytesIO()
    exif = turned.getexif()
    exif[274] = 6
    turned.save(seen, format="JPEG", exif=exif)
    upright = Image.open(io.BytesIO(encoded(seen.getvalue())))
    assert upright.size == (2, 4)
    clear = io.BytesIO()
    Image.new("RGBA", (2, 2), (9, 9, 9, 0)).save(clear, format="PNG")
    assert Image.open(io.BytesIO(encoded(clear.getvalue()))).getpixel((0, 0)) == (255, 255, 255)
    assert encoded(TALL) == TALL


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            url(b"no image"),
            r"image 1 of messages\[0\].content is an image that cannot be read: not an image in a format that is known; send",
        ),
        (url(TALL[:200]), r"image 1 of messages\[0\].content is an image that cannot be read"),
        (
            {"type": "image_url", "image_url": "http://a.b/c.png"},
            r"is a link \(http://a.b/c.png\), and none is fetched; send a PNG or JPEG as",
        ),
        (
            {"type": "image_url", "image_url": {"url": "file:///c.png"}},
            r"has the url 'file:///c.png'; send a PNG or JPEG as data:image/png",
        ),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,*"}}, r"image 1 of messages\[0\].content is no base64"),
        ({"type": "image_url"}, r"image 1 of messages\[0\].content has no url"),
        ({"type": "text", "text": "an @"}, r"the messages cannot be shown: 0 images for 1 image tokens in the text"),
    ],
)
def test_what_is_no_image_is_refused(part: dict[str, Any], message: str) -> None:
    talk = seeing("1")
    with pytest.raises(Refused, match=message) as refused:
        talk.ask(said("a", part))
    assert refused.value.status == 400 and talk.session.error is None and not talk.session.tree.nodes
    assert talk.ask(said("a", url(TALL))).output  # the episode goes on


def test_images_of_others_than_users_and_tools_and_templates_without_are_refused() -> None:
    with pytest.raises(Refused, match=r"messages\[0\].content has a part of type 'image_url'; only text is served"):
        seeing().ask({**said(url(TALL)), "role": "system"}, user("x"))
    with pytest.raises(Refused, match="the messages cannot be shown: 1 images for 0 image tokens in the text"):
        seeing(template=SEEING.replace("[@]", "")).ask(said(url(TALL), "a"))
    with pytest.raises(Refused, match=r"messages\[0\] has an image with a source of type 'file'; send base64"):
        anthropic_wire.read({"max_tokens": 9, "messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]})


def test_a_body_that_is_too_large_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_LARGEST_BODY", 2**19)

    async def asked() -> tuple[int, Any]:
        talk = seeing("1")
        async with serving(talk.renderer) as server:
            opened = server.open(talk.session)
            body = {"max_tokens": 9, "messages": [said(url(bytes(2**19)))]}
            headers = {"x-api-key": opened.key}
            async with aiohttp.ClientSession() as client, client.post(opened.base_url + "/messages", json=body, headers=headers) as answer:
                return answer.status, await answer.json()

    status, body = asyncio.run(asked())
    assert status == 413 and body["error"]["type"] == "request_too_large"
    assert "the body has more than 0.5 MiB; send fewer images, or smaller ones" in body["error"]["message"]


def test_a_policy_that_sees_is_asked_by_both_libraries_and_trained_on_what_it_saw(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = save_vision_model(tmp_path_factory.mktemp("seen"), family="qwen2_5_vl")
    processor, model = AutoProcessor.from_pretrained(directory), AutoModelForImageTextToText.from_pretrained(directory).eval()
    eye = AutoImageProcessor.from_pretrained(directory)
    letters, mark = processor.tokenizer, processor.image_token_id
    small, wide = picture(60, 40), picture(130, 70, seed=1)
    asked: list[Request] = []

    class Kept(TransformersEngine):
        async def generate(self, requests: Sequence[Request]) -> list[Completion]:
            asked.extend(requests)
            return await super().generate(requests)

    async def by_openai(base_url: str, api_key: str, name: str, row: dict[str, Any]) -> float:
        async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
            messages: list[Any] = [said("What is ", url(small), "?")]
            reply = (await client.chat.completions.create(model=name, messages=messages)).choices[0].message
            messages += [{"role": "assistant", "content": reply.content}, said(url(wide), "and this?")]
            await client.chat.completions.create(model=name, messages=messages)
        return 1.0

    async def by_anthropic(base_url: str, api_key: str, name: str, row: dict[str, Any]) -> float:
        async with anthropic.AsyncAnthropic(base_url=base_url.removesuffix("/v1"), api_key=api_key, max_retries=0) as client:
            content: list[Any] = [{"type": "text", "text": "What is "}, block(small), {"type": "text", "text": "?"}]
            messages: list[Any] = [{"role": "user", "content": content}]
            reply = await client.messages.create(model=name, messages=messages, max_tokens=50)
            more: list[Any] = [block(wide), {"type": "text", "text": "and this?"}]
            messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": more}]
            await client.messages.create(model=name, messages=messages, max_tokens=50)
        return 1.0

    for function in (by_openai, by_anthropic):
        asked.clear()
        ends = (letters.eos_token_id,)
        calling = Calling(
            engine=Kept(model, eos_ids=[*ends], image_processor=eye),
            agent=FunctionAgent(function=function, where="agent"),
            judge=None,
            tokenizer=letters,
            served=served_template(letters, stop_ids=ends),
            stop_ids=ends,
            config=RolloutConfig(n_samples_per_prompt=1, max_new_tokens=8, temperature=0.8, agent_timeout_s=60.0),
            run_seed=3,
            max_len=500,
            engine_version="",
            tokenizer_hash="",
            template_hash="",
            placeholders=Placeholders(eye, image_token=mark),
        )
        (group,) = asyncio.run(calling.collect([Prompt(prompt_id="p", tokens=(), text="", label=None)], step=1))
        (row,) = group.samples[0].segments
        tokens, mask = row.tokens.tolist(), row.action_mask
        # The processor's own ids of both prompts: the first reply stands between them as it was sampled.
        first, second = (list(request.tokens) for request in asked)
        shown = "<|vision_start|><|image_pad|><|vision_end|>"
        head = f"<|im_start|>user\nWhat is {shown}?<|im_end|>\n<|im_start|>assistant\n"
        behind = f"\n<|im_start|>user\n{shown}and this?<|im_end|>\n<|im_start|>assistant\n"
        pictures = [Image.open(io.BytesIO(data)) for data in (small, wide)]
        assert first == processor(text=[head], images=pictures[:1])["input_ids"][0]
        tail = processor(text=[behind], images=pictures[1:])["input_ids"][0]
        assert second[: len(first)] == first and second[-len(tail) :] == tail and tokens[: len(second)] == second
        assert [one.data for one in row.attached] == [small, wide] and list(row.attached) == list(asked[1].images)
        assert all(set(tokens[one.start : one.start + one.count]) == {mark} for one in row.attached)
        assert sum(one.count for one in row.attached) == tokens.count(mark) and list(asked[0].images) == list(row.attached[:1])
        with torch.no_grad():
            logits = alone(processor, model, tokens, row.attached) / 0.8
        learner = logits[:-1].log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert_close(row.rollout_logp[1:][mask[1:]], learner[mask[1:]], rtol=0, atol=1e-4)
        assert group.samples[0].response_text.count("<|image_pad|>") == 1
