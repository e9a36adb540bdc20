"""vLLM as it really runs: what it draws, what it reports about it, how it ends."""

import copy
import dataclasses
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from hone.rollout.errors import EngineError
from tests.rollout.conftest import EOS, Loop, Served, logp_of, request, start, tiny_model

# vllm, while it is imported, scripts a function by torch's old way.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
PROMPT = tuple(range(3, 103))  # 100 tokens: three whole blocks of 32 and a rest


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logp_is_the_learners_under_the_contracts_temperature(untied: Served, temperature: float) -> None:
    requests = [request((5, 6, 7), seed=seed, temperature=temperature) for seed in range(4)]
    for asked, drawn in zip(requests, untied.generate(requests), strict=True):
        assert drawn.request_id == asked.request_id
        assert len(drawn.tokens) == len(drawn.logp) == len(drawn.version) == 24
        expected = logp_of(untied.model, asked.tokens + drawn.tokens, temperature)[len(asked.tokens) - 1 :]
        assert_close(torch.tensor(drawn.logp), expected, rtol=0, atol=1e-4)


def test_sampled_logp_is_that_of_the_truncated_distribution(untied: Served) -> None:
    (drawn,) = untied.generate([request((5, 6, 7), seed=0, length=1, top_k=5)])
    with torch.no_grad():
        best = untied.model(torch.tensor([[5, 6, 7]])).logits[0, -1].topk(5)
    expected = torch.log_softmax(best.values, dim=-1)[best.indices.tolist().index(drawn.tokens[0])]
    assert_close(torch.tensor(drawn.logp[0]), expected, rtol=0, atol=1e-4)


def test_prompt_logp_is_the_learners(tied: Served) -> None:
    assert_close(torch.tensor(tied.loop.run(tied.engine.prompt_logp(PROMPT))), logp_of(tied.model, PROMPT), rtol=0, atol=1e-4)


def test_a_seed_reproduces_its_sample_and_another_does_not(untied: Served) -> None:
    first = untied.generate([request(PROMPT, seed=seed) for seed in (11, 12, 13)])
    again = untied.generate([request(PROMPT, seed=seed) for seed in (13, 12, 11)])
    assert [drawn.tokens for drawn in again] == [drawn.tokens for drawn in reversed(first)]
    assert len({drawn.tokens for drawn in first}) == 3


def test_a_greedy_request_takes_the_likeliest_token(untied: Served) -> None:
    asked = dataclasses.replace(request((5, 6, 7), seed=1, length=6, temperature=0.5), greedy=True)
    (drawn,) = untied.generate([asked])
    tokens = [5, 6, 7]
    with torch.no_grad():
        for _ in drawn.tokens:
            tokens.append(int(untied.model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert list(drawn.tokens) == tokens[3:]


def test_a_group_prefills_its_prompt_once(untied: Served) -> None:
    prompt = tuple(reversed(PROMPT))
    group = untied.generate([request(prompt, seed=seed) for seed in range(6)])
    assert [drawn.cached_tokens for drawn in group] == [0, 96, 96, 96, 96, 96]


def test_prompts_beyond_one_steps_token_budget_are_served(untied: Served) -> None:
    # 96 different prompts of 100 tokens exceed the 4096 of a step; cut in two, a seeded one would kill vLLM's core on the CPU.
    drawn = untied.generate([request((3 + seed, *PROMPT[1:]), seed=seed, length=2) for seed in range(96)])
    assert [len(one.tokens) for one in drawn] == [2] * 96


def test_the_end_of_sequence_is_kept_and_named(tied: Served) -> None:
    drawn = tied.generate([request((9, 10), seed=seed, length=300) for seed in range(16)])
    assert {one.finish_reason for one in drawn} == {"stop", "length"}
    for one in drawn:
        assert (one.tokens[-1] == EOS) == (one.finish_reason == "stop")
        assert EOS not in one.tokens[:-1]


def test_every_token_carries_the_version_that_sampled_it(untied: Served) -> None:
    # The short request ends while the long one is under way, so the sync falls into the middle of the long one.
    old, before = copy.deepcopy(untied.model), untied.version
    long = untied.loop.start(untied.engine.generate([request(PROMPT, seed=1, length=900)]))
    untied.generate([request((7, 8), seed=2, length=4)])
    untied.step()
    untied.sync()
    (drawn,) = long.result()
    cut = drawn.version.index(before + 1)
    assert 0 < cut < 900
    assert drawn.version == (before,) * cut + (before + 1,) * (900 - cut)
    # What was cached is computed anew under the new weights, so each part is exactly its own version's policy.
    tokens, logp = PROMPT + drawn.tokens, torch.tensor(drawn.logp)
    assert_close(logp[:cut], logp_of(old, tokens)[99 : 99 + cut], rtol=0, atol=1e-4)
    assert_close(logp[cut:], logp_of(untied.model, tokens)[99 + cut :], rtol=0, atol=1e-4)


def test_a_request_it_cannot_serve_is_refused_by_name(untied: Served) -> None:
    with pytest.raises(EngineError, match=r"engine untied failed while sampling prompt-3/sample-5: .*1024"):
        untied.generate([request((3,) * 1024, seed=5)])


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc whether a process is gone")
def test_a_killed_core_is_an_error_with_its_name_and_leaves_nothing(tmp_path: Path) -> None:
    tiny_model("untied", tmp_path)
    children = set(multiprocessing.active_children())
    engine = start(tmp_path, "engine-7", max_model_len=None)
    loop = Loop()
    loop.run(engine.check_health())
    drawing = loop.start(engine.generate([request(PROMPT, seed=seed, length=1900) for seed in (1, 2)]))
    loop.run(engine.generate([request((7, 8), seed=3, length=4)]))
    (pid,) = engine.pids()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=rf"engine-7 lost its vLLM core .*prompt-3/sample-1, prompt-3/sample-2 \(pid {pid} exit code -9"):
        drawing.result()
    with pytest.raises(EngineError, match="engine-7 lost its vLLM core at a health check"):
        loop.run(engine.check_health())
    loop.run(engine.shutdown())
    assert not Path(f"/proc/{pid}").exists()
    assert set(multiprocessing.active_children()) <= children
    loop.close()


def test_a_model_that_is_not_there_is_an_error_with_the_engines_name(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=rf"engine engine-8 did not start on {tmp_path}"):
        start(tmp_path, "engine-8", max_model_len=None)
