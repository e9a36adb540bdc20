"""The template check: silent on published templates that are sound, and a line of its own for every fault planted in one."""

from array import array

import pytest

from hone.datasets.chat import rendered
from hone.datasets.config import DataConfig
from hone.datasets.errors import BadRow
from hone.datasets.exchanges import Encoder
from hone.datasets.labelled import Exchange, TokenRow
from hone.datasets.offline_config import SFTData
from hone.datasets.records import PromptRow
from hone.datasets.template_check import Check, _Sample, checks
from hone.datasets.templates import BUILTIN
from tests.datasets.test_masks import APART, TEMPLATES, WHOLE, published, tokenizer_with

CHATML = BUILTIN["chatml"]


def found(template: str, eos: str = "<|im_end|>", **settings: str) -> dict[str, Check]:
    return {one.name: one for one in checks(tokenizer_with(template, eos), SFTData(apply_chat_template=True, **settings))}


def bad(told: dict[str, Check]) -> set[str]:
    return {name for name, one in told.items() if one.bad}


@published
@pytest.mark.parametrize(
    "name", ["llama3", "llama3_2", "qwen2_5", "qwen3", "qwen3_instruct_2507", "gemma3", "phi3", "cohere", "glm4moe", "gptoss"]
)
def test_published_templates_that_are_sound_pass(name: str) -> None:
    told = found((TEMPLATES / f"{name}.jinja").read_text(), (WHOLE | APART)[name][0])
    assert bad(told) - {"system message"} == set()
    assert set(told) == {"template", "prefix", "mask", "stop token", "BOS", "system message", "thoughts", "thinking toggle", "SFT = RL"}


@published
def test_what_templates_do_with_thoughts_is_told() -> None:
    told = found((TEMPLATES / "qwen3.jinja").read_text())
    assert told["thinking toggle"].told == "enable_thinking true ends '', false '<think>\\n\\n</think>\\n\\n'"
    assert told["thoughts"].told.startswith("dropped from earlier answers")
    assert "2 rows of one conversation" in told["mask"].told
    told = found((TEMPLATES / "deepseekv3.jinja").read_text())
    assert bad(told) == {"prefix", "mask", "thoughts"}
    assert "<think>" in told["prefix"].told and "They have eight." in told["prefix"].told


@pytest.mark.parametrize("name", BUILTIN)
def test_the_templates_that_come_with_the_project_pass_and_are_taken_by_name(name: str) -> None:
    eos = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}[name]
    told = found("{{ none }}", eos, tokenizer_chat_template=name)
    assert bad(told) == set()
    answers = ("They have eight.", "Twelve legs.")
    assert told["mask"].told == f"trained on: {' | '.join(repr(answer + eos) for answer in answers)}"


@pytest.mark.parametrize(
    ("planted", "by", "name", "said"),
    [
        (
            "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
            "{{- message['content'] -}}",
            "stop token",
            None,
        ),
        ("'<|im_start|>assistant\\n'", "'<|im_start|>bot\\n'", "prefix", "answer 1 does not begin where it is asked for"),
        ("'<|im_start|>assistant\\n'", "'<|im_start|>bot\\n'", "SFT = RL", "what stands before the answer differs"),
        ("{%- for message", "{{- bos_token + bos_token -}}{%- for message", "BOS", "2 of '<bos>'"),
        ("in messages", "in messages if message['role'] != 'system'", "system message", "dropped without a word"),
        (
            "message['content'] + '<|im_end|>' -}}{%- endgen",
            "message['content'][:4] + '<|im_end|>' -}}{%- endgen",
            "mask",
            "drops a message",
        ),
    ],
)
def test_a_fault_planted_in_a_sound_template_is_found(planted: str, by: str, name: str, said: str | None) -> None:
    assert planted in CHATML and bad(found(CHATML)) == set()
    told = found(CHATML.replace(planted, by))
    if said is None:  # without an end token of its own the tokenizer's is put behind the last answer: told, not bad
        assert told[name].told == "'<|im_end|>', the tokenizer's EOS, is trained on"
    else:
        assert name in bad(told) and said in told[name].told


def test_an_end_that_is_not_the_tokenizers_own_is_told_with_what_must_list_it() -> None:
    told = found(CHATML, "<|endoftext|>")["stop token"]
    assert not told.bad and told.told.startswith("'<|im_end|>' is trained on, and the tokenizer's EOS is '<|endoftext|>'")
    assert "generation_config must list" in told.told


@pytest.mark.parametrize(("end", "is_bad"), [("<|im_end|>", False), ("<|endoftext|>", False), ("A", True)])
def test_what_is_no_end_token_ends_no_generation(end: str, is_bad: bool) -> None:
    tokenizer = tokenizer_with(CHATML, "<|im_end|>")
    last = tokenizer.convert_tokens_to_ids(end)
    assert isinstance(last, int)
    sample = _Sample(tokenizer, Encoder(tokenizer, SFTData(apply_chat_template=True)))
    assert sample.stop([TokenRow(tokens=array("i", [5, last]), trained=b"\0\1")]).bad == is_bad


def test_a_template_that_refuses_conversations_is_one_bad_line() -> None:
    told = found("{{ raise_exception('no') }}")
    assert bad(told) == {"rendering"} and told["rendering"].told.endswith("no")


@pytest.mark.parametrize(
    "expression", ["1 / 0", "messages[99].content + 1", "'a' * -1 + messages[0].nothing.more", "{}['x'] + 1", "2.0 ** 9999"]
)
def test_an_expression_that_fails_is_the_templates_fault(expression: str) -> None:
    template = CHATML.replace("{%- for", "{{ " + expression + " }}{%- for", 1)
    told = found(template)
    assert bad(told) == {"rendering"} and told["rendering"].told.startswith("the template refuses a plain conversation: ")
    tokenizer = tokenizer_with(template, "<|im_end|>")
    row = Encoder(tokenizer, SFTData(apply_chat_template=True)).encode(Exchange(prompt="a", answer="b"), line=3)
    assert isinstance(row, BadRow) and row.line == 3
    prompt = PromptRow(uid="1", line=3, prompt="a", label=None, columns={})
    (bad_row,) = rendered([prompt], tokenizer, config=DataConfig(apply_chat_template=True))
    assert isinstance(bad_row, BadRow) and bad_row.line == 3
