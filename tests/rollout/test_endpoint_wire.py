"""The endpoint over a real socket, asked by the client libraries themselves and, where they would not, by hand.

Locks sentences 8, 10, 17, 22 and 23 of test_agent_semantics.py, and what each wire is told when it asks for what is not served.
"""

import asyncio
import dataclasses
import gc
import json
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from hone.rollout.endpoint import server as server_module
from hone.rollout.endpoint.server import Open, serving
from tests.rollout.chatting import END, TOOL, Talk, user, wrote

ANTHROPIC_TOOL = {"name": "add", "description": "Adds two numbers.", "input_schema": TOOL["function"]["parameters"]}


@asynccontextmanager
async def opened(*talks: Talk) -> AsyncIterator[list[Open]]:
    async with serving(talks[0].renderer) as server:
        yield [server.open(talk.session) for talk in talks]


def through(talk: Talk, work: Callable[[Any, Any, Open], Awaitable[Any]]) -> Any:
    """What `work` makes of an OpenAI client, an Anthropic client and the open session."""

    async def run() -> Any:
        async with opened(talk) as (session,):
            chat = openai.AsyncOpenAI(base_url=session.base_url, api_key=session.key, max_retries=0)
            messages = anthropic.AsyncAnthropic(base_url=session.base_url.removesuffix("/v1"), api_key=session.key, max_retries=0)
            async with chat, messages:
                return await work(chat, messages, session)

    return asyncio.run(run())


async def posted(
    session: Open, body: dict[str, Any], *, path: str = "/chat/completions", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {session.key}", **names}) as client,
        client.post(session.base_url + path, json=body) as answer,
    ):
        return answer.status, dict(answer.headers), await answer.read()


def test_8_replies_of_the_openai_library_come_back_as_ours() -> None:
    async def work(chat: Any, _: Any, session: Open) -> None:
        said: list[Any] = [user("1+2")]
        first = await chat.chat.completions.create(model="gpt-x", messages=said, tools=[TOOL], temperature=0.0, store=True)
        (choice,) = first.choices
        assert (choice.finish_reason, choice.message.content, first.model) == ("tool_calls", None, "gpt-x")
        (call,) = choice.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1, "b": 2})
        for echo in (choice.message, choice.message.model_dump()):
            again = [*said, echo, {"role": "tool", "tool_call_id": call.id, "content": "3"}]
            await chat.chat.completions.create(model="gpt-x", messages=again, tools=[TOOL])
        async with chat.chat.completions.stream(model="gpt-x", messages=[*said], tools=[TOOL]) as stream:
            streamed = (await stream.get_final_completion()).choices[0].message
        again = [*said, streamed.model_dump(), {"role": "tool", "tool_call_id": streamed.tool_calls[0].id, "content": "3"}]
        await chat.chat.completions.create(model="gpt-x", messages=again, tools=[TOOL])

    talk = Talk([wrote(1, 2) + END, f"3{END}", f"3{END}", wrote(3, 4) + END, f"3{END}"])
    through(talk, work)
    first, second, third, fourth, fifth = talk.session.tree.nodes
    assert [node.place.parent for node in (first, second, third, fourth, fifth)] == [None, first, first, None, fourth]
    assert {node.place.how for node in (second, third, fifth)} == {"append"}
    assert first.requested == {"model": "gpt-x", "temperature": 0.0, "store": True}


def test_8_replies_of_the_anthropic_library_come_back_as_ours() -> None:
    async def work(_: Any, messages: Any, session: Open) -> None:
        asked: dict[str, Any] = {"model": "claude-x", "max_tokens": 50, "system": "Sum.", "tools": [ANTHROPIC_TOOL]}
        said: list[Any] = [user("1+2 and 3+4")]
        assert (await messages.messages.count_tokens(model="x", system="Sum.", tools=[ANTHROPIC_TOOL], messages=said)).input_tokens > 20
        first = await messages.messages.create(**asked, messages=said)
        assert first.stop_reason == "tool_use" and [block.type for block in first.content] == ["text", "tool_use", "tool_use"]
        results = [{"type": "tool_result", "tool_use_id": block.id, "content": "3"} for block in first.content[1:]]
        said += [
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [*results, {"type": "text", "text": "go on"}]},
        ]
        async with messages.messages.stream(**asked, messages=said) as stream:
            second = await stream.get_final_message()
        assert (second.stop_reason, second.content[0].text) == ("end_turn", "ten")
        said += [{"role": "assistant", "content": second.content}, user("thanks")]
        third = await messages.messages.create(**{**asked, "max_tokens": 2}, messages=said)
        assert third.stop_reason == "max_tokens" and third.usage.output_tokens == 2

    talk = Talk(["Well. " + wrote(1, 2) + wrote(3, 4) + END, f"ten{END}", "bye bye"])
    through(talk, work)
    nodes = talk.session.tree.nodes
    assert [node.place.parent for node in nodes] == [None, *nodes[:2]] and len(talk.segments()) == 1
    follows = talk.text(nodes[1].place.prompt[len(nodes[0].ids) :])
    answers = "<tool_response>3</tool_response>" * 2
    assert follows == f"\n<|im_start|>user\n{answers}{END}\n<|im_start|>user\ngo on{END}\n<|im_start|>assistant\n"


def test_10_a_retry_is_answered_with_what_was_drawn() -> None:
    async def work(chat: Any, _: Any, session: Open) -> None:
        body = {"messages": [user("q")], "logprobs": True}
        first = await posted(session, body)
        retried = await posted(session, body, x_stainless_retry_count="1")
        other = await posted(session, body)
        assert first[0] == 200 and retried[2] == first[2] and other[2] != first[2]

    talk = Talk([f"a{END}", f"b{END}"])
    through(talk, work)
    assert len(talk.engine.calls) == 2


def test_10_a_retry_has_the_idempotency_key_of_what_it_retries() -> None:
    async def work(chat: Any, _: Any, session: Open) -> None:
        body = {"messages": [user("q")]}
        first, second = [await posted(session, body, Idempotency_Key=key) for key in ("one", "two")]
        assert await asyncio.gather(*(posted(session, body, Idempotency_Key=key) for key in ("one", "two"))) == [first, second]
        assert first[0] == 200 and first[2] != second[2]

    talk = Talk([f"a{END}", f"b{END}"])
    through(talk, work)
    assert len(talk.engine.calls) == 2


def test_17_sessions_do_not_meet_and_a_closed_one_says_so() -> None:
    async def run() -> None:
        talks = [Talk([f"a{END}", f"b{END}"]) for _ in range(2)]
        async with serving(talks[0].renderer) as server:
            one, two = (server.open(talk.session) for talk in talks)
            for _ in range(2):
                assert [status for status, _, _ in await asyncio.gather(*(posted(o, {"messages": [user("q")]}) for o in (one, two)))] == [
                    200
                ] * 2
            assert [len(talk.session.tree.nodes) for talk in talks] == [2, 2]
            stolen = dataclasses.replace(two, key=one.key)
            status, headers, answer = await posted(stolen, {"messages": [user("q")]})
            assert (status, headers["x-should-retry"], json.loads(answer)["error"]["code"]) == (401, "false", "invalid_api_key")
            await server.close(one)
            status, headers, answer = await posted(one, {"messages": [user("q")]})
            assert (status, headers["x-should-retry"], json.loads(answer)["error"]["code"]) == (410, "false", "session_closed")
            assert (await posted(two, {"messages": [user("q")]}, path="/messages"))[0] == 400

    asyncio.run(run())


def test_17_of_a_closed_session_nothing_is_kept_but_its_key() -> None:
    async def run() -> None:
        talk = Talk([f"a{END}"])
        kept = weakref.ref(talk.session)
        async with serving(talk.renderer) as server:
            session = server.open(talk.session)
            assert (await posted(session, {"messages": [user("q")]}))[0] == 200
            await server.close(session)
            told = dataclasses.replace(session, session=Talk([]).session, calls={})
            del talk, session
            gc.collect()
            assert kept() is None
            assert (await posted(told, {"messages": [user("q")]}))[0] == 410
            status, _, answer = await posted(dataclasses.replace(told, key="another"), {"messages": [user("q")]})
            assert (status, json.loads(answer)["error"]["code"]) == (401, "invalid_api_key")

    asyncio.run(run())


def test_22_streamed_and_whole_are_the_same_reply() -> None:
    async def work(chat: Any, _: Any, session: Open) -> None:
        whole = await chat.chat.completions.create(
            model="m", messages=[user("q")], tools=[TOOL], logprobs=True, extra_body={"return_token_ids": True}
        )
        (choice,) = whole.choices
        pieces = [
            piece
            async for piece in await chat.chat.completions.create(
                model="m",
                messages=[user("q")],
                tools=[TOOL],
                logprobs=True,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"return_token_ids": True},
            )
        ]
        deltas = [piece.choices[0].delta for piece in pieces if piece.choices]
        assert "".join(delta.content or "" for delta in deltas) == choice.message.content == "Well."
        calls = [call for delta in deltas for call in delta.tool_calls or ()]
        (called,) = choice.message.tool_calls
        assert "".join(call.function.arguments for call in calls) == called.function.arguments
        assert [call.function.name for call in calls if call.function.name] == ["add"]
        assert pieces[-2].choices[0].finish_reason == choice.finish_reason == "tool_calls"
        assert pieces[-1].usage == whole.usage and whole.usage.completion_tokens == len(choice.token_ids)
        (carried,) = [piece for piece in pieces if piece.choices and getattr(piece.choices[0], "token_ids", None)]
        assert carried.choices[0].token_ids == choice.token_ids and pieces[0].prompt_token_ids == whole.prompt_token_ids
        assert carried.choices[0].logprobs.model_dump() == choice.logprobs.model_dump()
        assert [entry.logprob for entry in choice.logprobs.content] == [-1.0] * len(choice.token_ids)

    talk = Talk(["Well." + wrote(1, 2) + END] * 2)
    through(talk, work)


def test_23_who_hangs_up_for_good_has_the_request_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_GRACE_S", 0.05)
    aborted = asyncio.Event()

    async def work(chat: Any, _: Any, session: Open) -> None:
        await posted(session, {"messages": [user("first")]})
        talk.engine.generate = hanging  # type: ignore[method-assign]
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(posted(session, {"messages": [user("q")]}), timeout=0.3)
        await asyncio.wait_for(aborted.wait(), timeout=30)

    async def hanging(requests: Any) -> Any:
        try:
            await asyncio.sleep(1000)
        finally:
            aborted.set()

    talk = Talk([f"a{END}"])
    through(talk, work)
    _, ledger = talk.session.tree.segments()
    assert ledger.balanced and ledger.trained == ledger.sampled == 2


def test_23_what_nobody_read_is_dropped_and_a_retry_reads_it() -> None:
    async def work(chat: Any, _: Any, session: Open) -> None:
        talk.engine.delay_s = lambda _: 0.5
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(posted(session, {"messages": [user("lost")]}), timeout=0.2)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(posted(session, {"messages": [user("found")]}), timeout=0.2)
        status, _, _ = await posted(session, {"messages": [user("found")]}, x_stainless_retry_count="1")
        assert status == 200

    talk = Talk([f"a{END}", f"bc{END}"])
    through(talk, work)
    segments, ledger = talk.session.tree.segments()
    assert len(talk.engine.calls) == 2 and len(segments) == 1 and ledger.dropped == {"undelivered": 2} and ledger.trained == 3


def test_plain_text_is_completed_and_gone_on_from() -> None:
    async def work(chat: Any, _: Any, session: Open) -> None:
        first = await chat.completions.create(model="m", prompt="2+2=", logprobs=1)
        assert (first.choices[0].text, first.choices[0].finish_reason) == ("4", "stop")
        assert first.choices[0].logprobs.token_logprobs == [-1.0, -1.0]
        second = await chat.completions.create(model="m", prompt="2+2=4, 4+4=", stop=[","])
        assert (second.choices[0].text, second.choices[0].finish_reason, second.usage.completion_tokens) == ("8", "stop", 2)
        third = await chat.completions.create(model="m", prompt="2+2=4, 4+4=8, 8+8=", max_tokens=2)
        assert (third.choices[0].text, third.choices[0].finish_reason) == ("16", "length")
        pieces = [piece.choices[0].text async for piece in await chat.completions.create(model="m", prompt=[40, 41], stream=True)]
        assert "".join(pieces) == "x"

    talk = Talk([f"4{END}", "8, never read", "16 and so on", f"x{END}"], template=None)
    through(talk, work)
    segments, ledger = talk.session.tree.segments()
    assert [len(segment.nodes) for segment in segments] == [3, 1]
    assert talk.text(segments[0].tokens) == "2+2=4, 4+4=8,, 8+8=16"
    # The end after "4" is not part of what the client went on with, nor is what was drawn behind the stop string.
    assert ledger.masked == {"boundary": 1} and ledger.dropped == {"stop_string": len(" never read")}


def test_the_stop_string_is_an_action_and_the_client_does_not_see_it() -> None:
    talk = Talk([f"Go on. STOP and more{END}", f"ok{END}"])
    first = talk.ask(user("q"), stop="STOP")
    assert (first.reply.content, first.finish_reason, talk.text(first.output)) == ("Go on. ", "stop", "Go on. STOP")
    second = talk.ask(user("q"), {"role": "assistant", "content": "Go on. "}, user("then?"))
    assert second.place.parent is first and talk.text(second.place.prompt[len(first.ids) :]).startswith(END)
    assert talk.session.tree.segments()[1].dropped == {"stop_string": len(" and more") + 1}


def test_an_engine_that_knows_the_text_is_told_where_a_reply_ends_and_the_contract_says_so() -> None:
    talk = Talk([f"one STOP two{END}", f"three END four{END}"], stops_at_text=True, sampler={"stop": ("END",)})
    first = talk.ask(user("q"), stop=["STOP", "END"], stop_token_ids=[41])
    ((request,),) = talk.engine.calls
    assert (request.contract.stop, request.contract.stop_token_ids) == (("END", "STOP"), (41,)) and request.contract == first.contract
    # What the run itself ends responses at needs no client that asks for it.
    assert talk.ask(user("r")).reply.content == "three " and talk.engine.calls[1][0].contract.stop == ("END",)
    # Of another engine the rest is cut off, so it is not told: it would have to refuse.
    deaf = Talk([f"one STOP two{END}"])
    assert deaf.ask(user("q"), stop="STOP").output == first.output and deaf.engine.calls[0][0].contract.stop == ()


def test_a_stop_id_that_a_client_names_is_an_action_and_no_text() -> None:
    talk = Talk(["one;"])
    letter = talk.ids(";")
    node = talk.ask(user("q"), stop_token_ids=letter)
    assert (node.reply.content, node.finish_reason, list(node.output)) == ("one", "stop", talk.ids("one;"))


def test_a_call_that_cannot_be_read_stays_text_and_is_counted() -> None:
    talk = Talk(['<tool_call>{"name": "add", "arguments": {"a": 1|</tool_call>' + END, f"ok{END}"])
    first = talk.ask(user("q"), tools=[TOOL])
    assert first.reply.tool_calls == () and first.reply.content.startswith("<tool_call>{") and first.finish_reason == "stop"
    assert talk.session.tree.counts["tool_parse_errors"] == 1
    second = talk.ask(user("q"), {"role": "assistant", "content": first.reply.content}, user("Write JSON."), tools=[TOOL])
    assert second.place.parent is first and len(talk.segments()) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages must be a list with at least one message"),
        ({"messages": [{"role": "pilot"}]}, r"messages\[0\] has the role 'pilot'"),
        ({"top_logprobs": 3}, "only the sampled token's log-probability is known"),
        ({"top_logprobs": "abc"}, "top_logprobs is 'abc'; it must be a whole number of at least 0"),
        ({"messages": [{"role": ["user"]}]}, r"messages\[0\] has the role \['user'\]"),
        ({"metadata": json.loads("[" * 300 + "]" * 300)}, "the body is no JSON: it is nested more than 100 levels deep"),
        ({"tool_choice": "required"}, "a call cannot be forced; use auto or none"),
        ({"response_format": {"type": "json_schema"}}, "the policy is not held to a grammar"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be a whole number of at least 1"),
        ({"n": 1000}, "at most 64 replies are drawn at a time"),
        ({"stop": [""]}, "stop must be a text or a list of texts, none of them empty"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids must be a list of token ids"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\] is no function with a name"),
        ({"logit_bias": {"3": 100}}, "logit_bias is not served"),
    ],
)
def test_what_is_not_served_is_refused_in_words(body: dict[str, Any], message: str) -> None:
    async def work(chat: Any, _: Any, session: Open) -> None:
        status, headers, answer = await posted(session, {"messages": [user("q")], **body} if body else {})
        error = json.loads(answer)["error"]
        assert (status, headers["x-should-retry"], error["type"]) == (400, "false", "invalid_request_error")
        import re

        assert re.search(message, error["message"])

    talk = Talk([])
    through(talk, work)
    assert not talk.engine.calls


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/completions", {"prompt": "q", "logprobs": "x"}, "logprobs is 'x'; it must be a whole number of at least 0"),
        ("/v1/messages", {"messages": [user("q")], "max_tokens": 5, "tools": {"name": "add"}}, "tools must be a list"),
    ],
)
def test_what_is_malformed_on_other_wires_is_refused_in_words(path: str, body: dict[str, Any], message: str) -> None:
    async def work(chat: Any, _: Any, session: Open) -> None:
        status, _, answer = await posted(session, body, path=path)
        assert status == 400 and message in json.loads(answer)["error"]["message"]

    talk = Talk([])
    through(talk, work)
    assert not talk.engine.calls


def test_a_body_nested_beyond_pythons_stack_is_refused() -> None:
    async def work(chat: Any, _: Any, session: Open) -> None:
        headers = {"Authorization": f"Bearer {session.key}"}
        raw = b"[" * 100_000 + b"]" * 100_000
        async with aiohttp.ClientSession(headers=headers) as client, client.post(f"{session.base_url}/completions", data=raw) as answer:
            assert answer.status == 400 and "nested too deeply" in (await answer.json())["error"]["message"]

    through(Talk([]), work)


def test_budget_and_context_are_refused_with_their_codes() -> None:
    async def work(chat: Any, messages: Any, session: Open) -> None:
        await chat.chat.completions.create(model="m", messages=[user("q")])
        with pytest.raises(openai.BadRequestError, match="its context ends at 60") as long:
            await chat.chat.completions.create(model="m", messages=[user("q" * 60)])
        assert long.value.code == "context_length_exceeded" and talk.session.refused == "context_length_exceeded"
        await chat.chat.completions.create(model="m", messages=[user("q")])
        assert not talk.session.refused
        with pytest.raises(openai.BadRequestError, match="the episode has used its 2 calls"):
            await chat.chat.completions.create(model="m", messages=[user("q")])
        with pytest.raises(anthropic.BadRequestError, match="budget_exhausted: the episode has used its 2 calls"):
            await messages.messages.create(model="m", max_tokens=5, messages=[user("q")])
        with pytest.raises(openai.NotFoundError, match=r"POST .*/v1/responses is not served; POST v1/chat/completions"):
            await chat.responses.create(model="m", input="q")
        assert [model.id async for model in chat.models.list()] == ["policy"]

    talk = Talk([f"a{END}", f"b{END}"], calls=2, max_len=60)
    through(talk, work)
