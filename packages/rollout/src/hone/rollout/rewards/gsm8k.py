"""The built-in reward `builtin:gsm8k`: 1 where the final answer is the label's number, else 0. Numbers only, and exact.

The label is a number, or a worked answer that ends in "#### 42". An answer that is no number counts as none.
"""

from hone.rollout.errors import RewardError
from hone.rollout.rewards.answers import Number, final_answer, number, same


def grade(answer: str, label: object) -> dict[str, object]:
    """Reward and figures for the text of one response; RewardError where the label holds no number."""
    gold = gold_number(label)
    if gold is None:
        raise RewardError(
            f"the label {str(label)[:200]!r} holds no number; give the answer's column with --data.label-key "
            "(a number, or a worked answer that ends in '#### 42'), or use builtin:math"
        )
    found = final_answer(answer)
    value = None if found is None else number(found)
    right = value is not None and same(value, gold)
    return {"rewards": float(right), "extra_logs": {"answered": float(found is not None), "readable": float(value is not None)}}


def gold_number(label: object) -> Number | None:
    """The number of a label, which may be a number itself; None if there is none."""
    if isinstance(label, bool) or label is None:
        return None
    text = str(label)
    return number(final_answer(text) or text)


def reward_func(queries: list[str], prompts: list[str], labels: list[object]) -> dict[str, object]:
    """OpenRLHF's form."""
    return grade(queries[0].removeprefix(prompts[0]), labels[0])
