"""JSON that others wrote, read no deeper than whatever writes it again can follow."""

import json
from typing import Any

_DEEPEST = 100


def read_json(text: str | bytes) -> Any:
    """What the text spells. Raises ValueError, also for what is nested more than a hundred levels deep."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())]
        if not level:
            return value
    raise ValueError(f"it is nested more than {_DEEPEST} levels deep")
