"""Peers' own functions, run from the released packages in `.peers/`; never part of the environment, never vendored.

    uv run just peers

Only what the functions themselves touch is loaded: no deepspeed, no ray. Without the packages, benchmarks that have the same
form written from the formula take that, and say so; those that have only the peer are skipped with the line above.
"""

import ast
import functools
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import pytest
import torch

PEERS = Path(__file__).parents[1] / ".peers"
OPENRLHF = PEERS / "openrlhf"
WRITTEN_HERE = "written from the formula"


def openrlhf_release() -> str:
    """For `extra_info`: which code the peer is."""
    (release,) = {found.version for found in distributions(path=[str(PEERS)]) if found.name == "openrlhf"} or {"of unknown release"}
    return f"OpenRLHF {release}, its own code"


@functools.cache
def openrlhf(file: str, *, without: tuple[str, ...] = ()) -> ModuleType:
    """A module of OpenRLHF by its path, with empty modules in place of those it imports and the wanted functions do not use.

    Its neighbours come with it where it imports them; the files that run when a package is imported do not.
    """
    if not (OPENRLHF / file).exists():
        pytest.skip("the peer is not here; uv run just peers")
    path = PurePosixPath(file)
    package = ModuleType("_".join(["peer_openrlhf", *path.parent.parts]))
    package.__path__ = [str(OPENRLHF / path.parent)]
    sys.modules.setdefault(package.__name__, package)
    absent = [name for name in without if name not in sys.modules]
    sys.modules.update({name: ModuleType(name) for name in absent})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a peer's warnings are not ours to mend
            return import_module(f"{package.__name__}.{path.stem}")
    finally:
        for name in absent:
            del sys.modules[name]


def openrlhf_gae() -> Callable[..., Any] | None:
    """`RemoteExperienceMaker.get_advantages_and_returns(self, values, rewards, action_mask, gamma, lambd)`."""
    file = OPENRLHF / "trainer" / "ppo_utils" / "experience_maker.py"
    if not file.exists():
        return None
    # Its module wants ray and vllm; the method wants torch.
    name = "get_advantages_and_returns"
    (method,) = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef) and node.name == name)
    scope: dict[str, Any] = {"torch": torch, "Tuple": tuple}
    exec(compile(ast.Module([method], []), str(file), "exec"), scope)
    return scope[name]


def openrlhf_policy_loss() -> type[torch.nn.Module] | None:
    """`openrlhf.models.loss.PolicyLoss`; a neighbour in its helpers' module wants deepspeed."""
    file = "models/loss.py"
    return openrlhf(file, without=("deepspeed",)).PolicyLoss if (OPENRLHF / file).exists() else None
