"""The native paths beside the plain ones: equal on ragged, poisoned and extreme input, chosen only where they pay.

`device` runs every comparison with numba, with Triton in its interpreter (from a process of its own, see the test that
starts it), and with Triton on a GPU.
"""

import math
import os
import subprocess
import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from hone.algos import kernels, policy_losses
from hone.algos.advantages import gae
from hone.algos.kernels import PLAIN_VARIABLE, kernels_for, plain, plain_only
from hone.algos.policy_losses import clipped_surrogate
from hone.algos.reduce import Reduction
from tests.algos.strategies import poisoned, scored_batch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ULP = 2.0**-23  # of fp32, relative


@pytest.fixture(
    params=[
        "numba",
        pytest.param("interpreted", marks=pytest.mark.skipif(not INTERPRETED, reason="test_triton_in_its_interpreter runs this")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request, monkeypatch):
    """(the kernels, where their tensors live); Triton's blocks are made small, so that short rows fill several."""
    if request.param == "numba":
        pytest.importorskip("numba", reason="the native path on a CPU needs numba: install hone-algos[fast]")
        return import_module("hone.algos.kernels.cpu"), "cpu"
    pytest.importorskip("triton", reason="the native path on CUDA needs triton")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    module = import_module("hone.algos.kernels.cuda")
    monkeypatch.setattr(module, "BLOCK_TOKENS", 64)
    return module, "cpu" if request.param == "interpreted" else "cuda"


@pytest.fixture
def numba_kernels():
    pytest.importorskip("numba", reason="the native path on a CPU needs numba: install hone-algos[fast]")
    return import_module("hone.algos.kernels.cpu")


def ragged(seed):
    """Rows of many lengths, some empty, with gaps: a scored batch in fp32, poisoned off the mask."""
    generator = torch.Generator().manual_seed(seed)
    rows = ((1, 1), (130, 1), (0, 1), (2, 0), (17, 0.5), (150, 0.9))  # tokens, share of the policy's own
    masks = [(torch.rand(tokens, generator=generator) < share).tolist() for tokens, share in rows]
    batch = poisoned(scored_batch(masks, Reduction(), seed=seed))
    names = ("rollout_logp", "old_logp", "advantages", "weights", "rewards", "values")
    return {name: batch.require(name).float() for name in names} | {"mask": batch.action_mask, "bounds": batch.cu_seqlens}


def on(device, *tensors):
    return [tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("gamma", "per_row"), [(0.99, False), (1.0, True), (0.0, False)])
def test_gae_equals_the_plain_path_whatever_stands_off_the_mask(device, seed, gamma, per_row):
    module, home = device
    batch = ragged(seed)
    rows = batch["bounds"].numel() - 1
    lambd = torch.linspace(0, 1, rows) if per_row else 0.95
    after = torch.arange(rows, dtype=torch.float64)
    inputs = (batch["rewards"], batch["values"], batch["mask"], batch["bounds"])
    *expected, finite = plain.gae(*inputs, gamma=gamma, lambd=lambd, bootstrap=after)
    there = lambd.to(home) if per_row else lambd
    *found, also_finite = module.gae(*on(home, *inputs), gamma=gamma, lambd=there, bootstrap=after.to(home))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert_close(one.cpu(), other, rtol=ULP, atol=1e-12)
        assert (one.cpu()[~batch["mask"]] == 0).all()
    assert finite
    assert also_finite


def test_a_row_that_is_not_finite_leaves_the_others_alone(device):
    module, home = device
    rewards, values, mask = torch.ones(12), torch.zeros(12), torch.ones(12, dtype=torch.bool)
    rewards[6] = math.nan
    inputs = on(home, rewards, values, mask, torch.tensor([0, 4, 8, 12]))
    to_go, _, finite = module.gae(*inputs, gamma=1.0, lambd=1.0, bootstrap=torch.zeros(3, dtype=torch.float64, device=home))
    assert_close(to_go.cpu(), torch.tensor([4.0, 3, 2, 1, math.nan, math.nan, math.nan, 1, 4, 3, 2, 1]), equal_nan=True)
    assert not finite


def value_and_gradient(function, logp, *constants, **bounds):
    """([loss, weight at a bound, kl], gradient)."""
    logp = logp.clone().requires_grad_()
    total, *figures = function(logp, *constants, **bounds)
    total.backward()
    return torch.stack([total.detach(), *figures]).cpu(), logp.grad.cpu()


def native(module):
    return lambda *per_token, **bounds: policy_losses._native_sums(module, bounds, *per_token)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dual_clip", [math.inf, 1.3])
def test_the_surrogate_equals_the_plain_path_whatever_stands_off_the_mask(device, seed, dual_clip):
    module, home = device
    batch = ragged(seed)
    inputs = [batch[name] for name in ("rollout_logp", "old_logp", "advantages", "weights", "mask")]
    bounds = {"lowest": 0.8, "highest": 1.28, "dual_clip": dual_clip}
    expected = value_and_gradient(policy_losses._surrogate_sums, *inputs, **bounds)
    figures, gradient = value_and_gradient(native(module), *on(home, *inputs), **bounds)
    assert_close(figures, expected[0], rtol=1e-6, atol=1e-6)  # sums in another order; the terms' absolute sum is about 1
    assert_close(gradient, expected[1], rtol=8 * ULP, atol=0)
    assert (gradient[~batch["mask"]] == 0).all()
    assert 0.1 < float((gradient[batch["mask"]] == 0).float().mean()) < 0.9  # both kinds of token are there


EXTREMES = [  # log-ratio, advantage, without dual clip, with dual clip 3
    (200.0, 1.0, -1.2, -1.2),  # rho overflows behind the upper bound
    (200.0, 0.0, 0.0, 0.0),  # 0 * inf
    (-200.0, 0.0, 0.0, 0.0),
    (-200.0, 1.0, 0.0, 0.0),  # rho underflows to zero
    (-200.0, -1.0, 0.8, 0.8),
    (200.0, -1.0, math.inf, 3.0),
    (-math.inf, 1.0, 0.0, 0.0),
    (math.nan, 1.0, math.nan, math.nan),  # a NaN on the mask is not hidden
    (0.0, math.nan, math.nan, math.nan),
]


@pytest.mark.parametrize(("log_ratio", "advantage", "free", "capped"), EXTREMES)
def test_extreme_ratios(device, log_ratio, advantage, free, capped):
    module, home = device
    logp, advantages = torch.tensor([0.0, log_ratio, 0.0]), torch.tensor([0.0, advantage, 0.0])
    inputs = on(home, logp, torch.zeros(3), advantages, torch.ones(3), torch.tensor([True, True, False]))
    for dual_clip, expected in ((math.inf, free), (3.0, capped)):
        figures, gradient = value_and_gradient(native(module), *inputs, lowest=0.8, highest=1.2, dual_clip=dual_clip)
        assert_close(figures[0], torch.tensor(expected), equal_nan=True)
        if math.isfinite(expected):
            assert (gradient == 0).all()
            assert figures[1] == (0.0 if advantage == 0 or log_ratio == -200.0 < 0 < advantage or log_ratio == -math.inf else 1.0)


def test_at_the_bound_itself_the_gradient_still_passes(device):
    module, home = device
    zeros, ones = torch.zeros(2), torch.ones(2)
    inputs = on(home, zeros, zeros, torch.tensor([2.0, -3.0]), ones, ones.bool())
    figures, gradient = value_and_gradient(native(module), *inputs, lowest=1.0, highest=1.0, dual_clip=math.inf)
    assert_close(gradient, torch.tensor([-2.0, 3.0]))
    assert figures[1] == 0


def test_the_gradient_is_scaled_kept_and_differentiated_again(device):
    module, home = device
    inputs = on(home, *[ragged(0)[name] for name in ("rollout_logp", "old_logp", "advantages", "weights", "mask")])
    logp = inputs[0].requires_grad_()
    seconds = []
    for function in (native(module), policy_losses._surrogate_sums):
        total, *figures = function(*inputs, lowest=0.8, highest=1.2, dual_clip=math.inf)
        assert not any(figure.requires_grad for figure in figures)
        (once,) = torch.autograd.grad(total, logp, retain_graph=True)
        (scaled,) = torch.autograd.grad(-3 * total, logp, retain_graph=True)
        assert_close(scaled, -3 * once)
        (graph,) = torch.autograd.grad(total, logp, create_graph=True)
        (second,) = torch.autograd.grad(graph.square().sum(), logp)
        seconds.append(second)
    assert float(seconds[1].abs().max()) > 0
    assert_close(*seconds, rtol=1e-5, atol=0)


def test_the_exponential_is_exact_to_a_unit_in_the_last_place(numba_kernels):
    # As differences of log-probabilities, so through the loss: with A = 1 and no bound the loss is -w rho.
    x = torch.cat([torch.linspace(-87, 88, 3001), torch.linspace(-1, 1, 3001)])
    ones = torch.ones_like(x)
    _, gradient = value_and_gradient(
        native(numba_kernels), x, 0 * x, ones, ones, ones.bool(), lowest=0.0, highest=math.inf, dual_clip=math.inf
    )
    exact = x.double().exp()
    assert float(((-gradient.double() - exact).abs() / exact).max()) < ULP
    subnormal = torch.tensor([-95.0, -103.0, -104.5, 88.8])
    _, gradient = value_and_gradient(
        native(numba_kernels),
        subnormal,
        0 * subnormal,
        *[torch.ones(4)] * 2,
        torch.ones(4).bool(),
        lowest=0.0,
        highest=math.inf,
        dual_clip=math.inf,
    )
    assert_close(-gradient[:2], subnormal[:2].exp(), rtol=0, atol=3e-45)
    assert (-gradient[2:]).tolist() == [0.0, math.inf]


def test_neither_threads_nor_strides_change_an_answer(numba_kernels):
    batch, threads = ragged(1), torch.get_num_threads()
    rows = (batch["rewards"], batch["values"], batch["mask"], batch["bounds"])
    losses = [batch[name] for name in ("rollout_logp", "old_logp", "advantages", "weights", "mask")]
    options = {"gamma": 0.99, "lambd": 0.9, "bootstrap": torch.zeros(batch["bounds"].numel() - 1, dtype=torch.float64)}
    bounds = {"lowest": 0.8, "highest": 1.2, "dual_clip": math.inf}
    answers = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            answers.append((*numba_kernels.gae(*rows, **options)[:2], *numba_kernels.surrogate(*losses, **bounds)))
    finally:
        torch.set_num_threads(threads)
    strided = [torch.stack([column, column], dim=1)[:, 0] for column in losses]
    answers.append((*answers[0][:2], *numba_kernels.surrogate(*strided, **bounds)))
    for answer in answers[1:]:
        assert_close(answer, answers[0], rtol=1e-12, atol=1e-15)  # only the order of the sums may differ


def large():
    """2^16 tokens in fp32: enough for a native path."""
    generator = torch.Generator().manual_seed(0)
    logp, old_logp, advantages = 0.3 * torch.randn(3, 2**16, generator=generator)
    mask = torch.rand(2**16, generator=generator) < 0.8
    return logp, old_logp, advantages, torch.full((2**16,), 2.0**-16), mask, torch.tensor([0, 2**15, 2**16])


def test_large_input_takes_the_native_path_and_means_the_same(numba_kernels, monkeypatch):
    taken = []
    for name in ("gae", "surrogate"):
        function = getattr(numba_kernels, name)
        monkeypatch.setattr(numba_kernels, name, lambda *args, _of=function, _name=name, **kw: (taken.append(_name), _of(*args, **kw))[1])
    logp, old_logp, advantages, weights, mask, bounds = large()
    answers = []
    for path in (plain_only, nullcontext):
        with path():
            leaf = logp.clone().requires_grad_()
            loss = clipped_surrogate(leaf, old_logp, advantages, weights, mask, clip_low=0.2, clip_high=0.2, dual_clip=2.0)
            loss.total.backward()
            answers.append((loss.total, loss.metrics, leaf.grad, *gae(logp, old_logp, mask, bounds, gamma=0.99, lambd=0.95)))
        assert taken == ([] if path is plain_only else ["surrogate", "gae"])
    assert_close(answers[1], answers[0], rtol=1e-6, atol=1e-6)
    assert answers[1][1].keys() == {"policy_loss", "ppo_clip_ratio", "ppo_kl"}
    assert not answers[1][1]["policy_loss"].requires_grad


def test_the_choice(numba_kernels, monkeypatch):
    enough = torch.zeros(2**16)
    assert kernels_for(enough, enough) is numba_kernels
    assert kernels_for(enough[1:]) is None  # too few to pay for compiling
    assert kernels_for(enough, enough.double()) is None
    assert kernels_for(enough.bfloat16()) is None
    assert kernels_for(enough, enough.to("meta")) is None
    assert kernels_for(enough.to("meta")) is None
    with plain_only():
        assert kernels_for(enough) is None
    assert kernels_for(enough) is numba_kernels
    monkeypatch.setenv(PLAIN_VARIABLE, "1")
    assert kernels_for(enough) is None
    monkeypatch.delenv(PLAIN_VARIABLE)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    kernels._installed.cache_clear()
    assert kernels_for(enough) is None
    kernels._installed.cache_clear()


def test_a_small_input_loads_no_compiler():
    code = """
import sys, torch
from hone.algos import clipped_surrogate, gae
logp, mask = torch.zeros(1000, requires_grad=True), torch.ones(1000, dtype=torch.bool)
zeros = torch.zeros(1000)
gae(zeros, zeros, mask, torch.tensor([0, 1000]), gamma=1.0, lambd=1.0)
clipped_surrogate(logp, zeros, zeros, zeros, mask, clip_low=0.2, clip_high=0.2).total.backward()
assert not {"numba", "llvmlite", "hone.algos.kernels.cpu", "hone.algos.kernels.cuda"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_triton_in_its_interpreter():
    pytest.importorskip("triton", reason="the native path on CUDA needs triton")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", __file__, "-k", "interpreted"]
    # NumPy, which stands in for the GPU, warns of every overflow.
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout


POINTERS = {"mask": "*u8", "cu_seqlens": "*i64", "lambd": "*fp64", "bootstrap": "*fp64", "gammas": "*fp64", "BLOCK": "constexpr"}
SCALARS = {"lowest": "fp32", "highest": "fp32", "dual_clip": "fp32", "tokens": "i32", "blocks": "i32"}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("kernel", ["_gae_of_row", "_surrogate_of_block"])
def test_the_triton_kernels_compile_for_a_gpu_that_is_not_here(kernel):
    pytest.importorskip("triton", reason="the native path on CUDA needs triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    function = getattr(import_module("hone.algos.kernels.cuda"), kernel)
    signature = {name: (POINTERS | SCALARS).get(name, "*fp32") for name in function.arg_names}
    source = ASTSource(fn=function, signature=signature, constexprs={"BLOCK": 1024})
    assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
