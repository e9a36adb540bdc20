"""Anthropic's messages wire: bodies of /v1/messages into the form of a chat request, and replies back, whole or as events."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hone.rollout.endpoint.content import image_part, text_of
from hone.rollout.endpoint.errors import Refused
from hone.rollout.endpoint.messages import read_messages
from hone.rollout.endpoint.openai_wire import Form, Reply
from hone.rollout.endpoint.session import Asked
from hone.rollout.endpoint.tree import Node

_RECORDED = ("model", "temperature", "top_p", "top_k", "tool_choice", "metadata", "thinking")
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    410: "not_found_error",
    413: "request_too_large",
}


def read(body: Mapping[str, Any], *, counting: bool = False) -> tuple[Asked, Form]:
    """A request for a message (or, when `counting`, for how long its prompt is). Raises Refused."""
    limit = body.get("max_tokens")
    if not counting and (not isinstance(limit, int) or limit < 1):
        raise Refused("max_tokens is required and must be a whole number of at least 1", param="max_tokens")
    choice = body.get("tool_choice")
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if choice is not None and kind not in ("auto", "none"):
        raise Refused(
            f"tool_choice {json.dumps(choice)[:80]} is not served: a call cannot be forced; use auto or none", param="tool_choice"
        )
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise Refused("messages must be a list with at least one message", param="messages")
    system = text_of(body.get("system"), "system")
    named = [("system", {"role": "system", "content": system})] if system else []
    for index, message in enumerate(given):
        named += [(f"messages[{index}]", plain) for plain in _plain(message, f"messages[{index}]")]
    stops = body.get("stop_sequences") or []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refused("stop_sequences must be a list of texts, none of them empty", param="stop_sequences")
    asked = Asked(
        messages=read_messages([plain for _, plain in named], wheres=[where for where, _ in named]),
        tools=_tools(body.get("tools")),
        reads_calls=kind != "none",
        limit=limit,
        stops=tuple(stops),
        requested={name: body[name] for name in _RECORDED if body.get(name) is not None},
    )
    return asked, Form(model=str(body.get("model") or "policy"), stream=bool(body.get("stream")))


def message_body(reply: Reply, form: Form) -> dict[str, Any]:
    """The whole answer."""
    (node,) = reply.nodes
    return {
        **_head(reply, form),
        "content": _blocks(node),
        **_ending(node),
        "usage": {"input_tokens": len(node.place.prompt), "output_tokens": len(node.output)},
    }


def events(reply: Reply, form: Form) -> Iterator[dict[str, Any]]:
    """The same answer as events, each with its name under "type"."""
    (node,) = reply.nodes
    start = {**_head(reply, form), "content": [], "stop_reason": None, "stop_sequence": None}
    yield {"type": "message_start", "message": {**start, "usage": {"input_tokens": len(node.place.prompt), "output_tokens": 0}}}
    for index, block in enumerate(_blocks(node)):
        empty, deltas = _in_pieces(block)
        yield {"type": "content_block_start", "index": index, "content_block": empty}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": _ending(node), "usage": {"output_tokens": len(node.output)}}
    yield {"type": "message_stop"}


def error_body(error: Refused) -> dict[str, Any]:
    """An error in this wire's form; the code stands before the message, for the form has no field for it."""
    kind = _KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": f"{error.code}: {error.message}"}}


def _plain(given: object, where: str) -> list[dict[str, Any]]:
    """One of its messages in the chat form: several where it holds the answers of tools, which come before its words."""
    if not isinstance(given, Mapping) or given.get("role") not in ("user", "assistant", "system"):
        raise Refused(f"{where} has no role that is known (user, assistant, system)", param=where)
    role, content = given["role"], given.get("content")
    if isinstance(content, str) or role == "system":
        return [{"role": role, "content": text_of(content, where)}]
    if not isinstance(content, Sequence) or not all(isinstance(block, Mapping) for block in content):
        raise Refused(f"{where}.content must be text or a list of blocks", param=where)
    parts: list[Mapping[str, Any]] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for block in content:
        match block.get("type"):
            case "text":
                parts.append({"type": "text", "text": str(block.get("text", ""))})
            case "image" if role == "user":
                parts.append(image_part(block, where))
            case "thinking":
                thoughts.append(str(block.get("thinking", "")))
            case "redacted_thinking":
                continue
            case "tool_use" if role == "assistant":
                function = {"name": block.get("name"), "arguments": block.get("input")}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case "tool_result" if role == "user":
                answers.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": _told(block, where)})
            case kind:
                raise Refused(f"{where} has a block of type {kind!r}, which is not served from a {role}", code="unsupported_content")
    if role == "assistant":
        thought = {"reasoning": "\n".join(thoughts)} if thoughts else {}
        return [{"role": role, "content": parts, **thought, **({"tool_calls": calls} if calls else {})}]
    return [*answers, *([{"role": role, "content": parts}] if parts or not answers else [])]


def _told(block: Mapping[str, Any], where: str) -> list[Any]:
    """What a tool answered, as parts of a chat message: those that are neither text nor image are refused with that message."""
    given = block.get("content") or []
    blocks = [{"type": "text", "text": given}] if isinstance(given, str) else given
    if not isinstance(blocks, Sequence):
        raise Refused(f"{where}.content must be text or a list of parts, not {type(given).__name__}", param=where)
    told = [image_part(one, where) if isinstance(one, Mapping) and one.get("type") == "image" else one for one in blocks]
    return [*([{"type": "text", "text": "Error: "}] if block.get("is_error") else []), *told]


def _tools(given: object) -> tuple[Mapping[str, Any], ...]:
    if given is not None and not isinstance(given, list):
        raise Refused("tools must be a list", param="tools")
    tools: list[Mapping[str, Any]] = []
    for index, tool in enumerate(given or []):
        if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str) or not isinstance(tool.get("input_schema"), Mapping):
            raise Refused(f"tools[{index}] has no name and input_schema; tools that the server runs are not served", param="tools")
        function = {"name": tool["name"], "description": tool.get("description") or "", "parameters": tool["input_schema"]}
        tools.append({"type": "function", "function": function})
    return tuple(tools)


def _head(reply: Reply, form: Form) -> dict[str, Any]:
    return {"id": reply.name, "type": "message", "role": "assistant", "model": form.model}


def _blocks(node: Node) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if node.reply.reasoning is not None:
        blocks.append({"type": "thinking", "thinking": node.reply.reasoning, "signature": f"node-{node.index}"})
    if node.reply.content or not (node.reply.tool_calls or blocks):
        blocks.append({"type": "text", "text": node.reply.content})
    for call in node.reply.tool_calls:
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)})
    return blocks


def _in_pieces(block: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the block before anything is in it, what is then put in)."""
    match block["type"]:
        case "text":
            return {**block, "text": ""}, [{"type": "text_delta", "text": block["text"]}]
        case "thinking":
            put = [{"type": "thinking_delta", "thinking": block["thinking"]}, {"type": "signature_delta", "signature": block["signature"]}]
            return {**block, "thinking": "", "signature": ""}, put
        case _:
            return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]


def _ending(node: Node) -> dict[str, Any]:
    if node.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if node.reply.tool_calls:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    stopped_by = node.requested.get("stopped_by")
    return {"stop_reason": "stop_sequence" if stopped_by else "end_turn", "stop_sequence": stopped_by}
