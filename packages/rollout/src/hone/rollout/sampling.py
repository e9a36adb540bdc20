"""From a prompt to the samples to draw of it: seeds that depend on (run, step, prompt, sample) and on nothing else."""

import dataclasses
import hashlib
import json

from hone.algos.batch import SamplerContract
from hone.rollout.types import Prompt, Request


def seed_of(run_seed: int, step: int, prompt_id: str, sample: int) -> int:
    """Seed of one sample, 63 bits: the same on every machine, in every process and for every number of engines.

    Hashed rather than counted up: engines offset seeds themselves, so neighbouring seeds would share random streams.
    """
    # JSON keeps the four apart: ("1", 23) and ("12", 3) must not meet.
    key = json.dumps([run_seed, step, prompt_id, sample]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def requests(
    prompt: Prompt, *, n: int, step: int, run_seed: int, max_new_tokens: int, contract: SamplerContract, greedy: bool = False
) -> list[Request]:
    """The `n` samples to draw of one prompt, each under `contract` with a seed of its own (the seed in `contract` is not used).

    With `greedy` one more, the last: the greedy response.
    """
    return [
        Request(
            request_id=f"{step}:{prompt.prompt_id}:{sample}",
            tokens=prompt.tokens,
            max_new_tokens=max_new_tokens,
            contract=dataclasses.replace(contract, seed=seed_of(run_seed, step, prompt.prompt_id, sample)),
            greedy=sample == n,
            images=prompt.images,
        )
        for sample in range(n + greedy)
    ]
