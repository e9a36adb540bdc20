"""What whole runs of several test folders share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from hone.launch.processes import prepare_environment

settings.register_profile("hone", deadline=None)  # a busy machine is no fault of what is tested
settings.load_profile("hone")
prepare_environment()  # before any test imports Ray, which looks at its environment once


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Heavy files first, and every file to one worker, since its tests share what is slow to make."""
    here = Path(__file__).parent
    heavy = {here / f"{name}.py" for name in HEAVY}
    assert all(file.exists() for file in heavy), sorted(file for file in heavy if not file.exists())
    for item in items:
        item.add_marker(pytest.mark.xdist_group("heavy" if item.path in heavy else item.path.relative_to(here).as_posix()))
    items.sort(key=lambda item: item.path not in heavy)


@pytest.fixture(scope="session")
def hone_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the session's own, so that the built-in model is really made here."""
    cache = tmp_path_factory.mktemp("hone-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HONE_CACHE", str(cache))
        yield cache
