"""The checks themselves: what an annotation asks for, what is said of a tensor that does not fit, and numbers that are not finite."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.testing import assert_close

from hone.algos.batch import rows_of_tokens
from hone.algos.checks import Spec, check_offsets, checked, require_finite, specs_of
from tests.algos.strategies import law

NAN, INF = math.nan, math.inf


@checked
def weigh(
    numbers: Float[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N_plus_1"],
    per_row: Float[Tensor, " N"] | float,
    table: Float[Tensor, "T 2"] | None = None,
    *,
    scale: float = 1.0,
    kept: Bool[Tensor, " T"] | None = None,
    anything: Shaped[Tensor, "T ..."] | None = None,
) -> float:
    """Weigh the numbers."""
    return scale * float(numbers.sum())


# Three numbers in rows of two and one.
NUMBERS, EDGES, PER_ROW = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 3], dtype=torch.int32), torch.zeros(2)


def _said(*args, **kwargs):
    with pytest.raises(ValueError) as raised:
        weigh(*args, **kwargs)
    return str(raised.value)


def test_what_fits_goes_through_however_it_is_given():
    assert weigh(NUMBERS, EDGES, PER_ROW) == 7.0
    assert weigh(numbers=NUMBERS, cu_seqlens=EDGES.long(), per_row=PER_ROW.double(), scale=2.0) == 14.0
    assert weigh(NUMBERS.bfloat16(), EDGES, 1.0, None) == weigh(NUMBERS, EDGES, 1) == 7.0
    assert weigh(NUMBERS, EDGES, PER_ROW, torch.zeros(3, 2), kept=NUMBERS > 1, anything=torch.zeros(3, 5, 7, dtype=torch.long)) == 7.0
    assert weigh(torch.zeros(0), EDGES[:1], torch.zeros(0)) == 0.0
    assert weigh(torch.zeros(0), torch.zeros(4, dtype=torch.long), torch.zeros(3)) == 0.0  # rows, none of which has a token


def test_the_function_keeps_its_name_and_what_it_says():
    assert (weigh.__name__, weigh.__doc__) == ("weigh", "Weigh the numbers.")
    with pytest.raises(TypeError, match="missing"):
        weigh(NUMBERS)
    with pytest.raises(TypeError, match="unexpected"):
        weigh(NUMBERS, EDGES, PER_ROW, colour=1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"numbers": [1.0, 2.0, 4.0]}, "numbers is a list; it must be a torch tensor of shape [T]"),
        ({"numbers": np.ones(3)}, "numbers is a ndarray; it must be a torch tensor of shape [T]"),
        ({"numbers": 1.0}, "numbers is a float; it must be a torch tensor of shape [T]"),
        ({"numbers": None}, "numbers is None; it must be a torch tensor of shape [T]"),
        ({"per_row": None}, "per_row is None; it must be a torch tensor of shape [N]"),
        ({"per_row": "no"}, "per_row is a str; it must be a torch tensor of shape [N]"),
        ({"table": 1.0}, "table is a float; it must be a torch tensor of shape [T, 2]"),
        ({"anything": 1.0}, "anything is a float; it must be a torch tensor of shape [T, ...]"),
        (
            {"numbers": NUMBERS.long()},
            "numbers is torch.int64; it must be floating point: pass numbers.float() if that is what it means",
        ),
        ({"cu_seqlens": EDGES.float()}, "cu_seqlens is torch.float32; it must be integer: pass cu_seqlens.long() if that is what it means"),
        ({"cu_seqlens": EDGES > 0}, "cu_seqlens is torch.bool; it must be integer: pass cu_seqlens.long() if that is what it means"),
        ({"kept": EDGES}, "kept is torch.int32; it must be boolean: pass kept.bool() if that is what it means"),
        ({"kept": NUMBERS}, "kept is torch.float32; it must be boolean: pass kept.bool() if that is what it means"),
        ({"cu_seqlens": EDGES * 1j}, "cu_seqlens is torch.complex64; it must be integer"),
        ({"numbers": NUMBERS * 1j}, "numbers is torch.complex64; it must be floating point"),
        (
            {"numbers": NUMBERS[None]},
            "numbers has shape (1, 3); it must be [T] (T: one entry per packed token); pack padded rows with `pack_padded`",
        ),
        ({"numbers": NUMBERS[0]}, "numbers has shape (); it must be [T] (T: one entry per packed token)"),
        ({"per_row": PER_ROW[None]}, "per_row has shape (1, 2); it must be [N] (N: one per row)"),
        ({"anything": NUMBERS[0]}, "anything has shape (); it must be [T, ...] (T: one entry per packed token)"),
        ({"table": torch.zeros(3, 3)}, "table has shape (3, 3); it must be [T, 2]"),
        (
            {"table": torch.zeros(4, 2)},
            "table has shape (4, 2), but numbers has 3 along T (one entry per packed token); give both alike",
        ),
        ({"kept": NUMBERS[:2] > 0}, "kept has shape (2,), but numbers has 3 along T (one entry per packed token); give both alike"),
        (
            {"anything": torch.zeros(2, 9)},
            "anything has shape (2, 9), but numbers has 3 along T (one entry per packed token); give both alike",
        ),
        ({"per_row": torch.zeros(3)}, "cu_seqlens has 3 entries, for 2 rows, but per_row has 3; give both the same rows"),
        ({"cu_seqlens": EDGES[:2]}, "cu_seqlens runs from 0 to 2; it must run from 0 to the 3 packed tokens: [0, *lengths.cumsum(0)]"),
        ({"cu_seqlens": EDGES[1:]}, "cu_seqlens runs from 2 to 3; it must run from 0 to the 3 packed tokens: [0, *lengths.cumsum(0)]"),
        ({"cu_seqlens": EDGES[:0]}, "cu_seqlens is empty; it must run from 0 to the 3 packed tokens: [0, *lengths.cumsum(0)]"),
        (
            {"cu_seqlens": torch.tensor([0, 4, 3])},
            "cu_seqlens falls somewhere; no row has fewer than 0 tokens: [0, *lengths.cumsum(0)]",
        ),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_what_does_not_fit_is_named_with_what_it_is_and_what_it_should_be(change, said):
    fitting = {"numbers": NUMBERS, "cu_seqlens": EDGES, "per_row": PER_ROW}
    message = _said(**{**fitting, **change})
    assert message.startswith(f"weigh: {said}")
    if "complex" not in said:
        assert message == f"weigh: {said}"
    positional = [*{**fitting, **change}.values()]
    if set(change) <= set(fitting):
        assert _said(*positional) == message


def test_values_are_not_looked_at():
    assert math.isnan(weigh(torch.tensor([NAN, INF, -INF]), EDGES, NAN))


def test_what_is_read_of_annotations():
    annotations = {
        "a": Float[Tensor, " T"],
        "b": Int[Tensor, "T K"] | None,
        "c": Shaped[Tensor, "B L ..."],
        "d": Float[Tensor, ""],
        "e": float | Bool[Tensor, "2"],
        "f": float,
        "g": dict[str, Float[Tensor, ""]],
        "h": Float[Tensor, "..."],
    }
    assert specs_of(annotations) == {
        "a": Spec(kind="floating point", axes=("T",), open=False),
        "b": Spec(kind="integer", axes=("T", "K"), open=False, others=(type(None),)),
        "c": Spec(kind="", axes=("B", "L"), open=True),
        "d": Spec(kind="floating point", axes=(), open=False),
        "e": Spec(kind="boolean", axes=("2",), open=False, others=(float, int)),
        "h": Spec(kind="floating point", axes=(), open=True),
    }


@law
@given(st.lists(st.integers(0, 5), max_size=6), st.data())
def test_offsets_fit_if_and_only_if_they_are_the_running_sum_of_lengths(lengths, data):
    edges = torch.tensor([0, *lengths]).cumsum(0)
    tokens = sum(lengths)
    check_offsets("f", edges, tokens=tokens)
    check_offsets("f", edges, tokens=None)
    assert rows_of_tokens(edges).tolist() == [row for row, length in enumerate(lengths) for _ in range(length)]
    with pytest.raises(ValueError, match=rf"f: cu_seqlens runs from 0 to {tokens}; it must run from 0 to the {tokens + 1} packed tokens"):
        check_offsets("f", edges, tokens=tokens + 1)
    with pytest.raises(ValueError, match="cu_seqlens runs from 1 to"):
        rows_of_tokens(edges + 1)
    if len(lengths) > 1:
        place = data.draw(st.integers(1, len(lengths) - 1))
        for wrong in (-1, tokens + 1):
            broken = edges.clone()
            broken[place] = wrong
            with pytest.raises(ValueError, match="cu_seqlens falls somewhere"):
                check_offsets("f", broken, tokens=tokens)


def test_finite_numbers_pass_and_others_are_counted_and_shown():
    require_finite("f", "rewards", torch.tensor([0.0, -1e38]))
    require_finite("f", "rewards", torch.tensor([1, 2]))
    require_finite("f", "rewards", torch.zeros(0))
    require_finite("f", "rewards", torch.tensor([NAN, 1.0, INF]), torch.tensor([False, True, False]))
    with pytest.raises(ValueError, match=r"^f: 2 of 4 rewards are not finite, at index 1 -inf; mend what computed it$"):
        require_finite("f", "rewards", torch.tensor([0.0, -INF, 1.0, NAN]))
    with pytest.raises(ValueError, match=r"^f: 1 of 2 rewards are not finite, at index 3 nan; drop the rows$"):
        require_finite(
            "f", "rewards", torch.tensor([0.0, -INF, 1.0, NAN]), torch.tensor([False, False, True, True]), remedy="drop the rows"
        )


def test_of_a_table_that_is_not_finite_the_row_is_told():
    table = torch.tensor([[NAN, NAN], [0.5, 0.5], [1.0, INF]])
    with pytest.raises(ValueError, match=r"f: 1 of 4 targets are not finite, at index 2 inf; "):
        require_finite("f", "targets", table, torch.tensor([False, True, True])[:, None].expand(3, 2))
    with pytest.raises(ValueError, match=r"f: 3 of 6 targets are not finite, at index 0 nan; "):
        require_finite("f", "targets", table)


def test_gradients_pass_the_checks():
    leaf = torch.ones(3, requires_grad=True)

    @checked
    def square(numbers: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
        return numbers * numbers

    square(leaf).sum().backward()
    assert_close(leaf.grad, torch.full((3,), 2.0))
