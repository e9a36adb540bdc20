"""Finding an agent in a user's file: an environment (`AgentInstance` or `AgentExecutor` as OpenRLHF has them, or `make_env` with one
of any protocol of `adapting`), or what owns its loop and asks the endpoint (a function `agent`, TRL's `environment_factory`).

`check_agent_file` reads the source as it lies there, without running it (configuration time); `load` runs it.
"""

import ast
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from hone.rollout.agents.adapting import adapted
from hone.rollout.agents.calling import FunctionAgent
from hone.rollout.agents.openrlhf import MultiTurnAgentExecutor, OpenRLHFEnv
from hone.rollout.agents.trl import ToolLoop
from hone.rollout.env import Env
from hone.rollout.errors import EnvironmentFailure

NAMES = ("make_env", "AgentInstance", "AgentExecutor", "agent", "environment_factory")
EXPECTED = (
    "`class AgentInstance` with reset and step, `class AgentExecutor(MultiTurnAgentExecutor)`, `def make_env()`, "
    "`def agent(base_url, api_key, model, row)`, or `environment_factory` as TRL has it"
)
_ONE_OF_OPENRLHF = {"AgentInstance", "AgentExecutor"}

_MODULE = "hone_agent_file"


@dataclass(frozen=True, kw_only=True)
class Agent:
    """A loaded file: `make` gives an Env for each episode, `where` is its name for messages."""

    make: Callable[[], Env]
    where: str


def check_agent_file(source: str) -> None:
    """EnvironmentFailure unless the file exists, parses and defines one of `NAMES`; runs none of it."""
    path = _located(source)
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        raise EnvironmentFailure(f"agent file {path}:{error.lineno or 1} has a syntax error: {error.msg}; mend that line") from error
    except (OSError, ValueError) as error:
        raise EnvironmentFailure(f"agent file {path} cannot be read as Python source: {error}; give a text file with {EXPECTED}") from error
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    imported = {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assigned = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if not {*names, *imported, *assigned} & set(NAMES):
        raise EnvironmentFailure(f"agent file {path} defines none of {', '.join(NAMES)}; write {EXPECTED}")


def load(source: str) -> Agent | FunctionAgent:
    """Run the file and find its environment, or its agent; EnvironmentFailure if it does not load or has none."""
    path = _located(source)
    sys.path.insert(0, str(path.parent))  # as for a script: modules beside the file can be imported
    module = ModuleType(_MODULE)
    module.__file__ = str(path)
    sys.modules[_MODULE] = module
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except BaseException as error:
        raise EnvironmentFailure(
            f"agent file {path} does not load: {type(error).__name__}: {error}; mend it. A file for OpenRLHF imports its base classes from "
            "hone.rollout.agents.openrlhf here"
        ) from error
    found = [name for name in NAMES if getattr(module, name, None) is not None]
    if len(found) > 1 and not set(found) <= _ONE_OF_OPENRLHF:
        raise EnvironmentFailure(f"agent file {path} defines {' and '.join(found)}, which are different ways to act; keep one")
    if callable(make := getattr(module, "make_env", None)):
        return Agent(make=partial(_made, make, path), where=f"make_env ({path})")
    if callable(function := getattr(module, "agent", None)):
        return FunctionAgent(function=function, where=f"agent ({path})")
    factory = getattr(module, "environment_factory", None)
    if callable(factory) or isinstance(factory, Mapping):
        return FunctionAgent(function=ToolLoop(factory, path=path).play, where=f"environment_factory ({path})")
    executor = getattr(module, "AgentExecutor", None)
    instance: Any = getattr(module, "AgentInstance", None)
    if isinstance(executor, type) and issubclass(executor, MultiTurnAgentExecutor):
        instance = executor().agent_instance_cls  # pyright: ignore[reportCallIssue] - a subclass takes no argument
    elif executor is not None and instance is None:
        raise EnvironmentFailure(
            f"agent file {path} has an AgentExecutor that is no MultiTurnAgentExecutor of hone.rollout.agents.openrlhf; an executor that "
            "drives the engine itself is not supported: write an AgentInstance"
        )
    if instance is None:
        raise EnvironmentFailure(f"agent file {path} defines none of {', '.join(NAMES)}; write {EXPECTED}")
    if not callable(getattr(instance, "step", None)):
        raise EnvironmentFailure(f"AgentInstance in {path} has no step; write {EXPECTED}")
    return Agent(make=partial(_instance, instance, path), where=f"AgentInstance ({path})")


def _instance(instance: Callable[[], Any], path: Path) -> Env:
    try:
        return OpenRLHFEnv(instance())
    except Exception as error:
        raise EnvironmentFailure(
            f"AgentInstance in {path} cannot be made: {type(error).__name__}: {error}; one is made for each episode, without arguments"
        ) from error


def _made(make: Callable[[], object], path: Path) -> Env:
    try:
        made = make()
    except Exception as error:
        raise EnvironmentFailure(
            f"make_env in {path} raised {type(error).__name__}: {error}; it is called for each episode, without arguments: mend it"
        ) from error
    return adapted(made, where=f"make_env in {path}")


def _located(source: str) -> Path:
    path = Path(source).expanduser().absolute()
    if not path.is_file():
        raise EnvironmentFailure(f"agent file {path} does not exist or is no file; give a Python file with {EXPECTED}")
    return path
