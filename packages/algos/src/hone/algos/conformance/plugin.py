"""The laws as a pytest plugin: `pytest -p hone.algos.conformance.plugin`, or `pytest_plugins` in the root conftest.py.

A test that asks for `loss_law`, `clip_law` (for losses that clip as PPO does), `step_law`, `kl_law`, `logp_law`,
`whitening_law`, `group_law` or `return_law` runs once per law of that kind and calls it with the function under test.
`@pytest.mark.conformance` changes what is asked of it: `without={"on-policy gradient": "a supervised loss"}` leaves laws
out, each with its reason; `reduction=` is the example's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from hone.algos.conformance import LAWS
from hone.algos.conformance.case import example

NEEDS_A_CASE = ("loss", "clip", "step")


def pytest_configure(config: pytest.Config) -> None:
    """Announce the marker, so that --strict-markers accepts it."""
    config.addinivalue_line("markers", "conformance(without, reduction): laws to leave out with the reason; how the loss reduces")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per law of the kinds a test asks for. A law left out that does not exist is an error."""
    marker = metafunc.definition.get_closest_marker("conformance")
    settings: dict[str, Any] = dict(marker.kwargs) if marker else {}
    without: dict[str, str] = settings.pop("without", {})
    reduction = settings.pop("reduction", None)
    kinds = [kind for kind in LAWS if f"{kind}_law" in metafunc.fixturenames]
    known = {name for kind in kinds for name in LAWS[kind]}
    if strange := [*settings, *(set(without) - known)]:
        raise pytest.UsageError(f"mark.conformance of {metafunc.definition.name} knows no {sorted(strange)}; the laws are {sorted(known)}")
    for kind in kinds:
        laws: list[Any] = []
        for name, law in LAWS[kind].items():
            bound: Callable[..., None] = partial(law, case=example(reduction=reduction)) if kind in NEEDS_A_CASE else law
            marks = [pytest.mark.skip(reason=without[name])] if name in without else []
            laws.append(pytest.param(bound, id=name, marks=marks))
        metafunc.parametrize(f"{kind}_law", laws)
