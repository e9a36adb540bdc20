"""LeastLoaded: where a call goes, and whose error it is."""

import asyncio

import pytest

from hone.algos.batch import SamplerContract
from hone.rollout.engines.scripted import ScriptedEngine
from hone.rollout.errors import EngineError, StaleWeights
from hone.rollout.router import LeastLoaded
from hone.rollout.types import Request

CONTRACT = SamplerContract(temperature=1.0, top_p=1.0, top_k=0, seed=0, engine="e", tokenizer="t", template="c")


def call(samples: int, *, tokens: int = 1) -> list[Request]:
    return [Request(request_id=str(sample), tokens=(tokens,), max_new_tokens=4, contract=CONTRACT) for sample in range(samples)]


def test_a_call_goes_to_the_engine_with_the_fewest_requests_in_flight() -> None:
    # A prompt of id 9 keeps its engine busy.
    slow, fast = (ScriptedEngine(name=name, script=lambda _: [1], delay_s=lambda r: 0.2 if r.tokens == (9,) else 0.0) for name in "ab")
    router = LeastLoaded([slow, fast])

    async def scenario() -> None:
        first = asyncio.create_task(router.generate(call(3, tokens=9)))  # a: 3 in flight
        await asyncio.sleep(0)
        second = asyncio.create_task(router.generate(call(2, tokens=9)))  # b: 2 in flight
        await asyncio.sleep(0)
        third = asyncio.create_task(router.generate(call(2, tokens=9)))  # b again: 2 < 3, afterwards 4
        await asyncio.sleep(0)
        fourth = asyncio.create_task(router.generate(call(1, tokens=9)))  # a: 3 < 4
        await asyncio.gather(first, second, third, fourth)
        await router.generate(call(1))  # all idle: ties go to the first

    asyncio.run(scenario())
    assert [len(requests) for requests in slow.calls] == [3, 1, 1]
    assert [len(requests) for requests in fast.calls] == [2, 2]


def test_an_engine_that_failed_is_idle_again() -> None:
    def fail(_: Request) -> list[int]:
        raise EngineError("no room")

    broken, sound = ScriptedEngine(name="a", script=fail), ScriptedEngine(name="b", script=lambda _: [1])
    router = LeastLoaded([broken, sound])
    for _ in range(2):
        with pytest.raises(EngineError, match=r"engine a: no room"):
            asyncio.run(router.generate(call(5)))
    assert len(broken.calls) == 2


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (StaleWeights("old weights"), StaleWeights, "engine vllm-0: old weights"),
        (EngineError("vllm-0 died"), EngineError, "vllm-0 died"),
        (ConnectionError("gone"), EngineError, "engine vllm-0 failed: ConnectionError: gone"),
    ],
)
def test_errors_keep_their_kind_and_name_the_engine(raised: Exception, kind: type[Exception], message: str) -> None:
    def fail(_: Request) -> list[int]:
        raise raised

    with pytest.raises(EngineError) as caught:
        asyncio.run(LeastLoaded([ScriptedEngine(name="vllm-0", script=fail)]).generate(call(1)))
    assert type(caught.value) is kind
    assert str(caught.value) == message


def test_no_engines_is_an_error_and_the_name_lists_them() -> None:
    with pytest.raises(ValueError, match="no engines"):
        LeastLoaded([])
    router = LeastLoaded([ScriptedEngine(name="a", script=lambda _: []), ScriptedEngine(name="b", script=lambda _: [], logp=-2.0)])
    assert router.name == "2 engines (a, b)"
    assert asyncio.run(router.prompt_logp([1, 2, 3])) == [-1.0, -1.0]
