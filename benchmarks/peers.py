"""OpenRLHF's own functions, run from the released package in `.peers/`, where that is present; it is never vendored here.

Only what the functions themselves touch is loaded: no deepspeed, no ray. Without the package the benchmarks take the same
forms written from the formulas, and say so.
"""

import ast
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

PEERS = Path(__file__).parents[1] / ".peers"
OPENRLHF = PEERS / "openrlhf"
WRITTEN_HERE = "written from the formula"


def openrlhf_release() -> str:
    """For `extra_info`: which code the peer is."""
    (release,) = {found.version for found in distributions(path=[str(PEERS)]) if found.name == "openrlhf"} or {"of unknown release"}
    return f"OpenRLHF {release}, its own code"


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
    """`openrlhf.models.loss.PolicyLoss`."""
    if not (OPENRLHF / "models" / "loss.py").exists():
        return None
    package = ModuleType("openrlhf_models")
    package.__path__ = [str(OPENRLHF / "models")]
    sys.modules[package.__name__] = package
    absent = "deepspeed" not in sys.modules
    if absent:
        sys.modules["deepspeed"] = ModuleType("deepspeed")  # a neighbour in its helpers' module wants it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of what the module compiles as it loads
            return import_module("openrlhf_models.loss").PolicyLoss
    finally:
        if absent:
            del sys.modules["deepspeed"]
