"""Token ids: one BOS or none, never two; what is too long or unknown is counted, and refused when it is more than 1 %."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from hone.datasets.config import DataConfig
from hone.datasets.errors import DataError, TokenizerError
from hone.datasets.records import PromptRow, PromptSet
from hone.datasets.schemas import load_prompts
from hone.datasets.tasks.arithmetic import build_tokenizer
from hone.datasets.tokenise import tokenise

PLAIN, CHAT = DataConfig(), DataConfig(apply_chat_template=True)
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"


def prompts(*texts: str) -> PromptSet:
    rows = tuple(PromptRow(uid=f"f:{index}", prompt=text, label=index, line=index + 1) for index, text in enumerate(texts))
    return PromptSet(name="rows.jsonl", fingerprint="f", rows=rows)


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str, config: DataConfig) -> tuple[int, ...]:
    (record,) = tokenise(prompts(text), tokenizer, config=config, max_new_tokens=8).records
    return record.tokens


def test_a_plain_prompt_gets_the_one_bos_of_a_tokenizer_that_has_one(
    llama: PreTrainedTokenizerFast, chatml: PreTrainedTokenizerFast
) -> None:
    bare = tuple(llama.encode("clips", add_special_tokens=False))
    assert ids_of(llama, "clips", PLAIN) == (0, *bare)
    assert ids_of(chatml, "clips", PLAIN) == bare


def test_a_rendered_chat_gets_the_bos_of_its_template_and_no_second(
    llama: PreTrainedTokenizerFast, chatml: PreTrainedTokenizerFast
) -> None:
    ids = ids_of(llama, "clips", CHAT)
    assert ids.count(0) == 1
    assert ids[0] == 0
    assert llama.decode(ids).startswith("<s><|start_header_id|>user<|end_header_id|>\n\nclips<|eot_id|>")
    assert 0 not in ids_of(chatml, "clips", CHAT)


def test_records_carry_uid_text_label_and_line(chatml: PreTrainedTokenizerFast) -> None:
    done = tokenise(prompts("a", "b"), chatml, config=DataConfig(input_template="Q{}"), max_new_tokens=8)
    assert [(r.uid, r.text, r.label, r.line) for r in done.records] == [("f:0", "Qa", 0, 1), ("f:1", "Qb", 1, 2)]
    assert all(chatml.decode(record.tokens) == record.text for record in done.records)
    assert done.dropped == ()


def test_many_calls_give_the_ids_of_one_call_each(chatml: PreTrainedTokenizerFast) -> None:
    texts = [f"{index} clips" for index in range(2100)]
    records = tokenise(prompts(*texts), chatml, config=PLAIN, max_new_tokens=8).records
    assert [record.tokens for record in records] == [tuple(chatml.encode(text)) for text in texts]


@pytest.mark.parametrize("config", [PLAIN, DataConfig(input_template="<s>{}")])
def test_two_bos_are_refused_with_the_rendered_text(llama: PreTrainedTokenizerFast, config: DataConfig) -> None:
    text = "<s>hello" if config is PLAIN else "hello"
    with pytest.raises(DataError) as caught:
        tokenise(prompts(text), llama, config=config, max_new_tokens=8)
    assert "the prompt begins with two BOS '<s>' (1 row)" in str(caught.value)
    assert "rows.jsonl:1: rendered '<s>hello'" in str(caught.value)


def test_a_chat_template_that_writes_two_bos_is_refused(llama: PreTrainedTokenizerFast) -> None:
    doubling = copy.deepcopy(llama)
    doubling.chat_template = "{{ bos_token }}" + str(llama.chat_template)
    with pytest.raises(DataError, match="begins with two BOS"):
        tokenise(prompts("hello"), doubling, config=CHAT, max_new_tokens=8)


def test_a_tokenizer_that_ends_prompts_with_eos_is_refused(ends_with_eos: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TokenizerError, match=r"puts its EOS '</s>' after a prompt.*add_eos_token to false"):
        tokenise(prompts("hello"), ends_with_eos, config=PLAIN, max_new_tokens=8)


def test_an_eos_that_the_prompt_itself_ends_with_is_the_users_choice(chatml: PreTrainedTokenizerFast) -> None:
    assert ids_of(chatml, "hello<|im_end|>", PLAIN)[-1] == chatml.eos_token_id


def test_up_to_one_percent_of_long_prompts_are_dropped_with_their_sum(chatml: PreTrainedTokenizerFast) -> None:
    # Nine characters that never merge are nine tokens; 12 - 3 = 9 leave room for exactly nine.
    exact, long = "#" * 9, "#" * 10
    done = tokenise(prompts(*[exact] * 99, long), chatml, config=DataConfig(max_len=12), max_new_tokens=3)
    assert len(done.records) == 99
    (dropped,) = done.dropped
    assert (dropped.uid, dropped.line, dropped.reason) == ("f:99", 100, "10 prompt tokens + 3 new tokens > --data.max-len 12")


def test_more_than_one_percent_of_long_prompts_is_an_error_with_the_sums_and_knobs(chatml: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError) as caught:
        tokenise(prompts(*["#"] * 98, "#" * 10, "#" * 11), chatml, config=DataConfig(max_len=12), max_new_tokens=3)
    assert str(caught.value) == (
        "rows.jsonl: 2 of 100 rows cannot be used\n"
        "  longer than 9 tokens: --data.max-len 12 less --rollout.max-new-tokens 3 (2 rows); raise --data.max-len, lower "
        "--rollout.max-new-tokens, or shorten the rows (up to 1 % of them are dropped and counted)\n"
        "    rows.jsonl:99: 10 tokens\n"
        "    rows.jsonl:100: 11 tokens"
    )


def test_unknown_characters_are_dropped_up_to_one_percent_and_refused_beyond() -> None:
    tiny = build_tokenizer()
    done = tokenise(prompts(*["1+2="] * 199, "1*2="), tiny, config=PLAIN, max_new_tokens=8)
    assert [(dropped.line, dropped.reason) for dropped in done.dropped] == [(200, "characters outside the tokenizer's vocabulary")]
    with pytest.raises(
        DataError, match=r"(?s)outside the vocabulary.*--actor\.model-name-or-path.*rows\.jsonl:2: 1 of 4 tokens unknown in '1\*2='"
    ):
        tokenise(prompts("1+2=", "1*2="), tiny, config=PLAIN, max_new_tokens=8)


def test_padding_and_truncation_left_on_by_an_earlier_call_change_nothing(llama: PreTrainedTokenizerFast) -> None:
    stateful = copy.deepcopy(llama)
    stateful(["a", "b c d e"], padding=True, truncation=True, max_length=3)
    assert ids_of(stateful, "How many clips did she sell?", PLAIN) == ids_of(llama, "How many clips did she sell?", PLAIN)


def test_a_bos_from_a_post_processor_of_pairs_is_still_one(llama: PreTrainedTokenizerFast) -> None:
    layered = copy.deepcopy(llama)
    single = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    layered.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), single])
    assert ids_of(layered, "clips", PLAIN).count(0) == 1


def test_messages_with_more_than_role_and_content_reach_the_template(
    write: Callable[[bytes | str], str], chatml: PreTrainedTokenizerFast
) -> None:
    named = copy.deepcopy(chatml)
    named.chat_template = "{% for m in messages %}{{ m['name'] }}: {{ m['content'] }}{% endfor %}"
    row = {"input": [{"role": "user", "name": "Ada", "content": "hi"}]}
    config = DataConfig(prompt_dataset=write(json.dumps(row)), apply_chat_template=True)
    (record,) = tokenise(load_prompts(config), named, config=config, max_new_tokens=8).records
    assert record.text == "Ada: hi"


@pytest.mark.skipif(not GSM8K.exists(), reason="the gsm8k problems are not beside this checkout (../shared/data/gsm8k)")
def test_real_word_problems_survive_the_way_to_ids_and_back(llama: PreTrainedTokenizerFast) -> None:
    config = DataConfig(prompt_dataset=str(GSM8K), input_key="question", label_key="answer", apply_chat_template=True, max_samples=1500)
    done = tokenise(load_prompts(config), llama, config=config, max_new_tokens=1024)
    assert len(done.records) + len(done.dropped) == 1500
    assert len({record.uid for record in done.records}) == len(done.records)
    for record in done.records[:: len(done.records) // 50]:
        assert llama.decode(record.tokens) == record.text
        assert record.tokens.count(0) == 1
