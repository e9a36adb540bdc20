"""The gate before learning: a batch that engine and learner disagree on by too much ends the run, and nothing is learnt from it."""

from hone.algos.batch import Batch
from hone.launch.measure import mismatch_metrics
from hone.launch.suspect import suspect


class GapExceeded(Exception):
    """Engine and learner are further apart than `rollout.max_gap`; `evidence` is what is written down of it."""

    def __init__(self, message: str, evidence: dict[str, object]) -> None:
        super().__init__(message)
        self.evidence = evidence


def check_gap(batch: Batch, *, version: int, limit: float | None) -> None:
    """Raises GapExceeded where |rollout_logp - old_logp|, averaged over action tokens, is above `limit` [nats] or no number.

    version: the learner's, of which `old_logp` is; limit: None lets everything pass.
    """
    if limit is None:
        return
    gaps = mismatch_metrics(batch)
    mean, largest = gaps["mismatch/logp_abs_diff_mean"], gaps["mismatch/logp_abs_diff_max"]
    if mean <= limit:
        return
    cause = suspect(batch, version=version, limit=limit)
    step, tokens = version + 1, int(batch.action_mask.sum())
    raise GapExceeded(
        f"step {step}: engine and learner are {mean:.3g} nats apart on average over {tokens} action tokens ({largest:.3g} at most), and "
        f"rollout.max_gap is {limit:g}; nothing was learnt from this step\n"
        f"suspect: {cause.name.replace('_', ' ')}: {cause.why}\n"
        "fix: what the suspect names, or raise --rollout.max-gap if this gap is to be learnt with",
        {"step": step, "gap": mean, "largest": largest, "limit": limit, "suspect": cause.name, "why": cause.why},
    )
