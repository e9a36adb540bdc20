"""Errors as codes and as text: the table of codes, every problem at once, nothing that moves the cursor."""

import pytest

from hone.datasets.errors import DataError, TokenizerError
from hone.launch.errors import CODES, Problem, UsageError, exit_code, present
from hone.learner.errors import ModelError, NumericsError
from hone.rollout.errors import EngineError, RewardError, StaleWeights


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError([Problem(what="w", mend="m")]), 2),
        (UsageError([Problem(what="w", mend="m", code=6), Problem(what="w", mend="m", code=3)]), 3),
        (DataError("x"), 3),
        (TokenizerError("x"), 3),
        (ModelError("x"), 5),
        (RewardError("x"), 6),
        (EngineError("x"), 7),
        (StaleWeights("x"), 7),
        (NumericsError(role="policy", step=1, what="nan"), 8),
        (KeyboardInterrupt(), 130),
        (RuntimeError("x"), 1),
    ],
)
def test_every_error_has_its_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_the_table_names_types_that_exist() -> None:
    import importlib

    for name in CODES:
        module, _, kind = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), kind), BaseException)


class Remote(Exception):
    """As Ray hands over what a task raised: the original under `cause`, the remote traceback in its own text."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__("Traceback of another process")
        self.cause = cause


def test_an_error_of_another_process_counts_as_what_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    error = Remote(RewardError("reward_func returned None for prompt 3"))
    assert exit_code(error) == 6
    present(error, debug=False)
    assert capsys.readouterr().err == "error: reward_func returned None for prompt 3\n"


def test_a_problem_is_what_where_and_how_to_mend() -> None:
    assert str(Problem(what="w", mend="m", where="p")) == "w\nat: p\nfix: m"
    assert str(UsageError([Problem(what="w", mend=""), Problem(what="v", mend="n")])) == "w\nv\nfix: n"


def test_all_problems_are_shown_numbered_and_none_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x " * 200 + "end"
    present(UsageError([Problem(what="first", mend="do a", where="--a"), Problem(what=long, mend="do b", where="--b")]), debug=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "error: 2 problems; nothing was started",
        "",
        "  1. first",
        "     at  --a",
        "     fix do a",
        "",
        f"  2. {long}",
        "     at  --b",
        "     fix do b",
    ]


def test_a_drawing_keeps_its_lines_and_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    present(UsageError([Problem(what="wrong\nab = \n     ^", mend="m")]), debug=False)
    assert capsys.readouterr().err == "error: wrong\n       ab =\n            ^\n     fix m\n"


def test_quoted_input_cannot_move_the_cursor_or_mark_up_text(capsys: pytest.CaptureFixture[str]) -> None:
    # spec S12
    present(UsageError([Problem(what="got `\x1b[2J\x07[red]\u202e`", mend="m")]), debug=False)
    assert capsys.readouterr().err.splitlines()[0] == r"error: got `\x1b[2J\x07[red]\u202e`"


def test_a_secret_of_the_environment_is_struck_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "verysecretvalue")
    present(RewardError("it said verysecretvalue"), debug=False)
    assert "verysecret" not in capsys.readouterr().err


def test_a_traceback_is_for_debug_only(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise RuntimeError("deep")
    except RuntimeError as error:
        present(error, debug=False)
        quiet = capsys.readouterr().err
        present(error, debug=True)
        loud = capsys.readouterr().err
    assert "Traceback" not in quiet and "RuntimeError: deep" in quiet and "--debug" in quiet
    assert "Traceback" in loud and "test_errors.py" in loud
