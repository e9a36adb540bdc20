"""What a vision-language model cannot be, or have done with it, is told before anything is started."""

from pathlib import Path

import pytest

from tests.launch.asking import missing
from tests.launch.test_preflight import a_model, of_model


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return a_model(tmp_path / "m", model_type="qwen2_5_vl", text_config={"max_position_embeddings": 64, "num_attention_heads": 2})


def test_a_directory_without_an_image_processor_is_named(model: Path) -> None:
    (without,) = (one for one in of_model(model) if "image processor" in one.what)
    assert without.what == f"{model} is a vision-language model without an image processor"


def test_what_a_vision_language_model_cannot_be_or_have(model: Path) -> None:
    (model / "preprocessor_config.json").write_text("{}")
    told = [one.what for one in of_model(model, "--actor.num-gpus-per-node 2 --ds.ring-attn-size 2")]
    assert told[0].startswith("data.max_len ") and told[0].endswith("the model's 64 positions (max_position_embeddings in its config.json)")
    assert told[1:] == [
        f"{model} is a vision-language model, which cannot be a critic",
        f"{model} is a vision-language model, which is not cut or compiled: ds.ring_attn_size does not go with it",
    ]
    fits = f"grpo --actor.model-name-or-path {model} --data.max-len 64 --rollout.max-new-tokens 32"
    assert missing(fits) == []
    split = [one.what for one in missing(f"{fits} --actor.num-gpus-per-node 2 --ds.tensor-parallel-size 2")]
    assert f"{model} is a vision-language model, which is not cut or compiled: ds.tensor_parallel_size does not go with it" in split
