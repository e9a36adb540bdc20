"""Bad input to every public function: named with its value and its remedy, or the documented neutral result.

The functions are found by reading the modules (tests/reference/arguments.py), so one that is added without `@checked` fails here.
"""

import dataclasses
import math
import re

import jaxtyping
import pytest
import torch
from torch import Tensor

from hone.algos.algorithms import ALGORITHMS, OFFLINE
from hone.algos.batch import Batch, Packed, Scored
from hone.algos.judging import judge
from hone.algos.offline import Demonstrations, Judgements, Pairs, Steps, Taught
from hone.algos.protocol import Loss, Outputs
from hone.algos.reduce import Reduction
from tests.algos.strategies import scored_batch
from tests.reference.arguments import SIZES, Asked, arguments, asked, functions, stage, tensors

NAN, INF = math.nan, math.inf

# Called by functions that have checked, several times each.
INNER = {"masking"}

EVERY = functions()
CHECKED = sorted(name for name in EVERY if name.split(".")[0] not in INNER)
STAGES = (Packed, Batch, Scored, Demonstrations, Pairs, Judgements, Steps, Taught)
every_checked = pytest.mark.parametrize("name", CHECKED)


@pytest.fixture
def as_users_call_it():
    """Without the suite's own type checker, which would speak first where a dataclass is made."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_the_functions_are_found():
    modules = {name.split(".")[0] for name in EVERY}
    assert {"advantages", "corrections", "decoupled", "distillation", "kto", "mismatch", "offline", "padding", "preference"} <= modules
    assert {"algorithms.remax.with_greedy", "batch.rows_of_tokens", "offline.with_anchor"} <= set(EVERY)
    assert len(EVERY) > 100


def _misfits(value: Tensor, demand: Asked, *, shared: set[str]):
    """(what is wrong, a value that is) for a tensor that fits its annotation."""
    yield "list", [value.tolist()]
    yield "numpy", value.numpy()
    if not demand.number:
        yield "number", 1.0
    if not demand.optional:
        yield "nothing", None
    yield "axis more", value[None]
    if value.dim():
        yield "axis fewer", value[0]
    for axis, its in enumerate(demand.axes):
        if its in shared:
            yield f"{its} less one", value.narrow(axis, 0, value.shape[axis] - 1)
    if demand.kind != "Shaped":
        yield "complex", value * 1j
    if demand.kind in ("Float", "Int"):
        yield "boolean", value > 0
    if demand.kind in ("Float", "Bool"):
        yield "integers", value.long()
    if demand.kind in ("Int", "Bool"):
        yield "floats", value.float()


def _refusal(call, name: str) -> str | None:
    """What is wrong with how the call refuses `name`; None if it is named in a ValueError that also tells what to do."""
    try:
        call()
    except ValueError as error:
        named, remedy = re.search(rf"\b{name}\b", str(error)), "; " in str(error)
        return None if named and remedy else f"says {error}"
    except Exception as error:
        return f"raises {type(error).__name__}: {error}"
    return "raises nothing"


@every_checked
def test_what_does_not_fit_is_refused_by_name(name, as_users_call_it):
    function, fitting = EVERY[name], arguments(EVERY[name])
    function(**fitting)
    demands = tensors(function)
    axes = [axis for demand in demands.values() for axis in demand.axes]
    if "rows" in fitting:
        axes += ["T", "N", "P"]
    shared = {axis for axis in axes if axes.count(axis) > 1 or ("N_plus_1" in axes and axis == "N")}
    failures = {
        (argument, wrong): problem
        for argument, demand in demands.items()
        for wrong, value in _misfits(arguments(function)[argument], demand, shared=shared)
        if (problem := _refusal(lambda argument=argument, value=value: function(**{**fitting, argument: value}), argument))
    }
    assert not failures


@pytest.mark.parametrize("name", [name for name in CHECKED if "cu_seqlens" in tensors(EVERY[name])])
def test_offsets_that_do_not_fit_are_refused(name, as_users_call_it):
    function, fitting = EVERY[name], arguments(EVERY[name])
    edges = fitting["cu_seqlens"]
    broken = {"from 1": edges + 1, "empty": edges[:0], "falling": edges.flip(0).index_fill(0, torch.tensor([0]), 0)}
    if "T" in {axis for demand in tensors(function).values() for axis in demand.axes}:
        broken["too short"] = torch.cat([edges[:-1], edges[-1:] - 1])
        broken["too long"] = torch.cat([edges[:-1], edges[-1:] + 1])
    failures = {
        wrong: problem
        for wrong, value in broken.items()
        if (problem := _refusal(lambda value=value: function(**{**fitting, "cu_seqlens": value}), "cu_seqlens"))
    }
    assert not failures


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_refuses_fields_that_do_not_fit(kind, as_users_call_it):
    rows = stage(kind, SIZES)
    demands = {field.name: asked(field.type) for field in dataclasses.fields(kind)}
    failures = {
        (field, wrong): problem
        for field, demand in demands.items()
        if demand is not None
        for wrong, value in _misfits(getattr(rows, field), demand, shared={"T", "N"})
        if (problem := _refusal(lambda field=field, value=value: dataclasses.replace(rows, **{field: value}), field))
    }
    assert not failures


METHODS = {"loss": (6,), "score_loss": (4,), "logits_loss": (6, 3)}
"""What an algorithm reads, and of which shape it fits the rows of `stage`."""


def _loss(algo, numbers: Tensor) -> Loss:
    kinds = {**dict.fromkeys(ALGORITHMS, Scored), "sft": Demonstrations, "kto": Judgements, "prm": Steps, "kd": Taught}
    rows = stage(kinds.get(algo.name, Pairs), SIZES)
    (method,) = (method for method in METHODS if hasattr(algo, method))
    return getattr(algo, method)(Outputs(logp=numbers) if method == "loss" else numbers, rows)


@pytest.mark.parametrize("name", sorted({*ALGORITHMS, *OFFLINE}))
def test_an_algorithm_refuses_outputs_of_another_size(name, as_users_call_it):
    algo = {**ALGORITHMS, **OFFLINE}[name]()
    fitting = torch.zeros(next(shape for method, shape in METHODS.items() if hasattr(algo, method)))
    _loss(algo, fitting)
    for wrong in (fitting[:-1], fitting[:1], torch.cat([fitting, fitting]), fitting[:0]):
        with pytest.raises(ValueError, match="; "):
            _loss(algo, wrong)


ONE_EACH = torch.arange(4) * 7 - 3
BY_GROUP = [name for name in sorted(EVERY) if "group" in tensors(EVERY[name])]
# What is neither an advantage nor zero: greedy ones compare with another sample, the others do not compare at all.
NOT_COMPARED = {"greedy_baselines", "greedy_centred", "group_index", "group_figures", "varied_groups", "groups_in_range"}


@pytest.mark.parametrize("name", BY_GROUP)
def test_a_group_of_one_gets_exactly_zero(name):
    function, fitting = EVERY[name], arguments(EVERY[name])
    fitting["group"] = ONE_EACH
    short = name.split(".")[1]
    if short == "group_figures":
        counts = function(**{**fitting, "live": torch.tensor([True, True, False, True])})
        assert {figure: int(count) for figure, count in counts.items()} == {"groups": 3, "groups_of_one": 3, "groups_of_equals": 0}
    elif short == "varied_groups":
        assert not function(**fitting).any()
    elif short not in NOT_COMPARED:
        if "step_ends" in fitting:  # rows of 2, 0, 3 and 1 tokens, with one step each
            fitting["step_ends"] = fitting["action_mask"] = torch.tensor([True, False, False, True, False, True])
        assert (function(**fitting) == 0).all()


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_an_algorithm_of_groups_tells_how_many_taught_nothing(name):
    batch = dataclasses.replace(_batch([[True], [True, True], [False], [True], [True]]), group=torch.tensor([5, 0, 9, 3, 3]))
    algo = ALGORITHMS[name]()
    judged = judge(algo, batch)
    assert judged.advantages.isfinite().all()
    if "groups" in judged.figures:
        assert (judged.figures["groups"], judged.figures["groups_of_one"]) == (3, 2)
        penalty_free = dataclasses.replace(algo, kl=dataclasses.replace(algo.kl, init_coef=0.0))
        if not getattr(algo, "normalize", False):
            assert (penalty_free.advantages(batch).advantages[:3] == 0).all()
    else:
        assert name in {"ppo", "vapo", "reinforce", "remax", "on_policy_distill"}


def _batch(rows: list[list[bool]]) -> Batch:
    scored = scored_batch(rows, Reduction(), seed=0)
    fields = {field.name: getattr(scored, field.name) for field in dataclasses.fields(Batch)}
    return Batch(**{**fields, "greedy_scores": torch.zeros(len(rows))})


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_every_algorithm_refuses_a_reward_that_is_no_number(name, value):
    batch = _batch([[True, True], [False, True]])
    rewards = batch.rewards.clone()
    rewards[2] = value  # off the mask: no matter
    judge(ALGORITHMS[name](), dataclasses.replace(batch, rewards=rewards))
    rewards[1] = value
    with pytest.raises(ValueError, match=rf"1 of 3 rewards are not finite, at index 1 {value}; .* mend the reward function"):
        judge(ALGORITHMS[name](), dataclasses.replace(batch, rewards=rewards))


REWARDED = {name: own for name in sorted(EVERY) if (own := {"rewards", "scores"} & set(tensors(EVERY[name])))}
# Moved or scaled it stays a NaN, which `judge` names.
STAYS = {"shaping.clip_scores", "shaping.normalise_scores", "shaping.rescored", "shaping.stop_properly"}


@pytest.mark.parametrize("name", sorted(set(REWARDED) - STAYS))
def test_a_reward_that_is_no_number_is_named(name):
    for argument in REWARDED[name]:
        fitting = arguments(EVERY[name])
        fitting[argument].fill_(NAN)
        with pytest.raises(ValueError, match=rf"\b{argument}\b.*nan.*; "):
            EVERY[name](**fitting)


@pytest.mark.parametrize("name", sorted(STAYS))
def test_a_reward_that_is_no_number_is_not_turned_into_one(name):
    fitting = arguments(EVERY[name])
    fitting["scores"][3] = NAN
    result = EVERY[name](**fitting)
    assert result[-1].isnan() and result[:-1].isfinite().all()
