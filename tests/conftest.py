"""What whole runs of several test folders share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from hone.launch.processes import prepare_environment

settings.register_profile("hone", deadline=None)  # a busy machine is no fault of what is tested
settings.load_profile("hone")
prepare_environment()  # before any test imports Ray, which looks at its environment once


_HERE = Path(__file__).parent
HEAVY = (
    *("golden/test_curves", "golden/test_offline_curves"),
    *(f"launch/test_{name}" for name in ("adapter_run", "agent_run", "async_run", "called_agent_run", "chat", "cluster_resume")),
    *(f"launch/test_{name}" for name in ("cluster_run", "faults", "generate", "images", "loop_runs", "ray_start", "remote_engine")),
    *(f"launch/test_{name}" for name in ("resume", "road", "serve_rm", "student_samples")),
    *(f"learner/test_{name}" for name in ("checkpoint_resume", "compiled", "engines", "exports", "half_ranks", "model_ranks", "muon")),
    *(f"learner/test_{name}" for name in ("offline_ranks", "one_step", "ranks", "ring_flash", "ring_ranks", "vision_ranks")),
    *(f"rollout/test_{name}" for name in ("endpoint_exact", "images", "load", "pausing", "sync_faults", "tolerance", "vllm_engine")),
    *(f"rollout/test_{name}" for name in ("vllm_sampling", "ways", "weight_sync")),
)
"""Files whose tests start engines, several ranks, or a crowd: with `-n` one worker runs them all in turn, and the others the rest."""


def _is_heavy(path: Path) -> bool:
    return path.with_suffix("").relative_to(_HERE).as_posix() in HEAVY


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Heavy files first."""
    assert not (lost := [name for name in HEAVY if not (_HERE / f"{name}.py").exists()]), lost
    items.sort(key=lambda item: not (item.path.is_relative_to(_HERE) and _is_heavy(item.path)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Every file to one worker, since its tests share what is slow to make; all heavy files to one.

    A scheduler of ours because pytest-xdist's own groups do nothing with pytest 9.2 (it writes them into an attribute that pytest has
    ceased to read).
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::", 1)[0]
            return "heavy" if _is_heavy(config.rootpath / path) else path

    return ByFile(config, log)


@pytest.fixture(scope="session")
def hone_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the session's own, so that the built-in model is really made here."""
    cache = tmp_path_factory.mktemp("hone-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HONE_CACHE", str(cache))
        yield cache
