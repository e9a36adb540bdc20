"""The gate before learning names its suspect: a tiny recurrent softmax model samples under each mismatch, and another recomputes.

The state forgets by a factor a token, so that another prompt shows on the first tokens of a response, as it does in a language model.
"""

import dataclasses
import math

import pytest
import torch

from hone.algos.batch import Batch
from hone.launch.errors import exit_code
from hone.launch.gap import GapExceeded, check_gap
from hone.launch.suspect import suspect

VOCABULARY, WIDTH, RESPONSE, PROMPT = 24, 12, 24, 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiny:
    """logits_t = head h_t with h_t = 0.4 h_{t-1} + embedding[x_t]."""

    embedding: torch.Tensor
    head: torch.Tensor

    @classmethod
    def random(cls, seed: int, spread: float = 1.0) -> "Tiny":
        draw = torch.Generator().manual_seed(seed)
        shapes = (VOCABULARY, WIDTH), (VOCABULARY, WIDTH)
        embedding, head = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes)
        return cls(embedding=embedding, head=spread * head / math.sqrt(WIDTH))

    def after(self, tokens: list[int], state: torch.Tensor | None = None) -> torch.Tensor:
        state = torch.zeros(WIDTH, dtype=torch.float64) if state is None else state
        for token in tokens:
            state = 0.4 * state + self.embedding[token]
        return state


def log_probabilities(logits: torch.Tensor, temperature: float, top_p: float, top_k: int) -> torch.Tensor:
    logp = (logits / temperature).log_softmax(0)
    ordered, order = logp.exp().sort(descending=True)
    kept = (ordered.cumsum(0) - ordered < top_p) & (torch.arange(VOCABULARY) < (top_k or VOCABULARY))
    return logp.masked_fill(~torch.zeros(VOCABULARY, dtype=torch.bool).scatter(0, order, kept), -math.inf).log_softmax(0)


def sampled(
    engine: Tiny,
    learner: Tiny,
    *,
    temperature: float = 1.0,
    learners: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    before: tuple[int, ...] = (),
    noise: float = 0.0,
    groups: int = 8,
    samples: int = 4,
    version: int = 3,
    seed: int = 0,
) -> Batch:
    """Responses that `engine` draws and `learner` recomputes; `before` is what only the engine reads in front of every prompt."""
    draw = torch.Generator().manual_seed(seed)
    rows, rollout_logp, old_logp = [], [], []
    for _ in range(groups):
        prompt = torch.randint(VOCABULARY, (PROMPT,), generator=draw).tolist()
        for _ in range(samples):
            row = list(prompt)
            rollout_logp += [0.0] * PROMPT
            old_logp += [0.0] * PROMPT
            ours, theirs = learner.after(row), engine.after([*row, *before])
            for _ in range(RESPONSE):
                there = log_probabilities(engine.head @ theirs, temperature, top_p, top_k)
                token = int(torch.multinomial(there.exp(), 1, generator=draw))
                rollout_logp.append(float(there[token]) + noise * float(torch.randn(1, generator=draw)))
                old_logp.append(float((learner.head @ ours / learners).log_softmax(0)[token]))
                row.append(token)
                ours, theirs = learner.after([token], ours), engine.after([token], theirs)
            rows.append(row)
    length, count = PROMPT + RESPONSE, groups * samples
    return Batch(
        tokens=torch.tensor(rows).flatten(),
        cu_seqlens=torch.arange(0, (count + 1) * length, length, dtype=torch.int32),
        position_ids=torch.arange(length).repeat(count),
        action_mask=(torch.arange(length) >= PROMPT).repeat(count),
        rollout_logp=torch.tensor(rollout_logp),
        old_logp=torch.tensor(old_logp),
        rewards=torch.zeros(count * length),
        version=torch.full((count * length,), version),
        group=torch.arange(groups).repeat_interleave(samples),
        truncated=torch.zeros(count, dtype=torch.bool),
        temperature=learners,
    )


MODEL = Tiny.random(0, spread=1.5)
NEAR = dataclasses.replace(MODEL, head=MODEL.head + 0.1 * Tiny.random(1).head)
OTHER = Tiny.random(2, spread=1.5)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("engines", "learners"), [(0.7, 1.0), (2.0, 1.0), (1.0, 0.7), (0.9, 1.0)])
def test_a_temperature_is_named_with_its_value(engines: float, learners: float, seed: int) -> None:
    found = suspect(sampled(MODEL, MODEL, temperature=engines, learners=learners, noise=5e-3, seed=seed), version=3, limit=0.02)
    assert found.name == "temperature"
    told = float(found.why.split("as at temperature ")[1].split(",")[0])
    assert told == pytest.approx(engines, rel=0.05) and f"recomputes at {learners:g}" in found.why


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_temperature_is_told_from_single_samples_where_contexts_are_alike(seed: int) -> None:
    flat = Tiny.random(0, spread=0.5)
    found = suspect(sampled(flat, flat, temperature=0.5, samples=1, groups=16, seed=seed), version=3, limit=0.02)
    assert found.name == "temperature" and "of all tokens" in found.why


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("cut", [{"top_p": 0.5}, {"top_k": 3}, {"top_p": 0.9}])
def test_a_truncated_distribution_is_named(cut: dict[str, float], samples: int) -> None:
    found = suspect(sampled(MODEL, MODEL, samples=samples, **cut), version=3, limit=0.02)  # pyright: ignore[reportArgumentType] - by name
    assert found.name == "truncation" and "top_p" in found.why


@pytest.mark.parametrize("before", [(0,), (7, 9)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_another_prompt_is_named(before: tuple[int, ...], seed: int) -> None:
    found = suspect(sampled(MODEL, MODEL, before=before, seed=seed), version=3, limit=0.02)
    assert found.name == "prompt" and "chat template" in found.why


@pytest.mark.parametrize("engine", [NEAR, OTHER])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weights_are_stale_if_their_tokens_say_so_and_wrong_otherwise(engine: Tiny, seed: int) -> None:
    batch = sampled(engine, MODEL, seed=seed)
    assert suspect(batch, version=3, limit=0.02).name == "weights"
    found = suspect(batch, version=5, limit=0.02)
    assert found.name == "stale_weights" and "100% of the tokens" in found.why and "2 policy versions" in found.why
    # Half of the tokens are of the learner's version: only if those agree is age what sets the others apart.
    late = torch.arange(batch.tokens.numel()) % 2 == 0
    mixed = dataclasses.replace(batch, version=torch.where(late, 2, 3))
    assert suspect(mixed, version=3, limit=0.02).name == "weights"
    assert batch.old_logp is not None
    agreeing = dataclasses.replace(mixed, rollout_logp=torch.where(late, batch.rollout_logp, batch.old_logp))
    assert suspect(agreeing, version=3, limit=0.02).name == "stale_weights"


def test_a_temperature_is_named_however_old_the_tokens_are() -> None:
    assert suspect(sampled(MODEL, MODEL, temperature=0.7), version=5, limit=0.02).name == "temperature"


def test_noise_alone_is_of_the_number_format() -> None:
    found = suspect(sampled(MODEL, MODEL, noise=0.1), version=3, limit=0.02)
    assert found.name == "weights" and "vllm.dtype" in found.why and "sync_tolerance" in found.why


def test_the_gate_passes_what_is_within_and_stops_what_is_above_or_no_number() -> None:
    batch = sampled(MODEL, MODEL, top_p=0.5, samples=1)
    assert batch.old_logp is not None
    mean = float((batch.rollout_logp - batch.old_logp)[batch.action_mask].double().abs().mean())
    check_gap(batch, version=3, limit=None)
    check_gap(batch, version=3, limit=mean)
    with pytest.raises(GapExceeded, match=r"step 4: engine and learner are .* rollout.max_gap is .*\nsuspect: truncation") as raised:
        check_gap(batch, version=3, limit=0.99 * mean)
    assert exit_code(raised.value) == 8
    assert {"step": 4, "gap": mean, "suspect": "truncation"}.items() <= raised.value.evidence.items()
    broken = batch.rollout_logp.clone()
    broken[PROMPT] = math.nan
    with pytest.raises(GapExceeded, match="1 tokens have log-probabilities that are no finite numbers"):
        check_gap(dataclasses.replace(batch, rollout_logp=broken), version=3, limit=1e9)
