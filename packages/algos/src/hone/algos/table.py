"""The page of algorithms, made from their dataclasses: `python -m hone.algos.table > docs/algorithms.md`."""

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator

from hone.algos.algorithms import ALGORITHMS, OFFLINE
from hone.algos.algorithms.correction import Correction
from hone.algos.algorithms.terms import Clip, KLPenalty
from hone.algos.offline import Offline
from hone.algos.protocol import Algorithm
from hone.algos.reduce import Reduction

INTRODUCTION = """\
# Algorithms

Made by `just docs` from the dataclasses; a test holds page and code together. Every name is a class in
`hone.algos.algorithms`, whose fields are its settings (and, for what the command line offers, its flags under `--algo.`).
A default marked with * is not the paper's, which has none or another: the field's docstring says more. Where peers differ, see
[parity](parity.md).

Clips are how far the ratio may fall below one / rise above it. Settings that all of the first table share and that are off are left
out: `correction` (how samples count for which engine and learner disagree) and `entropy_coef`.
"""


def flattened(config: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every setting of a (nested) dataclass as (dotted name, value); a reduction counts as one."""
    assert dataclasses.is_dataclass(config)
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, Reduction):
            yield from flattened(value, f"{name}.")
        else:
            yield name, value


def references(text: str) -> list[str]:
    """Links to the arXiv ids in a text, in order, each once."""
    found = dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", text))
    return [f"[{number}](https://arxiv.org/abs/{number})" for number in found]


def algorithm_line(algorithm: Algorithm | Offline) -> str:
    """One row: name, what it is, needs, defaults, papers."""
    module = inspect.getdoc(sys.modules[type(algorithm).__module__]) or ""
    idea = module.partition(" Reference:")[0].partition(": ")[2].rstrip(".").replace("\n", " ")
    needs = ", ".join(f"`{name}`" for name in sorted(algorithm.needs)) or "-"
    papers = ", ".join(references(module)) or "-"
    return f"| `{algorithm.name}` | `{type(algorithm).__name__}` | {idea} | {needs} | {_defaults(algorithm)} | {papers} |"


def algorithms_page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    tables = {
        "From what the policy sampled": [algorithm() for algorithm in ALGORITHMS.values()],
        "From labelled rows": [algorithm() for algorithm in OFFLINE.values()],
    }
    for title, table in tables.items():
        head = "| name | class | idea | needs | defaults | papers |\n|---|---|---|---|---|---|"
        parts.append(f"## {title}\n\n{head}\n" + "\n".join(algorithm_line(algorithm) for algorithm in table) + "\n")
    return "\n".join(parts)


def _defaults(algorithm: Algorithm | Offline) -> str:
    shown: list[str] = []
    for field in dataclasses.fields(algorithm):  # pyright: ignore[reportArgumentType] - every algorithm is a dataclass
        value = getattr(algorithm, field.name)
        star = "*" if any(name.split(".")[0] == field.name for name in algorithm.house) else ""
        if isinstance(value, KLPenalty):
            where = "loss" if value.use_loss else "reward"
            shown.append(f"no KL{star}" if value.init_coef == 0 else f"KL{star} {value.init_coef:g} {value.estimator} in the {where}")
        elif isinstance(value, Clip):
            shown.append(f"clip{star} {value.low:g} / {value.high:g}")
        elif isinstance(value, Reduction):
            shown.append(f"by {value.over}" if value.length is None else f"by {value.over} ({value.length})")
        elif not isinstance(value, Correction) and field.name != "entropy_coef":
            inner = flattened(value, f"{field.name}.") if dataclasses.is_dataclass(value) else [(field.name, value)]
            shown += [f"`{name}`{'*' if name in algorithm.house else ''} {_plain(setting)}" for name, setting in inner if setting != ()]
    return ", ".join(shown) or "-"


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.stdout.write(algorithms_page())
