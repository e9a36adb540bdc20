"""Which column holds the prompt and which the label: the layouts of OpenRLHF, verl and TRL, recognised by the columns a row has."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PromptLayout:
    """The columns of the prompt and the label (a name, or a path into an object); a row `needs` all of those to have it."""

    name: str
    prompt: str
    label: str | None = None
    needs: frozenset[str] = frozenset()


PROMPT_LAYOUTS = (
    PromptLayout(name="OpenRLHF", prompt="input", needs=frozenset({"input"})),
    PromptLayout(
        name="verl", prompt="prompt", label="reward_model.ground_truth", needs=frozenset({"prompt", "data_source", "reward_model"})
    ),
    PromptLayout(name="TRL", prompt="prompt", needs=frozenset({"prompt"})),
    PromptLayout(name="messages", prompt="messages", needs=frozenset({"messages"})),
)
"""In the order they are tried."""

MISSING = object()
"""What `value_at` gives where a row has no such column."""


def recognise(found: Collection[str]) -> PromptLayout | None:
    """The first layout that a row with the columns `found` has."""
    return next((layout for layout in PROMPT_LAYOUTS if layout.needs <= set(found)), None)


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
