"""What an engine does beside a plain step: the moving average, naps, and steps that are left out. Plain torch, and two gloo ranks of
DeepSpeed under every ZeRO stage.
"""

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hone.learner.config import DeepSpeedConfig
from hone.learner.engines import deepspeed, zero_settings
from hone.learner.engines.ema import Average
from hone.learner.engines.loss_scale import LossScale
from hone.learner.errors import ModelError
from tests.learner.engine_ranks import BETA, MAX_TOKENS, ROLES, measure
from tests.learner.processes import free_port, run_ranks
from tests.learner.tiny import make_learner, save_model

CASES: dict[str, dict[str, Any]] = {
    **{f"stage{stage}": {"stage": stage, "dtype": "fp32", "ds": {}} for stage in range(4)},
    **{f"stage{stage}-muon": {"stage": stage, "dtype": "fp32", "ds": {}, "optim": "muon"} for stage in range(4)},
    "stage2-offload": {"stage": 2, "dtype": "fp32", "ds": {"adam_offload": True, "overlap_comm": True}},
    "stage3-offload": {"stage": 3, "dtype": "fp32", "ds": {"adam_offload": True}},
    "stage2-cpu-adam": {"stage": 2, "dtype": "fp32", "ds": {"adam_offload": True, "cpu_adam": "deepspeed"}},
    "stage3-param-offload": {"stage": 3, "dtype": "fp32", "ds": {"param_offload": True, "adam_offload": True}},
    "stage3-hpz": {"stage": 3, "dtype": "fp32", "ds": {"zpg": 2, "overlap_comm": True}},
    "stage2-bf16": {"stage": 2, "dtype": "bf16", "ds": {}},
    "stage3-bf16": {"stage": 3, "dtype": "bf16", "ds": {}},
    "stage0-tensor": {"stage": 0, "dtype": "fp32", "ds": {"tensor_parallel_size": 2}},
    "stage2-tensor-offload": {"stage": 2, "dtype": "fp32", "ds": {"tensor_parallel_size": 2, "adam_offload": True, "overlap_comm": True}},
    "stage3-tensor-offload": {"stage": 3, "dtype": "fp32", "ds": {"tensor_parallel_size": 2, "param_offload": True, "adam_offload": True}},
    "stage2-tensor-bf16": {"stage": 2, "dtype": "bf16", "ds": {"tensor_parallel_size": 2}},
}
pytestmark = pytest.mark.timeout(600)
SINGLE = ("single", "single-bf16", "single-muon")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Every case on two ranks, in one pair of processes; and in this process on the engine of one."""
    root = tmp_path_factory.mktemp("engines")
    model = save_model(root / "model", "qwen3-tied")
    cases = [
        {**case, "name": name, "ports": [free_port() for _ in range(2)], "out": str(root / f"{name}-average")}
        for name, case in CASES.items()
    ]
    (root / "spec.json").write_text(json.dumps({"model": model, "results": str(root / "results"), "cases": cases}))
    run_ranks("tests.learner.engine_ranks", root / "spec.json", root=root, ranks=2, timeout_s=580)
    ranks = [torch.load(root / f"results-{rank}.pt") for rank in range(2)]
    results = {name: [rank[name] for rank in ranks] for name in CASES}
    for name in SINGLE:
        dtype = "bf16" if "bf16" in name else "fp32"

        def build(dtype: str = dtype, name: str = name, **ds: Any) -> Any:
            common = {"dtype": dtype, "max_tokens": MAX_TOKENS, "lr": 1e-3, "ema_beta": BETA, "max_skipped_steps": 2}
            common["optim"] = "muon" if "muon" in name else "adam"
            return make_learner(dict.fromkeys(ROLES, model), **common, **ds)

        results[name] = [measure(build, str(root / f"{name}-average"))]
    return {**results, "root": [{"path": root}]}


EVERY = (*CASES, *SINGLE)


@pytest.mark.parametrize("name", EVERY)
def test_the_average_is_the_formula_over_the_weights_of_every_step(runs: dict[str, Any], name: str) -> None:
    for rank in runs[name]:
        expected = rank["trajectory"][0]
        for step in (1, 2):
            expected = {key: BETA * value + (1 - BETA) * rank["trajectory"][step][key] for key, value in expected.items()}
        for key, value in expected.items():
            # In bf16 the average follows the fp32 masters, which the trajectory knows to 8 bits.
            rtol, atol = (1e-5, 1e-6) if "bf16" not in name else (2**-6, 1e-4)
            assert_close(rank["average of two"][key], value, rtol=rtol, atol=atol, msg=lambda text, key=key: f"{key}: {text}")
        moved = [key for key, value in rank["average of two"].items() if not torch.equal(value, rank["trajectory"][2][key])]
        assert moved and rank["as before the average"] == []


@pytest.mark.parametrize("name", EVERY)
def test_the_average_is_exported_as_a_model_of_its_own(runs: dict[str, Any], name: str) -> None:
    path = runs["root"][0]["path"] / f"{name}-average"
    exported = dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())
    average = runs[name][0]["average of two"]
    assert exported.keys() == average.keys()
    assert all(torch.equal(weight.float(), average[key]) for key, weight in exported.items())


@pytest.mark.parametrize("name", EVERY)
def test_naps_and_refused_steps_change_nothing(runs: dict[str, Any], name: str) -> None:
    for rank in runs[name]:
        assert rank["end"] == rank["steps"] == rank["saved asleep"] == []
        assert rank["reference"]
        for where in ("loss", "gradient"):
            assert rank[where] == (False, 1, []) and rank[f"{where} state"] == []
        assert rank["counters"] == {"steps": 3, "muon": int("muon" in name), "skipped_in_a_row": 0}


@pytest.mark.parametrize("name", EVERY)
def test_asleep_a_learner_holds_no_parameters_and_awake_only_one_roles(runs: dict[str, Any], name: str) -> None:
    for rank in runs[name]:
        assert rank["held asleep"] == 0 and rank["policy slept while the critic trained"]
    parameters = sum(value.numel() for value in runs[name][0]["trajectory"][0].values())
    # At the call the critic is awake: parameters and at least masters (or themselves), two moments and the average, over the ranks.
    least = parameters * 4 * (4.5 if "bf16" in name else 3 if "muon" in name else 4)
    assert sum(rank["moved"] for rank in runs[name]) >= 0.99 * least


@pytest.mark.parametrize("name", EVERY)
def test_too_many_refused_steps_in_a_row_end_the_run_on_every_rank(runs: dict[str, Any], name: str) -> None:
    for rank in runs[name]:
        attempt, message = rank["gave up"]
        assert attempt == 2 and message.startswith("policy: ")
        assert "at optimiser step 3, 3 times in a row; the parameters were left" in message and "--actor.max-skipped-steps" in message


@pytest.mark.parametrize("name", [name for name in CASES if "bf16" not in name])
def test_two_ranks_train_as_plain_torch_in_one_process(runs: dict[str, Any], name: str) -> None:
    (single,) = runs["single-muon" if "muon" in name else "single"]
    for rank in runs[name]:
        assert_close(rank["norms"], single["norms"], rtol=1e-5, atol=1e-5)
        for key, weight in single["trajectory"][-1].items():
            # Three steps of 1e-3; where a gradient is near Adam's eps, its rounding is what is divided by.
            assert_close(rank["trajectory"][-1][key], weight, rtol=1e-5, atol=3e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_the_average_golden() -> None:
    # beta 0.9 over 1, 2, 4: 0.9 * 1 + 0.1 * 2 = 1.1; 0.9 * 1.1 + 0.1 * 4 = 1.39.
    master = torch.tensor([1.0])
    average = Average([master], beta=0.9)
    for value, expected in ((2.0, 1.1), (4.0, 1.39)):
        master.fill_(value)
        average.update([master])
        assert_close(average.flats[0], torch.tensor([expected]))
    with average.swapped([master]):
        assert_close(master, torch.tensor([1.39]))
    assert float(master) == 4.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"grad_accum_dtype": "bf16", "param_dtype": "fp32"}, "gradients of fp32 parameters cannot be summed in bf16"),
        ({"adam_offload": True, "zero_stage": 0, "param_dtype": "fp32"}, "--ds.adam-offload needs sharded optimiser states"),
        ({"cpu_adam": "deepspeed"}, "--ds.cpu-adam deepspeed steps what is offloaded"),
        ({"param_offload": True, "zero_stage": 2}, "--ds.param-offload needs sharded parameters"),
        ({"zpg": 2, "zero_stage": 2}, "--ds.zpg 2 needs --ds.zero-stage 3"),
        ({"zpg": 3, "zero_stage": 3}, "a number of ranks it divides, not stage 3 of 4"),
    ],
)
def test_what_deepspeed_cannot_do_is_said_before_it_is_started(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        zero_settings.check(DeepSpeedConfig(**settings), device=torch.device("cpu"), world_size=4)


def test_a_cpu_adam_that_cannot_be_built_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("DeepSpeedCPUAdam requires the cpu_adam op, which failed to build/load.") from OSError("no c++ here")

    monkeypatch.setattr(deepspeed, "_import", lambda: None)
    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", SimpleNamespace(DeepSpeedCPUAdam=refuse))
    make = deepspeed._make_adamw(DeepSpeedConfig(adam_offload=True, cpu_adam="deepspeed"))
    with pytest.raises(ModelError, match=r"could not be built here \(no c\+\+ here\).*--ds\.cpu-adam torch"):
        make([torch.zeros(1)], lr=1.0)


def test_the_loss_scale_halves_at_an_overflow_and_doubles_after_a_window() -> None:
    scale = LossScale()
    assert scale.scale == 65536 and scale.update(overflow=True) and scale.scale == 32768
    for _ in range(999):
        scale.update(overflow=False)
    assert scale.scale == 32768
    scale.update(overflow=False)
    assert scale.scale == 65536
    scale.update(overflow=False)
    scale.update(overflow=True)
    for _ in range(999):  # the window begins anew
        scale.update(overflow=False)
    assert scale.scale == 32768
    scale.scale = 65536
    assert all(scale.update(overflow=True) for _ in range(16)) and scale.scale == 1
    assert not scale.update(overflow=True)  # nothing left to lower: this one counts
