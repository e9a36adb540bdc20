"""A real vLLM engine paused with requests under way: held, waited for, and what an update does to those that were held."""

import asyncio

import pytest
import torch
from torch.testing import assert_close

from hone.rollout.errors import EngineError
from tests.rollout.conftest import Served, logp_of, request

# vllm, while it is imported, scripts a function by torch's old way.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
PROMPT = tuple(range(5, 105))  # three whole blocks of 32 and a rest


def test_a_held_request_draws_what_it_would_have_drawn_if_the_weights_stay(untied: Served) -> None:
    # Its random numbers go on where they were: begun anew they would repeat those of the tokens it has, which is no sample any more.
    (alone,) = untied.generate([request(PROMPT, seed=4, length=600)])
    held = untied.loop.start(untied.engine.generate([request(PROMPT, seed=4, length=600)]))
    untied.generate([request((7, 8), seed=2, length=4)])
    before = untied.version
    untied.sync()
    (drawn,) = held.result()
    assert set(drawn.version) == {before, before + 1} and drawn.tokens == alone.tokens
    assert_close(torch.tensor(drawn.logp), torch.tensor(alone.logp), rtol=0, atol=1e-4)


def test_a_request_after_an_update_meets_no_block_of_the_old_version_though_one_that_was_held_has_the_same_prompt(untied: Served) -> None:
    held = untied.loop.start(untied.engine.generate([request(PROMPT, seed=1, length=800)]))
    assert untied.generate([request(PROMPT, seed=2, length=4)])[0].cached_tokens == 96
    untied.step()
    untied.sync()
    (first,) = untied.generate([request(PROMPT, seed=3, length=24)])
    (again,) = untied.generate([request(PROMPT, seed=3, length=24)])
    assert not held.done() and (first.cached_tokens, again.cached_tokens) == (0, 96)
    for drawn in (first, again):
        assert set(drawn.version) == {untied.version} and drawn.tokens == first.tokens
        assert_close(torch.tensor(drawn.logp), logp_of(untied.model, PROMPT + drawn.tokens)[99:], rtol=0, atol=1e-4)
    held.result()


def test_waiting_lets_what_is_under_way_end_and_begins_nothing(untied: Served) -> None:
    async def whole() -> tuple[bool, bool]:
        long = asyncio.ensure_future(untied.engine.generate([request(PROMPT, seed=1, length=300)]))
        await untied.engine.generate([request((7, 8), seed=2, length=4)])
        pausing = asyncio.ensure_future(untied.engine.pause("wait"))
        await asyncio.sleep(0)
        late = asyncio.ensure_future(untied.engine.generate([request((9, 9), seed=3, length=4)]))
        (drawn,) = await long
        await pausing
        assert len(drawn.tokens) == 300
        begun = late.done()
        await untied.engine.resume()
        return begun, len((await late)[0].tokens) == 4

    assert untied.loop.run(whole()) == (False, True)


def test_sleep_without_having_been_started_for_it_is_refused_by_name(untied: Served) -> None:
    with pytest.raises(EngineError, match=r"engine untied cannot sleep: it was started without --vllm.enable-sleep"):
        untied.loop.run(untied.engine.sleep(1))
    untied.loop.run(untied.engine.wake())  # it is awake: nothing happens


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM sleeps on a CUDA device only; none here")
@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_slept_serves_what_it_is_sent(level: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    from hone.rollout.config import VLLMConfig
    from hone.rollout.engines.vllm import VLLMEngine
    from tests.rollout.conftest import Loop, tiny_model

    directory = tmp_path_factory.mktemp("sleeper")
    model, loop = tiny_model("untied", directory), Loop()
    config = VLLMConfig(enable_sleep=True, gpu_memory_utilization=0.3)
    engine = VLLMEngine(model=str(directory), name="sleeper", config=config, max_model_len=512, dtype="float32", backend="ipc", threads=1)
    try:
        full = torch.cuda.mem_get_info()[0]
        loop.run(engine.sleep(level))  # pyright: ignore[reportArgumentType]
        assert torch.cuda.mem_get_info()[0] > full
        loop.run(engine.wake(["weights"]))
        if level == 1:
            loop.run(engine.wake(["kv_cache"]))
            (drawn,) = loop.run(engine.generate([request(PROMPT, seed=1, length=8)]))
            assert_close(torch.tensor(drawn.logp), logp_of(model, PROMPT + drawn.tokens)[99:], rtol=0, atol=1e-3)
    finally:
        loop.run(engine.shutdown())
        loop.close()
