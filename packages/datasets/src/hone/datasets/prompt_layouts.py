"""Which column holds the prompt and which the label: the layouts of OpenRLHF, verl and TRL, and of the files of GSM8K and MATH.

Recognised by the columns of the first row; where two have the same columns, by a mark in the answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PromptLayout:
    """The columns of the prompt and the label (a name, or a path into an object).

    A row `needs` all of its columns to have the layout, and its label must hold the `mark`. `reward` is the built-in grader
    that reads such labels.
    """

    name: str
    prompt: str
    needs: frozenset[str]
    label: str | None = None
    mark: str = ""
    reward: str | None = None

    def fits(self, row: Mapping[str, object]) -> bool:
        """Whether a row has this layout."""
        return self.needs <= row.keys() and (not self.mark or self.mark in str(value_at(row, str(self.label))))


PROMPT_LAYOUTS = (
    PromptLayout(name="OpenRLHF", prompt="input", needs=frozenset({"input"})),
    PromptLayout(
        name="verl", prompt="prompt", label="reward_model.ground_truth", needs=frozenset({"prompt", "data_source", "reward_model"})
    ),
    PromptLayout(name="TRL", prompt="prompt", needs=frozenset({"prompt"})),
    PromptLayout(name="messages", prompt="messages", needs=frozenset({"messages"})),
    PromptLayout(
        name="GSM8K", prompt="question", label="answer", needs=frozenset({"question", "answer"}), mark="####", reward="builtin:gsm8k"
    ),
    PromptLayout(
        name="MATH", prompt="problem", label="solution", needs=frozenset({"problem", "solution"}), mark="\\boxed", reward="builtin:math"
    ),
)
"""In the order they are tried."""

MISSING = object()
"""What `value_at` gives where a row has no such column."""


def recognise(row: Mapping[str, object]) -> PromptLayout | None:
    """The first layout that a row has."""
    return next((layout for layout in PROMPT_LAYOUTS if layout.fits(row)), None)


def value_at(columns: Mapping[str, object], name: str) -> object:
    """A row's value under a column's name, or under a path into objects; MISSING where there is none."""
    if name in columns:
        return columns[name]
    value: object = columns
    for step in name.split("."):
        if not isinstance(value, Mapping) or step not in value:
            return MISSING
        value = value[step]
    return value
