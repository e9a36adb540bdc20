"""Fleet: where a call goes, whose error it is, and what becomes of engines that die, hang or flap."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from hone.algos.batch import SamplerContract
from hone.rollout.engines.scripted import ScriptedEngine
from hone.rollout.errors import EngineError, EngineLost, StaleWeights
from hone.rollout.fleet import Fleet, Limits, Supervised
from hone.rollout.types import Completion, Request

CONTRACT = SamplerContract(temperature=1.0, top_p=1.0, top_k=0, seed=0, engine="e", tokenizer="t", template="c")


def call(samples: int, *, tokens: int = 1) -> list[Request]:
    return [Request(request_id=str(sample), tokens=(tokens,), max_new_tokens=4, contract=CONTRACT) for sample in range(samples)]


def test_a_call_goes_to_the_engine_with_the_fewest_requests_in_flight() -> None:
    # A prompt of id 9 keeps its engine busy.
    slow, fast = (ScriptedEngine(name=name, script=lambda _: [1], delay_s=lambda r: 0.2 if r.tokens == (9,) else 0.0) for name in "ab")
    router = Fleet([slow, fast])

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
    router = Fleet([broken, sound])
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
        asyncio.run(Fleet([ScriptedEngine(name="vllm-0", script=fail)]).generate(call(1)))
    assert type(caught.value) is kind
    assert str(caught.value) == message


def test_no_engines_is_an_error_and_the_name_lists_them() -> None:
    with pytest.raises(ValueError, match="no engines"):
        Fleet([])
    router = Fleet([ScriptedEngine(name="a", script=lambda _: []), ScriptedEngine(name="b", script=lambda _: [], logp=-2.0)])
    assert router.name == "2 engines (a, b)"
    assert asyncio.run(router.prompt_logp([1, 2, 3])) == [-1.0, -1.0]


class Mortal(ScriptedEngine):
    """A scripted engine that can die (its calls with it) and hang."""

    dead: bool = False
    hung: bool = False

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        drawn = await super().generate(requests)
        if self.hung:
            await asyncio.Event().wait()
        if self.dead:
            raise EngineLost(self.name, "died during generate")
        return drawn

    async def check_health(self) -> None:
        if self.hung:
            await asyncio.Event().wait()
        if self.dead:
            raise EngineLost(self.name, "died before a probe")


def mortal(name: str, *, dead: bool = False, hung: bool = False, delay_s: float = 0.0) -> Mortal:
    engine = Mortal(name=name, script=lambda request: [request.tokens[0]], delay_s=lambda _: delay_s)
    engine.dead, engine.hung = dead, hung
    return engine


class Log:
    """What a fleet told, and replacements by name, taken in order."""

    def __init__(self, *fresh: Mortal | Exception, takes_s: float = 0.0) -> None:
        self.events: list[tuple[str, str]] = []
        self.fresh, self.takes_s, self.ended = list(fresh), takes_s, []

    def event(self, kind: str, **fields: object) -> None:
        self.events.append((kind, str(fields["engine"])))

    async def replace(self, lost: Mortal) -> Mortal:
        self.ended.append(lost)
        await asyncio.sleep(self.takes_s)
        fresh = self.fresh.pop(0)
        if isinstance(fresh, Exception):
            raise fresh
        return fresh


def fleet(*engines: Mortal, log: Log, replacements: int = 3, fewest: int = 1, health_timeout_s: float = 0.2) -> Fleet:
    limits = Limits(replacements=replacements, fewest=fewest, health_timeout_s=health_timeout_s)
    return Fleet(engines, replace=log.replace, limits=limits, event=log.event)


def test_calls_of_an_engine_that_dies_are_asked_again_elsewhere_and_it_is_replaced() -> None:
    dying, sound, fresh = mortal("a", dead=True), mortal("b"), mortal("a")
    log = Log(fresh)
    engines = fleet(dying, sound, log=log)

    async def scenario() -> None:
        first = await engines.generate(call(3, tokens=7))
        assert [completion.request_id for completion in first] == ["0", "1", "2"] and first[0].tokens == (7,)
        assert await engines.settled() == [fresh, sound]  # in its old place: ties go to the engine named first
        await engines.generate(call(1))

    asyncio.run(scenario())
    assert log.events == [("engine_lost", "a"), ("calls_reissued", "a"), ("engine_replaced", "a")]
    assert log.ended == [dying] and len(sound.calls) == 1 and len(fresh.calls) == 1


def test_every_call_of_a_lost_engine_is_answered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Forty calls over two engines; one of them dies while ten of its calls are open.
    dying, sound = mortal("a", delay_s=0.05), mortal("b", delay_s=0.01)
    engines = fleet(dying, sound, log=Log(mortal("a")))

    async def scenario() -> list[list[Completion]]:
        asked = [
            asyncio.create_task(engines.generate([replace(call(1, tokens=number)[0], request_id=str(number))])) for number in range(40)
        ]
        await asyncio.sleep(0.02)
        dying.dead = True
        return await asyncio.gather(*asked)

    answers = asyncio.run(scenario())
    assert [(one.request_id, one.tokens) for [one] in answers] == [(str(number), (number,)) for number in range(40)]


def test_a_replacement_serves_only_when_it_is_ready_and_calls_wait_for_it() -> None:
    log = Log(mortal("a"), takes_s=0.2)
    engines = fleet(mortal("a", dead=True), log=log)

    async def scenario() -> None:
        asked = asyncio.create_task(engines.generate(call(1)))
        await asyncio.sleep(0.1)
        assert engines.serving == [] and not asked.done()
        assert len(await asked) == 1

    asyncio.run(scenario())


def test_an_engine_that_hangs_is_found_by_a_probe_and_its_calls_go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hone.rollout.fleet.PROBE_EVERY_S", 0.05)
    log = Log(mortal("a"))
    engines = fleet(mortal("a", hung=True), mortal("b", delay_s=0.01), log=log)
    answers = asyncio.run(asyncio.wait_for(engines.generate(call(2)), 20))
    assert len(answers) == 2 and log.events[0] == ("engine_lost", "a")


def test_an_idle_engine_that_died_is_replaced_before_anything_is_sent_to_it() -> None:
    fresh = mortal("b")
    engines = fleet(mortal("a"), mortal("b", dead=True), log=Log(fresh))

    async def scenario() -> list[Supervised]:
        return await engines.settled()

    assert asyncio.run(scenario())[1] is fresh


def test_what_kills_every_engine_it_meets_is_named() -> None:
    log = Log(*(mortal("a", dead=True) for _ in range(9)))
    with pytest.raises(EngineError, match=r"^0, 1 met the loss of 3 engines in a row, the last: engine a died"):
        asyncio.run(fleet(mortal("a", dead=True), log=log, replacements=9).generate(call(2)))


def test_below_its_minimum_the_fleet_says_whom_it_lost() -> None:
    engines = fleet(mortal("a", dead=True), mortal("b"), log=Log(), replacements=0, fewest=2)
    with pytest.raises(EngineError, match=r"1 engines are left and the run needs 2 \(--vllm.min-engines\); .* lost: engine a died during"):
        asyncio.run(engines.generate(call(1)))


def test_a_flapping_engine_is_retired_and_the_others_go_on() -> None:
    log = Log(*(mortal("a", dead=True) for _ in range(3)), takes_s=0.01)
    sound = mortal("b")
    engines = fleet(mortal("a", dead=True), sound, log=log)

    async def scenario() -> None:
        for _ in range(6):
            await engines.generate(call(1))
            await engines.settled()

    asyncio.run(scenario())
    assert engines.serving == [sound] and log.events[-1] == ("engine_retired", "a")
    assert [kind for kind, _ in log.events].count("engine_replaced") == 3


def test_a_replacement_that_cannot_start_counts_and_is_tried_again() -> None:
    fresh = mortal("a")
    log = Log(EngineError("engine a did not start"), fresh)
    engines = fleet(mortal("a", dead=True), log=log)
    asyncio.run(engines.generate(call(1)))
    assert [kind for kind, _ in log.events] == ["engine_lost", "calls_reissued", "replacement_failed", "engine_replaced"]
    with pytest.raises(EngineError, match=r"2 were replaced \(--vllm.max-replacements 2\); lost: .*did not start"):
        asyncio.run(
            fleet(mortal("a", dead=True), log=Log(EngineError("x did not start"), EngineError("y")), replacements=2).generate(call(1))
        )


def test_a_defect_while_replacing_reaches_whoever_asks() -> None:
    engines = fleet(mortal("a", dead=True), log=Log(KeyError("learner")))
    with pytest.raises(KeyError, match="learner"):
        asyncio.run(engines.generate(call(1)))


def test_cancelling_a_call_cancels_it_at_the_engine() -> None:
    engine = mortal("a", delay_s=30)
    engines = fleet(engine, log=Log())

    async def scenario() -> None:
        asked = asyncio.create_task(engines.generate(call(1)))
        await asyncio.sleep(0.02)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())
