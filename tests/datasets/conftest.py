"""Real tokenizers made on the spot: byte-level BPE with and without a BOS, and a chat template of either family."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "Natalia sold clips to her friends in April.",
    "How many clips did she sell altogether?",
    "user assistant system 0123456789",
] * 4

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The Llama kind writes the BOS itself, and refuses roles out of turn.
LLAMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def _byte_level(post: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if post:
        tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=[("<s>", 0), ("</s>", 1)])
    return tokenizer


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    """No BOS at all; Qwen's kind."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_level(None), eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def llama() -> PreTrainedTokenizerFast:
    """The post-processor puts the BOS <s> (id 0) before every text, and the chat template writes it, too."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_byte_level("<s> $A"), bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = LLAMA
    return tokenizer


@pytest.fixture(scope="session")
def ends_with_eos() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=_byte_level("<s> $A </s>"), bos_token="<s>", eos_token="</s>")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes | str], str]:
    def to_file(content: bytes | str) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return to_file
