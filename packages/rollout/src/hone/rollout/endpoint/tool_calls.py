"""Tool calls in what a model wrote, in the dialects of today's chat templates; which one a template uses is found out by asking it.

A call that cannot be read stays text: the agent is told what was written, and it is counted.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hone.rollout.endpoint.json_text import read_json

_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_XML = re.compile(r"<tool_call>\s*<function=([^>\n]+)>(.*?)</function>\s*(?:</tool_call>|\Z)", re.DOTALL)
_XML_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_GLM_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_MISTRAL = re.compile(r"([^\[{]+)(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\])?\s*(\{.*\})", re.DOTALL)
_KIMI = re.compile(
    r"<\|tool_call_begin\|>\s*(?:functions\.)?([^:<]+):\d+\s*<\|tool_call_argument_begin\|>(.*?)<\|tool_call_end\|>", re.DOTALL
)


def _deepseek(name: str) -> str:
    """DeepSeek's mark of this name, whose bars are wide and whose spaces are low lines of their own."""
    return "<\uff5c" + name.replace(" ", "\u2581") + "\uff5c>"


_DEEPSEEK_SECTION, _DEEPSEEK_BEGIN = _deepseek("tool calls begin"), _deepseek("tool call begin")
_DEEPSEEK = re.compile(
    rf"{_DEEPSEEK_BEGIN}(?:function{_deepseek('tool sep')})?([^\n<]+?)(?:{_deepseek('tool sep')}|\n```json\n)(.*?)(?:\n```)?"
    rf"{_deepseek('tool call end')}",
    re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """A reply taken apart: `content` before the calls, the calls as (name, JSON arguments), and how many could not be read."""

    content: str
    calls: tuple[tuple[str, str], ...] = ()
    errors: int = 0


Parser = Callable[[str, Mapping[str, Any]], Parsed]
"""(what the model wrote, parameter schemas of the tools by name) -> the reply taken apart."""


def hermes(text: str, schemas: Mapping[str, Any]) -> Parsed:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen 2.5 and 3."""
    found = list(_HERMES.finditer(text))
    if not found:
        return Parsed(content=text)
    calls = [_json_call(match.group(1), "arguments") for match in found]
    return _taken_apart(text, text[: found[0].start()], calls)


def bare_json(text: str, schemas: Mapping[str, Any]) -> Parsed:
    """The whole reply is `{"name": ..., "parameters": {...}}`: Llama 3.1 and 3.2."""
    body = text.strip().removeprefix("<|python_tag|>").strip()
    if not body.startswith('{"name"'):
        return Parsed(content=text)
    return _taken_apart(text, "", [_json_call(body, "parameters")])


def function_xml(text: str, schemas: Mapping[str, Any]) -> Parsed:
    """`<tool_call><function=NAME><parameter=KEY>value</parameter></function></tool_call>`: Qwen 3 Coder, 3.5, Nemotron 3.

    A value is text unless the tool's schema gives its parameter another type; then it is read as JSON.
    """
    start = text.find("<tool_call>")
    if start < 0:
        return Parsed(content=text)
    calls: list[tuple[str, str] | None] = []
    for match in _XML.finditer(text):
        properties = schemas.get(match.group(1), {}).get("properties", {})
        values = {key: _typed(value, properties.get(key, {})) for key, value in _XML_PARAMETER.findall(match.group(2))}
        calls.append((match.group(1), json.dumps(values, ensure_ascii=False)))
    calls += [None] * (text.count("<tool_call>") - len(calls))
    return _taken_apart(text, text[:start], calls)


def mistral(text: str, schemas: Mapping[str, Any]) -> Parsed:
    """`[TOOL_CALLS]` before a JSON list of calls, or before each `NAME[ARGS]{...}`, with or without `[CALL_ID]`: Mistral's of all years."""
    before, mark, rest = text.partition("[TOOL_CALLS]")
    if not mark:
        return Parsed(content=text)
    if rest.lstrip().startswith("["):
        listed = _json(rest)
        bodies = listed if isinstance(listed, list) and listed else [None]
        return _taken_apart(text, before, [_call_of(body, "arguments") for body in bodies])
    calls: list[tuple[str, str] | None] = []
    for part in rest.split("[TOOL_CALLS]"):
        match = _MISTRAL.fullmatch(part.strip())
        calls.append(None if match is None else _named_call(*match.groups()))
    return _taken_apart(text, before, calls)


def deepseek(text: str, schemas: Mapping[str, Any]) -> Parsed:
    """Calls between DeepSeek's own marks: `function SEP NAME` and a block of JSON (V3, R1), or `NAME SEP {...}` (V3.1)."""
    return _between(text, _DEEPSEEK, _DEEPSEEK_BEGIN, _DEEPSEEK_SECTION)


def kimi(text: str, schemas: Mapping[str, Any]) -> Parsed:
    """`functions.NAME:INDEX` and JSON between marks: Kimi K2."""
    return _between(text, _KIMI, "<|tool_call_begin|>", "<|tool_calls_section_begin|>")


def glm(text: str, schemas: Mapping[str, Any]) -> Parsed:
    """`<tool_call>NAME<arg_key>KEY</arg_key><arg_value>value</arg_value></tool_call>`: GLM 4.5 to 4.7; values as of `function_xml`."""
    start = text.find("<tool_call>")
    if start < 0:
        return Parsed(content=text)
    calls: list[tuple[str, str] | None] = []
    for match in _HERMES.finditer(text):
        name, _, rest = match.group(1).partition("<arg_key>")
        properties = schemas.get(name.strip(), {}).get("properties", {})
        pairs = _GLM_ARGUMENT.findall(f"<arg_key>{rest}") if rest else []
        readable = name.strip().isidentifier() and len(pairs) == match.group(1).count("<arg_key>")
        values = {key.strip(): _typed(value, properties.get(key.strip(), {})) for key, value in pairs}
        calls.append((name.strip(), json.dumps(values, ensure_ascii=False)) if readable else None)
    return _taken_apart(text, text[:start], calls)


PARSERS: dict[str, Parser] = {
    "hermes": hermes,
    "bare_json": bare_json,
    "function_xml": function_xml,
    "glm": glm,
    "mistral": mistral,
    "deepseek": deepseek,
    "kimi": kimi,
}


def _between(text: str, call: re.Pattern[str], begin: str, section: str) -> Parsed:
    """Calls that `call` finds as (name, JSON), each behind a `begin`, all behind a `section`."""
    if begin not in text:
        return Parsed(content=text)
    calls: list[tuple[str, str] | None] = [_named_call(*match.groups()) for match in call.finditer(text)]
    calls += [None] * (text.count(begin) - len(calls))
    return _taken_apart(text, text[: text.find(section if section in text else begin)], calls)


def _named_call(name: str, body: str) -> tuple[str, str] | None:
    return _call_of({"name": name.strip(), "arguments": _json(body)}, "arguments")


def _json(body: str) -> object:
    try:
        return read_json(body)
    except ValueError:
        return None


def _json_call(body: str, key: str) -> tuple[str, str] | None:
    return _call_of(_json(body), key)


def _call_of(call: object, key: str) -> tuple[str, str] | None:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(call.get(key, {}), dict):
        return None
    return call["name"], json.dumps(call.get(key, {}), ensure_ascii=False)


def _typed(value: str, schema: object) -> object:
    if not isinstance(schema, Mapping) or schema.get("type", "string") == "string":
        return value
    try:
        return read_json(value)
    except ValueError:
        return value


def _taken_apart(text: str, before: str, calls: list[tuple[str, str] | None]) -> Parsed:
    errors = sum(call is None for call in calls)
    if errors:
        # One that cannot be read makes all of it text: an agent that ran the others would act on half of what was meant.
        return Parsed(content=text, errors=errors)
    return Parsed(content=before.rstrip("\n"), calls=tuple(call for call in calls if call is not None))
