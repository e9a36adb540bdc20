"""Publishing in one process: an update that lies, loses a tensor or forgets its version stops the run and names what is stale."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hone.launch import local
from hone.launch.cli import main
from hone.launch.local import ServedHere
from hone.rollout.weight_sync.source import FingerprintedSource

RUN = ["grpo", "--run.backend", "local", "--train.max-steps", "3"]


def _nothing(served: ServedHere, source: FingerprintedSource, honest: Callable[..., Any]) -> dict[str, str]:
    """Claims that everything arrived, and leaves the engine as it was."""
    for _ in source:
        pass
    served._received = dict(source.fingerprints)
    return source.fingerprints


def _altered(served: ServedHere, source: FingerprintedSource, honest: Callable[..., Any]) -> dict[str, str]:
    """One tensor is damaged on its way."""
    weights = served._engine.held()
    held = weights["model.layers.1.mlp.up_proj.weight"]
    sent = honest(served, source)
    with torch.no_grad():
        held[0, 0] += 1
    served._received = {name: local.fingerprint(tensor) for name, tensor in weights.items() if name in sent}
    return sent


@pytest.mark.parametrize(
    ("fault", "said"),
    [(_nothing, "still answers like version 0"), (_altered, "model.layers.1.mlp.up_proj.weight arrived altered")],
)
def test_stale_weights_end_the_run(
    fault: Callable[..., dict[str, str]],
    said: str,
    hone_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    honest = ServedHere.receive
    calls = []

    def receive(served: ServedHere, source: FingerprintedSource) -> dict[str, str]:
        calls.append(source)
        return honest(served, source) if len(calls) == 1 else fault(served, source, honest)

    monkeypatch.setattr(ServedHere, "receive", receive)
    assert main([*RUN, "--run.dir", str(tmp_path / "run")]) == 7
    assert len(calls) == 2
    error = capsys.readouterr().err
    assert said in error and "version 1" in error


def test_a_forgotten_version_ends_the_run(
    hone_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def forget(served: ServedHere, version: int) -> None:
        return None

    monkeypatch.setattr(ServedHere, "set_version", forget)
    assert main([*RUN, "--run.dir", str(tmp_path / "run")]) == 7
    assert "serves version 0 after the update to version 1" in capsys.readouterr().err
