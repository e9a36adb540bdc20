"""Loading tokenizers: from a model directory, never with its code; hashes that change with the ids they make."""

import copy
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hone.datasets.config import DataConfig
from hone.datasets.errors import TokenizerError
from hone.datasets.tasks.arithmetic import build_tokenizer
from hone.datasets.tokenizer import load_tokenizer, template_hash, tokenizer_hash


def test_a_saved_tokenizer_loads_with_its_template_and_the_same_hash(chatml: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    chatml.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.encode("How many clips?") == chatml.encode("How many clips?")
    assert loaded.chat_template == chatml.chat_template
    assert tokenizer_hash(loaded) == tokenizer_hash(chatml)


@pytest.mark.parametrize("model_type", [None, "llama", "qwen3"])
def test_a_directory_without_tokenizer_files_is_refused(tmp_path: Path, model_type: str | None) -> None:
    # For a qwen3 config alone transformers makes an empty tokenizer without a word.
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(TokenizerError, match=r"has no tokenizer files \(found " + ("'config.json'" if model_type else "nothing")):
        load_tokenizer(str(tmp_path))


def test_code_that_comes_with_a_model_is_refused_and_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"})
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(TokenizerError, match="code that comes with the model, and such code is never run"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "canary").exists()


def test_a_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be loaded: JSONDecodeError"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("path", ["", "./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere-at-all"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(path: str) -> None:
    with pytest.raises(TokenizerError, match="does not exist; name a directory with a tokenizer"):
        load_tokenizer(path)


def test_a_name_the_hub_cannot_give_is_answered_with_three_fixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TokenizerError, match=r"(?s)no tokenizer at 'no-such/model': .*spelling.*gated.*without a network"):
        load_tokenizer("no-such/model")


def test_the_hash_sees_the_vocabulary_and_special_tokens_and_not_what_a_call_leaves_behind(llama: PreTrainedTokenizerFast) -> None:
    same, other = copy.deepcopy(llama), copy.deepcopy(llama)
    same(["a", "b c d"], padding="max_length", truncation=True, max_length=2)
    other.add_tokens(["new"])
    assert tokenizer_hash(same) == tokenizer_hash(llama)
    assert len({tokenizer_hash(llama), tokenizer_hash(other), tokenizer_hash(build_tokenizer())}) == 3
    renamed = copy.deepcopy(llama)
    renamed.eos_token = "<|eot_id|>"
    assert tokenizer_hash(renamed) != tokenizer_hash(llama)


def test_the_template_hash_is_of_the_template_in_use_and_empty_without_one(
    llama: PreTrainedTokenizerFast, chatml: PreTrainedTokenizerFast
) -> None:
    chat, plain = DataConfig(apply_chat_template=True), DataConfig()
    hashes = [
        template_hash(llama, config=chat),
        template_hash(chatml, config=chat),
        template_hash(llama, config=DataConfig(input_template="{}")),
    ]
    assert len(set(hashes)) == 3
    assert all(hashes)
    assert template_hash(llama, config=plain) == ""
