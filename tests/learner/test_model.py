"""Loading and saving: what is refused, with which words, and that an export is the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config, GPT2Config, GraniteConfig, MistralConfig

from hone.learner.errors import ModelError
from hone.learner.model import CriticModel, PolicyModel, load_critic, load_policy
from hone.learner.model_files import check_model
from tests.learner.tiny import CONFIGS, SHAPE, VOCABULARY, make_batch, save_config, save_model

CPU = torch.device("cpu")


def policy(directory: str, **settings: bool) -> PolicyModel:
    return load_policy(directory, dtype=torch.float32, device=CPU, **settings)


def critic(directory: str, prefix: str = "score") -> CriticModel:
    return load_critic(directory, dtype=torch.float32, device=CPU, value_head_prefix=prefix)


@pytest.mark.parametrize("kind", CONFIGS)
def test_log_probabilities_are_transformers_own(tmp_path: Path, kind: str) -> None:
    directory = save_model(tmp_path, kind)
    batch = make_batch([9, 4, 13], temperature=0.7)
    logp, entropy = policy(directory)(batch.tokens, batch.position_ids, batch.cu_seqlens, batch.action_mask, 0.7, True)
    plain = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        row, mask = batch.tokens[start:end], batch.action_mask[start + 1 : end]
        log_probabilities = (plain(input_ids=row[None]).logits[0, :-1] / 0.7).log_softmax(-1)
        expected = log_probabilities.gather(1, row[1:, None])[:, 0]
        assert_close(logp[start + 1 : end][mask], expected[mask], rtol=1e-4, atol=1e-5)
        assert_close(entropy[start + 1 : end][mask], -(log_probabilities.exp() * log_probabilities).sum(-1)[mask], rtol=1e-4, atol=1e-5)


def test_other_architectures_load_or_are_refused_by_name(tmp_path: Path) -> None:
    policy(save_config(tmp_path / "window", MistralConfig(**SHAPE, sliding_window=3)))
    policy(save_config(tmp_path / "gpt2", GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64)))
    # Gemma 2 caps its attention scores, Granite divides its logits; neither is reproduced here, and neither may pass unseen.
    with pytest.raises(ModelError, match="softcap"):
        policy(save_config(tmp_path / "gemma2", Gemma2Config(**SHAPE)))
    with pytest.raises(ModelError, match="GraniteForCausalLM does something that packing does not reproduce"):
        policy(save_config(tmp_path / "granite", GraniteConfig(**SHAPE, logits_scaling=4.0)))


def test_a_wrong_path_names_the_nearest(tmp_path: Path) -> None:
    save_model(tmp_path / "qwen-tiny", "qwen3-tied")
    with pytest.raises(ModelError, match=r"did you mean .*qwen-tiny"):
        check_model(str(tmp_path / "qwen-tinny"))
    with pytest.raises(ModelError, match=f"does not exist either, the last directory on the way that does is {tmp_path}"):
        check_model(str(tmp_path / "models" / "a" / "b"))
    with pytest.raises(ModelError, match="is a file; name the directory"):
        check_model(str(tmp_path / "qwen-tiny" / "config.json"))
    with pytest.raises(ModelError, match=r"no config\.json \(found: empty\.txt\)"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "empty.txt").touch()
        check_model(str(tmp_path / "other"))
    check_model("organisation/name")  # a hub id: only the hub can tell


def test_a_model_is_checked_without_importing_torch(tmp_path: Path) -> None:
    check = f"import sys; from hone.learner.model_files import check_model; check_model({save_model(tmp_path, 'qwen3-tied')!r})"
    subprocess.run([sys.executable, "-c", f"{check}; assert not {{'torch', 'transformers'}} & sys.modules.keys()"], check=True)


def test_an_unknown_hub_id_says_what_can_be_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "tiny-model").mkdir()
    with pytest.raises(ModelError, match=r"did you mean tiny-model\?.*hf auth login.*without a network"):
        policy("tiny-modell")


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    directory = Path(save_model(tmp_path / "model", "qwen3-tied"))
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*Qwen3ForCausalLM.*save_pretrained"):
        policy(str(directory))


def test_models_that_bring_code_or_lack_weights_are_refused(tmp_path: Path) -> None:
    directory = Path(save_model(tmp_path / "code", "llama-untied"))
    settings = json.loads((directory / "config.json").read_text())
    code = {"model_type": "made_up", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (directory / "config.json").write_text(json.dumps({**settings, **code}))
    (directory / "code.py").write_text("raise SystemExit('this must not run')")
    with pytest.raises(ModelError, match="brings its own code, which is not run here"):
        policy(str(directory))

    directory = Path(save_model(tmp_path / "torn", "llama-untied"))
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights \(model\.layers\.1\.mlp\.up_proj\.weight"):
        policy(str(directory))
    (directory / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot be loaded"):
        policy(str(directory))


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_exported_policy_is_the_model(tmp_path: Path, kind: str) -> None:
    model = policy(save_model(tmp_path / "model", kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save(tmp_path / "export", {name: weight.detach() for name, weight in model.named_weights()})
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    tokens = torch.arange(12)[None]
    assert torch.equal(exported(input_ids=tokens).logits, _plain(model)(input_ids=tokens).logits)
    stored = set(load_file(tmp_path / "export" / "model.safetensors"))
    assert stored == set(load_file(tmp_path / "model" / "model.safetensors"))
    assert ("lm_head.weight" in stored) == (kind == "llama-untied")


def _plain(model: PolicyModel) -> AutoModelForCausalLM:
    model.causal_lm.set_attn_implementation("sdpa")
    return model.causal_lm


def test_a_fresh_critic_says_zero_and_a_saved_one_comes_back(tmp_path: Path) -> None:
    model = critic(save_model(tmp_path / "model", "llama-untied"))
    batch = make_batch([9, 4])
    inputs = (batch.tokens, batch.position_ids, batch.cu_seqlens, batch.action_mask)
    assert not model(*inputs).any()
    torch.nn.init.ones_(model.value_head.weight)
    model.save(tmp_path / "export", {name: weight.detach() for name, weight in model.named_weights()})
    assert torch.equal(critic(str(tmp_path / "export"))(*inputs), model(*inputs))
    # transformers reads it as a classifier of one label, which scores a row's last token: the state after it.
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export")
    classifier.config.pad_token_id = VOCABULARY + 1
    everywhere = torch.ones(9, dtype=torch.bool)
    scored = classifier(input_ids=batch.tokens[None, :8]).logits[0, 0]
    assert_close(scored, model(batch.tokens[:9], torch.arange(9), torch.tensor([0, 9]), everywhere)[8])


def test_a_stored_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    directory = Path(save_model(tmp_path / "model", "llama-untied"))
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "score.weight": torch.zeros(3, 32)}, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"score\.weight has shape \(3, 32\).*--ds\.value-head-prefix"):
        critic(str(directory))
    assert not critic(str(directory), prefix="value_head").value_head.weight.any()


def test_recomputing_layers_changes_no_gradient_and_wakes_no_dropout(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=64)  # dropout 0.1 in its configuration
    directory = save_config(tmp_path, config)
    batch = make_batch([9, 4, 13])
    gradients = []
    for recompute in (False, True):
        model = policy(directory, gradient_checkpointing=recompute)
        logp, _ = model(batch.tokens, batch.position_ids, batch.cu_seqlens, batch.action_mask, 1.0, True)
        logp.sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_weights()})
    recomputed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) and module.training]
    assert len(recomputed) == 2
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
