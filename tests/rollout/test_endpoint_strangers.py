"""What strangers may write to the endpoint, agents and policies alike: it is refused in words, and neither the engine nor the run fails."""

import asyncio
import dataclasses
import json
from typing import Any

import aiohttp
import pytest

from hone.rollout.agents.calling import FunctionAgent
from hone.rollout.endpoint import server as server_module
from hone.rollout.endpoint.errors import Refused
from hone.rollout.endpoint.messages import likeness
from hone.rollout.endpoint.openai_wire import read_chat, read_completion
from hone.rollout.endpoint.rendering import reply_with
from hone.rollout.endpoint.server import serving
from hone.rollout.endpoint.tool_calls import PARSERS
from hone.rollout.engines.scripted import ScriptedEngine
from hone.rollout.errors import EngineError, EnvironmentFailure
from hone.rollout.tolerance import Tolerance
from tests.rollout.chatting import CALL, CALLED, CHATML, END, TOOL, Talk, assistant, user
from tests.rollout.test_calling import calling, question

DEEP = "[" * 3000 + "]" * 3000
BREAKS = CHATML + "{% if breaks %}{{ 1 / 0 }}{% endif %}"


def alive(talk: Talk) -> bool:
    """Whether the episode goes on: nothing was held to be the engine's failure, and it still answers."""
    assert talk.session.error is None and not talk.session.failure.is_set()
    return talk.ask(user("still there?")).reply.content == "ok"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": [user("\ud83d")]}, "half of a surrogate pair"),
        ({"prompt": "\ud83d"}, "half of a surrogate pair"),
        ({"messages": [user("q")], "stop": "\ud83d"}, "half of a surrogate pair"),
        ({"messages": [user("q")], "chat_template_kwargs": {"breaks": True}}, "the chat template refuses these messages: division by zero"),
        ({"prompt": [999999]}, "prompt has the id 999999; the vocabulary ends at 109"),
        ({"prompt": [10**30]}, "the vocabulary ends at 109"),
        ({"messages": [user("q")], "stop_token_ids": [999999]}, "stop_token_ids has the id 999999; the vocabulary ends at 109"),
    ],
)
def test_what_an_agent_sends_is_never_the_engines_failure(body: dict[str, Any], message: str) -> None:
    talk = Talk([f"ok{END}"], template=BREAKS)
    read = read_completion if "prompt" in body else read_chat
    with pytest.raises(Refused, match=message) as refused:
        asyncio.run(talk.session.answer(read(body)[0]))
    assert refused.value.status == 400 and not talk.engine.calls
    assert alive(talk)


def test_arguments_that_are_nested_too_deeply_are_text() -> None:
    talk = Talk([f"ok{END}"] * 2, max_len=8000)
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": DEEP}}
    talk.ask(user("q"), assistant("", call), user("go on"))
    assert json.dumps(DEEP) in talk.text(talk.session.tree.nodes[0].place.prompt)
    assert alive(talk)


def test_a_call_that_is_nested_too_deeply_stays_text_and_is_counted() -> None:
    talk = Talk([CALL + "[" * 3000 + CALLED + END, f"ok{END}"], new_tokens=4000, max_len=8000)
    first = talk.ask(user("q"), tools=[TOOL])
    assert first.reply.tool_calls == () and first.reply.content.startswith(CALL) and talk.session.tree.counts["tool_parse_errors"] == 1
    assert alive(talk)
    for written in (
        f'{{"name": "add", "arguments": {{"a": {DEEP}}}}}',
        f'{{"name": "add", "arguments": {{"a": {"[" * 200 + "]" * 200}}}}}',
    ):
        assert PARSERS["hermes"](CALL + written + CALLED, {}).errors == 1


@pytest.mark.parametrize("parameters", [[1], {"properties": [1]}, {"properties": {"a": True}}, None])
def test_schemas_that_are_none_do_not_keep_calls_from_being_read(parameters: Any) -> None:
    template = CHATML.replace('{"name": "{{ call.function.name }}", ', "<function={{ call.function.name }}>").replace(
        '"arguments": {{ call.function.arguments | tojson }}}',
        "{% for key, value in call.function.arguments.items() %}<parameter={{ key }}>\n{{ value }}\n</parameter>{% endfor %}</function>",
    )
    talk = Talk([f"<tool_call><function=add><parameter=a>\n1\n</parameter></function></tool_call>{END}", f"ok{END}"], template=template)
    tool = {"type": "function", "function": {"name": "add", "parameters": parameters}}
    (call,) = talk.ask(user("q"), tools=[tool]).reply.tool_calls
    assert json.loads(call.arguments) == {"a": "1"}
    assert alive(talk)


def test_ids_beyond_the_tokenizers_may_come_back_if_they_were_drawn() -> None:
    talk = Talk([], template=None)
    drawn = [[40, 500], [41]]
    talk.session._engine = ScriptedEngine(script=lambda _: drawn.pop(0))
    first = asyncio.run(talk.session.answer(read_completion({"prompt": [40]})[0]))[0]
    again = asyncio.run(talk.session.answer(read_completion({"prompt": [*first.ids, 42]})[0]))[0]
    assert again.place.parent is first
    with pytest.raises(Refused, match="prompt has the id 501"):
        asyncio.run(talk.session.answer(read_completion({"prompt": [501]})[0]))


def test_whatever_an_engine_raises_is_an_engines_error() -> None:
    talk = Talk([])
    talk.session._engine = ScriptedEngine(script=lambda _: {}["nothing"])  # type: ignore[index]
    with pytest.raises(Refused) as refused:
        talk.ask(user("q"))
    assert refused.value.status == 500 and talk.session.failure.is_set()
    assert isinstance(talk.session.error, EngineError) and isinstance(talk.session.error.__cause__, KeyError)
    assert str(talk.session.error) == "engine scripted raised KeyError on prompt 'p': 'nothing'"


def test_a_request_that_is_refused_costs_a_group_where_failures_do() -> None:
    dropped: list[str] = []

    async def agent(base_url: str, api_key: str, model: str, row: dict[str, Any]) -> float:
        body, headers = {"messages": [user("\ud83d")]}, {"x-api-key": api_key}
        async with aiohttp.ClientSession() as client, client.post(base_url + "/chat/completions", json=body, headers=headers) as answer:
            answer.raise_for_status()
        return 1.0

    of_agent = dataclasses.replace(
        calling(FunctionAgent(function=agent, where="agent.py")),
        tolerance=Tolerance(drops=(EnvironmentFailure,), in_a_row=2, dropped=lambda _, reason: dropped.append(reason)),
    )
    assert asyncio.run(of_agent.collect([question()], step=1)) == []
    assert len(dropped) == 1 and dropped[0].startswith("failed: agent agent.py raised ClientResponseError: 400")


@pytest.mark.parametrize("more", [{"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, {"chat_template": "{{ 1 }}"}])
def test_another_template_than_the_contracts_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="chat_template is not served"):
        read_chat({"messages": [user("q")], **more})


@pytest.mark.parametrize(
    ("theirs", "alike"),
    [
        ('{"b": 1.0, "a": [true, 2]}', "respelled"),
        ('{"a": [true, 2], "b": 1e0}', "respelled"),
        ('{"a": [1, 2], "b": 1}', None),
        ('{"a": [true, 2], "b": true}', None),
        ('{"a": [true, 2], "b": "1"}', None),
    ],
)
def test_arguments_are_alike_where_their_json_is(theirs: str, alike: str | None) -> None:
    assert likeness(reply_with("", ("add", '{"a": [true, 2], "b": 1}')), reply_with("", ("add", theirs))) == alike


def test_a_text_is_not_the_json_that_spells_it() -> None:
    assert likeness(reply_with("", ("add", "one")), reply_with("", ("add", '"one"'))) is None


def test_comments_keep_a_stream_open_while_a_reply_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_BEFORE_STREAM_S", 0.01)
    monkeypatch.setattr(server_module, "_KEEPALIVE_S", 0.01)

    async def run() -> None:
        talk = Talk([f"ok{END}"])
        read, generate = asyncio.Event(), talk.engine.generate

        async def held(requests: Any) -> Any:
            await read.wait()
            return await generate(requests)

        talk.engine.generate = held  # type: ignore[method-assign]
        async with serving(talk.renderer) as server:
            session = server.open(talk.session)
            body, headers = {"messages": [user("q")], "stream": True}, {"x-api-key": session.key}
            url = session.base_url + "/chat/completions"
            async with aiohttp.ClientSession() as client, client.post(url, json=body, headers=headers) as answer:
                assert [await answer.content.readline() for _ in range(6)] == [b": keepalive\n", b"\n"] * 3
                read.set()
                assert (await answer.content.read()).endswith(b"data: [DONE]\n\n")

    asyncio.run(asyncio.wait_for(run(), timeout=60))


def test_the_log_tells_how_calls_were_placed() -> None:
    async def agent(base_url: str, api_key: str, model: str, row: dict[str, Any]) -> float:
        async with aiohttp.ClientSession(headers={"x-api-key": api_key}) as client:

            async def ask(*said: dict[str, Any]) -> dict[str, Any]:
                async with client.post(base_url + "/chat/completions", json={"messages": list(said)}) as answer:
                    return (await answer.json())["choices"][0]["message"]

            first = await ask(user("q"))
            await ask(user("q"))
            await ask(user("q"), assistant(first["content"]), user("r"))
        return 1.0

    (group,) = asyncio.run(calling(FunctionAgent(function=agent, where="agent"), *[f"ok{END}"] * 3).collect([question()], step=1))
    logs = {name.removeprefix("endpoint/"): value for name, value in group.samples[0].extra_logs.items()}
    assert (logs["calls"], logs["calls_root"], logs["calls_resample"], logs["calls_append"], logs["calls_rerender"]) == (3, 1, 1, 1, 0)
    assert logs["request_errors"] == 0
