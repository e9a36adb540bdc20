"""From a prompt to the samples to draw of it: seeds that depend on (run, step, prompt, sample) and on nothing else."""

import dataclasses
import functools
import hashlib
import json
import typing
from pathlib import Path

from hone.algos.batch import SamplerContract
from hone.rollout.config import RolloutConfig, SamplerConfig, StructuredOutputs
from hone.rollout.types import Prompt, Request


def contract_of(config: RolloutConfig, *, seed: int, engine: str, tokenizer: str, template: str) -> SamplerContract:
    """How the configuration has samples drawn. Raises ValueError as `sampler_of` does."""
    return SamplerContract(
        temperature=config.temperature, seed=seed, engine=engine, tokenizer=tokenizer, template=template, **sampler_of(config)
    )


@functools.lru_cache(maxsize=16)
def sampler_of(config: SamplerConfig) -> dict[str, typing.Any]:
    """The fields of a contract that the configuration decides, but for the temperature.

    Files are read once. Raises ValueError "NAME: WHAT; REMEDY" for a text that cannot be read, OSError for a file that cannot.
    """
    return {
        **{name: getattr(config, name) for name in ("top_p", "top_k", "min_p")},
        **{name: getattr(config, name) for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")},
        "min_tokens": config.min_new_tokens,
        "stop": _stops(config.stop),
        "stop_token_ids": _ids(config.stop_token_ids),
        "structured_outputs": _grammar(config.structured_outputs),
    }


def reads_text(config: SamplerConfig) -> bool:
    """Whether the engine has to know the tokenizer: ids alone show neither a text that ends a response nor what a grammar allows.

    An agent that owns its loop may name such texts in any of its calls.
    """
    agent = isinstance(config, RolloutConfig) and (config.agent_func_path is not None or config.agent_command is not None)
    return agent or config.stop is not None or config.structured_outputs != StructuredOutputs()


def _stops(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    listed = _json(text) if text.startswith("[") else None
    stops = listed if isinstance(listed, list) else [text]
    if not all(isinstance(one, str) and one for one in stops):
        raise ValueError(f"stop: {text!r:.80} is no list of texts; write one text, or a JSON list of texts that are not empty")
    return tuple(stops)


def _ids(text: str | None) -> tuple[int, ...]:
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"stop_token_ids: {text!r:.80} is no list of token ids; write whole numbers, separated by commas")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _grammar(chosen: StructuredOutputs) -> str:
    """The one grammar chosen as a JSON object of one entry, or ""."""
    kinds = {name: value for name in ("json", "json_object", "regex", "choice", "grammar") if (value := getattr(chosen, name))}
    if len(kinds) > 1:
        names = " and ".join(f"structured_outputs.{name}" for name in kinds)
        raise ValueError(f"structured_outputs: {names} are two grammars for one response; give one of them")
    if not kinds:
        return ""
    ((kind, value),) = kinds.items()
    if kind in ("json", "grammar"):
        value = _of_file(value)
    if kind in ("json", "choice"):
        value = _json(value)
    if kind == "json" and not isinstance(value, dict):
        raise ValueError("structured_outputs.json: neither a JSON object nor a file with one; write a JSON schema")
    if kind == "choice" and not (isinstance(value, list) and value and all(isinstance(one, str) and one for one in value)):
        raise ValueError(f'structured_outputs.choice: {chosen.choice!r:.80} is no JSON list of texts; write ["yes", "no"], say')
    return json.dumps({kind: value}, sort_keys=True)


def _of_file(text: str) -> str:
    """The content of the file of this name, where there is one, else the text itself."""
    # A text with a line break, or longer than a path can be, is no name.
    path = Path(text).expanduser() if len(text) < 1024 and "\n" not in text and "{" not in text else None
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else text


def _json(text: str) -> object:
    """The value written in JSON; None where it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return None


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
