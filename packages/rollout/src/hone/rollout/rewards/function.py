"""Finding a reward function: a Python file or a dotted module that defines `reward_func(queries, prompts, labels)`.

`check_reward_file` judges the source as it lies there, without running it (configuration time); `load` runs it (in a
worker process of the pool). Both raise a RewardError that says what, where and how to mend.
"""

import ast
import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from hone.rollout.errors import RewardError

NAME = "reward_func"
PARAMETERS = ("queries", "prompts", "labels")
EXPECTED = f"def {NAME}({', '.join(PARAMETERS)})"

_MODULE_NAME = "hone_reward_file"


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """A loaded reward function; `where` is its name for messages, "reward_func (file:line)"."""

    call: Callable[..., object]
    by_name: bool
    where: str
    path: Path | None

    def __call__(self, queries: list[str], prompts: list[str], labels: list[object]) -> object:
        """Whatever the user's function returns; `result.checked` judges that."""
        if self.by_name:
            return self.call(queries=queries, prompts=prompts, labels=labels)
        return self.call(queries, prompts, labels)


def check_reward_file(source: str) -> None:
    """RewardError unless `source` exists, parses, and defines a `reward_func` that can be called; runs none of it."""
    path = locate(source)
    if path is None:
        return
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
    definition = None
    names: list[str] = []
    for node in _top_level(tree.body):
        for name in _bound_names(node):
            names.append(name)
            definition = node if name == NAME else definition
    if definition is None and "*" not in names:
        raise RewardError(_missing(str(path), names))
    where = f"{path}:{getattr(definition, 'lineno', 1)}"
    if isinstance(definition, ast.AsyncFunctionDef):
        raise RewardError(_coroutine(where))
    # A decorator may change the signature, so that only the loaded function can tell.
    if isinstance(definition, ast.FunctionDef) and not definition.decorator_list:
        _called_by_name(_signature(definition.args), where)


def locate(source: str) -> Path | None:
    """The file of `source`, a path or a dotted module (None for a module without a source file); RewardError if there is none."""
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
    """Run the file or import the module, and find its `reward_func`; RewardError if it cannot be run, found or called."""
    path = locate(source)
    try:
        module = _run(path) if _is_path(source) and path else importlib.import_module(source)
    # The user's code may raise anything, SystemExit included; it is passed on by name.
    except BaseException as error:
        raise RewardError(f"reward file {path or source} does not load: {described(error, path)}; mend it and start again") from error
    call = getattr(module, NAME, None)
    if call is None:
        raise RewardError(_missing(str(path or source), [name for name, value in vars(module).items() if inspect.isfunction(value)]))
    if not callable(call):
        raise RewardError(f"{NAME} in {path or source} is {call!r} ({type(call).__name__}), not a function; expected {EXPECTED}")
    code = getattr(inspect.unwrap(call), "__code__", None)
    position = f"{code.co_filename}:{code.co_firstlineno}" if code else str(path or source)
    if inspect.iscoroutinefunction(call):
        raise RewardError(_coroutine(position))
    try:
        signature = inspect.signature(call)
    except ValueError:  # a function written in C may not have one
        by_name = False
    else:
        by_name = _called_by_name(signature, position)
    return RewardFunction(call=call, by_name=by_name, where=f"{NAME} ({position})", path=path)


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


def _called_by_name(signature: inspect.Signature, where: str) -> bool:
    """False: call with three positions, as OpenRLHF does; True: by name only; RewardError if neither fits."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [parameter.name for parameter in signature.parameters.values() if parameter.kind in kinds][: len(PARAMETERS)]
    swapped = any(name in PARAMETERS and name != PARAMETERS[index] for index, name in enumerate(positional))
    for by_name in (False, True):
        try:
            signature.bind(**dict.fromkeys(PARAMETERS)) if by_name else signature.bind(*PARAMETERS)
        except TypeError:
            continue
        if not swapped:
            return by_name
    raise RewardError(f"reward function {where} is {NAME}{signature}, which cannot be called as expected; write {EXPECTED}")


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


def _missing(where: str, names: list[str]) -> str:
    near = difflib.get_close_matches(NAME, names, n=1)
    remedy = f"rename {near[0]} to {NAME}, or add" if near else "add"
    return f"reward file {where} defines no {NAME} (it defines {', '.join(names) or 'nothing'}); {remedy} {EXPECTED}"


def _coroutine(where: str) -> str:
    return f"reward function {where} is a coroutine function (async def), which is not called here; write a plain {EXPECTED}"
