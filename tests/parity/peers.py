"""The peers' released packages, imported from `.peers/` without their dependencies: bare arithmetic, nothing else of theirs.

Everything they import besides torch, numpy, packaging and the standard library is replaced by stand-ins while they load, and
`sys.modules`, the environment and the import path are as before afterwards. Stand-ins answer any question while a peer loads
(a base class, a decorator, a flag that says no) and raise when they are called later: a test that runs through one fails,
unless it puts a fake of its own in that place, by name.
"""

import importlib
import importlib.abc
import importlib.machinery
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / ".peers"
RELEASES: dict[str, str] = dict(re.findall(r"^(\w+)==(\S+)", (Path(__file__).parent / "requirements.txt").read_text(), flags=re.MULTILINE))
"""The peers and their versions, as `just peers` installs them."""

STANDING_IN = frozenset(
    {"PIL", "accelerate", "aiohttp", "datasets", "deepspeed", "flash_attn", "huggingface_hub", "pandas", "peft", "pylatexenc", "ray"}
    | {"requests", "rich", "torchdata", "tqdm", "transformers", "vllm"}
)
"""Top-level packages the peers import and none of their arithmetic needs."""

_loading = False


class StandInCalledError(Exception):
    """A peer's function reached something outside its own package."""


class _Meta(type):
    """Makes a class answer as whatever a peer takes it for while it loads."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(f"{cls.__qualname__}.{name}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "_stand_in" not in vars(cls):
            return super().__call__(*args, **kwargs)
        if not _loading:
            raise StandInCalledError(f"{cls.__qualname__} is a stand-in; give the test a fake of it")
        # As a decorator it leaves what it decorates alone.
        if len(args) == 1 and not kwargs and callable(args[0]) and not isinstance(args[0], _Meta):
            return args[0]
        return _stand_in(f"{cls.__qualname__}()")

    def __bool__(cls) -> bool:
        return "_stand_in" not in vars(cls)

    def __add__(cls, other: Any) -> Any:
        return other


def _stand_in(name: str) -> type:
    return _Meta(name.rpartition(".")[2], (), {"_stand_in": True, "__qualname__": name, "__module__": __name__})


class _Module(ModuleType):
    __path__: Sequence[str] = []
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the peers in `.peers/` and nowhere else, and stand-ins for what they depend on."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        top = name.partition(".")[0]
        if name in RELEASES:
            # The directory is never put on sys.path: one of the peers brings a top-level package named "tests".
            return importlib.machinery.PathFinder.find_spec(name, [str(DIRECTORY)])
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if top in STANDING_IN else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _stand_ins() -> Iterator[None]:
    global _loading
    ours = STANDING_IN | set(RELEASES)
    hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ours}
    environment = dict(os.environ)
    for name in hidden:
        del sys.modules[name]
    before = set(sys.modules)
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    _loading = True
    compiler = torch.compile
    torch.compile = lambda function: function
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.compile = compiler
        _loading = False
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
            del sys.modules[name]
        sys.modules.update(hidden)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
    # Some other package, first imported just now, would keep what it was given.
    kept = {name for name in set(sys.modules) - before for value in vars(sys.modules[name]).values() if isinstance(value, _Meta | _Module)}
    assert not kept, f"{kept} hold stand-ins; import them before the peers, or let them be stood in for"


def load(*names: str) -> list[ModuleType]:
    """The peers' modules of these names, loaded together."""
    with _stand_ins():
        return [importlib.import_module(name) for name in names]
