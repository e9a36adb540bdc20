"""Finding a reward function: "FILE.py", "FILE.py:name", "package.module[:name]" or "builtin:name".

Without a name it is `reward_func` or, where there is none, `compute_score`. `check_reward_file` judges the source as it
lies there, without running it (configuration time); `load` runs it (in a worker process of the pool). Both raise a
RewardError that says what, where and how to mend.
"""

import ast
import asyncio
import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from hone.rollout.errors import RewardError
from hone.rollout.rewards.forms import EXPECTED, CallingForm, as_result, called, recognised
from hone.rollout.rewards.result import RewardItem

NAMES = ("reward_func", "compute_score")
BUILTIN = {
    "code": "hone.rollout.rewards.code",
    "gsm8k": "hone.rollout.rewards.gsm8k",
    "math": "hone.rollout.rewards.math_grading",
}

_MODULE_NAME = "hone_reward_file"


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """A loaded reward function; `where` is its name for messages, "reward_func (file:line)"."""

    call: Callable[..., object]
    form: CallingForm
    where: str
    path: Path | None
    # One loop for all calls: what a coroutine function keeps (a client, a semaphore) belongs to the loop it was made in.
    runner: asyncio.Runner = field(default_factory=asyncio.Runner)

    def __call__(self, item: RewardItem) -> object:
        """OpenRLHF's dict as far as the function returned one; `result.checked` judges that. A coroutine is run to its end."""
        returned = called(self.call, self.form, item, where=self.where)
        if inspect.iscoroutine(returned):
            returned = self.runner.run(returned)
        return as_result(returned, self.form, where=self.where, prompt_id=item.prompt_id)

    def close(self) -> None:
        """End the loop that coroutines ran in."""
        self.runner.close()


def check_reward_file(source: str) -> None:
    """RewardError unless `source` exists, parses, and defines a reward function that can be called; runs none of it."""
    path = locate(source)
    if path is None:
        return
    asked = _split(source)[1]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RewardError(f"reward file {path} cannot be read: {error.strerror}; make it readable") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(content, filename=str(path))
    except SyntaxError as error:
        raise RewardError(f"reward file {path}:{error.lineno or 1} has a syntax error: {error.msg}; mend that line") from error
    except ValueError as error:
        raise RewardError(f"reward file {path} is not Python source: {error}; give a text file with {EXPECTED}") from error
    definitions = {name: node for node in _top_level(tree.body) for name in _bound_names(node)}
    if "*" in definitions and not definitions.keys() & ({asked} if asked else set(NAMES)):
        return
    name = _chosen(asked, list(definitions), where=str(path))
    definition = definitions[name]
    # A decorator may change the signature, so that only the loaded function can tell.
    if isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef) and not definition.decorator_list:
        recognised(_signature(definition.args), name=name, where=f"{path}:{definition.lineno}")


def _chosen(asked: str | None, names: list[str], *, where: str) -> str:
    """The function to take among `names`; RewardError if there is none, or if two could be meant."""
    found = [name for name in ((asked,) if asked else NAMES) if name in names]
    if len(found) == 1:
        return found[0]
    if found:
        raise RewardError(f"reward file {where} defines both {' and '.join(found)}; name the one that judges: {where}:{found[0]}")
    wanted = asked or NAMES[0]
    near = difflib.get_close_matches(wanted, names, n=1)
    remedy = f"rename {near[0]} to {wanted}, name it ({where}:{near[0]}), or add" if near else "add"
    raise RewardError(f"reward file {where} defines no {wanted} (it defines {', '.join(names) or 'nothing'}); {remedy} {EXPECTED}")


def _split(source: str) -> tuple[str, str | None]:
    """A source without the name of its function, and that name: "dir/file.py:grade" -> ("dir/file.py", "grade")."""
    place, colon, name = source.rpartition(":")
    return (place, name) if colon and name.isidentifier() and not place.startswith("builtin") and ":" not in place else (source, None)


def locate(source: str) -> Path | None:
    """The file of `source`, a path or a dotted module (None for a module without a source file); RewardError if there is none."""
    source, _ = _split(source)
    if source.startswith("builtin:"):
        if (name := source.removeprefix("builtin:")) not in BUILTIN:
            raise RewardError(
                f"there is no built-in reward {name!r}; the built-in ones are {', '.join(f'builtin:{one}' for one in BUILTIN)}"
            )
        source = BUILTIN[name]
    if not _is_path(source):
        try:
            spec = importlib.util.find_spec(source)
        except (ImportError, ValueError):
            spec = None
        if spec is None:
            raise RewardError(
                f"reward function {source!r} is neither a Python file (a path that ends in .py) nor a module that can be found; "
                f"give a file with {EXPECTED}"
            )
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    path = Path(source).expanduser().absolute()
    if path.is_file():
        return path
    if path.exists():
        raise RewardError(f"reward file {path} is a directory, not a Python file; give the file in it with {EXPECTED}")
    if not path.parent.is_dir():
        raise RewardError(f"reward file {path} does not exist, nor does its directory; give the path of a file with {EXPECTED}")
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    hint = f"did you mean {path.parent / near[0]}?" if near else f"give the path of a file with {EXPECTED}"
    raise RewardError(f"reward file {path} does not exist; {hint}")


def load(source: str) -> RewardFunction:
    """Run the file or import the module, and find its function; RewardError if it cannot be run, found or called."""
    path = locate(source)
    place, asked = _split(source)
    try:
        module = _run(path) if _is_path(place) and path else importlib.import_module(BUILTIN.get(place.removeprefix("builtin:"), place))
    except RewardError:
        raise
    # The user's code may raise anything, SystemExit included; it is passed on by name.
    except BaseException as error:
        raise RewardError(f"reward file {path or source} does not load: {described(error, path)}; mend it and start again") from error
    own = [name for name, value in vars(module).items() if inspect.isfunction(value) or name in (*NAMES, asked)]
    name = _chosen(asked, own, where=str(path or source))
    call = getattr(module, name)
    if not callable(call):
        raise RewardError(f"{name} in {path or source} is {call!r} ({type(call).__name__}), not a function; expected {EXPECTED}")
    code = getattr(inspect.unwrap(call), "__code__", None)
    position = f"{code.co_filename}:{code.co_firstlineno}" if code else str(path or source)
    try:
        signature = inspect.signature(call)
    except ValueError:  # a function written in C may not have one
        form = CallingForm(form="openrlhf")
    else:
        form = recognised(signature, name=name, where=position)
    return RewardFunction(call=call, form=form, where=f"{name} ({position})", path=path)


def described(error: BaseException, path: Path | None) -> str:
    """Type, message and file:line of an error; the line in `path` where the error passed through it, else where it was raised."""
    what = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    if isinstance(error, SyntaxError):
        return f"{what} at {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if path is not None and Path(frame.filename) == path]
    frame = (own or list(frames))[-1]
    return f"{what} at {frame.filename}:{frame.lineno}"


def _is_path(source: str) -> bool:
    return source.endswith(".py") or "/" in source or "\\" in source


def _run(path: Path) -> ModuleType:
    # As for a script: modules beside the file can be imported.
    sys.path.insert(0, str(path.parent))
    module = ModuleType(_MODULE_NAME)
    module.__file__ = str(path)
    sys.modules[_MODULE_NAME] = module
    # Not through the import system: it would take a compiled copy of an older file for this one, if both were written
    # within one second and are equally long.
    exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    return module


def _signature(arguments: ast.arguments) -> inspect.Signature:
    """The signature of a function that has only been parsed; a default's value is left as "..."."""
    kinds = inspect.Parameter
    parameters: list[inspect.Parameter] = []
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    for index, argument in enumerate(positional):
        kind = kinds.POSITIONAL_ONLY if index < len(arguments.posonlyargs) else kinds.POSITIONAL_OR_KEYWORD
        parameters.append(kinds(argument.arg, kind, default=kinds.empty if index < required else ...))
    if arguments.vararg:
        parameters.append(kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(kinds(argument.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else ...))
    if arguments.kwarg:
        parameters.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the file is imported, those inside if, try, with and loops included."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for name in ("body", "orelse", "finalbody"):
                yield from _top_level(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from _top_level(handler.body)


def _bound_names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))
