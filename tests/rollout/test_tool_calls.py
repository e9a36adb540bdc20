"""Dialects of tool calls: what each model family writes is read as the same call, and what cannot be read stays text."""

import json
from typing import Any

import pytest

from hone.rollout.endpoint.templates import survey
from hone.rollout.endpoint.tool_calls import PARSERS, Parsed
from tests.rollout.chatting import END, TOOL, Talk, user
from tests.rollout.test_templates import bytes_with

SCHEMAS: dict[str, Any] = {"add": TOOL["function"]["parameters"], "say": {"properties": {"text": {"type": "string"}}}}
BAR, LOW = "\uff5c", "\u2581"


def deepseek(text: str) -> str:
    """`{tool calls begin}` as DeepSeek's mark of this name."""
    return text.replace("{", f"<{BAR}").replace("}", f"{BAR}>").replace("_", LOW).replace("(", "{").replace(")", "}")


V3 = deepseek('{tool_call_begin}function{tool_sep}add\n```json\n("a": 1, "b": 2)\n```{tool_call_end}')
V31 = deepseek('{tool_call_begin}add{tool_sep}("a": 1, "b": 2){tool_call_end}')
SECTION, SECTION_END = deepseek("{tool_calls_begin}"), deepseek("{tool_calls_end}")
KIMI = '<|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>{"a": 1, "b": 2}<|tool_call_end|>'
GLM = "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
WRITTEN = [
    ("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}, "id": "abcdefghi"}]', 1),
    ("mistral", '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}', 1),
    ("mistral", '[TOOL_CALLS]add[CALL_ID]abcdefghi[ARGS]{"a": 1, "b": 2}[TOOL_CALLS]add{"a": 1, "b": 2}', 2),
    ("deepseek", f"{SECTION}{V3}\n{V3}{SECTION_END}", 2),
    ("deepseek", f"{SECTION}{V31}{SECTION_END}", 1),
    ("kimi", f"<|tool_calls_section_begin|>{KIMI}{KIMI.replace(':0', ':1')}<|tool_calls_section_end|>", 2),
    ("glm", f"{GLM}\n{GLM}", 2),
    ("glm", GLM.replace("\n", ""), 1),
]
TEMPLATE = "".join(
    (
        "{{% for tool in tools or [] %}}{{{{ tool | tojson }}}}{{% endfor %}}",
        "{{% for message in messages %}}<|{{{{ message.role }}}}|>{{{{ message.content or '' }}}}",
        "{{% for call in message.tool_calls or [] %}}{call}{{% endfor %}}<eos>{{% endfor %}}",
        "{{% if add_generation_prompt %}}<|assistant|>{{% endif %}}",
    )
)


@pytest.mark.parametrize(("dialect", "written", "calls"), WRITTEN)
def test_calls_are_read_with_what_was_said_before_them(dialect: str, written: str, calls: int) -> None:
    parsed = PARSERS[dialect]("Let me see.\n" + written, SCHEMAS)
    assert parsed.content == "Let me see." and parsed.errors == 0
    assert [(name, json.loads(text)) for name, text in parsed.calls] == [("add", {"a": 1, "b": 2})] * calls


@pytest.mark.parametrize("dialect", ["mistral", "deepseek", "kimi", "glm"])
def test_what_calls_nothing_is_text(dialect: str) -> None:
    assert PARSERS[dialect]("1 + 2 = 3", SCHEMAS) == Parsed(content="1 + 2 = 3")


@pytest.mark.parametrize(("dialect", "written", "calls"), WRITTEN)
def test_a_call_that_was_cut_or_spoilt_is_text_and_counted(dialect: str, written: str, calls: int) -> None:
    spoilt = [written[: written.rfind("2") + 1]] if dialect == "glm" else [written.replace("1", "one"), written[: written.rfind("2") + 1]]
    for text in spoilt:
        parsed = PARSERS[dialect](text, SCHEMAS)
        assert parsed.content == text and parsed.calls == () and parsed.errors >= 1


def test_glm_values_are_text_where_the_schema_says_so() -> None:
    written = "<tool_call>say\n<arg_key>text</arg_key>\n<arg_value>12</arg_value>\n</tool_call>"
    assert PARSERS["glm"](written, SCHEMAS).calls == (("say", '{"text": "12"}'),)


@pytest.mark.parametrize(
    ("dialect", "call"),
    [
        ("mistral", "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}"),
        ("deepseek", deepseek("[B]{tool_sep}[A]{tool_call_end}").replace("[B]", deepseek("{tool_calls_begin}{tool_call_begin}") + "N")),
        ("kimi", "<|tool_call_begin|>functions.N:{{ loop.index0 }}<|tool_call_argument_begin|>[A]<|tool_call_end|>"),
        ("glm", "<tool_call>N{% for key, value in call.function.arguments.items() %}<arg_key>{{ key }}</arg_key>"
                "<arg_value>{{ value }}</arg_value>{% endfor %}</tool_call>"),
    ],
)  # fmt: skip
def test_a_template_tells_its_dialect(dialect: str, call: str) -> None:
    call = (
        call.replace("N{", "{{ call.function.name }}{")
        .replace("N:", "{{ call.function.name }}:")
        .replace(f"N<{BAR}", "{{ call.function.name }}<" + BAR)
    )
    letters = bytes_with(TEMPLATE.format(call=call.replace("[A]", "{{ call.function.arguments | tojson }}")))
    served = survey(letters, stop_ids=[letters.eos_token_id])
    assert (served.tools, served.dialect) == ("", dialect)


def test_a_dialect_that_nobody_reads_is_named_at_the_start() -> None:
    letters = bytes_with(TEMPLATE.format(call="@{{ call.function.name }}@{{ call.function.arguments | tojson }}"))
    served = survey(letters, stop_ids=[letters.eos_token_id])
    assert (
        served.dialect is None and "a dialect that is not read here (read are hermes, bare_json, function_xml, glm, mistral" in served.tools
    )


def test_mistrals_calls_have_ids_its_template_takes() -> None:
    talk = Talk(['[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}' + END])
    object.__setattr__(talk.session._served, "dialect", "mistral")
    (call,) = talk.ask(user("q"), tools=[TOOL]).reply.tool_calls
    assert len(call.id) == 9 and call.id.isalnum()
