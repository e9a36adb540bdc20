"""Every sampler parameter against real vLLM: what is drawn, that its log-probability is the one of what was sampled from, and its ids."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hone.algos.batch import SamplerContract
from hone.rollout.errors import EngineError
from hone.rollout.types import Completion, Request
from tests.rollout.conftest import EOS, VOCABULARY, Loop, Served, logp_of, start, tiny_model
from tests.rollout.sampler_reference import expected_logp

# vllm, while it is imported, scripts a function by torch's old way.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
PROMPT = (40, 41, 42)
SAMPLERS: list[dict[str, Any]] = [
    {"top_p": 0.6},
    {"top_k": 5},
    {"min_p": 0.2},
    {"repetition_penalty": 1.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.7},
    {"min_tokens": 12},
    {"stop_token_ids": (50, 51, 52, 53)},
    {"top_p": 0.8, "top_k": 12, "min_p": 0.02, "repetition_penalty": 1.2, "presence_penalty": 0.3, "min_tokens": 4},
]
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
GRAMMARS: list[tuple[dict[str, Any], str]] = [
    ({"regex": "[ab]{3}c"}, "[ab]{3}c"),
    ({"choice": ["yes", "no"]}, "yes|no"),
    ({"grammar": 'root ::= "x" digit digit\ndigit ::= [0-9]'}, "x[0-9]{2}"),
    ({"json": SCHEMA}, r'\{\s*"a"\s*:\s*[12]\s*\}\s*'),
]


def letters() -> PreTrainedTokenizerFast:
    """One id for every printable character, and some for two at once; id 1 ends a response."""
    texts = [*map(chr, range(32, 127)), "\n", *(f"{letter}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"), "the", "and", "<x>", "<y>"]
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *texts])}
    assert len(vocabulary) == VOCABULARY
    base = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    base.pre_tokenizer, base.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    base.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<pad>", "<eos>")])
    return PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False)


@dataclasses.dataclass
class Lettered:
    """A tiny model whose engine knows its tokenizer."""

    engine: Any
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    loop: Loop

    def drawn(self, *requests: Request) -> list[Completion]:
        return self.loop.run(self.engine.generate(requests))

    def text(self, tokens: Any) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))


@pytest.fixture(scope="module")
def lettered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lettered]:
    directory: Path = tmp_path_factory.mktemp("lettered")
    model, tokenizer = tiny_model("tied", directory), letters()
    tokenizer.save_pretrained(directory)
    engine, loop = start(directory, "lettered", max_model_len=512, reads_text=True), Loop()
    yield Lettered(engine, model, tokenizer, loop)
    loop.run(engine.shutdown())
    loop.close()


def asked(seed: int, *, length: int = 40, temperature: float = 0.8, **sampler: Any) -> Request:
    sampler = {"top_p": 1.0, "top_k": 0, **sampler}
    contract = SamplerContract(temperature=temperature, seed=seed, engine="vllm", tokenizer="", template="", **sampler)
    return Request(request_id=f"sample-{seed}", tokens=PROMPT, max_new_tokens=length, contract=contract)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: "+".join(sampler))
def test_the_logp_is_that_of_the_distribution_sampled_from(lettered: Lettered, sampler: dict[str, Any]) -> None:
    # A plain request among them: nobody else's contract may touch it.
    requests = [*(asked(seed, **sampler) for seed in range(12)), asked(99)]
    drawn = lettered.drawn(*requests)
    for request, completion in zip(requests, drawn, strict=True):
        expected = expected_logp(lettered.model, request, completion, ends=[EOS])
        assert_close(torch.tensor(completion.logp), torch.tensor(expected), rtol=0, atol=1e-4)
        ends = {EOS, *request.contract.stop_token_ids}
        assert len(completion.tokens) >= request.contract.min_tokens
        assert (completion.tokens[-1] in ends) == (completion.finish_reason == "stop")
        assert not ends.intersection(completion.tokens[:-1])
    if named := set(sampler.get("stop_token_ids", ())):
        assert {completion.tokens[-1] for completion in drawn} & named


def test_a_text_ends_a_response_and_its_ids_stay_as_they_were_sampled(lettered: Lettered) -> None:
    free = lettered.drawn(*(asked(seed) for seed in range(12)))
    texts = [lettered.text(completion.tokens) for completion in free]
    stop = next(text for text in texts if len(text) > 20)[8:10]
    drawn = lettered.drawn(*(asked(seed, stop=("never written", stop)) for seed in range(12)))
    ended = 0
    for before, text, completion in zip(free, texts, drawn, strict=True):
        found, told = text.find(stop), lettered.text(completion.tokens)
        # The same seed draws the same ids; the last is the one that completes the text.
        assert before.tokens[: len(completion.tokens)] == completion.tokens
        assert (stop in told) == (found >= 0) and stop not in lettered.text(completion.tokens[:-1])
        assert len(completion.logp) == len(completion.version) == len(completion.tokens)
        ended += found >= 0
        assert found < 0 or completion.finish_reason == "stop"
    assert ended >= 1
    # What training accepts, the learner recomputes.
    for completion in drawn:
        expected = logp_of(lettered.model, PROMPT + completion.tokens, 0.8)[len(PROMPT) - 1 :]
        assert_close(torch.tensor(completion.logp), expected, rtol=0, atol=1e-4)


def test_a_text_that_is_a_special_token_ends_a_response_too(lettered: Lettered) -> None:
    free = lettered.drawn(*(asked(seed, length=400) for seed in range(8)))
    pad = next(completion for completion in free if 0 in completion.tokens)
    seed = free.index(pad)
    (drawn,) = lettered.drawn(asked(seed, length=400, stop=("<pad>",)))
    assert drawn.tokens == pad.tokens[: pad.tokens.index(0) + 1] and drawn.finish_reason == "stop"


@pytest.mark.parametrize(("grammar", "pattern"), GRAMMARS, ids=lambda one: next(iter(one)) if isinstance(one, dict) else "")
def test_a_response_is_held_to_its_grammar(lettered: Lettered, grammar: dict[str, Any], pattern: str) -> None:
    drawn = lettered.drawn(*(asked(seed, length=200, structured_outputs=json.dumps(grammar)) for seed in range(4)))
    assert any(completion.finish_reason == "stop" for completion in drawn)
    for completion in drawn:
        if completion.finish_reason == "stop":
            assert re.fullmatch(pattern, lettered.text(completion.tokens).removesuffix("<eos>"))
        assert all(logp <= 1e-4 for logp in completion.logp)


def test_an_engine_without_a_tokenizer_says_so(untied: Served) -> None:
    for sampler in ({"stop": ("a",)}, {"structured_outputs": '{"regex": "a"}'}):
        with pytest.raises(EngineError, match=r"engine untied was started without a tokenizer, and request sample-3"):
            untied.generate([asked(3, **sampler)])


def test_a_grammar_that_cannot_be_read_is_an_engine_error(lettered: Lettered) -> None:
    with pytest.raises(EngineError, match=r"engine lettered failed while sampling sample-3"):
        lettered.drawn(asked(3, structured_outputs='{"regex": "(((("}'))
