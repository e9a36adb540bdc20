"""Chunked log-probabilities and entropies against plain full logits: values, gradients, alignment, and what is never held."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from hone.algos.kernels import PLAIN_VARIABLE
from hone.learner.kernels import tiles
from hone.learner.logprobs import scored_positions, state_values, token_logprobs

T, H, V = 23, 8, 50
CU_SEQLENS = torch.tensor([0, 5, 6, 14, 14, 23], dtype=torch.int32)  # a row of one token and an empty one among them


@pytest.fixture(autouse=True, params=["plain", "compiled"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every law holds for plain torch and for the compiled loops, which a vocabulary this small would not get."""
    if request.param == "plain":
        monkeypatch.setenv(PLAIN_VARIABLE, "1")
        yield
        return
    pytest.importorskip("numba", reason="compiled loops need numba (hone-algos[fast])")
    monkeypatch.delenv(PLAIN_VARIABLE, raising=False)
    monkeypatch.setattr(tiles, "COMPILED_VOCABULARY", 1)
    yield


def inputs(seed: int = 0, bias: bool = False) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(T, H, generator=generator).requires_grad_(),
        "head_weight": torch.randn(V, H, generator=generator).requires_grad_(),
        "head_bias": torch.randn(V, generator=generator).requires_grad_() if bias else None,
        "tokens": torch.randint(0, V, (T,), generator=generator),
        "action_mask": torch.rand(T, generator=generator) < 0.7,
    }


def reference(hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None, tokens: Tensor, action_mask: Tensor, *, temperature, softcap):
    """Row by row and token by token, with full logits; the sum over the vocabulary is written out."""
    logp, entropy = [], []
    for start, end in zip(CU_SEQLENS[:-1].tolist(), CU_SEQLENS[1:].tolist(), strict=True):
        for t in range(start, end):
            if t == start or not action_mask[t]:
                logp.append(torch.zeros((), dtype=hidden.dtype))
                entropy.append(torch.zeros((), dtype=hidden.dtype))
                continue
            logits = head_weight @ hidden[t - 1] + (0 if head_bias is None else head_bias)
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            log_probabilities = torch.log_softmax(logits / temperature, 0)
            logp.append(log_probabilities[tokens[t]])
            entropy.append(-(log_probabilities.exp() * log_probabilities).sum())
    return torch.stack(logp), torch.stack(entropy)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, None), (False, 3.0)])
def test_values_and_gradients_are_those_of_full_logits(chunk_tokens: int, temperature: float, bias: bool, softcap: float | None) -> None:
    ours, plain = inputs(bias=bias), inputs(bias=bias)
    logp, entropy = token_logprobs(
        cu_seqlens=CU_SEQLENS, temperature=temperature, chunk_tokens=chunk_tokens, with_entropy=True, softcap=softcap, **ours
    )
    expected_logp, expected_entropy = reference(**plain, temperature=temperature, softcap=softcap)
    assert_close(logp, expected_logp)
    assert_close(entropy, expected_entropy)
    pull = torch.randn(2, T, generator=torch.Generator().manual_seed(7))
    ((pull[0] * logp).sum() + (pull[1] * entropy).sum()).backward()
    ((pull[0] * expected_logp).sum() + (pull[1] * expected_entropy).sum()).backward()
    for name in ("hidden", "head_weight", "head_bias") if bias else ("hidden", "head_weight"):
        assert_close(ours[name].grad, plain[name].grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("used", ["logp", "entropy"])
def test_gradients_of_one_output_alone(used: str) -> None:
    ours, plain = inputs(), inputs()
    outputs = token_logprobs(cu_seqlens=CU_SEQLENS, temperature=0.7, chunk_tokens=5, with_entropy=True, **ours)
    expected = reference(**plain, temperature=0.7, softcap=None)
    index = ("logp", "entropy").index(used)
    outputs[index].sum().backward()
    expected[index].sum().backward()
    assert_close(ours["hidden"].grad, plain["hidden"].grad, rtol=1e-4, atol=1e-5)
    assert_close(ours["head_weight"].grad, plain["head_weight"].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, 3.0)])
def test_in_double_precision_everything_is_the_dense_reference(with_entropy: bool, told: bool, bias: bool, softcap: float | None) -> None:
    ours, plain = (
        {
            name: value.detach().double().requires_grad_() if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in inputs(bias=bias).items()
        }
        for _ in range(2)
    )
    pull = torch.randn(2, T, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    pull[1] *= with_entropy
    asked = []

    def slopes(logp: Tensor, entropy: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        asked.extend(positions.tolist())
        return pull[0, positions], pull[1, positions] if with_entropy else None

    logp, entropy = token_logprobs(
        cu_seqlens=CU_SEQLENS,
        temperature=0.7,
        chunk_tokens=4,
        with_entropy=with_entropy,
        softcap=softcap,
        slopes=slopes if told else None,
        **ours,
    )
    expected_logp, expected_entropy = reference(**plain, temperature=0.7, softcap=softcap)
    assert_close(logp, expected_logp, rtol=1e-12, atol=1e-12)
    total = (pull[0] * logp).sum()
    if with_entropy:
        assert_close(entropy, expected_entropy, rtol=1e-12, atol=1e-12)
        total = total + (pull[1] * entropy).sum()
    # An engine multiplies a loss by its number of ranks, or by a loss scale.
    (8 * total).backward()
    (8 * ((pull[0] * expected_logp).sum() + (pull[1] * expected_entropy).sum())).backward()
    for name in ("hidden", "head_weight", *(["head_bias"] if bias else [])):
        assert_close(ours[name].grad, plain[name].grad, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    assert asked == (scored_positions(CU_SEQLENS, ours["action_mask"]).tolist() if told else [])


def test_slopes_that_do_not_come_true_cost_a_product_and_change_nothing() -> None:
    ours, plain = inputs(), inputs()
    settings = {"cu_seqlens": CU_SEQLENS, "temperature": 0.7, "chunk_tokens": 4, "with_entropy": False}
    logp, _ = token_logprobs(slopes=lambda logp, entropy, positions: (torch.ones_like(logp), None), **settings, **ours)
    (expected, _) = token_logprobs(**settings, **plain)
    logp.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(ours["hidden"].grad, plain["hidden"].grad)
    assert torch.equal(ours["head_weight"].grad, plain["head_weight"].grad)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("tile_logits", [2**20, 12])
def test_states_spread_over_ranks_in_any_order_score_every_token_once(
    told: bool, tile_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two ranks share the states, shuffled, and a third holds none; a token's label may be elsewhere.
    monkeypatch.setattr(tiles, "TILE_LOGITS", tile_logits)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(3))
    pull = torch.randn(2, T, generator=torch.Generator().manual_seed(7))
    ours, plain, asked = inputs(bias=True), inputs(bias=True), []
    settings = {"cu_seqlens": CU_SEQLENS, "temperature": 0.7, "chunk_tokens": 4, "with_entropy": True, "softcap": 3.0}

    def slopes(logp: Tensor, entropy: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        asked.extend(positions.tolist())
        return pull[0, positions], pull[1, positions]

    results = []
    for own in (order[:9], order[9:], order[:0]):
        places = torch.full((T,), -1)
        places[own] = torch.arange(len(own))
        state = ours["hidden"][own] if len(own) else ours["hidden"][:1]
        results.append(torch.stack(token_logprobs(**{**ours, "hidden": state}, **settings, places=places, slopes=slopes if told else None)))
    expected = torch.stack(token_logprobs(**plain, **settings))
    assert_close(sum(results), expected)
    assert ((results[0] != 0) & (results[1] != 0)).sum() == 0 and not results[2].any()
    (pull * sum(results)).sum().backward()
    (pull * expected).sum().backward()
    for name in ("hidden", "head_weight", "head_bias"):
        assert_close(ours[name].grad, plain[name].grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert sorted(asked) == (scored_positions(CU_SEQLENS, ours["action_mask"]).tolist() if told else [])


@pytest.mark.parametrize("told", [False, True])
def test_bf16_is_as_near_to_the_truth_as_full_logits_are(told: bool) -> None:
    ours, plain, truth = (
        {
            name: value.detach().to(dtype).requires_grad_() if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in inputs().items()
        }
        for dtype in (torch.bfloat16, torch.bfloat16, torch.bfloat16)
    )
    truth = {
        name: value.detach().double().requires_grad_() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in truth.items()
    }
    pull = torch.randn(T, generator=torch.Generator().manual_seed(7))
    slopes = (lambda logp, entropy, positions: (pull[positions], None)) if told else None
    logp, _ = token_logprobs(cu_seqlens=CU_SEQLENS, temperature=0.7, chunk_tokens=4, with_entropy=False, slopes=slopes, **ours)
    (pull * logp).sum().backward()
    positions = scored_positions(CU_SEQLENS, plain["action_mask"])
    full = (plain["hidden"][positions - 1] @ plain["head_weight"].T).float().div(0.7).log_softmax(-1)
    full = full.gather(1, plain["tokens"][positions, None]).squeeze(1)
    (pull[positions] * full).sum().backward()
    exact, _ = reference(**truth, temperature=0.7, softcap=None)
    (pull * exact).sum().backward()
    assert logp.dtype == torch.float32
    assert (logp[positions] - exact[positions]).abs().max() <= 1.01 * (full - exact[positions]).abs().max()
    for name in ("hidden", "head_weight"):
        error, allowed = ((one[name].grad - truth[name].grad).norm() for one in (ours, plain))
        assert error <= 1.1 * allowed, name


def test_a_confident_token_keeps_its_small_gradient_in_bf16() -> None:
    # Logits 12 and 0, target the first: p = 1 / (1 + e^-12), d logp / d hidden = (1 - p) (w_0 - w_1), 1 - p = 6.14e-6, far below
    # the 2^-8 that bf16 tells from 1.
    hidden = torch.tensor([[12.0], [0.0]], dtype=torch.bfloat16).requires_grad_()
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    settings = {"temperature": 1.0, "chunk_tokens": 4, "with_entropy": False}
    logp, _ = token_logprobs(hidden, weight, torch.tensor([0, 0]), torch.tensor([0, 2]), torch.tensor([False, True]), **settings)
    logp.sum().backward()
    assert_close(hidden.grad[0].float(), torch.tensor([6.144e-6]), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("large", [-3e4, 3e4])
def test_large_logits_neither_overflow_nor_lose_the_entropy(large: float) -> None:
    # Every tile but one far below (or above) the others: the maximum moves late, and early.
    weight = torch.zeros(V, 1)
    weight[[3, 40]] = large
    hidden, tokens, mask = torch.ones(2, 1), torch.tensor([0, 3]), torch.tensor([False, True])
    logp, entropy = token_logprobs(hidden, weight, tokens, torch.tensor([0, 2]), mask, temperature=1.0, chunk_tokens=1, with_entropy=True)
    states = 2 if large > 0 else V - 2
    assert_close(entropy[1], torch.tensor(float(states)).log())
    assert_close(logp[1], -torch.tensor(2.0).log() if large > 0 else torch.tensor(large) - torch.tensor(48.0).log())


def test_tiles_narrower_than_the_vocabulary_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for tile_logits in (2**20, 12):
        monkeypatch.setattr(tiles, "TILE_LOGITS", tile_logits)
        for told in (False, True):
            given = inputs(bias=True)
            slopes = (lambda logp, entropy, positions: (torch.ones_like(logp), torch.full_like(logp, 0.5))) if told else None
            logp, entropy = token_logprobs(
                cu_seqlens=CU_SEQLENS, temperature=0.7, chunk_tokens=4, with_entropy=True, softcap=4.0, slopes=slopes, **given
            )
            (logp.sum() + 0.5 * entropy.sum()).backward()
            results.append([logp, entropy, *(given[name].grad for name in ("hidden", "head_weight", "head_bias"))])
    for other in results[1:]:
        assert_close(other, results[0], rtol=1e-5, atol=1e-5)


def test_a_hand_derived_value() -> None:
    # One row [2, 1]; the state of token 0 is 1, the head [0, ln 3, ...]: p(1) = 3 / (1 + 3 + 1) at temperature 1.
    logp, entropy = token_logprobs(
        torch.tensor([[1.0], [9.0]]),
        torch.tensor([[0.0], [3.0**0.5], [0.0]]).square().log1p(),  # logits ln 1, ln 4, ln 1
        torch.tensor([2, 1]),
        torch.tensor([0, 2]),
        torch.tensor([True, True]),
        temperature=1.0,
        chunk_tokens=1,
        with_entropy=True,
    )
    assert_close(logp, torch.log(torch.tensor([1.0, 4 / 6])))
    two_sixths = torch.tensor([1 / 6, 4 / 6, 1 / 6])
    assert_close(entropy, torch.stack([torch.zeros(()), -(two_sixths * two_sixths.log()).sum()]))


def test_a_rows_first_token_is_never_scored() -> None:
    everywhere = torch.ones(T, dtype=torch.bool)
    assert set(range(T)) - set(scored_positions(CU_SEQLENS, everywhere).tolist()) == {0, 5, 6, 14}


def test_an_empty_mask_gives_zeros_and_zero_gradients() -> None:
    given = inputs()
    given["action_mask"] = torch.zeros(T, dtype=torch.bool)
    logp, _ = token_logprobs(cu_seqlens=CU_SEQLENS, temperature=1.0, chunk_tokens=4, with_entropy=False, **given)
    logp.sum().backward()
    assert not logp.any() and not given["hidden"].grad.any() and not given["head_weight"].grad.any()


def test_garbage_off_the_mask_changes_nothing() -> None:
    ours = inputs()
    state_is_used = torch.zeros(T, dtype=torch.bool)
    state_is_used[scored_positions(CU_SEQLENS, ours["action_mask"]) - 1] = True
    broken = {**ours, "hidden": torch.where(state_is_used[:, None], ours["hidden"].detach(), torch.nan)}
    settings = {"cu_seqlens": CU_SEQLENS, "temperature": 1.0, "chunk_tokens": 4, "with_entropy": True}
    for clean, dirty in zip(token_logprobs(**ours, **settings), token_logprobs(**broken, **settings), strict=True):
        assert torch.equal(clean, dirty)


class Largest(TorchDispatchMode):
    """Records the largest tensor any operation returns [elements], forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_full_logits_never_exist() -> None:
    tokens, vocabulary, hidden_size, chunk = 256, 512, 4, 16
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    largest = Largest()
    with largest:
        logp, entropy = token_logprobs(
            hidden,
            weight,
            torch.arange(tokens),
            torch.tensor([0, tokens]),
            torch.ones(tokens, dtype=torch.bool),
            temperature=0.9,
            chunk_tokens=chunk,
            with_entropy=True,
        )
        (logp.sum() + entropy.sum()).backward()
    assert chunk * vocabulary <= largest.elements < tokens * vocabulary // 8


def test_values_stand_before_their_token() -> None:
    # The head reads the state's only number; a row's first token has no state before it.
    head = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(head.weight)
    hidden = torch.arange(10.0, 16.0)[:, None]
    values = state_values(hidden, head, torch.tensor([0, 4, 6]), torch.tensor([True, False, True, True, True, True]))
    assert_close(values, torch.tensor([0.0, 0.0, 11.0, 12.0, 0.0, 14.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_loops_leave_a_broken_row_to_itself_and_are_taken(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    epilogue_cpu = pytest.importorskip("hone.learner.kernels.epilogue_cpu", reason="compiled loops need numba (hone-algos[fast])")
    monkeypatch.delenv(PLAIN_VARIABLE, raising=False)
    monkeypatch.setattr(tiles, "COMPILED_VOCABULARY", 1)
    asked = []
    for name in ("reduce", "pull_"):
        plain = getattr(epilogue_cpu, name)
        monkeypatch.setattr(epilogue_cpu, name, lambda *given, name=name, plain=plain, **more: asked.append(name) or plain(*given, **more))
    whole, broken = inputs(), inputs()
    for given in (whole, broken):
        given.update({name: given[name].detach().to(dtype).requires_grad_() for name in ("hidden", "head_weight")})
    with torch.no_grad():
        broken["hidden"][9] = torch.nan
        broken["hidden"][15] = torch.inf
    results = []
    for given in (whole, broken):
        settings = {"cu_seqlens": CU_SEQLENS, "temperature": 0.7, "chunk_tokens": 4, "with_entropy": True}
        logp, entropy = token_logprobs(**{**given, "action_mask": torch.ones(T, dtype=torch.bool)}, **settings)
        (logp.sum() + 0.5 * entropy.sum()).backward()
        results.append((logp, entropy, given["hidden"].grad))
    (logp, entropy, by_hidden), (poisoned_logp, poisoned_entropy, by_poisoned) = results
    sound = torch.ones(T, dtype=torch.bool)
    sound[[10, 16]] = False  # what the broken states predict
    assert torch.equal(poisoned_logp[sound], logp[sound]) and torch.equal(poisoned_entropy[sound], entropy[sound])
    assert not poisoned_logp[~sound].isfinite().any() and not poisoned_entropy[~sound].isfinite().any()
    sound = torch.ones(T, dtype=torch.bool)
    sound[[9, 15]] = False
    assert torch.equal(by_poisoned[sound], by_hidden[sound]) and set(asked) == {"reduce", "pull_"}


def test_compiled_loops_read_and_round_bf16_as_torch_does() -> None:
    epilogue_cpu = pytest.importorskip("hone.learner.kernels.epilogue_cpu", reason="compiled loops need numba (hone-algos[fast])")
    generator = torch.Generator().manual_seed(5)
    halves = (4 * torch.randn(7, 301, generator=generator)).bfloat16()
    halves[2, 9], halves[3, 4] = torch.nan, -torch.inf
    column, (at_target, log_norm, slope, entropy, push) = torch.arange(-1, 6), torch.randn(5, 7, generator=generator)
    for more in ((None, None), (entropy, push)):
        reduced = [epilogue_cpu.reduce(one, column.clamp(min=0), temperature=0.7, with_entropy=True) for one in (halves, halves.float())]
        assert_close(*reduced, rtol=0, atol=0, equal_nan=True)
        pulled, expected = (
            epilogue_cpu.pull_(one, column, at_target, log_norm, slope, *more, temperature=0.7) for one in (halves.clone(), halves.float())
        )
        assert_close(pulled, expected.bfloat16(), rtol=0, atol=0, equal_nan=True)
        assert pulled[2].isnan().any()
