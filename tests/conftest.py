"""What whole runs of several test folders share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from hone.launch.processes import prepare_environment

settings.register_profile("hone", deadline=None)  # a busy machine is no fault of what is tested
settings.load_profile("hone")
prepare_environment()  # before any test imports Ray, which looks at its environment once


@pytest.fixture(scope="session")
def hone_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the session's own, so that the built-in model is really made here."""
    cache = tmp_path_factory.mktemp("hone-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HONE_CACHE", str(cache))
        yield cache
