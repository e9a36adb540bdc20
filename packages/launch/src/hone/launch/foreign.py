"""Names of other projects whose VALUE decides what is to be typed here: the algorithm, its loss, its correction.

name -> value -> how to mend it; the entry "" answers any other value. Reference: OpenRLHF 0.11 and its flat names up to 0.9, Molt,
verl, TRL. What is called the same whatever its value stands in `names.py`.
"""

from collections.abc import Mapping, Sequence

from hone.launch.verbs import VERBS

VERB_OF = {
    "gae": "ppo",
    "group_norm": "grpo",
    "grpo_vectorized": "grpo",
    "rloo_vectorized": "rloo",
    "reinforce++": "reinforce",
    "reinforce_plus_plus": "reinforce",
    "reinforce++_baseline": "reinforce_baseline",
    "reinforce_plus_plus_baseline": "reinforce_baseline",
    "vanilla": "ppo",
    "geo_mean": "gmpo",
    "opd": "on_policy_distill",
}
"""Estimators and losses as others call them -> the command here."""

PROGRAM_OF = {
    "rs": "rejection-sampling",
    "best_of_n": "rejection-sampling",
    "iter_dpo": "iterative-dpo",
    "online_dpo": "iterative-dpo",
    "csft": "conditional-sft",
    "batch_inference": "generate",
    "interactive_chat": "chat",
    "gkd": "kd",
}
"""The same of other programs."""

_COMMAND = "the algorithm is the command"
_ALGORITHM = {
    **{name: f"{_COMMAND}: `launch {name}`" for name in VERBS},
    **{name: f"{_COMMAND}: `launch {verb}`" for name, verb in VERB_OF.items()},
    "": f"{_COMMAND}: `launch COMMAND`, one of {', '.join(VERBS)}",
}
_LOSS = _ALGORITHM | {"ppo": "drop it: `launch ppo`, `launch grpo` and most other commands minimise the clipped surrogate anyway"}

_TOKEN, _SEQUENCE = "use --algo.correction.level token", "use --algo.correction.level sequence"
_MASK, _GATE = "--algo.correction.mode mask", "use --algo.correction.level geometric"
_OWN_CORRECTION = {
    "tis": f"{_TOKEN} --algo.correction.mode clip",
    "icepop": f"{_TOKEN} {_MASK}",
    "seq_mask_tis": _GATE,
    "": f"{_TOKEN}, sequence or geometric, and --algo.correction.mode",
}
_OWN_BOUNDS = {"": "use --algo.correction.low LOW --algo.correction.high HIGH"}

ANSWERS: dict[str, Mapping[str, str]] = {
    # OpenRLHF, and Molt
    "algo.advantage.estimator": _ALGORITHM,
    "advantage_estimator": _ALGORITHM,
    "actor.policy_loss_type": _LOSS,
    "policy_loss_type": _LOSS,
    "algo.advantage.is_correction_enable": {"": _TOKEN},
    "enable_vllm_is_correction": {"": _TOKEN},
    "algo.advantage.is_correction_type": _OWN_CORRECTION,
    "vllm_is_correction_type": _OWN_CORRECTION,
    "vllm_is_truncated_threshold": _OWN_BOUNDS,
    "vllm_is_correction_threshold": _OWN_BOUNDS,
    # verl
    "algorithm.adv_estimator": _ALGORITHM,
    "actor_rollout_ref.actor.policy_loss.loss_mode": _LOSS,
    "actor_rollout_ref.actor.loss_agg_mode": {
        "token_mean": "use --algo.reduction.over token",
        "seq_mean_token_mean": "use --algo.reduction.over sequence",
        "seq_mean_token_sum_norm": "use --algo.reduction.over constant --algo.reduction.length LONGEST_RESPONSE",
        "": "use --algo.reduction.over token, sequence or constant",
    },
    "algorithm.rollout_correction.rollout_is": {"token": _TOKEN, "sequence": _SEQUENCE, "": f"{_TOKEN}, or sequence"},
    "algorithm.rollout_correction.rollout_rs": {"": f"{_TOKEN}, sequence or geometric, with {_MASK}"},
    # TRL
    "loss_type": _ALGORITHM | {"bnpo": f"{_COMMAND}: `launch grpo --algo.reduction.over token`"},
    "importance_sampling_level": {
        "token": "drop it: a ratio for each token is what every command but `launch gspo` and `launch gmpo` has",
        "sequence": f"{_COMMAND}: `launch gspo`",
        "sequence_token": f"{_COMMAND}: `launch gspo --algo.gradient token`",
        "": f"{_COMMAND}: `launch grpo` for token, `launch gspo` for sequence",
    },
    "vllm_importance_sampling_correction": {"": f"{_TOKEN}, or sequence"},
    "vllm_importance_sampling_mode": {
        "token_truncate": _TOKEN,
        "token_mask": f"{_TOKEN} {_MASK}",
        "sequence_truncate": _SEQUENCE,
        "sequence_mask": f"{_SEQUENCE} {_MASK}",
        "": f"{_TOKEN} or sequence, with --algo.correction.mode truncate or mask",
    },
}


def answer(name: str, values: Sequence[str]) -> str:
    """How to say here what `name` with these values says elsewhere; empty where the name is no habit known here."""
    answers = ANSWERS.get(name, {})
    return answers.get(" ".join(values).lower().replace("-", "_"), answers.get("", ""))
