"""The language model's head: ours beside OpenRLHF's own functions on full fp32 logits; time, and the most memory held at once.

Log-probabilities alone, and with entropies, which our policy update always takes and OpenRLHF's where `entropy_coef` is set.
T packed tokens, H hidden size, V vocabulary. `answers`: every token but a row's first is scored, our worst case, in which the
products alone, three with gradients, leave the peer at most 1.4 times slower. `prompts`: the first 45 % of each row are prompt,
as of GSM8K's rows; leaving them out saves us their share and saves the full form nothing. The roof is the matrix products that
cannot be avoided: one for results, three with gradients (6 H V operations a scored token).
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
from benchmarks.peers import openrlhf
from hone.learner.logprobs import token_logprobs
from hone.learner.model import CHUNK_BYTES

SIZES = {"qwen_vocabulary": (512, 1024, 151_936, 4), "small": (768, 256, 16_384, 8)}
TEMPERATURE = 0.8
PROMPTS = {"answers": 0.0, "prompts": 0.45}
"""Share of each row that is prompt."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Of results and gradients: 2^-8 is one step of bf16, and a product in tiles may round each logit the other way."""


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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # the peer's torch.compile looks
@pytest.mark.parametrize("mode", ["forward", "told_slopes", "any_loss"])
@pytest.mark.parametrize("entropies", [False, True], ids=["logp", "logp_and_entropy"])
@pytest.mark.parametrize(("size", "prompts"), [("qwen_vocabulary", "answers"), ("qwen_vocabulary", "prompts"), ("small", "answers")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_head(benchmark: BenchmarkFixture, dtype: torch.dtype, size: str, prompts: str, entropies: bool, mode: str) -> None:
    """forward: results alone. told_slopes: with gradients of a loss that is a sum over tokens. any_loss: of any other."""
    tokens_count, hidden_size, vocabulary, rows = SIZES[size]
    gradients = mode != "forward"
    utils = openrlhf("models/utils.py", without=("deepspeed",))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens_count, hidden_size, generator=generator).to(dtype).requires_grad_(gradients)
    head_weight = (torch.randn(vocabulary, hidden_size, generator=generator) / hidden_size**0.5).to(dtype).requires_grad_(gradients)
    tokens = torch.randint(0, vocabulary, (tokens_count,), generator=generator)
    bounds = torch.arange(0, tokens_count + 1, tokens_count // rows)
    scored = torch.ones(tokens_count, dtype=torch.bool)
    length = tokens_count // rows
    scored.view(rows, length)[:, : max(1, round(PROMPTS[prompts] * length))] = False
    # These stand for the loss's gradient.
    pull = torch.randn(tokens_count, generator=generator)
    pull_entropy = torch.randn(tokens_count, generator=generator) if entropies else None

    def results(logp: Tensor, entropy: Tensor | None) -> list[Tensor | None]:
        loss = (pull * logp).sum() + (0 if pull_entropy is None else (pull_entropy * entropy).sum())
        told = [logp.detach()] if entropy is None else [logp.detach(), entropy.detach()]
        return [*told, *(torch.autograd.grad(loss, (hidden, head_weight)) if gradients else ())]

    def slopes(logp: Tensor, entropy: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        return pull[positions], None if pull_entropy is None else pull_entropy[positions]

    def ours() -> list[Tensor | None]:
        logp, entropy = token_logprobs(
            hidden,
            head_weight,
            tokens,
            bounds,
            scored,
            temperature=TEMPERATURE,
            chunk_tokens=CHUNK_BYTES["cpu"] // (vocabulary * dtype.itemsize),
            with_entropy=entropies,
            slopes=slopes if mode == "told_slopes" else None,
        )
        return results(logp, entropy)

    def peer() -> list[Tensor | None]:
        logits = linear(hidden, head_weight).float()
        logits.div_(TEMPERATURE)  # as its Actor does
        logp = utils.log_probs_from_logits(logits, tokens.roll(-1)).roll(1)
        return results(logp * scored, utils.compute_entropy(logits).roll(1) * scored if entropies else None)

    def products() -> None:
        with torch.no_grad():
            states = hidden[scored.roll(-1)]
            logits = states @ head_weight.T
            if gradients:
                logits @ head_weight
                logits.T @ states

    (chunked, ours_bytes), (full, peer_bytes) = with_peak_bytes(ours), with_peak_bytes(peer)
    assert_close(chunked, full, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    result_bytes = sum(tensor.nbytes for tensor in full[-2:] if tensor is not None) if gradients else 0  # both must hold the gradients
    del chunked, full
    benchmark.extra_info.update(
        ours_peak_mib=ours_bytes / 2**20,
        openrlhf_peak_mib=peer_bytes / 2**20,
        gradients_mib=result_bytes / 2**20,
        times_more_memory_than_ours=(peer_bytes - result_bytes) / (ours_bytes - result_bytes),
    )
    beside(benchmark, ours, peers={"openrlhf": peer}, roof=products, rounds=3 if size == "qwen_vocabulary" else 7)
