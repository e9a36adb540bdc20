"""Was an update really applied? Version, bytes, and what the engine now says about a canary.

Each check sees what the others cannot: the version a forgotten call, the fingerprints a lost or altered tensor, the
canary (log-probabilities of a fixed sequence) everything behind the loader: packed copies, tied heads, a no-op update.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hone.rollout.errors import StaleWeights

# A canary that did not move at all, while the learner's moved this many times what the two usually differ by, was not updated.
_STOOD_STILL = 10.0
_ROUNDING = 1e-6  # [nats], what the two differ by at the very least
_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class Canary:
    """Log-probabilities [nats] of the canary's tokens under one version: the learner's and the engine's."""

    version: int
    learner: tuple[float, ...]
    engine: tuple[float, ...]


def tolerance(dtype: str, configured: float | None = None) -> float:
    """Largest allowed difference of the canary's log-probabilities [nats]: as configured, else 1e-3 in fp32, 0.02 in fp16, 0.1 in bf16."""
    return configured if configured is not None else {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}[dtype]


def canary_tokens(vocab_size: int, seed: int, length: int) -> list[int]:
    """`length` token ids, uniform over the vocabulary, the same for the same seed on every machine."""
    return [random.Random(f"canary {seed} {index}").randrange(vocab_size) for index in range(length)]


def verify(
    *,
    engine: str,
    expected_version: int,
    engine_version: int,
    sent: Mapping[str, str],
    received: Mapping[str, str],
    canary_learner: Sequence[float],
    canary_engine: Sequence[float],
    tolerance: float,
    previous: Canary | None = None,
    suspects: Sequence[str] = (),
) -> float:
    """Largest difference of the canary's log-probabilities [nats], or StaleWeights naming the engine and what is stale.

    `previous` is the canary of the version before (of this engine); `suspects` are parameters that an engine says it
    cannot vouch for, named when the bytes agree and the canary does not.
    """
    remedy = "the run must not go on with it: restart it from its last checkpoint"
    if engine_version != expected_version:
        raise StaleWeights(
            f"engine {engine} serves version {engine_version} after the update to version {expected_version}; {remedy}, "
            "and look for an update that failed before its finish"
        )
    missing = [name for name in sent if name not in received]
    differing = [name for name in sent if name in received and received[name] != sent[name]]
    unknown = [name for name in received if name not in sent]
    if missing or differing or unknown:
        parts = [("never arrived", missing), ("arrived altered", differing), ("arrived unsent", unknown)]
        found = "; ".join(f"{_some(names)} {what}" for what, names in parts if names)
        raise StaleWeights(f"engine {engine}, version {expected_version}: of {len(sent)} tensors sent, {found}; {remedy}")
    gap = _largest(canary_learner, canary_engine)
    still = previous is not None and _stood_still(previous, canary_learner, canary_engine)
    if gap <= tolerance and not still:
        return gap
    raise StaleWeights(
        f"engine {engine}, version {expected_version}: all {len(sent)} tensors arrived intact, yet its log-probabilities on the "
        f"canary differ from the learner's by up to {gap:.3g} nats (tolerance {tolerance:g}); "
        f"{_diagnosis(previous, canary_engine, tolerance=tolerance, still=still, suspects=suspects)}; {remedy}"
    )


def _largest(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest |one - other| [nats]; infinite when the lengths differ or an entry is not a number."""
    if len(one) != len(other) or not one:
        return float("inf")
    differences = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return max((d if d == d else float("inf")) for d in differences)


def _stood_still(previous: Canary, learner: Sequence[float], engine: Sequence[float]) -> bool:
    """True when the engine answers to the bit as before, though the learner moved well beyond what the two differ by."""
    noise = max(_largest(previous.learner, previous.engine), _ROUNDING)
    return tuple(engine) == previous.engine and _largest(previous.learner, learner) > _STOOD_STILL * noise


def _diagnosis(previous: Canary | None, engine: Sequence[float], *, tolerance: float, still: bool, suspects: Sequence[str]) -> str:
    """What the canary says about how the update failed."""
    if previous is not None and (still or _largest(previous.learner, engine) <= tolerance):
        return f"it still answers like version {previous.version}: the update reported success and changed nothing"
    partly = "" if previous is None else f"it does not answer like version {previous.version} either, so only a part was applied; "
    return f"{partly}most suspect: {_some(suspects) if suspects else 'none known'}"


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
