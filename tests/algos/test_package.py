"""The package as a researcher meets it: its names, its cheap import, its README, its ranges."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import jaxtyping
import pytest
import torch

import hone.algos
from hone.algos import (
    GRPO,
    GSPO,
    PPO,
    AdaptiveKL,
    Clip,
    Correction,
    Distillation,
    KLPenalty,
    Reduction,
    clipped_surrogate,
    clipped_value_loss,
    correction_weights,
    gae,
    judge,
    kl_loss,
)
from hone.algos.ranges import Range, range_of, require_valid
from tests.algos.strategies import scored_batch

SOURCES = Path(hone.algos.__file__).parent
# What other functions are made of, and nobody asks for by name.
BENEATH = {("hone.algos.corrections", "check_bounds"), ("hone.algos.pairs", "paired_loss")}
README = Path(__file__).parents[2] / "packages/algos/README.md"


def test_every_name_offered_is_there():
    names = [name for name in dir(hone.algos) if not name.startswith("_") and name not in ("import_module", "re", "Path")]
    assert {"PPO", "GRPO", "clipped_surrogate", "gae", "Batch"} <= set(names)
    for name in names:
        assert getattr(hone.algos, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'DPO2'"):
        hone.algos.DPO2  # noqa: B018 - the access is the test


def test_every_public_function_is_on_offer():
    internal = {"checks", "kernels", "masking", "ranges", "table"} | {"conformance"}  # the last has a door of its own
    offered = {(home, name) for name, home in hone.algos._HOMES.items()}
    for source in SOURCES.glob("*.py"):
        functions = [node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)]
        public = {(f"hone.algos.{source.stem}", name) for name in functions if not name.startswith("_")}
        if source.stem not in internal | {"__init__"}:
            assert public - offered <= BENEATH, f"add to __init__.pyi, or to BENEATH: {public - offered - BENEATH}"


def test_configuration_can_be_read_without_torch():
    code = "import sys, hone.algos, hone.algos.ranges; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_in_the_readme_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(example.splitlines()) <= 14
    exec(compile(example, str(README), "exec"), {})
    (printed,) = re.findall(r"```text\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("limit", "text", "inside", "outside"),
    [
        (Range(low=0), "[0, inf)", [0, 0.5, 1e9], [-1e-9, float("nan")]),
        (Range(low=0, open_low=True, high=1), "(0, 1]", [1e-9, 1], [0, 1.1]),
        (Range(high=2, open_high=True), "(-inf, 2)", [-5, 1.9], [2]),
    ],
)
def test_ranges(limit, text, inside, outside):
    assert str(limit) == text
    assert all(value in limit for value in inside)
    assert not any(value in limit for value in outside)


def test_a_range_is_found_through_a_union():
    limit = Range(low=1)
    assert range_of(Annotated[int, limit] | None) == limit
    assert range_of(Annotated[int, "metres"]) is None
    assert range_of(int | None) is None


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (lambda: PPO(clip=Clip(low=-1.0)), r"PPO: clip.low is -1.0, it must lie in \[0, 1\]"),
        (lambda: PPO(kl=KLPenalty(gradient="Reverse")), "kl.gradient is 'Reverse', choose one of 'reverse', 'unbiased', 'as_written'"),
        (lambda: GSPO(gradient="tok", entropy_coef=-3.0), "entropy_coef is -3.0.*gradient is 'tok', choose one of 'sequence', 'token'"),
        (lambda: Distillation(divergence="fwd"), "divergence is 'fwd', choose one of 'forward', 'reverse', 'jsd'"),
    ],
)
def test_settings_that_make_no_sense_are_all_told_before_anything_is_computed(config, told, as_users_call_it):
    with pytest.raises(ValueError, match=told):
        require_valid(config())
    assert require_valid(PPO()) is None


def test_judge_and_controllers_look_at_their_settings(as_users_call_it):
    batch = scored_batch([[True]], Reduction(), seed=0)
    with pytest.raises(ValueError, match=r"correction\.level is 'tokens', choose one of 'off', 'token', 'sequence', 'geometric'"):
        judge(GRPO(correction=Correction(level="tokens")), batch)
    with pytest.raises(ValueError, match=r"AdaptiveKL: coef is -1\.0"):
        AdaptiveKL(coef=-1.0)
    with pytest.raises(ValueError, match="reduction 'tokens'"):
        Reduction(over="tokens")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda x, m, c: correction_weights(x, x, m, c, level="tokens", mode="clip", high=2.0),
            "level is 'tokens'; choose one of",
        ),
        (lambda x, m, c: correction_weights(x, x, m, c, level="token", mode="masked", high=2.0), "mode is 'masked'; choose one of"),
        (lambda x, m, c: kl_loss(x, x, x, m, coef=1.0, estimator="k3", gradient="Reverse"), "gradient is 'Reverse'; choose one of"),
        (lambda x, m, c: kl_loss(x, x, x, m, coef=1.0, estimator="k9", gradient="reverse"), "estimator is 'k9'; choose one of"),
        (lambda x, m, c: gae(x, x, m, c, gamma=float("nan"), lambd=1.0), r"gamma is nan; it must lie in \[0, 1\]"),
        (lambda x, m, c: gae(x, x, m, c, gamma=1.0, lambd=float("inf")), r"lambd is inf; it must lie in \[0, 1\]"),
        (lambda x, m, c: clipped_surrogate(x, x, x, x, m, clip_low=float("nan"), clip_high=0.2), "clip_low is nan"),
        (lambda x, m, c: clipped_surrogate(x, x, x, x, m, clip_low=0.2, clip_high=-0.1), "clip_high is -0.1"),
        (lambda x, m, c: clipped_value_loss(x, x, x, x, m, clip=float("nan")), "clip is nan"),
    ],
)
def test_functions_refuse_choices_that_are_none_and_numbers_out_of_range(call, told, as_users_call_it):
    with pytest.raises(ValueError, match=told):
        call(torch.zeros(2), torch.ones(2, dtype=torch.bool), torch.tensor([0, 2]))


@pytest.fixture
def as_users_call_it():
    """Without the suite's own type checker, which knows of choices too."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
