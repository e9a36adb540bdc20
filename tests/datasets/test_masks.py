"""Of published chat templates, with and without generation tags: every trained token is the assistant's, its end included, nothing else."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hone.datasets.errors import BadRow
from hone.datasets.exchanges import Encoder
from hone.datasets.labelled import Exchange, TokenRow
from hone.datasets.offline_config import SFTData

TEMPLATES = Path(__file__).parents[2] / ".peers" / "trl" / "chat_templates"
FIRST, SECOND = "They have eight.", "Twelve legs."
TALK = (
    {"role": "user", "content": "How many legs have two cats?"},
    {"role": "assistant", "content": FIRST},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": SECOND},
)
THOUGHT = "<think>\n\n</think>\n\n"
# Template -> its end token, and what is to be trained on of the conversation: one text for each row.
WHOLE = {
    "llama3": ("<|eot_id|>", "{}"),
    "llama3_1": ("<|eot_id|>", "{}"),
    "llama3_2": ("<|eot_id|>", "{}"),
    "llama3_training": ("<|eot_id|>", "{}"),
    "qwen2_5": ("<|im_end|>", "{}"),
    "qwen2_5_training": ("<|im_end|>", "\n{}"),  # its tags begin behind the word assistant
    "qwen3_training": ("<|im_end|>", THOUGHT + "{}"),
    "qwen3_instruct_2507": ("<|im_end|>", "{}"),
    "gemma": ("<end_of_turn>", "{}"),
    "gemma3": ("<end_of_turn>", "{}"),
    "gemma3_training": ("<end_of_turn>", "{}"),
    "gemma4": ("<turn|>", "{}"),
    "phi3": ("<|end|>", "{}"),
    "phi3_training": ("<|end|>", "{}"),
    "cohere": ("<|END_OF_TURN_TOKEN|>", "{}"),
    "lfm2": ("<|im_end|>", "{}"),
    "deepseekv3_training": ("<｜end▁of▁sentence｜>", "<｜Assistant｜>{}"),  # noqa: RUF001 - its tags begin before the role
    "glm4moe": ("<|user|>", "\n<think></think>\n{}"),
}
# Templates that write an earlier answer otherwise than the last: each answer is a row of its own.
APART = {
    "qwen3": ("<|im_end|>", THOUGHT + "{}"),
    "gptoss": ("<|return|>", "<|channel|>final<|message|>{}"),
}
SPECIAL = sorted(
    {end for end, _ in (*WHOLE.values(), *APART.values())}
    | {"<|endoftext|>", "<bos>", "<|im_start|>", "<start_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|assistant|>", "<|turn>"}
    | {"<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>", "<|START_OF_TURN_TOKEN|>"}
)

published = pytest.mark.skipif(
    not TEMPLATES.is_dir(), reason="TRL's released package carries the templates; `just peers` installs it apart"
)


def tokenizer_with(template: str, eos: str) -> PreTrainedTokenizerFast:
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    base.train_from_iterator([str(message["content"]) for message in TALK], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=base,
        eos_token=eos,
        bos_token="<bos>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
        chat_template=template,
    )


def trained(row: TokenRow, tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode([token for token, mark in zip(row.tokens, row.trained, strict=True) if mark]))


def encoded(template: str, eos: str, exchange: Exchange) -> tuple[tuple[TokenRow, ...], PreTrainedTokenizerFast]:
    tokenizer = tokenizer_with(template, eos)
    found = Encoder(tokenizer, SFTData(apply_chat_template=True)).encode(exchange, line=1)
    assert not isinstance(found, BadRow), found
    return found.rows, tokenizer


@published
@pytest.mark.parametrize("name", WHOLE)
def test_a_conversation_is_one_row_whose_answers_are_trained_on(name: str) -> None:
    eos, answer = WHOLE[name]
    (row,), tokenizer = encoded((TEMPLATES / f"{name}.jinja").read_text(), eos, Exchange(prompt=(), answer=TALK))
    assert trained(row, tokenizer) == "".join(answer.format(said) + eos for said in (FIRST, SECOND))
    assert row.trained[-1] == 1  # nothing stands behind the last end


@published
@pytest.mark.parametrize("name", APART)
def test_where_earlier_answers_are_rewritten_each_is_learnt_as_it_would_be_said(name: str) -> None:
    eos, answer = APART[name]
    rows, tokenizer = encoded((TEMPLATES / f"{name}.jinja").read_text(), eos, Exchange(prompt=(), answer=TALK))
    assert [trained(row, tokenizer) for row in rows] == [answer.format(said) + eos for said in (FIRST, SECOND)]


@published
@pytest.mark.parametrize("name", ["llama3", "llama3_training", "gemma3", "phi3", "cohere", "qwen3"])
def test_of_a_prompt_with_earlier_answers_only_the_last_one_is_trained_on(name: str) -> None:
    eos, answer = (WHOLE | APART)[name]
    (row,), tokenizer = encoded((TEMPLATES / f"{name}.jinja").read_text(), eos, Exchange(prompt=TALK[:3], answer=SECOND))
    assert trained(row, tokenizer) == answer.format(SECOND) + eos
    # What stands before it is what the policy would be asked with: supervised learning and reinforcement see the same prompt.
    asked = tokenizer.apply_chat_template(list(TALK[:3]), tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
    if "{% generation" not in (TEMPLATES / f"{name}.jinja").read_text():
        assert list(row.tokens[: row.trained.index(1)]) == prompt


@published
def test_a_template_that_asks_with_a_thought_and_writes_none_is_refused() -> None:
    tokenizer = tokenizer_with((TEMPLATES / "deepseekv3.jinja").read_text(), "<|im_end|>")
    found = Encoder(tokenizer, SFTData(apply_chat_template=True)).encode(Exchange(prompt=(), answer=TALK), line=7)
    assert isinstance(found, BadRow) and found.line == 7
    assert "writes an answer otherwise than it asks for one" in found.what and "generation" in found.remedy


def test_tags_that_mark_another_number_of_answers_are_refused() -> None:
    last = "{% generation %}{{ m['content'] }}{% endgeneration %}"
    template = "{% for m in messages %}{% if loop.last %}" + last + "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    found = Encoder(tokenizer_with(template, "<|im_end|>"), SFTData(apply_chat_template=True)).encode(
        Exchange(prompt=(), answer=TALK), line=3
    )
    assert isinstance(found, BadRow) and found.detail == "1 marked spans, 2 messages of the assistant"


def test_a_template_without_an_end_token_gets_one() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (row,), tokenizer = encoded(template, "<|im_end|>", Exchange(prompt=TALK[:1], answer=FIRST))
    assert trained(row, tokenizer) == f"{FIRST}<|im_end|>"


TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize("template", [TURNS, TURNS + "<|im_start|>assistant\n"])
@pytest.mark.parametrize("exchange", [Exchange(prompt=TALK[:1], answer=FIRST), Exchange(prompt=(), answer=TALK)])
def test_a_template_that_renders_alike_whether_it_asks_or_not_is_refused_where_a_turns_mark_would_be_learnt(
    template: str, exchange: Exchange
) -> None:
    found = Encoder(tokenizer_with(template, "<|im_end|>"), SFTData(apply_chat_template=True)).encode(exchange, line=4)
    assert isinstance(found, BadRow) and found.line == 4
    assert (
        "ignores add_generation_prompt" in found.what and "assistant" in found.detail and "--data.tokenizer-chat-template" in found.remedy
    )
    asking = TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (row,), tokenizer = encoded(asking, "<|im_end|>", exchange)
    assert trained(row, tokenizer).startswith(FIRST + "<|im_end|>")


def test_a_template_whose_answers_begin_behind_the_question_need_not_ask() -> None:
    template = "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}<|im_end|>"
    (row,), tokenizer = encoded(template + "{% endif %}{% endfor %}", "<|im_end|>", Exchange(prompt=(), answer=TALK))
    assert trained(row, tokenizer) == f" {FIRST}<|im_end|> {SECOND}<|im_end|>"


@published
@pytest.mark.parametrize("name", ["smolvlm", "smolvlm_training", "idefics3", "idefics3_training"])
def test_a_template_that_drops_texts_is_refused(name: str) -> None:
    tokenizer = tokenizer_with((TEMPLATES / f"{name}.jinja").read_text(), "<end_of_utterance>")
    found = Encoder(tokenizer, SFTData(apply_chat_template=True)).encode(Exchange(prompt=TALK[:1], answer=FIRST), line=9)
    assert isinstance(found, BadRow) and found.line == 9 and found.what == "the chat template drops a message, or part of it"


@pytest.mark.parametrize("tags", [True, False])
def test_of_an_answer_the_thoughts_must_be_rendered_and_of_a_question_all(tags: bool) -> None:
    said = "{{ m['content'].split('</think>')[-1] }}<|im_end|>"
    marked = "{% generation %}" + said + "{% endgeneration %}" if tags else said
    template = "{% for m in messages %}{% if m['role'] == 'assistant' %} " + marked + "{% elif m['role'] == 'user' %}{{ m['content'] }}"
    encoder = Encoder(tokenizer_with(template + "{% endif %}{% endfor %}", "<|im_end|>"), SFTData(apply_chat_template=True))
    thought = {"role": "assistant", "content": "<think>Four each.</think>" + FIRST}
    reasoned = {"role": "assistant", "content": FIRST, "reasoning_content": "Four each."}
    system = {"role": "system", "content": "Be short."}
    for prompt, answer, place in ((TALK[:1], (thought,), 1), (TALK[:1], (reasoned,), 1), ((system, *TALK[:1]), (TALK[1],), 0)):
        found = encoder.encode(Exchange(prompt=prompt, answer=answer), line=2)
        assert isinstance(found, BadRow) and f"message {place} " in found.detail and "drops a message" in found.what
    # What earlier answers thought is no part of what is learnt.
    assert not isinstance(encoder.encode(Exchange(prompt=(TALK[0], thought, TALK[2]), answer=SECOND), line=2), BadRow)


@published
def test_white_space_of_thoughts_that_a_template_lays_out_anew_is_nothing_lost() -> None:
    answer = Exchange(prompt=TALK[:1], answer=f"<think>Four each.</think>{FIRST}")
    (row,), tokenizer = encoded((TEMPLATES / "qwen3.jinja").read_text(), "<|im_end|>", answer)
    assert trained(row, tokenizer) == f"<think>\nFour each.\n</think>\n\n{FIRST}<|im_end|>"
