"""The best model of a run: which way is better, and that one is always there while another takes its place."""

from pathlib import Path

import pytest

from hone.launch.programs.best import Best


@pytest.mark.parametrize(("key", "higher"), [("eval/accuracy", True), ("eval/reward_margin", True), ("eval/loss", False)])
def test_which_way_is_better(key: str, higher: bool, tmp_path: Path) -> None:
    best = Best(key, tmp_path / "model_best")
    found = [best.improved({key: value}, step=step) for step, value in enumerate([0.5, 0.7, 0.6, 0.3, float("nan")], 1)]
    assert found == ([True, True, False, False, False] if higher else [True, False, False, True, False])


def test_the_one_before_is_there_until_the_new_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best, place = Best("eval/loss", tmp_path / "model_best"), tmp_path / "model_best"

    def export(directory: Path) -> None:
        directory.mkdir()
        (directory / "weights").write_text(str(best.step))

    assert best.improved({"eval/loss": 2.0}, step=1)
    best.keep(export)
    plain = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if target == place:
            raise KeyboardInterrupt
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    assert best.improved({"eval/loss": 1.0}, step=2)
    with pytest.raises(KeyboardInterrupt):
        best.keep(export)
    assert {(file.parent / "weights").read_text() for file in tmp_path.glob("*/best.json")} == {"1", "2"}
    monkeypatch.undo()
    best.keep(export)
    assert [file.name for file in tmp_path.iterdir()] == ["model_best"] and (place / "weights").read_text() == "2"
