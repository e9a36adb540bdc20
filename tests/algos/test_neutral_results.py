"""Nothing in, no action token, numbers of any size: every public function gives the documented neutral result, and never NaN.

The functions are found by reading the modules (tests/reference/arguments.py).
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hone.algos.batch import Packed
from hone.algos.protocol import Loss
from tests.algos.strategies import law
from tests.reference.arguments import EMPTY, arguments, functions, tensors

NAN, INF = math.nan, math.inf
EVERY = functions()
every = pytest.mark.parametrize("name", sorted(EVERY))
few = settings(law, max_examples=10)

# Constants by the modules' own words; figures may be made of them.
CONSTANTS = {
    "weights",
    "old_logp",
    "ref_logp",
    "rollout_logp",
    "proximal_logp",
    "behaviour_logp",
    "teacher_logp",
    "advantages",
    "returns",
} | {*("old_values", "margins", "anchor", "targets")}


def _leaves(fitting: dict[str, object]) -> list[Tensor]:
    """The floating-point arguments that are no constants, asking for a gradient."""
    floats = {name: value for name, value in fitting.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return [value.requires_grad_() for name, value in floats.items() if name not in CONSTANTS]


def _numbers(result: object) -> list[Tensor]:
    """All numbers of a result, whatever it is."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Loss):
        return [result.total, *result.metrics.values()]
    if isinstance(result, float | int):
        return [torch.tensor(result)]
    if isinstance(result, Packed):
        return []
    parts = result.values() if isinstance(result, dict) else vars(result).values() if dataclasses.is_dataclass(result) else result
    return [number for part in parts for number in _numbers(part)]


def _assert_zero_and_attached(loss: Loss, leaves: list[Tensor]) -> None:
    assert loss.total == 0 and loss.total.requires_grad
    gradients = torch.autograd.grad(loss.total, leaves, allow_unused=True)
    assert any(gradient is not None for gradient in gradients)
    assert all((gradient == 0).all() for gradient in gradients if gradient is not None)
    assert all(figure == 0 and not figure.requires_grad for figure in loss.metrics.values())


@every
def test_a_batch_of_nothing_gives_nothing_and_never_nan(name):
    fitting = arguments(EVERY[name], EMPTY)
    leaves = _leaves(fitting)
    if name in ("kto.kl_anchor", "offline.with_anchor"):
        fitting["sums"] = torch.zeros(2)
        with pytest.raises(ValueError, match=r"0 mismatched rows; .* raise"):
            EVERY[name](**fitting)
        return
    result = EVERY[name](**fitting)
    assert all(number.isfinite().all() for number in _numbers(result))
    if isinstance(result, Loss):
        _assert_zero_and_attached(result, leaves)
    elif isinstance(result, Packed):
        assert result.rows == 0
    elif name not in ("masking.upcast", "shaping.update_moments"):  # what they are given without an axis, and what they saw before
        assert all(number.numel() == 0 or (number == 0).all() for number in _numbers(result))


MASKS = ("action_mask", "step_mask", "pair_mask", "row_mask", "live")
HARMLESS = {"distillation.tempered_logp", "distillation.lumped_student_logp", "distillation.lumped_teacher_logp"}  # "harmless" off the mask


@pytest.mark.parametrize("name", [name for name in sorted(EVERY) if set(MASKS) & set(tensors(EVERY[name]))])
def test_without_an_action_token_the_result_is_zero_whatever_the_numbers_are(name):
    fitting = arguments(EVERY[name])
    for argument, demand in tensors(EVERY[name]).items():
        if argument in (*MASKS, "step_ends"):
            fitting[argument] = torch.zeros_like(fitting[argument])
        elif demand.kind == "Float" and not argument.startswith("greedy") and demand.axes:
            fitting[argument] = (
                torch.tensor([NAN, INF, -INF, 1e300], dtype=torch.float64)
                .repeat(10)[: fitting[argument].numel()]
                .reshape(fitting[argument].shape)
            )
    leaves = _leaves(fitting)
    result = EVERY[name](**fitting)
    if isinstance(result, Loss):
        _assert_zero_and_attached(result, leaves)
    elif name == "ratios.importance_ratio":
        assert (result == 1).all()
    elif name in HARMLESS:
        assert not result.isnan().any()
    else:
        assert all((number == 0).all() for number in _numbers(result))


NEGATIVE = ("logp", "log_ratios", "chosen_mean", "rejected_mean")


def _drawn(function, *, seed: int, scale: float, dtype: torch.dtype) -> dict[str, object]:
    """Arguments with random masks and numbers of that size; what has the sense of a share, a count or a label keeps it."""
    generator = torch.Generator().manual_seed(seed)
    fitting = arguments(function, dtype=dtype)
    for name, demand in tensors(function).items():
        value = fitting[name]
        if name in ("action_mask", "step_mask", "pair_mask", "row_mask", "live", "desirable", "truncated"):
            fitting[name] = torch.rand(value.shape, generator=generator) < 0.6
        elif demand.kind == "Float" and name not in ("targets", "sums", "weights"):
            numbers = 2 * scale * torch.rand(value.shape, generator=generator, dtype=torch.float64) - scale
            negative = any(word in name for word in NEGATIVE) or name == "teacher_logp"
            fitting[name] = (-numbers.abs() if negative else numbers).to(dtype)
    if "scores" in fitting and function.__name__ == "max_rl":
        fitting["scores"] = fitting["scores"].abs()
    if function.__name__ == "pass_at_k_advantages":
        fitting["scores"] = (fitting["scores"] > 0).to(dtype)
    if "step_ends" in fitting:
        fitting["step_ends"] = fitting["step_ends"] & fitting["action_mask"]
    return fitting


REST_OF_NOTHING = {"distillation.lumped_teacher_logp"}  # a top that holds everything leaves a rest of -inf


@every
@few
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-8, 1.0, 40.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_finite_numbers_in_finite_numbers_out(name, seed, scale, dtype):
    fitting = _drawn(EVERY[name], seed=seed, scale=scale, dtype=dtype)
    leaves = _leaves(fitting)
    result = EVERY[name](**fitting)
    if name not in REST_OF_NOTHING:
        assert all(number.isfinite().all() for number in _numbers(result))
    if isinstance(result, Loss):
        gradients = torch.autograd.grad(result.total, leaves, allow_unused=True)
        assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


@every
@few
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e3, 1e8, 1e30]))
def test_however_large_finite_numbers_never_become_nan(name, seed, scale):
    """One token, pair or row: what overflows to inf stays inf, where `0 * inf` or `inf - inf` on the way would be NaN."""
    fitting = _drawn(EVERY[name], seed=seed, scale=scale, dtype=torch.float32)
    for mask in set(MASKS) & set(fitting):
        fitting[mask] = torch.arange(fitting[mask].numel()) == seed % fitting[mask].numel()
    if "step_ends" in fitting:
        fitting["step_ends"] = fitting["action_mask"]
    leaves = _leaves(fitting)
    result = EVERY[name](**fitting)
    assert not any(number.isnan().any() for number in _numbers(result))
    if isinstance(result, Loss):
        gradients = torch.autograd.grad(result.total, leaves, allow_unused=True)
        assert not any(gradient.isnan().any() for gradient in gradients if gradient is not None)
