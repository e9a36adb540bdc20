"""Loading the peers changes nothing for the rest of the suite, which runs the real Ray, vLLM and transformers."""

import importlib.util
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.parity import peers


def test_loading_leaves_no_trace(trl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ModuleType("transformers")
    monkeypatch.setitem(sys.modules, "transformers", real)
    before, environment, finders, compiler = set(sys.modules), dict(os.environ), list(sys.meta_path), torch.compile
    (loaded,) = peers.load("trl.trainer.grpo_trainer")
    foreign = peers.STANDING_IN | set(peers.RELEASES)
    assert {name for name in set(sys.modules) - before if name.partition(".")[0] in foreign} == set()
    assert before <= set(sys.modules)
    assert sys.modules["transformers"] is real
    assert loaded.transformers is not real
    assert (dict(os.environ), sys.meta_path, torch.compile) == (environment, finders, compiler)
    assert importlib.util.find_spec("trl") is None


def test_a_failed_load_leaves_no_trace(trl: SimpleNamespace) -> None:
    finders = list(sys.meta_path)
    with pytest.raises(ModuleNotFoundError):
        peers.load("trl.no_such_module")
    assert sys.meta_path == finders
    assert "trl" not in sys.modules


def test_a_stand_in_refuses_to_be_called(trl: SimpleNamespace) -> None:
    with pytest.raises(peers.StandInCalledError, match="is_peft_model"):
        trl.dpo.is_peft_model(None)
