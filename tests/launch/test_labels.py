"""What samples become before a step: margins with their pairs, and the shares of each step's labels in the order its judge has."""

from array import array
from types import SimpleNamespace

import pytest
import torch

from hone.algos.reduce import Reduction
from hone.datasets.labelled import Sample, TokenRow
from hone.launch import labels


def row(*trained: int) -> TokenRow:
    return TokenRow(tokens=array("i", range(len(trained))), trained=bytes(trained))


def test_each_pair_keeps_its_margin() -> None:
    samples = [Sample(uid="a", line=1, rows=(row(0, 1), row(0, 1)), margin=margin) for margin in (1.5, 0.0, -2.0)]
    rows = labels.packed([one for sample in samples for one in sample.rows])
    assert labels.pairs(rows, samples, None).margins.tolist() == [1.5, 1.5, 0.0, 0.0, -2.0, -2.0]  # pyright: ignore[reportAttributeAccessIssue] - of pairs


@pytest.mark.parametrize(("tokens", "good"), [((), 1), ((7, 8), 0)])
def test_a_classifier_has_bad_before_good_and_reward_tokens_good_before_bad(tokens: tuple[int, ...], good: int) -> None:
    samples = [Sample(uid="a", line=1, rows=(row(0, 1, 0, 1),), shares=(1.0, 0.25))]
    algo = SimpleNamespace(reward_tokens=tokens, reduction=Reduction())
    found = labels.steps(labels.packed(samples[0].rows), samples, algo).targets  # pyright: ignore[reportAttributeAccessIssue] - of steps
    expected = torch.zeros(4, 2)
    expected[1, good], expected[3, good], expected[3, 1 - good] = 1.0, 0.25, 0.75
    assert torch.equal(found, expected)
