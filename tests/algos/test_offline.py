"""Labelled rows: what they weigh, what they refuse, and that a cut takes everything along as it is."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from hone.algos.batch import Batch, Packed, Scored, select
from hone.algos.kto import anchor_sums
from hone.algos.offline import (
    Demonstrations,
    Judgements,
    Pairs,
    Steps,
    Taught,
    weighed_demonstrations,
    weighed_judgements,
    weighed_pairs,
    weighed_steps,
    weighed_taught,
    with_anchor,
)
from hone.algos.reduce import Reduction
from tests.algos.strategies import law
from tests.reference.arguments import asked
from tests.reference.offline_rows import packed

NAN, INF = math.nan, math.inf
# Two and one action tokens, a row without any, three.
MASKS = [".##", "#.", "...", "###"]


def _fp64(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        (Reduction(), [0, 1 / 6, 1 / 6, 1 / 6, 0, 0, 0, 0, 1 / 6, 1 / 6, 1 / 6]),
        (Reduction(over="sequence"), [0, 1 / 6, 1 / 6, 1 / 3, 0, 0, 0, 0, 1 / 9, 1 / 9, 1 / 9]),
        (Reduction(over="constant", length=4), [0, 1 / 12, 1 / 12, 1 / 12, 0, 0, 0, 0, 1 / 12, 1 / 12, 1 / 12]),
    ],
)
def test_tokens_weigh_as_the_reduction_says_and_a_row_without_any_weighs_nothing(reduction, expected):
    rows, tokens = packed(MASKS), 11
    targets, teacher = torch.full((tokens, 2), 0.5), torch.zeros(tokens, 3)
    for labelled in (
        weighed_demonstrations(rows, reduction=reduction),
        weighed_steps(rows, targets, reduction=reduction),
        weighed_taught(rows, teacher, reduction=reduction),
    ):
        assert_close(labelled.weights, torch.tensor(expected))


def test_pairs_weigh_alike_and_one_without_tokens_on_either_side_nothing():
    rows = weighed_pairs(packed(["#", "##", ".", "#", "##", "..", "...", ".", "#.", ".#"]))
    assert_close(rows.row_weights, torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0, 0.5, 0.5]))
    assert_close(rows.pair_weights, torch.tensor([0.5, 0, 0, 0, 0.5]))
    assert rows.pair_mask.tolist() == [True, False, False, False, True]
    assert_close(rows.margins, torch.zeros(10))


def test_both_rows_of_a_pair_carry_its_margin():
    rows = weighed_pairs(packed(["#"] * 4), margins=_fp64(0.5, -2.0))
    assert_close(rows.margins, torch.tensor([0.5, 0.5, -2.0, -2.0]))
    assert_close(select(rows, [2, 3]).margins, torch.tensor([-2.0, -2.0]))


def test_an_odd_number_of_rows_and_another_number_of_margins_are_refused():
    with pytest.raises(ValueError, match="rows are 3; pairs need an even number: chosen, rejected"):
        weighed_pairs(packed(["#"] * 3))
    for count in (1, 3, 4):
        with pytest.raises(ValueError, match=rf"margins have shape \({count},\); 4 rows are 2 pairs, give each one margin"):
            weighed_pairs(packed(["#"] * 4), margins=torch.zeros(count))


def test_judged_rows_weigh_alike_and_one_without_tokens_nothing():
    desirable = torch.tensor([True, False, True, False])
    rows = weighed_judgements(packed(MASKS), desirable)
    assert_close(rows.row_weights, torch.tensor([1 / 3, 1 / 3, 0, 1 / 3]))
    assert rows.desirable is desirable and rows.anchor is None


def test_the_anchor_is_that_of_all_ranks_and_belongs_to_the_step():
    rows = weighed_judgements(packed(MASKS), torch.tensor([True, False, True, False]))
    with pytest.raises(ValueError, match="the batch has no anchor; `with_anchor` fills it when the algorithm's `needs` contains 'anchor'"):
        rows.require("anchor")
    # Log-ratios .4 and -.2 on one rank and .7 on another: .9 / 3, not the mean .4 of the ranks' means.
    sums = anchor_sums(_fp64(0.4, NAN, -0.2), torch.tensor([True, False, True])) + anchor_sums(_fp64(0.7), torch.tensor([True]))
    anchored = with_anchor(rows, sums)
    assert_close(anchored.require("anchor"), _fp64(0.3).squeeze())
    for part in (select(anchored, [3]), select(anchored, [2, 0]), select(anchored, [])):
        assert_close(part.require("anchor"), _fp64(0.3).squeeze())
    assert with_anchor(rows, _fp64(-1.0, 5.0)).anchor == 0
    for count in (0, 1):
        with pytest.raises(ValueError, match=rf"{count} mismatched rows; it needs at least 2 per optimiser step: raise train.batch_size"):
            with_anchor(rows, _fp64(0.4, float(count)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([NAN, 0.5], r"steps: 1 of 2 targets are not finite, at index 1 nan"),
        ([1.0, -INF], r"steps: 1 of 2 targets are not finite, at index 1 -inf"),
        ([1.5, -0.5], r"targets of the step that ends at token 1 are \[1.5, -0.5\]; they must be at least 0 and add up to 1"),
        ([0.25, 0.25], r"targets of the step that ends at token 1 are \[0.25, 0.25\]; .* such as \[1 - q, q\]"),
        ([0.0, 0.0], r"targets of the step that ends at token 1 are \[0.0, 0.0\]"),
        ([1.0, 1.0], r"targets of the step that ends at token 1 are \[1.0, 1.0\]"),
    ],
)
def test_targets_are_shares_where_a_step_ends_and_anything_elsewhere(wrong, message):
    rows = packed([".#", "."])
    fitting = torch.tensor([[NAN, 7.0], [0.25, 0.75], [-INF, INF]])
    assert weighed_steps(rows, fitting, reduction=Reduction()).targets is fitting
    broken = fitting.clone()
    broken[1] = torch.tensor(wrong)
    with pytest.raises(ValueError, match=message):
        weighed_steps(rows, broken, reduction=Reduction())


def test_a_teacher_reports_everything_or_its_top():
    rows, logp, tokens = packed(["##"]), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long)
    assert weighed_taught(rows, logp, reduction=Reduction()).teacher_tokens is None
    top = weighed_taught(rows, logp, teacher_tokens=tokens, reduction=Reduction())
    assert top.teacher_logp is logp and top.teacher_tokens is tokens


LABELS = {
    "demonstrations": (Demonstrations, lambda rows, reduction: weighed_demonstrations(rows, reduction=reduction)),
    "pairs": (Pairs, lambda rows, reduction: weighed_pairs(rows, margins=torch.arange(rows.rows // 2).float())),
    "judgements": (
        Judgements,
        lambda rows, reduction: with_anchor(weighed_judgements(rows, torch.arange(rows.rows) % 3 == 0), torch.tensor([1.0, 4.0])),
    ),
    "steps": (
        Steps,
        lambda rows, reduction: weighed_steps(
            rows, torch.arange(3.0 * rows.tokens.numel()).reshape(-1, 3).sin().softmax(-1), reduction=reduction
        ),
    ),
    "taught": (
        Taught,
        lambda rows, reduction: weighed_taught(
            rows,
            torch.arange(2.0 * rows.tokens.numel()).reshape(-1, 2),
            teacher_tokens=torch.arange(2 * rows.tokens.numel()).reshape(-1, 2),
            reduction=reduction,
        ),
    ),
}
masks = st.lists(st.text("#.", min_size=0, max_size=5), min_size=1, max_size=4).map(lambda masks: masks + masks[::-1])


@pytest.mark.parametrize("name", LABELS)
@law
@given(masks=masks, over=st.sampled_from(["token", "sequence"]), data=st.data())
def test_a_cut_takes_rows_with_all_they_carry(name, masks, over, data):
    kind, label = LABELS[name]
    plain = packed(masks, ref_logp=torch.arange(float(sum(map(len, masks)))))
    plain = dataclasses.replace(plain, attached=tuple((f"of row {row}",) for row in range(plain.rows)))
    rows = label(dataclasses.replace(plain, temperature=0.7), Reduction(over=over))
    assert type(rows) is kind and rows.temperature == 0.7
    for field in dataclasses.fields(Packed):
        assert field.name == "temperature" or getattr(rows, field.name) is getattr(plain, field.name)
    together = kind.ROWS_TOGETHER
    units = data.draw(st.lists(st.integers(0, rows.rows // together - 1), max_size=5))
    order = [together * unit + place for unit in units for place in range(together)]
    part = select(rows, order)
    assert type(part) is kind and part.rows == len(order) and part.temperature == 0.7
    edges = rows.cu_seqlens.tolist()
    tokens = [token for row in order for token in range(edges[row], edges[row + 1])]
    for field in dataclasses.fields(kind):
        value = getattr(rows, field.name)
        if field.name in ("cu_seqlens", "temperature", "anchor") or value is None:
            continue
        if field.name == "attached":
            assert part.attached == tuple(rows.attached[row] for row in order)
            continue
        index = torch.tensor(order if field.name in kind.PER_ROW else tokens, dtype=torch.long)
        assert_close(getattr(part, field.name), value[index], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Packed, Batch, Scored, *(kind for kind, _ in LABELS.values())])
def test_every_field_with_an_entry_per_row_is_taken_by_row(kind):
    demands = {field.name: asked(field.type) for field in dataclasses.fields(kind)}
    assert {name for name, demand in demands.items() if demand is not None and demand.axes == ("N",)} == kind.PER_ROW


def test_weights_are_settled_for_the_whole_step_before_it_is_cut():
    whole = weighed_pairs(packed(["#", "#", "#", "#", "#", "#"]))
    assert_close(select(whole, [0, 1]).pair_weights, torch.tensor([1 / 3]))  # of its own it would be 1
    judged = weighed_judgements(packed(["#", "#", "."]), torch.tensor([True, False, True]))
    assert_close(select(judged, [1]).row_weights, torch.tensor([0.5]))
    shown = weighed_demonstrations(packed(["#", "###"]), reduction=Reduction(over="sequence"))
    assert_close(select(shown, [1]).weights, torch.full((3,), 1 / 6))


@pytest.mark.parametrize("name", LABELS)
def test_a_step_of_nothing_has_rows_and_weights_of_nothing(name):
    _, label = LABELS[name]
    for rows in (packed([]), packed(["..", "."]), packed(["", ""])):
        labelled = label(rows, Reduction(over="sequence"))
        assert labelled.rows == rows.rows
        weights = labelled.row_weights if "row_weights" in labelled.PER_ROW else labelled.weights
        assert (weights == 0).all()


def test_a_pair_is_not_parted():
    """Cut between its rows, each would stand beside a stranger, and no shape would tell."""
    pairs = weighed_pairs(packed(["#", "##", ".#", "#"]))
    assert select(pairs, [2, 3, 0, 1]).lengths.tolist() == [2, 1, 1, 2]
    for rows in ([0], [1, 2], [1, 0], [0, 1, 2], [0, 3]):
        with pytest.raises(ValueError, match="part Pairs; take 2 neighbours"):
            select(pairs, rows)
