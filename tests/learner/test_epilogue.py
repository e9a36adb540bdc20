"""The Triton kernels against plain torch: in Triton's interpreter, in a process of its own, and on a GPU where there is one."""

import os
import subprocess
import sys

import pytest
import torch

CASES = """
import torch
from torch.testing import assert_close
from hone.learner.kernels import epilogue, tiles
from hone.learner.logprobs import token_logprobs

epilogue.BLOCK = {block}  # several blocks a token, the last one cut short
plain = tiles._epilogue
asked = []

def watched(logits):
    found = plain(logits)
    asked.append(found is epilogue)
    return found

def outcome(softcap, entropy_slope, told, kernels, dtype, bias):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn({tokens}, 8, generator=generator).to("{device}", dtype).requires_grad_()
    weight = (3 * torch.randn({vocabulary}, 8, generator=generator)).to("{device}", dtype).requires_grad_()
    given = torch.randn({vocabulary}, generator=generator).to("{device}", dtype).requires_grad_() if bias else None
    tokens = torch.randint(0, {vocabulary}, ({tokens},), generator=generator).to("{device}")
    tokens[3] = {vocabulary} - 1
    bounds = torch.tensor([0, 4, {tokens}], device="{device}")
    pull = torch.randn({tokens}, generator=generator).to("{device}")
    tiles._epilogue = watched if kernels else lambda logits: None
    slopes = lambda logp, entropy, positions: (pull[positions], torch.full_like(logp, entropy_slope) if entropy_slope else None)
    logp, entropy = token_logprobs(
        hidden, weight, tokens, bounds, torch.ones_like(tokens, dtype=torch.bool), temperature=0.7, chunk_tokens=5, with_entropy=True,
        head_bias=given, softcap=softcap, slopes=slopes if told else None,
    )
    ((pull * logp).sum() + entropy_slope * entropy.sum()).backward()
    return [logp, entropy, hidden.grad, weight.grad, *([given.grad] if bias else [])]

KINDS = ((None, 0.0, False, False), (None, 0.5, True, True), (4.0, 0.5, False, False), (4.0, 0.0, True, True))
for softcap, entropy_slope, told, bias in KINDS:
    for dtype in {dtypes}:
        ours, expected = (outcome(softcap, entropy_slope, told, kernels, dtype, bias) for kernels in (True, False))
        tolerance = 2e-5 if dtype == torch.float32 else 2e-2
        for one, other in zip(ours, expected, strict=True):
            scale = other.abs().max()
            assert_close(one / scale, other / scale, rtol=tolerance, atol=tolerance)
assert asked and all(asked)
print("agreed")
"""


def test_in_the_interpreter_the_kernels_are_plain_torch() -> None:
    text = CASES.format(block=32, tokens=9, vocabulary=50, device="cpu", dtypes="(torch.float32,)")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.strip() == "agreed", done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled Triton kernels need a CUDA device; none here")
def test_on_a_gpu_the_kernels_are_plain_torch() -> None:
    text = CASES.format(block=4096, tokens=700, vocabulary=20_011, device="cuda", dtypes="(torch.float32, torch.bfloat16)")
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.strip() == "agreed", done.stderr
