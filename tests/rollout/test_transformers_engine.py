"""The engine in this process: what it draws, what it reports, and that company in a batch changes neither."""

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hone.algos.batch import SamplerContract
from hone.rollout.engines.transformers import TransformersEngine, _draw
from hone.rollout.errors import EngineError, StaleWeights
from hone.rollout.types import Completion, Request
from tests.rollout.sampler_reference import expected_logp

VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # peaked distributions: a wrong position or mask shows
}
PROMPTS = ((5, 6, 7), (8,), (9, 10, 11, 12, 13, 14, 15), (5, 6, 8), (20, 21))


def model(kind: str = "qwen3", *, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    if kind == "gpt2":  # absolute positions; rotary ones would forgive a shift of a whole row
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True))


def request(tokens: tuple[int, ...], *, seed: int, length: int = 12, temperature: float = 1.0, **sampler: Any) -> Request:
    sampler = {"top_p": 1.0, "top_k": 0, **sampler}
    contract = SamplerContract(temperature=temperature, seed=seed, engine="t", tokenizer="", template="", **sampler)
    return Request(request_id=f"{tokens}:{seed}", tokens=tokens, max_new_tokens=length, contract=contract)


def generate(engine: TransformersEngine, requests: list[Request]) -> list[Completion]:
    return asyncio.run(engine.generate(requests))


def recomputed_logp(policy: PreTrainedModel, prompt: tuple[int, ...], sampled: tuple[int, ...], temperature: float) -> torch.Tensor:
    """The slow way: one row, no padding, no cache."""
    ids = torch.tensor([prompt + sampled])
    with torch.no_grad():
        logp = torch.log_softmax(policy(input_ids=ids).logits[0].float() / temperature, dim=-1)
    return logp[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).squeeze(1)


def test_inversion_draws_every_id_as_often_as_its_probability_says() -> None:
    # softmax(log p) = p = (0.1, 0, 0.2, 0.7); at temperature 0.5 p^2 / sum(p^2) = (1, 0, 4, 49) / 54.
    logits = torch.tensor([[0.1, 0.0, 0.2, 0.7]]).log().expand(1080, 4)
    uniform = (torch.arange(1080, dtype=torch.float64) + 0.5) / 1080
    for temperature, counts in ((1.0, [108, 0, 216, 756]), (0.5, [20, 0, 80, 980])):
        ids, logp = _draw(logits / temperature, uniform, torch.zeros(1080, dtype=torch.bool))
        assert ids.bincount(minlength=4).tolist() == counts
        assert_close(logp, (torch.tensor(counts) / 1080).log()[ids], rtol=0, atol=1e-6)


def test_inversion_never_draws_an_impossible_id() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(2, 3)
    ids, logp = _draw(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), torch.zeros(2, dtype=torch.bool))
    assert ids.tolist() == [1, 1]
    assert logp.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_reported_logp_is_the_models_own_under_the_contracts_temperature(kind: str) -> None:
    policy = model(kind)
    asked = [request(prompt, seed=seed, temperature=0.5 + seed / 4) for prompt in PROMPTS for seed in range(3)]
    for completion, wanted in zip(generate(TransformersEngine(policy, eos_ids=[3]), asked), asked, strict=True):
        expected = recomputed_logp(policy, wanted.tokens, completion.tokens, wanted.contract.temperature)
        assert_close(torch.tensor(completion.logp), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_a_sample_is_the_same_alone_and_in_company(kind: str) -> None:
    # Ragged prompts, shared prompts, limits and ends at different times: rows are padded, expanded and dropped.
    engine = TransformersEngine(model(kind), eos_ids=[3, 4, 17])
    asked = [request(prompt, seed=10 * row + seed, length=4 + 5 * seed) for row, prompt in enumerate(PROMPTS) for seed in range(4)]
    together = generate(engine, asked)
    assert len({completion.finish_reason for completion in together}) == 2
    for wanted, company in zip(asked, together, strict=True):
        (alone,) = generate(engine, [wanted])
        assert (alone.request_id, alone.tokens, alone.finish_reason) == (company.request_id, company.tokens, company.finish_reason)
        assert_close(torch.tensor(alone.logp), torch.tensor(company.logp), rtol=0, atol=2e-5)


def test_seeds_decide() -> None:
    engine = TransformersEngine(model(), eos_ids=[])
    same, again, other = generate(engine, [request((5, 6), seed=seed) for seed in (1, 1, 2)])
    assert same.tokens == again.tokens
    assert same.tokens != other.tokens


def test_a_greedy_request_takes_the_likeliest_token_whatever_its_seed_and_company() -> None:
    policy = model()
    engine = TransformersEngine(policy, eos_ids=[])
    greedy = [dataclasses.replace(request((5, 6, 7), seed=seed, temperature=0.5), greedy=True) for seed in (1, 2)]
    first, other, sampled = generate(engine, [*greedy, request((5, 6, 7), seed=3)])
    assert first.tokens == other.tokens != sampled.tokens
    tokens = list((5, 6, 7))
    for _ in range(12):
        tokens.append(int(policy(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert list(first.tokens) == tokens[3:]


def test_it_stops_at_any_end_token_and_keeps_it() -> None:
    policy = model()
    (free,) = generate(TransformersEngine(policy, eos_ids=[]), [request((5, 6), seed=1)])
    end = free.tokens[4]
    cut = free.tokens.index(end) + 1
    (stopped,) = generate(TransformersEngine(policy, eos_ids=[end, 39]), [request((5, 6), seed=1)])
    assert (free.finish_reason, len(free.tokens)) == ("length", 12)
    assert (stopped.finish_reason, stopped.tokens) == ("stop", free.tokens[:cut])
    assert len(stopped.logp) == len(stopped.version) == cut
    # An end token drawn at the very limit is an end, not a cut.
    (at_limit,) = generate(TransformersEngine(policy, eos_ids=[end]), [request((5, 6), seed=1, length=cut)])
    assert at_limit.finish_reason == "stop"


def test_batches_beyond_max_rows_are_split_and_prompts_prefilled_once() -> None:
    policy = model()
    asked = [request((5, 6, 7), seed=seed) for seed in range(7)]
    whole = generate(TransformersEngine(policy, eos_ids=[3]), asked)
    split = generate(TransformersEngine(policy, eos_ids=[3], max_rows=3), asked)
    assert [completion.tokens for completion in split] == [completion.tokens for completion in whole]
    assert [completion.cached_tokens for completion in whole] == [0, 3, 3, 3, 3, 3, 3]
    assert [completion.cached_tokens for completion in split] == [0, 3, 3, 0, 3, 3, 0]


def test_prompt_logp_is_the_learners_at_temperature_one() -> None:
    policy = model()
    tokens = (5, 6, 7, 8, 9)
    found = asyncio.run(TransformersEngine(policy, eos_ids=[3]).prompt_logp(tokens))
    assert_close(torch.tensor(found), recomputed_logp(policy, tokens[:1], tokens[1:], 1.0))


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_loaded_weights_are_served_under_their_version(kind: str) -> None:
    engine, learner = TransformersEngine(model(kind), eos_ids=[3]), model(kind, seed=1)
    before = asyncio.run(engine.prompt_logp([5, 6, 7]))
    engine.load_weights(((name, value.detach()) for name, value in learner.named_parameters()), version=4)
    expected = recomputed_logp(learner, (5,), (6, 7), 1.0)
    assert (torch.tensor(before) - expected).abs().max() > 0.1
    assert_close(torch.tensor(asyncio.run(engine.prompt_logp([5, 6, 7]))), expected)
    (completion,) = generate(engine, [request((5, 6), seed=1)])
    assert set(completion.version) == {4}
    # The copy is the engine's own: the learner's next step does not reach it.
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.zero_()
    assert_close(torch.tensor(asyncio.run(engine.prompt_logp([5, 6, 7]))), expected)


def test_weights_that_do_not_fit_are_named_and_the_version_stays() -> None:
    engine = TransformersEngine(model(), eos_ids=[3], version=2)
    weights = dict(model(seed=1).named_parameters())
    missing = {name: value for name, value in weights.items() if "q_proj" not in name}
    with pytest.raises(StaleWeights, match=r"not sent 2 of its parameters for version 3 \(model.layers.0.self_attn.q_proj.weight, "):
        engine.load_weights(missing.items(), version=3)
    with pytest.raises(StaleWeights, match=r"no parameter 'model.other'"):
        engine.load_weights([("model.other", torch.zeros(1))], version=3)
    with pytest.raises(StaleWeights, match=r"holds 'model.norm.weight' as \(32,\) but was sent \(31,\)"):
        engine.load_weights([("model.norm.weight", torch.zeros(31))], version=3)
    assert engine.version == 2


def test_an_update_that_broke_off_is_never_sampled_from() -> None:
    engine, learner = TransformersEngine(model(), eos_ids=[3], version=2), model(seed=1)

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "model.embed_tokens.weight", learner.get_input_embeddings().weight
        raise ConnectionResetError("the learner is gone")

    asked = [request(PROMPTS[0], seed=1)]
    before = generate(engine, asked)
    with pytest.raises(ConnectionResetError):
        engine.load_weights(broken(), version=3)
    for answer in (engine.generate(asked), engine.prompt_logp([5, 6, 7])):
        with pytest.raises(
            StaleWeights, match=r"transformers refuses to (sample|answer): an update .* was begun and not finished; send all"
        ):
            asyncio.run(answer)
    engine.load_weights(learner.named_parameters(), version=3)
    (after,) = generate(engine, asked)
    assert set(after.version) == {3} and after.logp != before[0].logp


SAMPLERS: list[dict[str, Any]] = [
    {"top_p": 0.6},
    {"top_k": 5},
    {"min_p": 0.2},
    {"repetition_penalty": 1.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.7},
    {"min_tokens": 6},
    {"stop_token_ids": (5, 9)},
    {
        "top_p": 0.8,
        "top_k": 12,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "min_tokens": 4,
        "stop_token_ids": tuple(range(5, 16)),
    },
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: "+".join(sampler))
def test_every_sampler_draws_from_the_distribution_it_is_said_to(sampler: dict[str, Any]) -> None:
    policy, eos_ids = model(), [3, 17]
    asked = [request(prompt, seed=seed, temperature=0.8, **sampler) for prompt in PROMPTS for seed in range(6)]
    # A plain request beside them: nobody else's contract may touch it.
    asked.append(request(PROMPTS[0], seed=99))
    drawn = generate(TransformersEngine(policy, eos_ids=eos_ids), asked)
    for wanted, completion in zip(asked, drawn, strict=True):
        expected = expected_logp(policy, wanted, completion, ends=eos_ids)
        assert_close(torch.tensor(completion.logp), torch.tensor(expected), rtol=0, atol=2e-5)
        ends = {*eos_ids, *wanted.contract.stop_token_ids}
        assert len(completion.tokens) >= wanted.contract.min_tokens
        assert (completion.tokens[-1] in ends) == (completion.finish_reason == "stop")
        assert not ends.intersection(completion.tokens[:-1])
    named = set(sampler.get("stop_token_ids", ()))
    assert not named or {completion.tokens[-1] for completion in drawn} & named
    alone = generate(TransformersEngine(policy, eos_ids=eos_ids), [asked[-1]])
    assert alone[0].tokens == drawn[-1].tokens


def test_a_text_ends_a_response_and_its_ids_stay() -> None:
    class Letters:
        def decode(self, token_ids: list[int], **_: Any) -> str:
            return "".join(chr(97 + one) if one < 26 else "" for one in token_ids)

    policy, decoder = model(), Letters()
    free = [request((5, 6), seed=seed, length=40) for seed in range(12)]
    texts = [decoder.decode(list(one.tokens)) for one in generate(TransformersEngine(policy, eos_ids=[3]), free)]
    stop = next(text for text in texts if len(text) > 24)[10:12]
    asked = [dataclasses.replace(one, contract=dataclasses.replace(one.contract, stop=("~", stop))) for one in free]
    drawn = generate(TransformersEngine(policy, eos_ids=[3], tokenizer=decoder), asked)
    for text, completion in zip(texts, drawn, strict=True):
        found = text.find(stop)
        told = decoder.decode(list(completion.tokens))
        assert told == (text if found < 0 else text[: found + len(stop)])
        assert completion.finish_reason == ("stop" if found >= 0 or completion.tokens[-1] == 3 else "length")
        assert len(completion.logp) == len(completion.tokens)
    assert sum(stop in text for text in texts) >= 1


def test_requests_it_cannot_honour_are_refused() -> None:
    engine = TransformersEngine(model(), eos_ids=[3])
    for wanted, message in (
        (request((5,), seed=1, stop=("end",)), r"has no tokenizer, and request .* ends at the text 'end'"),
        (request((5,), seed=1, structured_outputs='{"regex": "a"}'), r'holds no response to a grammar.*"regex": "a".*use vLLM'),
        (request((), seed=1), "empty prompt"),
        (request((5,), seed=1, length=0), "max_new_tokens 0"),
        (request((5, VOCABULARY), seed=1), "id 40 .* 40 entries"),
    ):
        with pytest.raises(EngineError, match=message):
            generate(engine, [wanted])


def test_what_the_model_cannot_compute_is_an_engine_error() -> None:
    with pytest.raises(EngineError, match=r"engine transformers failed on 1 requests of up to 200 prompt tokens: IndexError: index out of"):
        generate(TransformersEngine(model("gpt2"), eos_ids=[3]), [request((5,) * 200, seed=1)])


def test_a_cancelled_call_stops_decoding() -> None:
    engine = TransformersEngine(model(), eos_ids=[])

    async def scenario() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.generate([request((5,), seed=1, length=1_000_000)]), timeout=0.3)
        # The lock is free again at the next token; the abandoned call would hold it for hours.
        assert len(await engine.generate([request((5,), seed=1, length=2)])) == 1

    asyncio.run(scenario())


def test_a_mixture_takes_its_experts_by_their_checkpoint_names(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
    for seed in (0, 1):
        torch.manual_seed(seed)
        Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / str(seed))
    engine = TransformersEngine(Qwen3MoeForCausalLM.from_pretrained(tmp_path / "0"), eos_ids=[3])
    stored = load_file(tmp_path / "1" / "model.safetensors")
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in stored
    engine.load_weights(stored.items(), version=1)
    expected = recomputed_logp(Qwen3MoeForCausalLM.from_pretrained(tmp_path / "1"), (5,), (6, 7), 1.0)
    assert_close(torch.tensor(asyncio.run(engine.prompt_logp([5, 6, 7]))), expected)
    del stored["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(StaleWeights, match=r"not sent 1 of its parameters for version 2 \(model\.layers\.1\.mlp\.experts"):
        engine.load_weights(stored.items(), version=2)
    with pytest.raises(StaleWeights, match=r"no parameter 'model.layers.1.mlp.experts.4.up_proj.weight'"):
        engine.load_weights([("model.layers.1.mlp.experts.4.up_proj.weight", torch.zeros(16, 32))], version=2)
    assert engine.version == 1
