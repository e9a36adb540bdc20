"""Golden curves: ten steps that only a meant change of numerics may move, the same on any learner.

`just golden` rewrites the committed text; the difference belongs into the commit that meant it.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hone.launch import local
from hone.launch.parts import Assembly, Plan
from hone.launch.train import Step
from hone.rollout.engines.scripted import ScriptedEngine
from tests.golden.curves import COLUMNS, plan, record, replay, single_row, text

COMMITTED = Path(__file__).parent


@pytest.fixture(scope="module", params=["grpo", "ppo"])
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[Step]]:
    directory = tmp_path_factory.mktemp(f"golden-{request.param}")
    return request.param, directory, record(request.param, directory)


def test_the_curve_is_the_committed_one(recorded: tuple[str, Path, list[Step]]) -> None:
    verb, _, steps = recorded
    assert text(verb, steps) == (COMMITTED / f"{verb}.txt").read_text()


def test_the_curve_of_a_students_own_samples_is_the_committed_one(tmp_path: Path) -> None:
    steps = record("on_policy_distill", tmp_path)
    assert text("on_policy_distill", steps) == (COMMITTED / "on_policy_distill.txt").read_text()
    # The teacher is a model of another size, and the reward, which the student earns as it would without, is not looked at.
    assert steps[0].metrics["train/actor_grad_norm"] > 0.1


def test_the_curve_is_not_flat(recorded: tuple[str, Path, list[Step]]) -> None:
    _, _, steps = recorded
    assert steps[-1].metrics["rollout/reward_mean"] > steps[0].metrics["rollout/reward_mean"] + 0.1
    assert any(step.metrics["train/ppo_clip_ratio"] > 0 for step in steps)


@pytest.mark.parametrize(("zero_stage", "ranks"), [(3, 2), (2, 1)])
def test_other_learners_draw_the_same_curve_from_the_same_data(
    zero_stage: int, ranks: int, recorded: tuple[str, Path, list[Step]], ray_learners: Callable[[Plan], Assembly]
) -> None:
    verb, directory, steps = recorded
    again = replay(plan(verb, directory, zero_stage=zero_stage, ranks=ranks), steps, ray_learners)
    for name in [*COLUMNS[verb], "mismatch/logp_abs_diff_mean"]:
        curve, expected = [step.metrics[name] for step in again], [step.metrics[name] for step in steps]
        assert curve == pytest.approx(expected, rel=1e-4, abs=5e-6), name


def test_an_optimiser_step_with_fewer_rows_than_ranks_is_the_same_too(tmp_path: Path, ray_learners: Callable[[Plan], Assembly]) -> None:
    made = plan("ppo", tmp_path, zero_stage=3, ranks=2)
    one, two = (built.host["policy"] for built in (local.build(plan("ppo", tmp_path)), ray_learners(made)))
    scored = single_row()
    results = [group.update_policy("policy", scored, made.config.algo) for group in (one, two)]
    assert results[1].metrics == pytest.approx(results[0].metrics, rel=1e-4, abs=1e-6)
    assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=1e-4)
    for group in (one, two):
        group.close()


@pytest.fixture(scope="module")
def ray_learners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Plan], Assembly]]:
    """Learner ranks as Ray actors with DeepSpeed, and no engine: what a cluster run learns with."""
    import asyncio

    from hone.launch import cluster
    from hone.launch.placement import groups

    def build(made: Plan) -> Assembly:
        specs = made.roles()
        sizes = {role: (spec.config.num_nodes, spec.config.num_gpus_per_node) for role, spec in specs.items()}
        (placed,) = groups(dict.fromkeys(specs, "learner"), sizes, list(specs))
        group = cluster.learner_ranks(made, placed, specs, None, shares=False)
        group.wait()
        return Assembly(
            host=dict.fromkeys(specs, group),
            executor=made.executor(ScriptedEngine(script=lambda request: ()), "", 1),
            source=made.source,
            publisher=lambda version: {},
            runner=asyncio.Runner(),
            on_phase=made.on_phase,
            closers=[group.close],
        )

    with tempfile.TemporaryDirectory(prefix="hone-golden-") as scratch:
        cluster.start(Path(scratch))
        yield build
        cluster.stop(tmp_path_factory.mktemp("logs"), Path(scratch))
