"""The samples of a step as plain rows for the rollout log."""

from collections.abc import Sequence
from typing import Any

from hone.rollout.executor import Group


def rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """One row a sample: texts, ids with their log-probabilities [nats], the judgement, and how it was drawn."""
    result: list[dict[str, Any]] = []
    for group in groups:
        for sample in group.samples:
            trajectory, contract = sample.trajectory, sample.trajectory.contract
            chosen = trajectory.action_mask
            result.append(
                {
                    "prompt_id": trajectory.prompt_id,
                    "sample": trajectory.sample,
                    "prompt": sample.prompt_text,
                    "response": sample.response_text,
                    "label": sample.label,
                    "reward": sample.reward,
                    "score": sample.score,
                    "truncated": trajectory.truncated,
                    "tokens": trajectory.tokens[chosen].tolist(),
                    "rollout_logp": trajectory.rollout_logp[chosen].tolist(),
                    "version": int(trajectory.version[chosen].min()),
                    "seed": contract.seed,
                    "temperature": contract.temperature,
                    "top_p": contract.top_p,
                    "top_k": contract.top_k,
                    "engine": contract.engine,
                    "tokenizer": contract.tokenizer,
                    "template": contract.template,
                }
            )
    return result
