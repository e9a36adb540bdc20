"""Packed = one by one: rows that lie end to end attend as if each were alone, forward and backward."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hone.learner.attention.varlen import PACKED, packed_attention, row_arguments
from hone.learner.model import packed_hidden
from tests.learner.tiny import CONFIGS, VOCABULARY

LENGTHS = [5, 1, 9, 7]
CU_SEQLENS = torch.tensor([0, 5, 6, 15, 22], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_packed_forward_is_one_forward_per_row(kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation=PACKED)
    tokens = torch.randint(0, VOCABULARY, (22,))
    pull = torch.randn(22, model.config.hidden_size)

    packed = packed_hidden(model.base_model, tokens, POSITIONS, CU_SEQLENS)
    (packed * pull).sum().backward()
    packed_gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    model.set_attn_implementation("eager")
    alone = torch.cat([model.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in tokens.split(LENGTHS)])
    (alone * pull).sum().backward()
    assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(packed_gradients[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("window", [None, 1, 3])
def test_windows_and_grouped_heads_against_a_written_out_softmax(window: int | None) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 22, 8), torch.randn(1, 2, 22, 8), torch.randn(1, 2, 22, 8)
    ours, _ = packed_attention(nn.Module(), query, key, value, None, scaling=0.3, sliding_window=window, **row_arguments(CU_SEQLENS))
    row = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    age = torch.arange(22)[:, None] - torch.arange(22)[None, :]
    seen = (row[:, None] == row[None, :]) & (age >= 0) & (age < (window or 22))
    scores = torch.einsum("htd,hsd->hts", query[0], key[0].repeat_interleave(2, 0)) * 0.3
    expected = torch.einsum("hts,hsd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value[0].repeat_interleave(2, 0))
    assert_close(ours[0], expected)


def test_it_refuses_what_it_does_not_compute() -> None:
    states = torch.randn(1, 2, 22, 8)
    with pytest.raises(ValueError, match="softcap"):
        packed_attention(nn.Module(), states, states, states, None, softcap=30.0, **row_arguments(CU_SEQLENS))
    with pytest.raises(ValueError, match="does not hand keyword arguments on"):
        packed_attention(nn.Module(), states, states, states, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs a CUDA device; none here")
@pytest.mark.parametrize("window", [None, 3])
def test_the_cuda_kernel_is_the_per_row_loop(window: int | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 22, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
    arguments = row_arguments(CU_SEQLENS.cuda())
    pull = torch.randn(1, 22, 4, 16, device="cuda", dtype=torch.bfloat16)
    kernel, _ = packed_attention(nn.Module(), query, key, value, None, sliding_window=window, **arguments)
    gradients = torch.autograd.grad((kernel * pull).sum(), (query, key, value))
    doubles = [states.detach().float().requires_grad_() for states in (query, key, value)]
    loop, _ = packed_attention(nn.Module(), *doubles, None, sliding_window=window, **arguments)
    expected = torch.autograd.grad((loop * pull.float()).sum(), doubles)
    assert_close(kernel.float(), loop, rtol=2e-2, atol=2e-2)
    for ours, plain in zip(gradients, expected, strict=True):
        assert_close(ours.float(), plain, rtol=5e-2, atol=5e-2)
