"""A sampler contract in vLLM's words: Request -> SamplingParams. vllm is imported when the first is made."""

import json
from collections.abc import Sequence
from typing import Any

from hone.rollout.errors import EngineError
from hone.rollout.types import Request


def sampling_params(request: Request, *, engine: str, eos_token_ids: Sequence[int], reads_text: bool) -> Any:
    """One sample's parameters; EngineError where the contract takes a tokenizer and the engine has none.

    vLLM applies, in this order: grammar, what may not end yet, penalties, temperature, min-p, top-k, top-p. Under
    `logprobs_mode="processed_logprobs"` a token's log-probability is that of what is left, normalised anew.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    contract = request.contract
    if (contract.stop or contract.structured_outputs) and not reads_text:
        raise EngineError(
            f"engine {engine} was started without a tokenizer, and request {request.request_id} ends at a text or is held to a grammar"
        )
    grammar = json.loads(contract.structured_outputs) if contract.structured_outputs else None
    return SamplingParams(
        # One request per sample: vLLM seeds the n samples of one request with neighbouring numbers, which share streams.
        temperature=0.0 if request.greedy else contract.temperature,
        top_p=contract.top_p,
        top_k=contract.top_k,
        min_p=contract.min_p,
        repetition_penalty=contract.repetition_penalty,
        presence_penalty=contract.presence_penalty,
        frequency_penalty=contract.frequency_penalty,
        seed=contract.seed,
        max_tokens=request.max_new_tokens,
        min_tokens=min(contract.min_tokens, request.max_new_tokens),
        stop=list(contract.stop),
        stop_token_ids=[*eos_token_ids, *contract.stop_token_ids],
        structured_outputs=None if grammar is None else StructuredOutputsParams(**grammar),
        logprobs=0,
        flat_logprobs=True,
        detokenize=bool(contract.stop),
        # A text that ends a response may be a special token, or hold one.
        skip_special_tokens=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
