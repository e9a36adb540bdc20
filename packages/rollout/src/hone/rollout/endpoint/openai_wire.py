"""OpenAI's wire: bodies of /v1/chat/completions and /v1/completions into one form, and replies back, whole or in pieces."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hone.rollout.endpoint.errors import Refused
from hone.rollout.endpoint.messages import read_messages
from hone.rollout.endpoint.rendering import Renderer
from hone.rollout.endpoint.session import Asked
from hone.rollout.endpoint.tree import Node

_RECORDED = (
    *(
        "model",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "min_tokens",
    ),
    *("tool_choice", "parallel_tool_calls", "user", "metadata", "reasoning_effort", "store", "service_tier"),
)
_MOST_CHOICES = 64


@dataclass(frozen=True, kw_only=True)
class Form:
    """How the reply is to be written."""

    model: str
    stream: bool = False
    usage_chunk: bool = False
    logprobs: bool = False
    ids: bool = False
    tokens_as_ids: bool = False


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What was drawn, and the name and time under which it was first told: told again, it is the same to the byte."""

    name: str
    created: int
    nodes: Sequence[Node]


def read_chat(body: Mapping[str, Any]) -> tuple[Asked, Form]:
    """A chat request. Raises Refused for what is malformed, and in words for what is not served."""
    _refuse_unserved(body)
    if _whole(body, "top_logprobs") > 0:
        raise Refused("top_logprobs above 0 is not served: only the sampled token's log-probability is known", param="top_logprobs")
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise Refused(
            f"tool_choice {json.dumps(choice)[:80]} is not served: a call cannot be forced; use auto or none", param="tool_choice"
        )
    asked = Asked(
        messages=read_messages(body.get("messages")),
        tools=_tools(body.get("tools")),
        reads_calls=choice != "none",
        options=_template_options(body),
        limit=_positive(body, "max_completion_tokens") or _positive(body, "max_tokens"),
        stops=_stops(body.get("stop")),
        stop_ids=_stop_ids(body.get("stop_token_ids")),
        n=_choices(body),
        requested={name: body[name] for name in _RECORDED if body.get(name) is not None},
    )
    return asked, _form(body, logprobs=bool(body.get("logprobs")))


def read_completion(body: Mapping[str, Any]) -> tuple[Asked, Form]:
    """A request to complete plain text, or ids. Raises Refused."""
    _refuse_unserved(body)
    for name, without in (("echo", False), ("suffix", None), ("best_of", 1)):
        if body.get(name) not in (None, without):
            raise Refused(f"{name} is not served", param=name)
    if _whole(body, "logprobs") > 1:
        raise Refused("logprobs above 1 is not served: only the sampled token's log-probability is known", param="logprobs")
    prompt: Any = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    is_ids = isinstance(prompt, list) and prompt and all(isinstance(one, int) and one >= 0 for one in prompt)
    if not (isinstance(prompt, str) and prompt) and not is_ids:
        raise Refused("prompt must be one text or one list of token ids, not empty", param="prompt")
    asked = Asked(
        prompt=prompt if isinstance(prompt, str) else tuple(prompt),
        limit=_positive(body, "max_tokens"),
        stops=_stops(body.get("stop")),
        stop_ids=_stop_ids(body.get("stop_token_ids")),
        n=_choices(body),
        requested={name: body[name] for name in _RECORDED if body.get(name) is not None},
    )
    return asked, _form(body, logprobs=body.get("logprobs") is not None)


def chat_body(reply: Reply, form: Form, renderer: Renderer) -> dict[str, Any]:
    """The whole answer to a chat request."""
    choices = [
        {
            "index": index,
            "message": {**_said(node), **({"tool_calls": _calls(node)} if node.reply.tool_calls else {})},
            "finish_reason": _finish(node),
            "logprobs": _chat_logprobs(node, form, renderer),
            **({"token_ids": list(node.output)} if form.ids else {}),
        }
        for index, node in enumerate(reply.nodes)
    ]
    return {**_head(reply, form, "chat.completion"), "choices": choices, "usage": usage(reply.nodes), **_prompt_ids(reply, form)}


def chat_chunks(reply: Reply, form: Form, renderer: Renderer) -> Iterator[dict[str, Any]]:
    """The same answer in pieces."""
    head = _head(reply, form, "chat.completion.chunk")

    def chunk(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {**head, "choices": [{"index": index, "delta": delta, "finish_reason": None, "logprobs": None, **more}]}

    for index, node in enumerate(reply.nodes):
        yield {**chunk(index, {"role": "assistant", "content": ""}), **_prompt_ids(reply, form)}
        said = {name: text for name, text in _said(node).items() if name != "role" and text}
        ids = {"token_ids": list(node.output)} if form.ids else {}
        yield chunk(index, said, logprobs=_chat_logprobs(node, form, renderer), **ids)
        for place, call in enumerate(_calls(node)):
            function = {"name": call["function"]["name"], "arguments": ""}
            yield chunk(index, {"tool_calls": [{"index": place, "id": call["id"], "type": "function", "function": function}]})
            yield chunk(index, {"tool_calls": [{"index": place, "function": {"arguments": call["function"]["arguments"]}}]})
        yield chunk(index, {}, finish_reason=_finish(node))
    if form.usage_chunk:
        yield {**head, "choices": [], "usage": usage(reply.nodes)}


def completion_body(reply: Reply, form: Form, renderer: Renderer) -> dict[str, Any]:
    """The whole answer to a request for plain text."""
    choices = [_text_choice(index, node, form, renderer) for index, node in enumerate(reply.nodes)]
    return {**_head(reply, form, "text_completion"), "choices": choices, "usage": usage(reply.nodes), **_prompt_ids(reply, form)}


def completion_chunks(reply: Reply, form: Form, renderer: Renderer) -> Iterator[dict[str, Any]]:
    """The same answer in pieces."""
    head = _head(reply, form, "text_completion")
    for index, node in enumerate(reply.nodes):
        yield {**head, "choices": [_text_choice(index, node, form, renderer)], **_prompt_ids(reply, form)}
    if form.usage_chunk:
        yield {**head, "choices": [], "usage": usage(reply.nodes)}


def usage(nodes: Sequence[Node]) -> dict[str, Any]:
    """Tokens read and written; those of the prompt count once, however many replies were drawn to it."""
    prompt, written = len(nodes[0].place.prompt), sum(len(node.output) for node in nodes)
    cached = {"cached_tokens": nodes[0].cached_tokens}
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written, "prompt_tokens_details": cached}


def error_body(error: Refused) -> dict[str, Any]:
    """An error in this wire's form."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def _head(reply: Reply, form: Form, kind: str) -> dict[str, Any]:
    return {"id": reply.name, "object": kind, "created": reply.created, "model": form.model}


def _said(node: Node) -> dict[str, Any]:
    said: dict[str, Any] = {"role": "assistant", "content": node.reply.content or (None if node.reply.tool_calls else "")}
    if node.reply.reasoning is not None:
        said |= {"reasoning": node.reply.reasoning, "reasoning_content": node.reply.reasoning}
    return said


def _calls(node: Node) -> list[dict[str, Any]]:
    return [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in node.reply.tool_calls
    ]


def _finish(node: Node) -> str:
    return "tool_calls" if node.reply.tool_calls and node.finish_reason != "length" else node.finish_reason


def _tokens(node: Node, form: Form, renderer: Renderer) -> list[str]:
    return [f"token_id:{token}" if form.tokens_as_ids else renderer.decoded([token]) for token in node.output]


def _chat_logprobs(node: Node, form: Form, renderer: Renderer) -> dict[str, Any] | None:
    if not form.logprobs:
        return None
    content = [
        {"token": token, "bytes": list(token.encode()), "logprob": logp, "top_logprobs": []}
        for token, logp in zip(_tokens(node, form, renderer), node.logp, strict=True)
    ]
    return {"content": content, "refusal": None}


def _text_choice(index: int, node: Node, form: Form, renderer: Renderer) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index, "text": node.text, "finish_reason": node.finish_reason, "logprobs": None}
    if form.logprobs:
        tokens = _tokens(node, form, renderer)
        offsets = [sum(map(len, tokens[:place])) for place in range(len(tokens))]
        choice["logprobs"] = {"tokens": tokens, "token_logprobs": list(node.logp), "top_logprobs": None, "text_offset": offsets}
    return {**choice, "token_ids": list(node.output)} if form.ids else choice


def _prompt_ids(reply: Reply, form: Form) -> dict[str, Any]:
    return {"prompt_token_ids": list(reply.nodes[0].place.prompt)} if form.ids else {}


def _form(body: Mapping[str, Any], *, logprobs: bool) -> Form:
    return Form(
        model=str(body.get("model") or "policy"),
        stream=bool(body.get("stream")),
        usage_chunk=bool(_mapping(body, "stream_options").get("include_usage")),
        logprobs=logprobs,
        ids=bool(body.get("return_token_ids")),
        tokens_as_ids=bool(body.get("return_tokens_as_token_ids")),
    )


def _refuse_unserved(body: Mapping[str, Any]) -> None:
    shape = _mapping(body, "response_format").get("type", "text")
    if shape != "text":
        raise Refused(f"response_format {shape!r} is not served: the policy is not held to a grammar", param="response_format")
    for name in (
        *("functions", "function_call", "logit_bias", "audio", "prediction", "structured_outputs", "guided_json", "guided_regex"),
        "chat_template",
    ):
        if body.get(name):
            raise Refused(f"{name} is not served", param=name)


def _template_options(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the chat template is told beside the messages. Another template is refused: the sampler contract has the hash of the run's."""
    options = _mapping(body, "chat_template_kwargs")
    if "chat_template" in options:
        raise Refused("chat_template is not served: the run's own is recorded with every sample", param="chat_template_kwargs")
    return options


def _choices(body: Mapping[str, Any]) -> int:
    count = _positive(body, "n") or 1
    if count > _MOST_CHOICES:
        raise Refused(f"n is {count}; at most {_MOST_CHOICES} replies are drawn at a time", param="n")
    return count


def _positive(body: Mapping[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is not None and (not isinstance(value, int) or value < 1):
        raise Refused(f"{name} is {value!r:.40}; it must be a whole number of at least 1", param=name)
    return value


def _whole(body: Mapping[str, Any], name: str) -> int:
    value = body.get(name)
    if value is not None and (not isinstance(value, int) or value < 0):
        raise Refused(f"{name} is {value!r:.40}; it must be a whole number of at least 0", param=name)
    return value or 0


def _mapping(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = body.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise Refused(f"{name} must be an object", param=name)
    return value or {}


def _stops(stop: object) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        raise Refused("stop must be a text or a list of texts, none of them empty", param="stop")
    return tuple(stops)


def _stop_ids(given: object) -> tuple[int, ...]:
    ids = [] if given is None else given
    if not isinstance(ids, list) or not all(isinstance(one, int) and one >= 0 for one in ids):
        raise Refused("stop_token_ids must be a list of token ids", param="stop_token_ids")
    return tuple(ids)


def _tools(given: object) -> tuple[Mapping[str, Any], ...]:
    if given is None:
        return ()
    if not isinstance(given, list):
        raise Refused("tools must be a list", param="tools")
    for index, tool in enumerate(given):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Refused(f"tools[{index}] is no function with a name; only functions are served", param="tools")
    return tuple(given)
