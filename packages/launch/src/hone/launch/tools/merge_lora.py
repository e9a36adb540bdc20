"""`launch merge-lora MODEL ADAPTER OUT`: one model directory out of a model and an adapter."""

from collections.abc import Sequence
from pathlib import Path

from hone.launch.errors import Problem, UsageError
from hone.launch.tools.words import new_place, read

USAGE = "launch merge-lora MODEL ADAPTER OUT [--param-dtype fp32|bf16|fp16]"


def run(words: Sequence[str]) -> int:
    """Merge; returns the exit code. Raises UsageError, ModelError."""
    asked = read(words, places=("MODEL", "ADAPTER", "OUT"), options=("--param-dtype",), switches=(), usage=USAGE)
    new_place(asked["OUT"], where="argument 4")
    from hone.learner.merge import merge  # torch, from here on
    from hone.learner.roles import DTYPES

    dtype = asked.get("--param-dtype")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError([Problem(what=f"there is no number format {dtype}", mend=f"one of {', '.join(DTYPES)}", where="--param-dtype")])
    task = merge(asked["MODEL"], Path(asked["ADAPTER"]), Path(asked["OUT"]), dtype=None if dtype is None else DTYPES[dtype])
    print(f"{asked['MODEL']} with {asked['ADAPTER']} merged in ({task}) is in {asked['OUT']}")
    return 0
