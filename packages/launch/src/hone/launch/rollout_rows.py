"""The samples of a step as plain rows for the rollout log; an episode of several segments has a row for each, texts on the last."""

from collections.abc import Sequence
from typing import Any

from hone.rollout.executor import Group


def rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """One row a segment: texts, ids with their log-probabilities [nats], the judgement, and how it was drawn."""
    result: list[dict[str, Any]] = []
    for group in groups:
        for sample, trajectory in [(one, segment) for one in group.samples for segment in one.segments]:
            contract, chosen = trajectory.contract, trajectory.action_mask
            last = trajectory is sample.trajectory
            result.append(
                {
                    "prompt_id": trajectory.prompt_id,
                    "sample": trajectory.sample,
                    "segment": trajectory.segment,
                    "prompt": sample.prompt_text if last else "",
                    "response": sample.response_text if last else "",
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
                    "stop": list(contract.stop),
                    "stop_token_ids": list(contract.stop_token_ids),
                    "engine": contract.engine,
                    "tokenizer": contract.tokenizer,
                    "template": contract.template,
                }
            )
    return result
