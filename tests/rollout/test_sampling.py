"""Seeds: one per (run, step, prompt, sample), the same everywhere and for ever."""

import hashlib
import itertools

from hone.algos.batch import SamplerContract
from hone.rollout.sampling import requests, seed_of
from hone.rollout.types import Prompt

CONTRACT = SamplerContract(temperature=0.7, top_p=1.0, top_k=0, seed=0, engine="e 1", tokenizer="t", template="c")


def test_seed_is_the_hash_it_is_said_to_be() -> None:
    digest = hashlib.blake2b(b'[7, 3, "ab:0:5", 2]', digest_size=8).digest()
    assert seed_of(7, 3, "ab:0:5", 2) == int.from_bytes(digest, "big") >> 1
    # A literal, so that a change of the formula, which would change every user's run, cannot pass unseen.
    assert seed_of(0, 0, "a", 0) == 7579539321651076624


def test_seeds_are_63_bit_and_differ_in_every_argument() -> None:
    seeds = [seed_of(*key) for key in itertools.product(range(3), range(5), ("a", "b", "1", "12"), range(20))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # all the bits are used


def test_neighbouring_arguments_do_not_run_together() -> None:
    assert seed_of(1, 23, "4", 5) != seed_of(12, 3, "4", 5)
    assert seed_of(1, 2, '3", "4', 5) != seed_of(1, 2, "3", 45)


def test_requests_carry_prompt_length_and_contract() -> None:
    prompt = Prompt(prompt_id="ab:0:5", tokens=(4, 5, 6), text="x", label=None)
    asked = requests(prompt, n=3, step=2, run_seed=9, max_new_tokens=11, contract=CONTRACT)
    assert [request.contract.seed for request in asked] == [seed_of(9, 2, "ab:0:5", sample) for sample in range(3)]
    assert [request.request_id for request in asked] == ["2:ab:0:5:0", "2:ab:0:5:1", "2:ab:0:5:2"]
    assert {(request.tokens, request.max_new_tokens) for request in asked} == {((4, 5, 6), 11)}
    assert {(request.contract.temperature, request.contract.engine, request.contract.template) for request in asked} == {(0.7, "e 1", "c")}
