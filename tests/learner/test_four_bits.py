"""QLoRA on bitsandbytes' CPU kernels: frozen weights in 4 bits below adapters, handed out in full."""

import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Qwen3Config

from hone.learner.config import LoraConfig
from hone.learner.errors import CheckpointError, ModelError
from hone.learner.quantised import in_four_bits, settle
from tests.learner.test_adapters import ROLES, learner_of, logp, plain_logp, randomise, save, update, weights
from tests.learner.tiny import SHAPE, make_learner, save_config, save_model

WIDE = {**SHAPE, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
FOUR_BITS = {"lora": LoraConfig(rank=3, alpha=6), "load_in_4bit": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_config(tmp_path_factory.mktemp("model"), Qwen3Config(**WIDE, tie_word_embeddings=True))


def test_linear_layers_are_held_in_four_bits_and_handed_out_in_full(model: str, tmp_path: Path) -> None:
    learner, plain = make_learner({"policy": model}, ds=FOUR_BITS), make_learner({"policy": model})
    assert learner.weight_names("policy") == plain.weight_names("policy")
    held = dict(learner.engines["policy"].module.named_weights())
    quantised = [name for name, parameter in held.items() if parameter.dtype == torch.uint8]
    assert len(quantised) == 2 * 7 and "lm_head.weight" not in held  # tied to the embedding, which stays in full
    original = weights(plain)
    for name, weight in weights(learner).items():
        if name not in quantised:
            assert torch.equal(weight, original[name])
            continue
        assert torch.equal(weight, dequantize_4bit(held[name].data, held[name].quant_state))
        # Sixteen levels between -1 and 1 times a block's largest: the widest gap is 0.304, so rounding is at most half of that.
        assert 0 < float((weight - original[name]).abs().max()) < 0.16 * float(original[name].abs().max())

    randomise(learner, "policy")
    update(learner)
    learner.export("policy", str(tmp_path / "export"))
    assert load_file(tmp_path / "export" / "model.safetensors").keys() == load_file(Path(model) / "model.safetensors").keys()
    assert_close(plain_logp(AutoModelForCausalLM.from_pretrained(tmp_path / "export")), logp(learner), rtol=1e-4, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **in_four_bits(torch.float32, torch.device("cpu")))
    settle(base, model)  # else the CPU's other layout rounds scales to bf16: 0.06 nats
    assert_close(plain_logp(PeftModel.from_pretrained(base, tmp_path / "export" / "adapter")), logp(learner), rtol=1e-4, atol=1e-4)


def test_only_adapters_move_and_the_reference_is_the_policy_it_began_as(model: str) -> None:
    learner = make_learner(dict.fromkeys((*ROLES, "reference"), model), ds=FOUR_BITS)
    frozen = {name: one.clone() for name, one in learner.engines["policy"].module.named_weights() if ".lora_" not in name}
    assert all(torch.equal(one, weights(learner, "reference")[name]) for name, one in weights(learner).items())
    for role in ROLES:
        update(learner, role)
        update(learner, role)
    after = dict(learner.engines["policy"].module.named_weights())
    assert all(torch.equal(after[name], one) for name, one in frozen.items())
    moved = [name for name, one in weights(learner).items() if not torch.equal(one, weights(learner, "reference")[name])]
    assert len(moved) == 2 * 7


def test_a_checkpoint_of_adapters_over_four_bits_fits_no_other_base(model: str, tmp_path: Path) -> None:
    learner, again = (make_learner({"policy": model}, ds=FOUR_BITS) for _ in range(2))
    update(learner)
    path = save(learner, tmp_path)
    again.restore(path)
    for one in (learner, again):
        update(one)
    assert all(torch.equal(one, weights(learner)[name]) for name, one in weights(again).items())
    with pytest.raises(CheckpointError, match="another model"):
        learner_of(model).restore(path)


def test_combinations_that_cannot_be_right_are_refused(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"rows are multiples of 64, and those of model\.layers\.0\.self_attn\.q_proj have 32"):
        make_learner({"policy": save_model(tmp_path, "qwen3-tied")}, ds=FOUR_BITS)
    with pytest.raises(ValueError, match=r"nothing would train; add adapters, --ds\.lora\.rank"):
        make_learner({"policy": model}, ds={"load_in_4bit": True})
    with pytest.raises(ValueError, match=r"--ds\.zero-stage 3 cuts parameters anywhere"):
        make_learner({"policy": model}, ds=FOUR_BITS, stage=3)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"needs bitsandbytes .*install hone-learner\[qlora\]"):
        make_learner({"policy": model}, ds=FOUR_BITS)
