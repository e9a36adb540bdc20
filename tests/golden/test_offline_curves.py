"""Golden curves of the programs over labelled rows: ten steps that only a meant change of numerics may move, the same on any ranks."""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from hone.launch import cluster
from hone.launch.finetune import finetune
from hone.launch.offline_build import assemble, make_plan, tables_of
from hone.launch.offline_config import OfflineConfig
from hone.launch.offline_data import prepare, settled
from hone.launch.offline_groups import LocalRanks, OfflinePlan, Ranks
from hone.launch.offline_parts import MODEL, TEACHER
from hone.launch.placement import PlacedGroup
from hone.launch.remote import RemoteGroup
from hone.launch.resolve import resolve
from hone.learner.roles import RoleSpec
from tests.golden.offline_curves import CURVES, record, small, text, words

COMMITTED = Path(__file__).parent


@pytest.mark.parametrize("name", CURVES)
def test_the_curve_is_the_committed_one(name: str, hone_cache: Path, tmp_path: Path) -> None:
    steps = record(name, tmp_path)
    assert text(name, steps) == (COMMITTED / f"{name}.txt").read_text()
    assert steps[-1]["train/loss"] != steps[0]["train/loss"] and "eval/loss" in steps[4]


class RayRanks:
    """Groups in a Ray that is started already, two ranks each."""

    def __init__(self, plan: OfflinePlan) -> None:
        self._plan = plan

    def group(self, name: str, specs: Mapping[str, RoleSpec]) -> RemoteGroup:
        placed = PlacedGroup(name=name, roles=tuple(specs), ranks=2, nodes=1)
        group = cluster.learner_ranks(self._plan, placed, specs, None, shares=False)
        group.wait()
        return group

    def close(self) -> None:
        """The Ray is the module's."""


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="hone-golden-") as scratch:
        cluster.start(Path(scratch))
        yield
        cluster.stop(tmp_path_factory.mktemp("logs"), Path(scratch))


# A loss over log-probabilities, over scores with the statistics, over logits beside a teacher, and one with an anchor.
# And two whose reference lives beside the model on the ranks.
@pytest.mark.parametrize(
    ("name", "when"), [("dpo", "before"), ("dpo", "drawn"), ("rm", ""), ("kd", ""), ("kto", "before"), ("kto", "drawn")]
)
def test_two_ranks_that_share_every_parameter_draw_the_same_curve(
    name: str, when: str, ray: None, hone_cache: Path, tmp_path: Path
) -> None:
    one = curve(name, tmp_path, LocalRanks, zero_stage=0, ranks=1)
    two = curve(name, tmp_path, RayRanks, zero_stage=3, ranks=2, options=["--ref.when", when] if when else [])
    for mine, theirs in zip(one, two, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=5e-6)


def curve(
    name: str, directory: Path, kind: type[LocalRanks] | type[RayRanks], *, zero_stage: int, ranks: int, options: Sequence[str] = ()
) -> list[dict[str, float]]:
    """Three steps, the last one evaluated; then a reward model's statistics."""
    verb, *own = words(name, directory)
    config: OfflineConfig = resolve(verb, [*own, *options], gpus=0).config
    config = dataclasses.replace(
        config,
        ds=dataclasses.replace(config.ds, zero_stage=zero_stage),
        model=dataclasses.replace(config.model, num_gpus_per_node=ranks),
    )
    models = {MODEL: str(small(directory / "model")), "reference": str(small(directory / "model"))}
    models = {MODEL: models[MODEL], TEACHER: str(small(directory / "teacher", seed=1))} if name == "kd" else models
    data = prepare(config, model=models[MODEL])
    config = settled(config, data.tokenizer)
    plan = make_plan(config, models=models, data=data, steps=3, logs=directory, scratch=directory, on_start=lambda role, state: None)
    made: Ranks = kind(plan)
    # Each asks its own reference: what another one said is not taken over.
    tables = tables_of(plan, data, made, memory=directory / f"reference-{ranks}")
    parts = assemble(plan, data, made, tables, on_phase=lambda phase, seconds: None)
    try:
        steps = [step.metrics for step in finetune(parts, max_steps=3)]
        if config.kind == "reward":
            parts.keep_statistics()
    finally:
        parts.close()
    assert "eval/loss" in steps[-1]
    return [{name: value for name, value in step.items() if not name.startswith(("timing/", "perf/"))} for step in steps]
