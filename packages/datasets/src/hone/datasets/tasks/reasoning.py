"""Procedural tasks of reasoning-gym (the extra `reasoning`): prompts from a seed, and the reward that is the task's own grader.

`--data.prompt-dataset reasoning-gym:chain_sum` (or `...:chain_sum@7`, another seed) with `--reward.remote-url
hone.datasets.tasks.reasoning`. The label is the task's whole entry, which its grader needs.
"""

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from hone.datasets.errors import DataError, did_you_mean
from hone.datasets.lazy import Lazy
from hone.datasets.records import Row, Source

PREFIX = "reasoning-gym:"
ROWS = 10_000
"""Of a task that has as many as one likes."""
ANSWER = re.compile(r"<answer>(.*?)</answer>", flags=re.DOTALL)


def source(name: str, *, max_samples: int) -> Source:
    """The first rows of a task named as `reasoning-gym:TASK[@SEED]`: "prompt", and as "label" the entry.

    Raises DataError: not installed, no such task.
    """
    task, _, typed = name.removeprefix(PREFIX).partition("@")
    if typed and not typed.isdecimal():
        raise DataError(f"the seed of {name!r} is {typed!r}; write a whole number behind the @")
    known = _library()
    if task not in known.factory.DATASETS:
        raise DataError(
            f"reasoning-gym has no task {task!r}; it has {len(known.factory.DATASETS)}{did_you_mean(task, known.factory.DATASETS)}"
        )
    count, seed = min(ROWS, max_samples), int(typed or 0)
    rows = Entries(known.create_dataset(task, seed=seed, size=count), task)
    from importlib.metadata import version

    made_from = f"{task} {seed} {count} {version('reasoning-gym')}"
    return Source(name=name, fingerprint=hashlib.blake2b(made_from.encode(), digest_size=16).hexdigest(), rows=rows)


@dataclass(frozen=True, eq=False)
class Entries(Lazy[Row]):
    """The entries of a task, each made when it is asked for: the library makes entry i from the seed and i alone."""

    dataset: Any
    task: str

    def __len__(self) -> int:
        return len(self.dataset)

    def _at(self, index: int) -> Row:
        entry = self.dataset[index]
        label = {"task": self.task, "question": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}
        return Row(line=index + 1, columns={"prompt": entry["question"], "label": label})


def reward_func(completions: Sequence[str], labels: Sequence[Mapping[str, Any]]) -> list[float]:
    """TRL's form: the task's grade of the text in <answer> tags or, without them, of the whole response."""
    return [grade(completion, label) for completion, label in zip(completions, labels, strict=True)]


def grade(response: str, label: Mapping[str, Any]) -> float:
    """In [0, 1]. Raises ValueError for a label that is no entry of a task."""
    if not isinstance(label, Mapping) or not {"task", "answer", "metadata"} <= label.keys():
        raise ValueError(f"label {str(label)[:80]!r} is no entry of reasoning-gym; use --data.prompt-dataset {PREFIX}TASK")
    found = ANSWER.findall(response)
    return float(_grader(str(label["task"]))((found[-1] if found else response).strip(), dict(label)))


@cache
def _grader(task: str) -> Any:
    return _library().get_score_answer_fn(task)


def _library() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries it brings; they are not ours to mend
            import reasoning_gym
    except ImportError as error:
        raise DataError("reasoning-gym is not installed; pip install 'hone-datasets[reasoning]'") from error
    return reasoning_gym
