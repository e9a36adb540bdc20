"""Whole runs: the built-in model made once a session, small models of other architectures, rows and reward files to feed them."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging

GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k" / "train.jsonl"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
}
MADE_UP = [{"question": f"How many legs have {count} cats?", "answer": str(4 * count)} for count in range(1, 41)]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on what the tests ask, with a ChatML template: it stands in for a downloaded one."""
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    base.train_from_iterator([row["question"] + row["answer"] for row in MADE_UP], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML)


def save_model(directory: Path, tokenizer: PreTrainedTokenizerFast, *, kind: str, tied: bool) -> Path:
    """A small random model of the given architecture with its tokenizer, as a user's directory would hold it."""
    import torch

    logging.disable_progress_bar()
    torch.manual_seed(0)
    settings = {**SIZES, "vocab_size": len(tokenizer), "tie_word_embeddings": tied, "bos_token_id": None}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    untrained = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**settings, **ends)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**settings, **ends)),
        "mixture": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, **ends, num_experts=4, num_experts_per_tok=2)),
    }
    untrained[kind]().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_rows(file: Path, rows: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_reward(file: Path, body: str) -> Path:
    """A reward file with OpenRLHF's contract; `body` is what the function does."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    file.write_text(f"def reward_func(queries, prompts, labels):\n{lines}")
    return file


SHORT_IS_GOOD = """assert len(queries) == len(prompts) == len(labels) == 1
response = queries[0][len(prompts[0]):]
return {"rewards": [1.0 / (1 + len(response))], "scores": [0.5], "extra_logs": {"characters": [float(len(response))]}}"""
