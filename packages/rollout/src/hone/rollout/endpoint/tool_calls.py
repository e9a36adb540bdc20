"""Tool calls in what a model wrote, in the dialects of today's chat templates; which one a template uses is found out by asking it.

A call that cannot be read stays text: the agent is told what was written, and it is counted.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_XML = re.compile(r"<tool_call>\s*<function=([^>\n]+)>(.*?)</function>\s*(?:</tool_call>|\Z)", re.DOTALL)
_XML_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


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


PARSERS: dict[str, Parser] = {"hermes": hermes, "bare_json": bare_json, "function_xml": function_xml}


def _json_call(body: str, key: str) -> tuple[str, str] | None:
    try:
        call = json.loads(body)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(call.get(key, {}), dict):
        return None
    return call["name"], json.dumps(call.get(key, {}), ensure_ascii=False)


def _typed(value: str, schema: Mapping[str, Any]) -> object:
    if schema.get("type", "string") == "string":
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _taken_apart(text: str, before: str, calls: list[tuple[str, str] | None]) -> Parsed:
    errors = sum(call is None for call in calls)
    if errors:
        # One that cannot be read makes all of it text: an agent that ran the others would act on half of what was meant.
        return Parsed(content=text, errors=errors)
    return Parsed(content=before.rstrip("\n"), calls=tuple(call for call in calls if call is not None))
