"""Token-exact episodes of agents that own their loop: what the endpoint's tree locks.

1. Every id with mask 1 was returned by the engine in exactly that order, and equals the engine's output for its node.
2. A node's prompt ids equal those the engine reports; a difference fails the session with both id windows shown. (test_endpoint_exact)
3. On append, the child's prompt begins with the parent's prompt and output, id for id (one trailing stop id excepted: `boundary`).
4. Two tool results given in one request both appear, in call order, in one rendered group.
5. The text between a close token and the next role is the template's own, newline included.
6. A reply that ended by length gets its close token as context (mask 0), never as action.
7. The stop token that was sampled has mask 1 and a logprob; a token we added has mask 0 and none.
8. An assistant message echoed through `model_dump()`, the streaming helper, or with re-spaced arguments matches its node.
9. An assistant message with one changed word does not match, and none of its tokens is trained.
10. A request marked as a retry returns the stored reply byte for byte and draws no new sample. (test_endpoint_wire)
11. The same unmarked body twice gives two siblings with different seeds.
12. `n=4` gives four siblings, one parent, and the same four when repeated with the same session seed.
13. After compaction there are two segments and no token is trained twice or lost.
14. Parallel branches train their common prefix's actions once.
15. A template that drops thinking yields, under `history=template`, a new segment whose prompt equals the full render.
16. Under `history=verbatim` the prompt holds the thinking ids that were sampled.
17. Interleaved requests of two sessions never share a node; a closed session answers 410 and is not retried. (test_endpoint_wire)
18. Concurrent requests inside one session are all recorded; the segments are the same for every arrival order, up to their order.
19. The client's temperature does not change the sampler contract; it stands in `requested`.
20. A weight update between or within turns shows as a version change at the exact token. (The prefix cache: test_weight_sync.)
21. A missing, positive, NaN or misaligned logprob fails the call; it never becomes 0.
22. Streamed and unstreamed replies carry the same message, finish reason, usage and ids. (test_endpoint_wire)
23. A reader that hangs up leaves the ledger balanced. (test_endpoint_wire)
24. Images are refused in words by a policy that reads text only. (One that sees: test_endpoint_images)
25. Sampled ids = trained + masked + dropped, each with a reason, for any interleaving of the above.
"""

import asyncio
import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hone.rollout.endpoint.errors import Refused
from hone.rollout.engines.scripted import ScriptedEngine
from hone.rollout.errors import EngineError
from hone.rollout.types import Completion, Request
from tests.rollout.chatting import CHATML, END, NO_CLOSE, THINKING, TOOL, Talk, answered, assistant, echoed, user, wrote


def test_1_3_5_7_ids_are_kept_as_sampled_and_only_what_was_said_since_is_rendered() -> None:
    talk = Talk([f"Four.{END}", f"Nine.{END}"])
    first = talk.ask(user("2+2"))
    second = talk.ask(user("2+2"), echoed(first), user("and 4+5?"))
    assert second.place.prompt[: len(first.ids)] == first.ids
    assert talk.text(second.place.prompt[len(first.ids) :]) == f"\n<|im_start|>user\nand 4+5?{END}\n<|im_start|>assistant\n"
    (segment,) = talk.segments()
    actions = [token for token, own in zip(segment.tokens, segment.mask, strict=True) if own]
    assert actions == talk.ids(f"Four.{END}Nine.{END}") == [*first.output, *second.output]
    assert [logp for logp, own in zip(segment.logp, segment.mask, strict=True) if own] == [-1.0] * len(actions)
    assert {logp for logp, own in zip(segment.logp, segment.mask, strict=True) if not own} == {0.0}
    # The whole is what the template would have rendered, though it never rendered a reply.
    conversation = [user("2+2"), assistant("Four."), user("and 4+5?")]
    assert talk.text(second.place.prompt) == talk.letters.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)


def test_1_a_spelling_that_the_tokenizer_would_not_choose_stays() -> None:
    talk = Talk([f"x{END}", f"y{END}"])
    pieces = [talk.letters.convert_tokens_to_ids(letter) for letter in wrote(1, 2)]  # letter by letter, where one id would do
    assert pieces != talk.ids(wrote(1, 2))
    talk.engine.script = _in_turn([*pieces, talk.letters.convert_tokens_to_ids(END)], talk.ids(f"3{END}"))
    first = talk.ask(user("1+2"), tools=[TOOL])
    (call,) = first.reply.tool_calls
    second = talk.ask(user("1+2"), echoed(first), answered(call, "3"), tools=[TOOL])
    assert second.place.prompt[len(first.place.prompt) :][: len(pieces)] == tuple(pieces)


def _in_turn(*outputs: Sequence[int]) -> Any:
    left = list(outputs)
    return lambda _: left.pop(0)


def test_4_two_results_stand_in_call_order_in_one_group() -> None:
    talk = Talk([wrote(1, 2) + wrote(3, 4) + END, f"ok{END}"])
    first = talk.ask(user("both"), tools=[TOOL])
    one, two = first.reply.tool_calls
    assert (one.arguments, two.arguments) == ('{"a": 1, "b": 2}', '{"a": 3, "b": 4}')
    second = talk.ask(user("both"), echoed(first), answered(two, "seven"), answered(one, "three"), tools=[TOOL])
    assert talk.text(second.place.prompt[len(first.ids) :]) == (
        f"\n<|im_start|>user\n<tool_response>three</tool_response><tool_response>seven</tool_response>{END}\n<|im_start|>assistant\n"
    )
    with pytest.raises(Refused, match=r"tool_call_id 'call_x' answers no call of the last reply") as refused:
        talk.ask(user("both"), echoed(first), {"role": "tool", "tool_call_id": "call_x", "content": "?"}, tools=[TOOL])
    assert refused.value.code == "tool_call_id_unknown"


def test_6_7_a_cut_reply_is_closed_as_context() -> None:
    talk = Talk(["far too long", f"ok{END}"], new_tokens=7)
    first = talk.ask(user("go"))
    assert first.finish_reason == "length" and talk.text(first.output) == "far too"
    second = talk.ask(user("go"), echoed(first), user("on"))
    (segment,) = talk.segments()
    close = len(first.ids)
    assert talk.text(second.place.prompt[close:]).startswith(f"{END}\n<|im_start|>user\n")
    assert not segment.mask[close] and segment.logp[close] == 0.0 and segment.mask[close - 1] and segment.mask[-1]


@pytest.mark.parametrize("sampled", ["<|user|>", "<|observation|>"])
def test_3_where_the_next_role_closes_a_reply_its_marker_is_not_doubled(sampled: str) -> None:
    talk = Talk([f"four{sampled}", "ok<|user|>"], template=NO_CLOSE, end="<|user|>", stop_tokens=("<|user|>", "<|observation|>"))
    first = talk.ask(user("go"))
    second = talk.ask(user("go"), echoed(first), user("on"))
    assert talk.text(second.place.prompt) == "<|user|>\ngo<|assistant|>\nfour<|user|>\non<|assistant|>\n"
    segments, ledger = talk.session.tree.segments()
    # The right marker was sampled, and is an action; the wrong one is replaced, and is none.
    assert ledger.masked == ({} if sampled == "<|user|>" else {"boundary": 1}) and len(segments) == 1
    assert segments[0].mask[len(first.ids) - 1] == (sampled == "<|user|>")


def test_3_where_the_next_role_closes_a_call_its_answers_marker_does() -> None:
    talk = Talk(
        [wrote(1, 2) + "<|observation|>", "ok<|user|>"], template=NO_CLOSE, end="<|user|>", stop_tokens=("<|user|>", "<|observation|>")
    )
    first = talk.ask(user("1+2"), tools=[TOOL])
    second = talk.ask(user("1+2"), echoed(first), answered(first.reply.tool_calls[0], "3"), user("and?"), tools=[TOOL])
    assert talk.text(second.place.prompt[len(first.ids) - 1 :]) == "<|observation|>3<|user|>\nand?<|assistant|>\n"
    assert talk.session.tree.segments()[1].masked == {}


def test_8_spellings_of_client_libraries_match() -> None:
    respaced = '{"b":2,  "a":1}'
    spellings = {
        "as sent": lambda message: message,
        "model_dump": lambda message: {**message, "refusal": None, "annotations": None, "audio": None, "function_call": None},
        "content null": lambda message: {**message, "content": None},
        "streamed": lambda message: {**message, "tool_calls": [{**call, "index": 0} for call in message["tool_calls"]]},
        "re-spaced": lambda message: _with_arguments(message, respaced),
        "an object": lambda message: _with_arguments(message, json.loads(respaced)),
    }
    for name, spelling in spellings.items():
        talk = Talk([wrote(1, 2) + END, f"3{END}"])
        first = talk.ask(user("1+2"), tools=[TOOL])
        second = talk.ask(user("1+2"), spelling(echoed(first)), answered(first.reply.tool_calls[0], "3"), tools=[TOOL])
        assert second.place.parent is first and second.place.how == "append", name
        assert second.place.respelled == (name in ("re-spaced", "an object"))


def _with_arguments(message: dict[str, Any], arguments: object) -> dict[str, Any]:
    (call,) = message["tool_calls"]
    return {**message, "tool_calls": [{**call, "function": {**call["function"], "arguments": arguments}}]}


def test_9_an_edited_reply_is_not_ours() -> None:
    talk = Talk([f"It is four.{END}", f"ok{END}"])
    talk.ask(user("2+2"))
    second = talk.ask(user("2+2"), assistant("It is five."), user("sure?"))
    assert second.place.parent is None and second.place.reason == "history"
    first, edited = talk.segments()
    assert sum(first.mask) == len(talk.ids(f"It is four.{END}")) and sum(edited.mask) == len(talk.ids(f"ok{END}"))


def test_11_12_the_same_question_again_is_another_sample() -> None:
    def seeds() -> list[list[int]]:
        talk = Talk([f"{digit}{END}" for digit in range(6)])
        several = asyncio.run(talk.asked({"messages": [user("q")], "n": 4}))
        again = [talk.ask(user("q")), talk.ask(user("q"))]
        assert len({node.index for node in several}) == 4 and {node.place.parent for node in [*several, *again]} == {None}
        assert len(talk.segments()) == 6 and talk.session.tree.counts["calls_resample"] == 5
        return [[node.contract.seed for node in several], [node.contract.seed for node in again]]

    drawn = seeds()
    assert len({*drawn[0], *drawn[1]}) == 6 and seeds() == drawn


def test_13_a_compacted_history_is_a_further_segment() -> None:
    talk = Talk([f"one{END}", f"two{END}", f"three{END}"])
    first = talk.ask(user("a"))
    talk.ask(user("a"), echoed(first), user("b"))
    third = talk.ask(user("Summary: one, two."), user("c"))
    segments, ledger = talk.session.tree.segments()
    assert [sum(segment.mask) for segment in segments] == [8, 6] and segments[1].nodes == (third,)
    assert ledger.sampled == ledger.trained == 14


def test_14_branches_train_their_common_prefix_once() -> None:
    talk = Talk([f"root{END}", f"left{END}", f"right{END}"])
    root = talk.ask(user("a"))
    left = talk.ask(user("a"), echoed(root), user("l"))
    right = talk.ask(user("a"), echoed(root), user("r"))
    segments, ledger = talk.session.tree.segments()
    assert [sum(segment.mask) for segment in segments] == [5 + 5, 6] and ledger.trained == 16
    # In the second the common reply is only read, under the version that wrote it.
    assert segments[1].tokens == right.ids and not any(segments[1].mask[: len(right.place.prompt)])
    assert segments[0].tokens == left.ids


@pytest.mark.parametrize("history", ["template", "verbatim"])
def test_15_16_thoughts_stay_or_go_as_the_run_says(history: str) -> None:
    talk = Talk([f"<think>hm</think>four{END}", f"ok{END}"], template=THINKING, history=history)
    first = talk.ask(user("2+2"))
    assert (first.reply.reasoning, first.reply.content) == ("hm", "four")
    second = talk.ask(user("2+2"), echoed(first), user("sure?"))
    whole = talk.letters.apply_chat_template([user("2+2"), assistant("four"), user("sure?")], tokenize=False, add_generation_prompt=True)
    if history == "template":
        assert talk.text(second.place.prompt) == whole and second.place.reason == "the template rewrites what was said"
        assert len(talk.segments()) == 2
    else:
        assert second.place.prompt[: len(first.ids)] == first.ids and talk.text(second.place.prompt) != whole
        assert len(talk.segments()) == 1


def test_15_where_nothing_is_rewritten_the_template_appends_too() -> None:
    talk = Talk([f"four{END}", f"ok{END}"], template=CHATML, history="template")
    first = talk.ask(user("2+2"))
    assert talk.ask(user("2+2"), echoed(first), user("sure?")).place.how == "append"


def test_16_thoughts_that_the_prompt_began_are_told_as_thoughts_even_where_they_were_cut() -> None:
    begun = CHATML.replace("<|im_start|>assistant{{ '\\n' }}", "<|im_start|>assistant{{ '\\n' }}<think>{{ '\\n' }}")
    talk = Talk([f"hm</think>four{END}", "never ending", f"ok{END}"], template=begun, new_tokens=16)
    first = talk.ask(user("2+2"))
    assert (first.reply.reasoning, first.reply.content) == ("hm", "four")
    cut = talk.ask(user("2+2"), max_tokens=5)
    assert (cut.reply.reasoning, cut.reply.content, cut.finish_reason) == ("never", "", "length")
    third = talk.ask(user("2+2"), echoed(first), user("sure?"))
    assert third.place.parent is first and talk.text(third.ids).count("<think>") == 2


def test_18_concurrent_requests_are_all_recorded() -> None:
    def rows(order: Sequence[int]) -> set[tuple[Any, ...]]:
        talk = Talk([f"root{END}"])
        root = talk.ask(user("a"))
        words = ["x", "yy", "zzz"]
        talk.engine.script = lambda request: talk.ids(f"{talk.text(request.tokens).count('y')}{END}")
        talk.engine.delay_s = lambda request: 0.01 * order[len(talk.engine.calls) % 3]

        async def together() -> None:
            await asyncio.gather(*(talk.asked({"messages": [user("a"), echoed(root), user(word)]}) for word in words))

        asyncio.run(together())
        segments, ledger = talk.session.tree.segments()
        assert len(segments) == 3 and ledger.trained == ledger.sampled == 5 + 3 * 2
        return {(segment.tokens, segment.nodes[-1].contract.seed) for segment in segments}

    assert len({frozenset(rows(order)) for order in itertools.permutations(range(3))}) == 1


def test_19_sampling_is_the_runs_to_say() -> None:
    talk = Talk([f"a{END}"])
    node = talk.ask(user("q"), temperature=0.1, top_p=0.5, seed=3)
    (asked,) = talk.engine.calls[0]
    assert (asked.contract.temperature, asked.contract.top_p) == (0.7, 1.0) == (node.contract.temperature, node.contract.top_p)
    assert node.requested == {"temperature": 0.1, "top_p": 0.5, "seed": 3}


def test_20_versions_stand_at_their_tokens() -> None:
    talk = Talk([f"one{END}", f"two{END}"])
    first = talk.ask(user("a"))
    talk.engine.version = 1
    second = talk.ask(user("a"), echoed(first), user("b"))
    (segment,) = talk.segments()
    assert segment.version == (0,) * len(first.ids) + (1,) * (len(second.ids) - len(first.ids))


@pytest.mark.parametrize(
    "wrong", [{"logp": (math.nan, -1.0)}, {"logp": (0.5, -1.0)}, {"logp": (-1.0,)}, {"logp": ()}, {"version": (0,)}, {"tokens": ()}]
)
def test_21_a_logprob_that_is_none_fails_the_call(wrong: dict[str, Any]) -> None:
    talk = Talk([])

    class Wrong(ScriptedEngine):
        async def generate(self, requests: Sequence[Request]) -> list[Completion]:
            good = Completion(
                request_id=requests[0].request_id, tokens=(40, 2), logp=(-1.0, -1.0), version=(0, 0), finish_reason="stop", cached_tokens=0
            )
            return [dataclasses.replace(good, **wrong)]

    talk.session._engine = Wrong(script=lambda _: [])
    with pytest.raises(Refused) as refused:
        talk.ask(user("q"))
    assert (refused.value.status, refused.value.code) == (500, "engine_dead")
    assert isinstance(talk.session.error, EngineError) and talk.session.failure.is_set() and not talk.session.tree.nodes


def test_24_images_are_refused() -> None:
    parts = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    with pytest.raises(Refused, match=r"image 1 of messages\[0\].content cannot be shown: the policy reads text only"):
        Talk([]).ask({"role": "user", "content": parts})
    with pytest.raises(Refused, match=r"messages\[0\].content has a part of type 'input_audio'; only text and images"):
        Talk([]).ask({"role": "user", "content": [{"type": "input_audio"}]})


STEPS = st.lists(st.tuples(st.sampled_from(["go on", "again", "branch", "edit", "compact", "tools"]), st.integers(0, 3)), max_size=10)
REPLIES = st.sampled_from(
    [f"a{END}", "cut here, at twelve", f"b{END}", wrote(1, 2) + END, f"<tool_call>no{END}", f"same{END}", f"same{END}"]
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, replies=st.lists(REPLIES, min_size=12, max_size=12), unread=st.integers(0, 11))
def test_25_every_id_is_trained_masked_or_dropped(steps: list[tuple[str, int]], replies: list[str], unread: int) -> None:
    talk = Talk(replies, new_tokens=12)
    said: list[dict[str, Any]] = [user("begin")]
    past = [(list(said), talk.ask(*said, tools=[TOOL]))]
    for kind, which in steps:
        before, node = past[which % len(past)] if kind == "branch" else past[-1]
        reply = assistant("made up") if kind == "edit" else echoed(node)
        answers = [answered(call, "3") for call in node.reply.tool_calls] if kind != "edit" else []
        said = {
            "again": list(before),
            "compact": [user("Summary"), user(f"{which}")],
        }.get(kind, [*before, reply, *answers, user(f"{kind} {which}")])
        asked = asyncio.run(talk.session.answer(read(said, tools=kind != "tools")))
        if which != unread:
            talk.session.tree.deliver(asked[0])
        past.append((said, asked[0]))
    segments, ledger = talk.session.tree.segments()
    assert ledger.balanced and ledger.sampled == sum(len(node.output) for node in talk.session.tree.nodes)
    drawn = [completion for call in talk.engine.calls for completion in call]
    assert len(drawn) == len(talk.session.tree.nodes)
    trained = [token for segment in segments for token, own in zip(segment.tokens, segment.mask, strict=True) if own]
    kept = [node for node in talk.session.tree.nodes if any(node in segment.nodes for segment in segments)]
    assert sorted(trained) == sorted(token for node in kept for token in node.output)
    for segment in segments:
        for parent, child in itertools.pairwise(segment.nodes):
            assert child.place.prompt[: len(parent.ids)] == parent.ids


def read(said: list[dict[str, Any]], *, tools: bool) -> Any:
    from hone.rollout.endpoint.openai_wire import read_chat

    return read_chat({"messages": said, **({"tools": [TOOL]} if tools else {})})[0]
