"""Advantages, losses and algorithms for RL post-training, as pure functions on packed tensors.

The names on offer stand in `__init__.pyi`, and are fetched when first used: importing `hone.algos` or its `ranges` loads no torch.
"""

import re
from importlib import import_module
from pathlib import Path

_OFFER = Path(__file__).with_suffix(".pyi").read_text()
_HOMES = {name: home for home, name in re.findall(r"^from (\S+) import (\w+) as \2$", _OFFER, flags=re.MULTILINE)}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'hone.algos' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
