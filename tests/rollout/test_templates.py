"""Chat templates as they are published: what follows a reply, cut out behind a sentinel, is what the whole rendering has there.

The templates are those of TRL's package (`just peers`), text level, over a tokenizer of bytes with each template's own markers.
"""

import re
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hone.rollout.endpoint.messages import Message
from hone.rollout.endpoint.rendering import reply_with
from hone.rollout.endpoint.templates import Served, survey
from hone.rollout.errors import EnvironmentFailure
from tests.rollout.chatting import CHATML, TOOL, tokenizer

TEMPLATES = Path(__file__).parents[2] / ".peers" / "trl" / "chat_templates"
MARKERS = re.compile(
    r"<[|\uff5c][^<>\s'\"{}]+[|\uff5c]>|<\|?[a-z_]+\|>|<\|[a-z_]+>|<(?:start|end)_of_turn>|</?s>|\[/?INST\]|<end_of_utterance>"
)
# These take every content as a list of parts with pictures.
PICTURES = {"idefics3", "llava_next", "smolvlm"}
# Tools are shown, their calls read back, and what they say is appended.
TOOLS = {
    *("llama3_1", "llama3_2", "qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8", "glm4moe"),
    *("qwen3_instruct_2507", "qwen3_vl", "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"),
}


def files() -> list[Path]:
    found = sorted(TEMPLATES.glob("*.jinja"))
    if not found:
        pytest.skip("TRL's package is not in .peers/; `just peers` puts it there")
    return found


@cache
def bytes_with(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with a template and its markers as special tokens."""
    base = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    base.decoder = decoders.ByteLevel()
    special = [marker for marker in sorted(set(MARKERS.findall(template))) if marker not in ("<bos>", "<eos>")]
    return PreTrainedTokenizerFast(
        tokenizer_object=base, bos_token="<bos>", eos_token="<eos>", extra_special_tokens=special, chat_template=template
    )


def surveyed(file: Path) -> Served:
    letters = bytes_with(file.read_text())
    return survey(letters, stop_ids=[letters.eos_token_id])


def said(role: str, content: str) -> Message:
    return Message(role=role, content=content)


def behind(served: Served, before: list[Message], new: list[Message], mark: str, tools: tuple[dict, ...]) -> None:
    whole = served.renderer.text([*before, *new], tools, {})
    tail = served.renderer.tail(before[-1], new, tools, {})
    closer = min(place for end in served.renderer.closers if (place := whole.find(end, whole.rfind(mark))) >= 0)
    assert tail.text == whole[closer:]
    assert served.renderer.decoded(tail.ids) == tail.text and len(served.renderer.ids(served.renderer.decoded(tail.ids[:1]))) == 1


def test_every_text_template_is_appended_to_exactly() -> None:
    served = {file.stem: surveyed(file) for file in files() if file.stem.removesuffix("_training") not in PICTURES}
    assert len(served) == 66 and not any(one.append_users for one in served.values())
    openings = ([said("user", "Hello.")], [said("user", "a"), reply_with("b"), said("user", "c\n\nd")])
    answers = ("Yes, REPLY", "* one\n* two REPLY", "1 < 2 & 'REPLY'")
    for (name, one), opening, answer in product(served.items(), openings, answers):
        try:
            behind(one, [*opening, reply_with(answer)], [said("user", "Why?")], "REPLY", ())
        except AssertionError as error:
            raise AssertionError(name) from error


def test_tools_are_served_where_a_template_shows_and_writes_them() -> None:
    served = {file.stem: surveyed(file) for file in files() if file.stem.removesuffix("_training") not in PICTURES}
    assert {name.removesuffix("_training") for name, one in served.items() if not one.tools} == TOOLS
    call = ("add", '{"a": 71, "b": 92}')
    for name, one in served.items():
        if one.tools:
            assert len(one.tools) > 20 and one.reservations, name
            continue
        if name.startswith("glm4moe"):  # the next role's marker closes a reply, which only the model's own stop ids tell
            assert one.dialect == "glm" and one.reservations, name
            continue
        assert not one.append_tools and one.dialect in ("hermes", "bare_json", "function_xml"), name
        result = Message(role="tool", content="163", tool_call_id="call00000", name="add")
        opening = [said("system", "Be brief."), said("user", "71+92?")]
        behind(one, [*opening, reply_with("", call)], [result], "92", (TOOL,))
        behind(one, [*opening, reply_with("", call), result, reply_with("It is SUM")], [said("user", "Sure?")], "SUM", (TOOL,))


def test_a_template_that_cannot_be_served_is_refused_with_the_reason() -> None:
    for file in files():
        if file.stem.removesuffix("_training") in PICTURES:
            with pytest.raises(
                EnvironmentFailure, match=r"the chat template of .* cannot serve an agent: the chat template (drops|refuses)"
            ):
                surveyed(file)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            CHATML.replace("{{ message.content }}", "{{ message.content if message.role != 'assistant' }}"),
            "the template leaves the reply out",
        ),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}; {% endfor %}", "no token of the template closes the reply"),
        ("{{ raise_exception('no') }}", "the chat template refuses these messages: no"),
        (
            CHATML.replace("{{ message.content }}", "{{ message.content if loop.first else '' }}"),
            "the chat template drops a user message: 'two'",
        ),
        (None, "there is none; use an instruction-tuned model"),
    ],
)
def test_what_no_template_may_do(template: str | None, reason: str) -> None:
    letters = tokenizer(template)
    with pytest.raises(EnvironmentFailure, match=f"cannot serve an agent: {re.escape(reason)}"):
        survey(letters, stop_ids=[letters.eos_token_id])


def test_a_template_that_looks_far_back_is_not_appended_to() -> None:
    letters = tokenizer(CHATML.replace("<|im_start|>{{ message.role }}", "<|im_start|>{{ loop.index }} {{ message.role }}"))
    served = survey(letters, stop_ids=[letters.eos_token_id])
    assert "what follows a reply depends on what stands before it" in served.append_users
    assert served.reservations[0].startswith("replies are not appended to where users speak: each call renders the conversation anew")


def test_what_is_rendered_and_read_back_otherwise_is_not_appended() -> None:
    letters = tokenizer(CHATML.replace("<|im_end|>{{ '\\n' }}", "<|im_end|>\u00e9"))  # a letter this tokenizer does not know
    assert "the tokenizer does not give back what the template writes" in survey(letters, stop_ids=[letters.eos_token_id]).append_users
