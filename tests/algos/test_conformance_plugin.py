"""The conformance kit as a stranger meets it: a pytest plugin, pointed at losses of their own."""

import subprocess
import sys

USERS_TESTS = """
import pytest
import torch
from hone.algos.conformance import from_padded

def mean_loss(logp, advantages, action_mask, **_):
    per_token = -torch.where(action_mask, logp, 0.0) * torch.where(action_mask, advantages, 0.0)
    return per_token.sum() / action_mask.sum().clamp(min=1)

def test_mean(loss_law):
    loss_law(from_padded(mean_loss))

@pytest.mark.conformance(without={"on-policy gradient": "supervised"})
def test_nll(loss_law):
    loss_law(lambda case: -(torch.where(case.action_mask, case.logp, 0.0) * torch.where(case.action_mask, case.weights, 0.0)).sum())

def test_k2(kl_law):
    kl_law(lambda logp, ref_logp: 0.5 * (logp - ref_logp) ** 2)
"""


def _pytest(tmp_path, text):
    (tmp_path / "test_mine.py").write_text(text)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "hone.algos.conformance.plugin",
        "-p",
        "no:cacheprovider",
        "--strict-markers",
        "-q",
        "-rA",
    ]
    return subprocess.run([*command, "test_mine.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120).stdout


def test_a_user_points_the_plugin_at_a_loss(tmp_path):
    printed = _pytest(tmp_path, USERS_TESTS)
    assert "FAILED test_mine.py::test_mean[micro-batch additivity]" in printed
    assert "PASSED test_mine.py::test_mean[poison off the mask]" in printed
    assert "PASSED test_mine.py::test_k2[KL gradient]" in printed
    assert ": supervised" in printed and "FAILED test_mine.py::test_nll" not in printed
    assert "1 failed, 16 passed, 1 skipped" in printed, printed


def test_a_law_that_does_not_exist_cannot_be_left_out(tmp_path):
    text = USERS_TESTS.replace('"on-policy gradient": "supervised"', '"on policy": "supervised"')
    assert "mark.conformance of test_nll knows no ['on policy']; the laws are" in _pytest(tmp_path, text)


def test_the_kit_imports_no_pytest():
    code = "import sys, hone.algos.conformance; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
