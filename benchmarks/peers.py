"""Peers' own functions, loaded from an unpacked wheel; never part of the environment, never vendored.

    uv run just peers

Without it, tests that name the peer are skipped with that line.
"""

import functools
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

PEERS = Path(__file__).parent.parent / ".peers"
OPENRLHF = "0.11.2"


@functools.cache
def openrlhf(file: str, *, without: tuple[str, ...] = ()) -> ModuleType:
    """A module of OpenRLHF by its path, with empty modules in place of those it imports and the wanted functions do not use."""
    if not (PEERS / f"openrlhf-{OPENRLHF}.dist-info").is_dir():
        pytest.skip("the peer is not here; uv run just peers")
    path = PEERS / "openrlhf" / file
    spec = importlib.util.spec_from_file_location("peer_" + path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    absent = [name for name in without if name not in sys.modules]
    sys.modules.update({name: ModuleType(name) for name in absent})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a peer's warnings are not ours to mend
            spec.loader.exec_module(module)
    finally:
        for name in absent:
            del sys.modules[name]
    return module
