"""Log-probabilities: our chunked head beside full fp32 logits and log_softmax; time, and the most memory either holds at once.

T packed tokens, H hidden size, V vocabulary. Every token but a row's first is scored, which is our worst case: leaving
prompts out saves us their share and saves the full form nothing. The roof is the matrix products alone, on the same
numbers: one where only results are wanted, three where gradients are.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from benchmarks.bench_roof import beside
from hone.learner.logprobs import token_logprobs

T, H, V, ROWS = 768, 256, 16_384, 8
CHUNK_TOKENS = 96  # about what the learner takes on a CPU for a vocabulary of 150,000
TEMPERATURE = 0.8


def full_logprobs(hidden: Tensor, head_weight: Tensor, tokens: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """(logp, entropy) [nats] of every token from one [T, V] table of logits; zero where there is none."""
    log_probabilities = torch.log_softmax(linear(hidden, head_weight).float().div_(TEMPERATURE), -1)
    logp = log_probabilities.gather(1, tokens.roll(-1)[:, None]).squeeze(1)
    with torch.no_grad():
        entropy = log_probabilities.exp().mul_(log_probabilities).sum(-1).neg_()
    return logp.roll(1) * scored, entropy.roll(1) * scored


def with_peak_bytes(function: Callable[[], list[Tensor | None]]) -> tuple[list[Tensor | None], int]:
    """The call's results, and the most bytes that torch's allocator held during it, beyond those held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        results = function()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return results, peak


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward_and_backward"])
def test_head(benchmark: BenchmarkFixture, gradients: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator).requires_grad_(gradients)
    head_weight = (torch.randn(V, H, generator=generator) / H**0.5).requires_grad_(gradients)
    tokens = torch.randint(0, V, (T,), generator=generator)
    bounds = torch.arange(0, T + 1, T // ROWS)
    scored = torch.ones(T, dtype=torch.bool)
    scored[bounds[:-1]] = False
    pull = torch.randn(T, generator=generator)  # stands for the loss's gradient

    def results(logp: Tensor, entropy: Tensor | None) -> list[Tensor | None]:
        return [logp.detach(), entropy, *(torch.autograd.grad((pull * logp).sum(), (hidden, head_weight)) if gradients else ())]

    def ours() -> list[Tensor | None]:
        logp, entropy = token_logprobs(
            hidden, head_weight, tokens, bounds, scored, temperature=TEMPERATURE, chunk_tokens=CHUNK_TOKENS, with_entropy=True
        )
        return results(logp, None if entropy is None else entropy.detach())

    def peer() -> list[Tensor | None]:
        return results(*full_logprobs(hidden, head_weight, tokens, scored))

    def products() -> None:
        with torch.no_grad():
            logits = hidden @ head_weight.T
            if gradients:
                logits @ head_weight
                logits.T @ hidden

    (chunked, ours_bytes), (full, peer_bytes) = with_peak_bytes(ours), with_peak_bytes(peer)
    assert_close(chunked, full, rtol=1e-4, atol=1e-4)
    benchmark.extra_info.update(
        ours_peak_mib=ours_bytes / 2**20, full_logits_peak_mib=peer_bytes / 2**20, times_more_memory_than_ours=peer_bytes / ours_bytes
    )
    beside(benchmark, ours, peers={"full_logits": peer}, roof=products, rounds=3)
