"""Every metric a step may yield: name -> unit, reduction, healthy range, meaning. docs/metrics.md is generated from here.

`python -m hone.launch.observe.metrics > docs/metrics.md` writes the page; a test holds page and table together, and
`check_names` refuses a metric that has no entry, so that the loop cannot drift away from either.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from hone.algos.ranges import Range


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric: its unit, how many values became one, and where it lies in a healthy run (None: no range says anything)."""

    unit: str
    reduction: str
    healthy: Range | None = None
    meaning: str


EXTRA_PREFIX = "rollout/extra/"
_FRACTION = Range(low=0, high=1)
_NOT_NEGATIVE = Range(low=0)
_POSITIVE = Range(low=0, open_low=True)
_STEP = "once a step"
_SAMPLES = "mean over the step's samples"
_TOKENS = "weighted mean over action tokens and optimiser steps; by a constant length C, that times mean length / C"
_ROLLOUT = "mean over the step's action tokens"
_SHARE = "(sum w)^2 / (n sum w^2) over the step's n action tokens, {}"
_UPDATES = "mean over the step's optimiser steps"


def _seconds(meaning: str) -> Metric:
    return Metric(unit="s", reduction=_STEP, healthy=_NOT_NEGATIVE, meaning=meaning)


def _figures(prefix: str, of: str) -> dict[str, Metric]:
    """What a loss over labelled rows tells, of the rows of a step or of those held out."""

    def metric(unit: str, meaning: str, *, healthy: Range | None = None, per: str = "rows") -> Metric:
        return Metric(unit=unit, reduction=f"weighted mean over {per} of {of}", healthy=healthy, meaning=meaning)

    found = {
        "loss": metric("loss", "The whole loss of a program over labelled rows.", per="tokens, rows or pairs"),
        "nll": metric("nats", "Negative log-likelihood of the tokens that are to be said.", healthy=_NOT_NEGATIVE, per="tokens or rows"),
        "preference_loss": metric("loss", "DPO, IPO, SimPO, ORPO or KTO without any likelihood beside it.", per="pairs or rows"),
        "rm_loss": metric("loss", "-log sigmoid(chosen - rejected - margin) of a reward model.", healthy=_NOT_NEGATIVE, per="pairs"),
        "centre": metric("reward^2", "Squared sum of a pair's scores, before its coefficient.", healthy=_NOT_NEGATIVE, per="pairs"),
        "prm_loss": metric("nats", "Cross-entropy of a process reward model.", healthy=_NOT_NEGATIVE, per="steps"),
        "distillation_loss": metric("nats", "Divergence of teacher and student.", per="tokens"),
        "accuracy": metric(
            "fraction", "Pairs whose chosen answer, or steps whose label, is preferred.", healthy=_FRACTION, per="pairs or steps"
        ),
        "chosen_reward": metric("reward", "Of the chosen or good answers: a score, or beta times the log-ratio.", per="pairs or rows"),
        "rejected_reward": metric("reward", "Of the rejected or bad answers.", per="pairs or rows"),
        "reward_margin": metric("reward", "Chosen less rejected; it should rise.", per="pairs or rows"),
        "kl_anchor": metric("nats", "KTO's anchor: how far the policy is from the reference.", healthy=_NOT_NEGATIVE, per="rows"),
    }
    return {f"{prefix}/{name}": one for name, one in found.items()}


def _counted(meaning: str) -> Metric:
    return Metric(unit="count", reduction="sum over the iteration's prompts", healthy=_NOT_NEGATIVE, meaning=meaning)


METRICS: dict[str, Metric] = {
    "step": Metric(unit="steps", reduction="count", healthy=Range(low=1), meaning="Training steps done, from 1."),
    "rollout/reward_mean": Metric(unit="reward", reduction=_SAMPLES, meaning="The reward function's `rewards`; what the run is to raise."),
    "rollout/greedy_reward_mean": Metric(
        unit="reward", reduction="mean over the step's prompts", meaning="ReMax alone: the reward of the prompt's greedy response."
    ),
    "rollout/reward_std": Metric(
        unit="reward", reduction="standard deviation over the step's samples", healthy=_NOT_NEGATIVE, meaning="Spread of the rewards."
    ),
    "rollout/reward_best": Metric(
        unit="reward", reduction="mean over the iteration's prompts", meaning="Loops alone: the highest reward of each prompt's responses."
    ),
    "rollout/score_mean": Metric(
        unit="score", reduction=_SAMPLES, healthy=_FRACTION, meaning="The reward function's `scores`, the ungraded quality."
    ),
    "rollout/response_length_mean": Metric(unit="tokens", reduction=_SAMPLES, healthy=_POSITIVE, meaning="Sampled tokens of a response."),
    "rollout/truncated_rate": Metric(
        unit="fraction",
        reduction=_SAMPLES,
        healthy=Range(low=0, high=0.2),
        meaning="Responses cut by the token limit; many of them: raise the limit.",
    ),
    "rollout/group_reward_std": Metric(
        unit="reward",
        reduction="standard deviation within a group, mean over groups",
        healthy=_NOT_NEGATIVE,
        meaning="Near 0 the samples of a prompt agree and group-relative advantages vanish.",
    ),
    "rollout/groups": Metric(
        unit="groups", reduction="sum", healthy=Range(low=1), meaning="Prompts with a sample to compare, where a group is the baseline."
    ),
    "rollout/groups_of_one": Metric(
        unit="groups", reduction="sum", healthy=Range(low=0, high=0), meaning="Of these, with one sample: its advantage is 0."
    ),
    "rollout/groups_of_equals": Metric(
        unit="groups",
        reduction="sum",
        healthy=_NOT_NEGATIVE,
        meaning="Of these, with samples of equal score: their advantages are 0; as many as there are groups: nothing is learnt.",
    ),
    "rollout/num_samples": Metric(unit="samples", reduction="sum", healthy=Range(low=1), meaning="Samples that were trained on."),
    "train/policy_loss": Metric(unit="loss", reduction=_TOKENS, meaning="The policy's loss; its size says little, its jumps a lot."),
    "train/ppo_clip_ratio": Metric(
        unit="fraction",
        reduction=_TOKENS,
        healthy=Range(low=0, high=0.3),
        meaning="Tokens whose ratio was clipped; many: lower the learning rate.",
    ),
    "train/ppo_kl": Metric(
        unit="nats",
        reduction=_TOKENS,
        healthy=Range(low=-0.1, high=0.1),
        meaning="old_logp - logp (k1), how far the step moved the policy.",
    ),
    "train/kl": Metric(
        unit="nats", reduction=_TOKENS, healthy=Range(low=-0.1, high=10), meaning="KL(policy || reference), by the chosen estimator."
    ),
    "train/entropy": Metric(
        unit="nats",
        reduction=_TOKENS,
        healthy=_NOT_NEGATIVE,
        meaning="Entropy of the policy; a fall to 0 ends exploration.",
    ),
    "train/sapo_gate": Metric(
        unit="fraction",
        reduction=_TOKENS,
        healthy=Range(low=0.5),
        meaning="What SAPO's gate leaves of a token's gradient: 1 while the ratio is one, towards 0 as it leaves it.",
    ),
    "train/imitation_nll": Metric(
        unit="nats",
        reduction=_TOKENS,
        healthy=_NOT_NEGATIVE,
        meaning="Negative log-likelihood of the correct responses that VAPO imitates, 0 for all others.",
    ),
    "train/critic_loss": Metric(unit="loss", reduction=_TOKENS, healthy=_NOT_NEGATIVE, meaning="The value function's squared error."),
    "train/values": Metric(unit="reward", reduction=_TOKENS, meaning="The critic's values; they should come near train/returns."),
    "train/returns": Metric(unit="reward", reduction=_TOKENS, meaning="The critic's targets."),
    **{
        f"train/{role}aux_loss": Metric(
            unit="loss",
            reduction=_UPDATES,
            healthy=_NOT_NEGATIVE,
            meaning=f"The {model}'s load-balancing loss before its coefficient; with k experts a token, k is balanced.",
        )
        for role, model in (("", "policy"), ("critic_", "critic"))
    },
    **{
        f"train/{role}max_expert_load": Metric(
            unit="1",
            reduction=_UPDATES,
            healthy=Range(low=1),
            meaning=f"Tokens of the {model}'s busiest expert, over an even share; 1 is balanced, large: experts starve.",
        )
        for role, model in (("", "policy"), ("critic_", "critic"))
    },
    "train/actor_grad_norm": Metric(
        unit="L2 norm", reduction=_UPDATES, healthy=_NOT_NEGATIVE, meaning="Norm of the policy's gradient before it is clipped."
    ),
    "train/critic_grad_norm": Metric(
        unit="L2 norm", reduction=_UPDATES, healthy=_NOT_NEGATIVE, meaning="Norm of the critic's gradient before it is clipped."
    ),
    "train/actor_skipped": Metric(
        unit="fraction", reduction=_UPDATES, healthy=Range(high=0), meaning="Optimiser steps of the policy that were left out: not finite."
    ),
    "train/critic_skipped": Metric(
        unit="fraction", reduction=_UPDATES, healthy=Range(high=0), meaning="Optimiser steps of the critic that were left out: not finite."
    ),
    "train/actor_lr": Metric(unit="1", reduction=_UPDATES, healthy=_NOT_NEGATIVE, meaning="The policy's learning rate."),
    "train/critic_lr": Metric(unit="1", reduction=_UPDATES, healthy=_NOT_NEGATIVE, meaning="The critic's learning rate."),
    "train/optimizer_steps": Metric(
        unit="steps", reduction="sum", healthy=Range(low=1), meaning="Optimiser steps the policy took in this step."
    ),
    **_figures("train", "the optimiser step"),
    **_figures("eval", "those held out"),
    "train/grad_norm": Metric(unit="L2 norm", reduction=_STEP, healthy=_NOT_NEGATIVE, meaning="Norm of the gradient before it is clipped."),
    "train/lr": Metric(unit="1", reduction=_STEP, healthy=_NOT_NEGATIVE, meaning="The learning rate."),
    "train/skipped": Metric(unit="steps", reduction=_STEP, healthy=Range(high=0), meaning="1 for a step left out: not finite."),
    "train/tokens": Metric(unit="tokens", reduction="sum", healthy=_POSITIVE, meaning="Tokens of the step that are trained on."),
    "train/epoch": Metric(unit="epochs", reduction=_STEP, healthy=_NOT_NEGATIVE, meaning="Times the data has been gone through so far."),
    "mismatch/logp_abs_diff_mean": Metric(
        unit="nats",
        reduction="mean over action tokens",
        healthy=Range(low=0, high=0.02),
        meaning="|rollout_logp - old_logp|, the gap of engine and learner: at most 1e-4 in fp32, about 5e-3 in bf16. "
        "`--rollout.max-gap` ends a run above a limit of yours.",
    ),
    "mismatch/logp_abs_diff_max": Metric(
        unit="nats", reduction="maximum over action tokens", healthy=Range(low=0, high=1), meaning="The largest gap of one token."
    ),
    "mismatch/kl": Metric(
        unit="nats",
        reduction="mean over action tokens",
        healthy=Range(low=-1e-3, high=1e-3),
        meaning="rollout_logp - old_logp (k1), KL(engine || learner).",
    ),
    "mismatch/k3": Metric(
        unit="nats",
        reduction=_ROLLOUT,
        healthy=Range(high=1e-3),
        meaning="exp(u) - 1 - u with u = old_logp - rollout_logp: the same divergence, in which gaps of opposite sign cannot cancel.",
    ),
    "mismatch/chi2": Metric(
        unit="1",
        reduction=_ROLLOUT,
        healthy=Range(low=-0.05, high=0.05),
        meaning="exp(2 u) - 1, the chi-squared divergence: a few tokens far apart show here first.",
    ),
    "mismatch/perplexity_ratio": Metric(
        unit="learner / engine",
        reduction="mean over rows, weighted by their action tokens",
        healthy=Range(low=0.98, high=1.02),
        meaning="exp of a row's mean -u: how much more perplexed by its own samples the learner is than the engine was.",
    ),
    "mismatch/ess": Metric(
        unit="fraction",
        reduction=_SHARE.format("w = exp(u)"),
        healthy=Range(low=0.95),
        meaning="Effective share of the sample if every token were weighted by its ratio; 1 where engine and learner agree.",
    ),
    "mismatch/correction_ess": Metric(
        unit="fraction",
        reduction=_SHARE.format("w the correction"),
        healthy=Range(low=0.5),
        meaning="Effective share of the sample that the correction leaves.",
    ),
    "mismatch/correction_mean": Metric(
        unit="1", reduction=_ROLLOUT, healthy=Range(low=0.5, high=1.5), meaning="What advantages are multiplied by; 1 leaves them alone."
    ),
    "mismatch/correction_rejected": Metric(
        unit="fraction", reduction=_ROLLOUT, healthy=Range(low=0, high=0.1), meaning="Tokens that the correction rejects."
    ),
    "staleness/version_lag_max": Metric(
        unit="versions",
        reduction="maximum over action tokens",
        healthy=_NOT_NEGATIVE,
        meaning="Policy version being trained less the one that sampled; 0 in a synchronous run, never above --rollout.max-staleness.",
    ),
    "staleness/version_lag_mean": Metric(
        unit="versions", reduction="mean over action tokens", healthy=_NOT_NEGATIVE, meaning="The same, on average."
    ),
    "staleness/dropped": Metric(
        unit="groups",
        reduction="sum",
        healthy=Range(low=0, high=0),
        meaning="Finished groups that became too old before a step had room for them: sampled for nothing; lower --rollout.over-sampling.",
    ),
    "rollout/stragglers": Metric(
        unit="groups",
        reduction="sum",
        healthy=_NOT_NEGATIVE,
        meaning="Prompts in flight given up because their step had a full batch (--rollout.over-sampling), or because they became too old.",
    ),
    "rollout/open": Metric(
        unit="groups",
        reduction="count at the step's end",
        healthy=_NOT_NEGATIVE,
        meaning="Prompts under way and finished groups that wait for their step, where rollout does not wait for the learner.",
    ),
    "rollout/filtering_pass_rate": Metric(
        unit="fraction",
        reduction="groups kept over groups judged",
        healthy=Range(low=0.1),
        meaning="Share of the step's groups that dynamic sampling kept; the lower, the more is sampled for nothing.",
    ),
    "rollout/filtering_reward_mean": Metric(
        unit="reward",
        reduction="mean over all judged groups, those dropped included",
        healthy=None,
        meaning="What the policy earns on the data as it is; rollout/reward_mean is of the kept groups alone.",
    ),
    "loop/kept": _counted("Rows an iteration learns from: responses, or pairs of them."),
    "loop/equal": _counted("Prompts whose responses all earned the same; a pair cannot be made of them."),
    "loop/tied_best": _counted("Other prompts with several responses of the highest reward, of which the first drawn is taken."),
    "loop/tied_worst": _counted("The same of the lowest reward."),
    "loop/below": _counted("Prompts whose best response is not above `select.above`, and is not learnt from."),
    "loop/same": _counted("Prompts whose best and worst response are the same ids, judged differently; no pair is made of them."),
    "timing/generation": _seconds("Sampling, the reward function included."),
    "timing/make_experience": _seconds("Log-probabilities, reference, values, advantages."),
    "timing/ppo_train": _seconds("Forward, backward and optimiser of policy and critic."),
    "timing/broadcast": _seconds("Weights to the engines, verification included."),
    "timing/label": _seconds("Packing rows; a teacher's distributions, and KTO's anchor."),
    "timing/train": _seconds("Forward, backward and optimiser of a program over labelled rows."),
    "timing/evaluate": _seconds("Measuring the rows held out."),
    "timing/step_total": _seconds("The whole step; less its phases, it is overhead."),
    "perf/rollout_tokens_per_second": Metric(
        unit="tokens/s", reduction="sampled tokens / timing/generation", healthy=_POSITIVE, meaning="Speed of sampling."
    ),
    "perf/train_tokens_per_second": Metric(
        unit="tokens/s",
        reduction="packed tokens / timing/ppo_train, or timing/train",
        healthy=_POSITIVE,
        meaning="Speed of learning; each token once however many epochs.",
    ),
    "perf/peak_memory_gb": Metric(
        unit="GB",
        reduction="maximum so far, sampled every 2 s, sum over all processes of the run",
        healthy=_POSITIVE,
        meaning="Host memory (10^9 bytes), shared pages counted once.",
    ),
    "perf/sync_ms": Metric(unit="ms", reduction=_STEP, healthy=_NOT_NEGATIVE, meaning="Handing the weights over; verification included."),
    "sync/canary_abs_diff_max": Metric(
        unit="nats",
        reduction="maximum over the canary's tokens",
        healthy=Range(low=0, high=0.05),
        meaning="|engine - learner| on the canary prompt after the weights were handed over; above the tolerance the run stops.",
    ),
}

PREFIXES: dict[str, Metric] = {
    EXTRA_PREFIX: Metric(
        unit="its own", reduction=_SAMPLES, meaning="A key of the reward function's or environment's `extra_logs`; `turns` of an episode."
    ),
}


def describe(name: str) -> Metric | None:
    """The entry of a metric's name, or None where the table has none."""
    if name in METRICS:
        return METRICS[name]
    return next((metric for prefix, metric in PREFIXES.items() if name.startswith(prefix) and len(name) > len(prefix)), None)


def check_names(metrics: Iterable[str]) -> None:
    """Refuse names that the table does not hold. Raises ValueError naming all of them and the nearest that exist."""
    unknown = sorted(name for name in metrics if describe(name) is None)
    if unknown:
        near = {name: difflib.get_close_matches(name, METRICS, n=1) for name in unknown}
        listed = ", ".join(f"{name!r}" + (f" (near: {near[name][0]})" if near[name] else "") for name in unknown)
        raise ValueError(
            f"metrics without an entry in hone.launch.observe.metrics.METRICS: {listed}; add them there, then regenerate docs/metrics.md"
        )


def is_healthy(name: str, value: float | int) -> bool:
    """Whether a value lies in its metric's healthy range; NaN never does where there is a range."""
    metric = describe(name)
    return metric is None or metric.healthy is None or value in metric.healthy


def metrics_page() -> str:
    """The text of docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "<!-- Generated: python -m hone.launch.observe.metrics > docs/metrics.md -->",
        "",
        "One line of `metrics.jsonl` in the run directory is one step; these are its keys. A value that is not finite is written as",
        'the text `"nan"`, `"inf"` or `"-inf"`, and `events.jsonl` names it. Values outside the healthy range are marked in the',
        "display and listed in `report.md`; the ranges are where to begin looking, not limits that stop a run.",
        "",
        "| name | unit | reduction | healthy | meaning |",
        "|---|---|---|---|---|",
    ]
    named = METRICS | {f"{prefix}<key>": metric for prefix, metric in PREFIXES.items()}
    for name, metric in named.items():
        cells = (f"`{name}`", metric.unit, metric.reduction, "" if metric.healthy is None else str(metric.healthy), metric.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(metrics_page(), end="")
