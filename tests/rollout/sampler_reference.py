"""What a sampler contract makes of one row of logits, written as slowly and plainly as it is said: the answer engines are held to."""

import math
from collections.abc import Collection, Sequence

import torch
from transformers import PreTrainedModel

from hone.algos.batch import SamplerContract
from hone.rollout.types import Completion, Request


def distribution(
    logits: Sequence[float], contract: SamplerContract, *, prompt: Sequence[int], written: Sequence[int], ends: Collection[int]
) -> list[float]:
    """The probability of every id, next after `written`; `ends` are all ids that end a response."""
    shaped = []
    for index, logit in enumerate(logits):
        if len(written) < contract.min_tokens and index in ends:
            shaped.append(-math.inf)
            continue
        if index in prompt or index in written:
            logit = logit / contract.repetition_penalty if logit > 0 else logit * contract.repetition_penalty
        logit -= contract.frequency_penalty * written.count(index) + contract.presence_penalty * (index in written)
        shaped.append(logit / contract.temperature)
    probability = _normalised([math.exp(logit - max(shaped)) for logit in shaped])
    probability = _normalised([one if one >= contract.min_p * max(probability) else 0.0 for one in probability])
    if contract.top_k:
        likely = sorted(probability, reverse=True)[: contract.top_k]
        probability = _normalised([one if one >= likely[-1] else 0.0 for one in probability])
    kept, mass = set(), 0.0
    for index in sorted(range(len(probability)), key=lambda index: -probability[index]):
        if mass >= contract.top_p:
            break
        kept.add(index)
        mass += probability[index]
    return _normalised([one if index in kept else 0.0 for index, one in enumerate(probability)])


def expected_logp(model: PreTrainedModel, request: Request, completion: Completion, *, ends: Collection[int]) -> list[float]:
    """Log-probability [nats] of every sampled id under the request's contract, by the model's own logits."""
    tokens, start = request.tokens + completion.tokens, len(request.tokens)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0].double()
    ends = {*ends, *request.contract.stop_token_ids}
    found = []
    for place, sampled in enumerate(completion.tokens):
        row = logits[start + place - 1].tolist()
        probability = distribution(row, request.contract, prompt=request.tokens, written=completion.tokens[:place], ends=ends)
        found.append(math.log(probability[sampled]) if probability[sampled] else -math.inf)
    return found


def _normalised(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [weight / total for weight in weights]
