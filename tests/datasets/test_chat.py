"""Rendering: exact texts of both template families, literal input templates, and every way a template can fail."""

import copy
import json
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from hone.datasets.chat import render, template_problems, template_text
from hone.datasets.config import DataConfig
from hone.datasets.errors import DataError, TokenizerError
from hone.datasets.records import Message, PromptRow, PromptSet

CHAT = DataConfig(apply_chat_template=True)


def prompts(*values: str | tuple[Message, ...]) -> PromptSet:
    rows = tuple(PromptRow(uid=f"f:{index}", prompt=value, label=None, line=index + 1) for index, value in enumerate(values))
    return PromptSet(name="rows.jsonl", fingerprint="f", rows=rows)


def test_a_plain_string_stands_as_it_is(chatml: PreTrainedTokenizerFast) -> None:
    assert render(prompts(" a {x} "), chatml, config=DataConfig()) == [" a {x} "]


def test_an_input_template_is_filled_literally(chatml: PreTrainedTokenizerFast) -> None:
    config = DataConfig(input_template="{0.__class__} {q: {}} {")
    assert render(prompts("a {} {x}"), chatml, config=config) == ["{0.__class__} {q: a {} {x}} {"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(input_template="Q:"), "has 0 places {} for the prompt; write exactly one"),
        (DataConfig(input_template="{} {}"), "has 2 places"),
        (
            DataConfig(input_template="{}", apply_chat_template=True),
            "--data.input-template and --data.apply-chat-template exclude one another",
        ),
        (DataConfig(input_template="User: {}\\nAssistant: "), "holds a backslash and an n"),
    ],
)
def test_unsound_template_settings_are_found_without_a_tokenizer(config: DataConfig, message: str, chatml: PreTrainedTokenizerFast) -> None:
    (problem,) = template_problems(config)
    assert message in problem
    with pytest.raises(DataError) as caught:
        render(prompts("a"), chatml, config=config)
    assert str(caught.value) == problem


def test_sound_template_settings_have_no_problem() -> None:
    assert template_problems(DataConfig()) == template_problems(CHAT) == template_problems(DataConfig(input_template="User: {}\n")) == ()


def test_chat_templates_render_strings_as_one_user_message_and_open_the_answer(
    chatml: PreTrainedTokenizerFast, llama: PreTrainedTokenizerFast
) -> None:
    talk = ({"role": "system", "content": "s"}, {"role": "user", "content": "{} u"})
    assert render(prompts("hi", talk), chatml, config=CHAT) == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n{} u<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert render(prompts("hi"), llama, config=CHAT) == [
        "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ]


def test_a_tokenizer_without_a_template_names_the_ways_out(ends_with_eos: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TokenizerError, match=r"has no chat template; .*chat_template\.jinja.*--data\.input-template"):
        render(prompts("a"), ends_with_eos, config=CHAT)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "TemplateSyntaxError: Unexpected end of template"),
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{{ messages[7].content }}", "UndefinedError: list object has no element 7"),
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
    ],
)
def test_what_a_template_says_when_it_fails_is_shown_with_the_row(chatml: PreTrainedTokenizerFast, template: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        render(prompts("hello"), with_template(chatml, template), config=CHAT)
    assert "the chat template of " in str(caught.value)
    assert f"rows.jsonl:1: {message}" in str(caught.value)
    assert "messages [{'role': 'user', 'content': 'hello'}]" in str(caught.value)


def test_only_the_rows_a_template_fails_on_are_listed(llama: PreTrainedTokenizerFast) -> None:
    tool = ({"role": "user", "content": "u"}, {"role": "tool", "content": "t"})
    with pytest.raises(DataError) as caught:
        render(prompts("fine", tool, "fine", tool), llama, config=CHAT)
    assert str(caught.value).startswith("rows.jsonl: 2 of 4 rows cannot be used")
    assert "rows.jsonl:2: TemplateError: no tools here" in str(caught.value)
    assert "rows.jsonl:4: TemplateError: no tools here" in str(caught.value)


def test_a_template_that_drops_thoughts_is_shown_beside_what_it_renders(chatml: PreTrainedTokenizerFast) -> None:
    dropping = (
        "{% for message in messages %}{% set content = message['content'] %}"
        "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}[{{ content }}]{% endfor %}"
    )
    talk = tuple(
        {"role": role, "content": content} for role, content in (("user", "a"), ("assistant", "<think>hm</think>b"), ("user", "c"))
    )
    with pytest.raises(DataError) as caught:
        render(prompts("plain", talk), with_template(chatml, dropping), config=CHAT)
    assert "delete the <think> parts from the rows" in str(caught.value)
    assert "rows.jsonl:2: message 1 (assistant) is '<think>hm</think>b', rendered '[a][b][c]'" in str(caught.value)


def test_a_template_that_ignores_the_system_message_is_refused(chatml: PreTrainedTokenizerFast) -> None:
    users_only = "{% for message in messages if message['role'] == 'user' %}{{ message['content'] }}{% endfor %}"
    talk = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "u"})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: message 0 \(system\) is 'be brief', rendered 'u'"):
        render(prompts(talk), with_template(chatml, users_only), config=CHAT)


def test_the_template_in_use_is_known_as_text(chatml: PreTrainedTokenizerFast) -> None:
    assert template_text(chatml, config=CHAT) == chatml.chat_template
    assert template_text(chatml, config=DataConfig(input_template="Q: {}")) == "Q: {}"
    assert template_text(chatml, config=DataConfig()) == ""


def test_rows_read_from_a_file_render_as_they_stand_in_it(write: Callable[[bytes | str], str], chatml: PreTrainedTokenizerFast) -> None:
    from hone.datasets.schemas import load_prompts

    rows = [{"input": [{"role": "user", "content": "caf\u00e9"}]}, {"input": "na\u00efve"}]
    config = DataConfig(prompt_dataset=write("\n".join(json.dumps(row) for row in rows)), apply_chat_template=True)
    assert render(load_prompts(config), chatml, config=config) == [
        f"<|im_start|>user\n{word}<|im_end|>\n<|im_start|>assistant\n" for word in ("caf\u00e9", "na\u00efve")
    ]
