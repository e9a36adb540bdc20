"""The model that ships as a recipe: the same recipe gives the same weights, made once, and another recipe another model."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from hone.launch.builtin import BuiltinModel, builtin_model

QUICK = BuiltinModel(hidden_size=32, heads=2, key_value_heads=1, steps=30, rows_per_step=32)


def test_a_recipe_is_made_once_and_always_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, object]] = []
    losses: list[float] = []
    for name in ("one", "two"):
        monkeypatch.setenv("HONE_CACHE", str(tmp_path / name))
        path = builtin_model(QUICK, progress=lambda step, steps, loss: losses.append(loss))
        made.append(load_file(path / "model.safetensors"))
        assert path.parent == tmp_path / name and [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert len(losses) == 60 and losses[:30] == losses[30:]
    assert losses[29] < losses[0] - 0.5
    assert made[0].keys() == made[1].keys() and all((made[0][key] == made[1][key]).all() for key in made[0])

    # The second time it is found, not made; a recipe that differs in anything is another model.
    assert builtin_model(QUICK, progress=lambda step, steps, loss: pytest.fail("made again")) == path
    other = builtin_model(BuiltinModel(hidden_size=32, heads=2, key_value_heads=1, steps=2, rows_per_step=32))
    assert other.parent == path.parent and other != path


def test_an_interrupted_making_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HONE_CACHE", str(tmp_path))

    def stop(step: int, steps: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builtin_model(QUICK, progress=stop)
    assert list(tmp_path.iterdir()) == []
