import math
import re
from pathlib import Path

import pytest

from hone.launch.observe.metrics import METRICS, check_names, describe, is_healthy, metrics_page

ROOT = Path(__file__).parents[3]
PREFIXES = ("rollout", "train", "mismatch", "staleness", "timing", "perf", "sync")


def sources():
    return {path: path.read_text() for path in ROOT.glob("packages/*/src/**/*.py") if "observe" not in path.parts}


def test_the_page_is_the_table():
    assert (ROOT / "docs/metrics.md").read_text() == metrics_page(), "run: python -m hone.launch.observe.metrics > docs/metrics.md"


def test_every_name_written_in_the_code_is_in_the_table():
    pattern = re.compile(rf'"((?:{"|".join(PREFIXES)})/[a-z0-9_]+(?:/[a-z0-9_]+)?)"')
    written = {name for text in sources().values() for name in pattern.findall(text)}
    assert {"rollout/reward_mean", "mismatch/k3"} <= written
    check_names(written)


def test_every_name_in_the_table_is_produced_by_the_code():
    text = "\n".join(sources().values())
    assert [name for name in METRICS if f'"{name}"' not in text and f'"{name.rpartition("/")[2]}"' not in text] == []


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"'rollout/reward_men' \(near: rollout/reward_mean\)"):
        check_names(["step", "rollout/reward_men"])


def test_extra_logs_are_allowed_under_their_prefix_only():
    check_names(["rollout/extra/format"])
    with pytest.raises(ValueError, match="rollout/extra/"):
        check_names(["rollout/extra/"])


def test_health_is_the_range_of_the_table():
    assert is_healthy("mismatch/logp_abs_diff_mean", 1e-4)
    assert not is_healthy("mismatch/logp_abs_diff_mean", 0.5)
    assert not is_healthy("mismatch/logp_abs_diff_mean", math.nan)
    assert is_healthy("train/policy_loss", -123.0)  # no range says anything


def test_every_metric_says_what_it_is():
    for name in METRICS:
        metric = describe(name)
        assert metric is not None and metric.unit and metric.reduction and metric.meaning.endswith(".")
