"""Labelled rows: layouts of OpenRLHF, TRL and verl, what is trained on in plain texts, cutting, documents, and every faulty row told."""

import dataclasses
import json
from array import array
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from hone.datasets.errors import DataError
from hone.datasets.exchanges import cut, filled
from hone.datasets.labelled import Exchange, ExchangeRow, LabelledSet, Sample, TokenRow
from hone.datasets.layouts import exchange_rows, image_faults, judged_rows, pair_rows, text_rows
from hone.datasets.mismatched import Mismatched, prompt_of
from hone.datasets.offline_config import JudgedData, LabelledData, MarginPairData, PairData, SFTData, StepData
from hone.datasets.records import Source
from hone.datasets.rows_stream import SampleStream
from hone.datasets.samples import samples_of
from hone.datasets.sources import read_file
from hone.datasets.step_rows import reward_token_ids, steps_rows
from hone.datasets.tasks import labelled_arithmetic
from hone.datasets.tasks.arithmetic import build_tokenizer

ASKED, SAID = {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


def source(tmp_path: Path, *rows: dict[str, Any]) -> Source:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_file(str(file), max_samples=1000)


def learnt(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """(what stands there, what of it is trained on) for each row."""
    return [
        (
            str(tokenizer.decode(list(row.tokens))),
            str(tokenizer.decode([token for token, mark in zip(row.tokens, row.trained, strict=True) if mark])),
        )
        for row in sample.rows
    ]


@pytest.mark.parametrize(
    ("row", "config"),
    [
        ({"prompt": "1+1=", "completion": "2"}, SFTData()),  # TRL
        ({"input": "1+1=", "output": "2"}, SFTData()),  # OpenRLHF
        ({"question": "1+1=", "answer": "2"}, SFTData()),  # verl's and GSM8K's
        ({"q": "1+1=", "a": "2"}, SFTData(input_key="q", output_key="a")),
        ({"prompt": "1+1", "completion": "2"}, SFTData(input_template="{}=")),
    ],
)
def test_a_prompt_and_its_answer_in_every_layout(
    row: dict[str, Any], config: SFTData, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (sample,) = samples_of(exchange_rows(source(tmp_path, row), config), tokenizer, config).samples
    assert learnt(sample, tokenizer) == [("1+1=2<eos>", "2<eos>")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, SAID]},
        {"conversations": [{"from": "human", "value": "1+1="}, {"from": "gpt", "value": "2"}]},
        {"prompt": [ASKED], "completion": [SAID]},
        {"prompt": "1+1=", "completion": "2"},
    ],
)
def test_conversations_in_every_layout(row: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    config = SFTData(apply_chat_template=True)
    (sample,) = samples_of(exchange_rows(source(tmp_path, row), config), tokenizer, config).samples
    assert learnt(sample, tokenizer) == [("1+1=2<eos>", "2<eos>")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1+1=", "chosen": "2", "rejected": "-2"},
        {"question": "1+1=", "chosen": "2", "rejected": "-2"},
        {"chosen": "1+1= 2", "rejected": "1+1= -2"},  # the prompt is what both begin with
    ],
)
def test_pairs_with_and_without_a_prompt(row: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (sample,) = samples_of(pair_rows(source(tmp_path, row), PairData()), tokenizer, PairData()).samples
    assert [trained for _, trained in learnt(sample, tokenizer)] == ["2<eos>", "-2<eos>"]


def test_a_word_that_both_answers_begin_with_is_no_part_of_the_prompt(tmp_path: Path) -> None:
    (row,) = pair_rows(source(tmp_path, {"chosen": "1+1= 25", "rejected": "1+1= 26"}), PairData()).rows
    assert row.chosen == Exchange(prompt="1+1= ", answer="25") and row.rejected == Exchange(prompt="1+1= ", answer="26")


def test_pairs_of_conversations_share_their_beginning(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    other = {"role": "assistant", "content": "-2"}
    config = PairData(apply_chat_template=True)
    for row in (
        {"chosen": [ASKED, SAID], "rejected": [ASKED, other]},
        {"prompt": [ASKED], "chosen": [ASKED, SAID], "rejected": [ASKED, other]},
        {"prompt": [ASKED], "chosen": [SAID], "rejected": [other]},
        {"prompt": "1+1=", "chosen": [ASKED, SAID], "rejected": [ASKED, other]},  # UltraFeedback
        {"prompt": " 1+1=\n", "chosen": [ASKED, SAID], "rejected": [ASKED, other]},
    ):
        (sample,) = samples_of(pair_rows(source(tmp_path, row), config), tokenizer, config).samples
        assert learnt(sample, tokenizer) == [("1+1=2<eos>", "2<eos>"), ("1+1=-2<eos>", "-2<eos>")]


def test_a_prompt_before_a_whole_conversation_is_asked_once(tmp_path: Path) -> None:
    tokenizer, config = build_tokenizer(), JudgedData(apply_chat_template=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    system = {"role": "system", "content": "0"}
    for prompt, said, text in (("1+1=", [ASKED, SAID], "1+1=2<eos>"), ("1+1=", [system, ASKED, SAID], "01+1=2<eos>")):
        rows = source(tmp_path, {"prompt": prompt, "completion": said, "label": True})
        (sample,) = samples_of(judged_rows(rows, config), tokenizer, config).samples
        assert learnt(sample, tokenizer) == [(text, "2<eos>")]
    for said, what in (([ASKED, SAID], "does not begin with the row's prompt"), ([{**ASKED, "content": "2+2="}], "says nothing")):
        rows = source(tmp_path, {"prompt": "2+2=", "completion": said, "label": True})
        with pytest.raises(DataError, match=what):
            judged_rows(rows, config)


def test_messages_of_a_table_are_those_of_lines_at_any_depth(tmp_path: Path) -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    other = {"function": {"name": "halve", "arguments": {"b": 2}}}
    talk = [
        {"role": "developer", "content": "0"},
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call, other]},
        {"role": "tool", "content": "2", "name": "add"},
        SAID,
    ]
    lines = source(tmp_path, {"messages": talk})
    pq.write_table(pa.Table.from_pylist([{"messages": talk}]), tmp_path / "rows.parquet")
    table = read_file(str(tmp_path / "rows.parquet"), max_samples=1)
    for one in (lines, table):
        (row,) = exchange_rows(one, SFTData(apply_chat_template=True)).rows
        assert isinstance(row.exchange, Exchange)
        said = {"role": "assistant", "content": "", "tool_calls": [call, other]}
        assert list(row.exchange.answer) == [talk[0], ASKED, said, talk[3], SAID]


@pytest.mark.parametrize("content", [[{"type": "image"}, {"type": "text", "text": "1+1="}], [{"type": "image_url", "image_url": "a.png"}]])
def test_parts_that_are_images_are_refused(content: object, tmp_path: Path) -> None:
    rows = source(tmp_path, {"messages": [{**ASKED, "content": content}, SAID]})
    with pytest.raises(DataError, match="images, which sft, rm, prm, dpo, kto and kd do not learn from") as caught:
        exchange_rows(rows, SFTData(apply_chat_template=True))
    assert "message 0" in str(caught.value)


@pytest.mark.parametrize("name", ["images", "image"])
def test_columns_of_images_are_refused_where_a_row_has_one(name: str, tmp_path: Path) -> None:
    image_faults(source(tmp_path, {"messages": [ASKED, SAID], name: []}, {"messages": [ASKED, SAID], name: None}))
    with pytest.raises(DataError, match=f"column '{name}'"):
        image_faults(source(tmp_path, {"messages": [ASKED, SAID], name: []}, {"messages": [ASKED, SAID], name: ["a.png"]}))


def test_values_of_csv_are_read_as_what_they_say(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    said = {"True": True, "1": True, "false": False, "0": False}
    file.write_text("prompt,completion,label\n" + "".join(f"1+1=,2,{word}\n" for word in said))
    rows = judged_rows(read_file(str(file), max_samples=9), JudgedData()).rows
    assert [row.desirable for row in rows] == list(said.values())
    file.write_text("prompt,chosen,rejected,margin\n1,2,3,1.5\n1,2,4,-2\n")
    assert [row.margin for row in pair_rows(read_file(str(file), max_samples=9), MarginPairData()).rows] == [1.5, -2.0]
    file.write_text("prompt,chosen,rejected,margin\n1,2,3,nan\n")
    with pytest.raises(DataError, match="is no number"):
        pair_rows(read_file(str(file), max_samples=9), MarginPairData())


def test_an_instruction_and_its_input_are_one_prompt(tmp_path: Path) -> None:
    rows = source(
        tmp_path,
        {"instruction": "Add.", "input": "1+1", "output": "2", "label": True},
        {"instruction": "Say one.", "input": "", "output": "1", "label": False},
    )
    asked = ["Add.\n\n1+1", "Say one."]
    assert [row.exchange.prompt for row in exchange_rows(rows, SFTData()).rows] == asked  # pyright: ignore[reportAttributeAccessIssue]
    assert [row.exchange.prompt for row in judged_rows(rows, JudgedData()).rows] == asked
    named = exchange_rows(rows, SFTData(input_key="instruction")).rows
    assert [row.exchange.prompt for row in named] == ["Add.", "Say one."]  # pyright: ignore[reportAttributeAccessIssue]
    pairs = source(tmp_path, {"instruction": "Add.", "input": "1+1", "chosen": "2", "rejected": "3"})
    assert [row.chosen.prompt for row in pair_rows(pairs, PairData()).rows] == asked[:1]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(DataError, match="prompt 'input' is empty"):
        exchange_rows(source(tmp_path, {"instruction": None, "input": "", "output": "2"}), SFTData())


def test_an_unknown_token_that_is_also_the_end_tells_of_no_unknown_character(tmp_path: Path) -> None:
    own, config = build_tokenizer(), SFTData()
    own.unk_token = own.eos_token
    rows = source(tmp_path, {"prompt": "1+1=", "completion": "2<eos>"})
    (sample,) = samples_of(exchange_rows(rows, config), own, config).samples
    assert learnt(sample, own) == [("1+1=2<eos>", "2<eos>")]


def test_margins_are_read_where_there_are_any(tmp_path: Path) -> None:
    rows = source(
        tmp_path,
        {"prompt": "1", "chosen": "2", "rejected": "3", "margin": 1.5},
        {"prompt": "1", "chosen": "2", "rejected": "4", "margin": 0},
    )
    assert [row.margin for row in pair_rows(rows, MarginPairData()).rows] == [1.5, 0.0]
    assert [row.margin for row in pair_rows(rows, PairData()).rows] == [0.0, 0.0]


@pytest.mark.parametrize("label", [True, 1, 1.0])
def test_judged_answers(label: object, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = source(tmp_path, {"prompt": "1+1=", "completion": "2", "label": label}, {"prompt": "1+1=", "completion": "-2", "label": False})
    samples = samples_of(judged_rows(rows, JudgedData()), tokenizer, JudgedData()).samples
    assert [sample.desirable for sample in samples] == [True, False]


def test_steps_of_a_list_and_steps_with_a_placeholder_are_marked_where_they_end(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    listed = StepData(step_separator=" ")
    rows = steps_rows(source(tmp_path, {"prompt": "1+1= ", "completions": ["1+1=2", "2"], "labels": [True, 0.25]}), listed)
    (sample,) = samples_of(rows, tokenizer, listed).samples
    assert learnt(sample, tokenizer) == [("1+1= 1+1=2 2 ", "  ")] and sample.shares == (1.0, 0.25)

    marked = StepData(placeholder_token=" ", reward_tokens="+,-")
    rows = steps_rows(source(tmp_path, {"input": "1+1=2 1+2=4 ", "label": ["+", "-"]}), marked)
    (sample,) = samples_of(rows, tokenizer, marked).samples
    assert learnt(sample, tokenizer) == [("1+1=2 1+2=4 ", "  ")] and sample.shares == (1.0, 0.0)
    assert reward_token_ids(marked, tokenizer) == tuple(tokenizer.convert_tokens_to_ids(["+", "-"]))


def test_an_answer_that_is_cut_is_taught_without_its_end_and_one_without_room_is_dropped(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = SFTData(max_len=6)
    rows = [
        {"prompt": "1+1=", "completion": "2222"},
        *[{"prompt": "1+1=", "completion": "2"}] * 198,
        {"prompt": "1+1+1=", "completion": "3"},
    ]
    samples = samples_of(exchange_rows(source(tmp_path, *rows), config), tokenizer, config)
    assert learnt(samples.samples[0], tokenizer) == [("1+1=22", "22")]
    assert [dropped.line for dropped in samples.dropped] == [200] and "no room for an answer" in samples.dropped[0].reason
    assert samples.notes == ("1 answers are cut at --data.max-len 6 and are taught without their end",)
    with pytest.raises(DataError, match=r"no room for an answer \(1 row\); raise --data.max-len"):
        samples_of(exchange_rows(source(tmp_path, *rows[-2:]), config), tokenizer, config)


def test_documents_fill_rows_together_and_none_is_lost(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = SFTData(pretrain_mode=True, max_len=16)
    texts = ["1+1=2", "1+2=3", "2+2=4", "123456789012345678901234567890"]
    samples = samples_of(text_rows(source(tmp_path, *({"text": text} for text in texts)), config), tokenizer, config).samples
    assert all(sample.length <= 16 for sample in samples) and len(samples) == 4
    said = [str(tokenizer.decode(list(row.tokens))) for sample in samples for row in sample.rows]
    assert said[:3] == [f"{text}<eos>" for text in texts[:3]] and "".join(said[3:]) == f"{texts[3]}<eos>"
    assert all(set(row.trained) == {1} for sample in samples for row in sample.rows)


def test_a_row_ends_with_its_last_trained_token() -> None:
    row = TokenRow(tokens=array("i", [5, 6, 7, 8]), trained=bytes([0, 1, 1, 0]))
    assert cut(row, 9) == TokenRow(tokens=array("i", [5, 6, 7]), trained=bytes([0, 1, 1]))
    assert cut(row, 1) is None
    assert list(filled(iter([("a", 1, [4])]), 8)) == []  # a document of one token has nothing to predict


def test_a_mismatched_row_is_a_prompt_with_the_next_other_prompts_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    config = JudgedData()
    judged = judged_rows(labelled_arithmetic.judged(1, 40), config)
    samples = samples_of(judged, tokenizer, config).samples
    prompts = [prompt_of(sample.rows[0]) for sample in samples]
    joined = Mismatched(samples, 64)
    assert len(joined) == 40
    for index, row in enumerate(joined):
        assert prompt_of(row) == prompts[index]
        later = [(index + step) % 40 for step in range(1, 40)]
        other = next(place for place in later if prompts[place] != prompts[index])
        assert list(row.tokens[len(prompts[index]) :]) == list(samples[other].rows[0].tokens[len(prompts[other]) :])
    with pytest.raises(DataError, match="all prompts are the same"):
        Mismatched(samples_of(LabelledSet(name="one", fingerprint="", rows=[judged.rows[0]] * 2), tokenizer, config).samples, 64)


TALKS = PairData(apply_chat_template=True)
FAULTS: list[tuple[Any, LabelledData, dict[str, Any], str]] = [
    (exchange_rows, SFTData(), {"prompt": "", "completion": "2"}, "prompt 'prompt' is empty"),
    (exchange_rows, SFTData(), {"prompt": "1", "completion": None}, "answer 'completion' is empty"),
    (exchange_rows, SFTData(), {"prompt": "1", "completion": 3}, "neither text nor messages"),
    (exchange_rows, SFTData(), {"prompt": "1"}, "has no column of answers; columns found: 'prompt'"),
    (exchange_rows, SFTData(), {"promt": "1", "completion": "2"}, "did you mean 'promt'"),
    (exchange_rows, SFTData(output_key="complete"), {"prompt": "1", "completion": "2"}, "did you mean 'completion'"),
    (exchange_rows, SFTData(), {"messages": [ASKED, SAID]}, "turn on --data.apply-chat-template"),
    (exchange_rows, SFTData(apply_chat_template=True), {"messages": [ASKED]}, "the assistant says nothing"),
    (exchange_rows, SFTData(apply_chat_template=True), {"messages": [ASKED, {"role": "assitant", "content": "2"}]}, "unknown role"),
    (pair_rows, PairData(), {"prompt": "1", "chosen": "2", "rejected": "2"}, "chosen and rejected are the same"),
    (pair_rows, PairData(), {"chosen": "1 ", "rejected": "1 2"}, "nothing says where the prompt ends"),
    (pair_rows, PairData(), {"prompt": "1", "chosen": "2"}, "no column 'rejected'"),
    (pair_rows, MarginPairData(), {"prompt": "1", "chosen": "2", "rejected": "3", "margin": "much"}, "margin 'margin' is no number"),
    (pair_rows, MarginPairData(margin_key="by"), {"prompt": "1", "chosen": "2", "rejected": "3"}, "no column 'by'"),
    (pair_rows, PairData(), {"promt": "1", "chosen": "2", "rejected": "3"}, "with --data.prompt-key; did you mean 'promt'?"),
    (pair_rows, PairData(), {"chosen": "1 2", "rejected": "11 2"}, "begin with no prompt that both share"),
    (pair_rows, TALKS, {"chosen": [ASKED, SAID], "rejected": [{**ASKED, "content": "9"}, SAID]}, "begin with no prompt that both share"),
    (exchange_rows, SFTData(apply_chat_template=True), {"messages": [ASKED, {**SAID, "content": " "}]}, "an empty assistant message"),
    (steps_rows, StepData(steps_key="steps"), {"prompt": "1", "labels": [True]}, "no column 'steps'"),
    (judged_rows, JudgedData(), {"prompt": "1", "completion": "2", "label": "good"}, "neither true nor false"),
    (judged_rows, JudgedData(), {"prompt": "1", "completion": "2"}, "no column 'label'"),
    (steps_rows, StepData(), {"prompt": "1", "completions": [], "labels": []}, "no list of texts"),
    (steps_rows, StepData(), {"prompt": "1", "completions": ["2"], "labels": [True, False]}, "1 steps, 2 labels"),
    (steps_rows, StepData(), {"prompt": "1", "completions": ["2"], "labels": [1.5]}, "the share of good in"),
    (steps_rows, StepData(placeholder_token="#"), {"input": "1", "labels": [True]}, "no '#' in the text"),
    (text_rows, SFTData(), {"text": "  "}, "document 'text' is empty"),
]


@pytest.mark.parametrize(("read", "config", "row", "told"), FAULTS, ids=[told[:30] for *_, told in FAULTS])
def test_a_faulty_row_is_told_with_its_line(read: Any, config: Any, row: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refusal:
        read(source(tmp_path, row), config)
    assert told in str(refusal.value)
    if "\n" in str(refusal.value):
        assert "rows.jsonl:1" in str(refusal.value)


def test_a_margin_beyond_all_numbers_is_none(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1", "chosen": "2", "rejected": "3", "margin": 1e999}\n')
    with pytest.raises(DataError, match=r"margin 'margin' is no number \(1 row\).*\n.*rows\.jsonl:1: inf"):
        pair_rows(read_file(str(file), max_samples=9), MarginPairData())


def test_an_assistant_that_only_thinks_or_calls_says_enough(tmp_path: Path) -> None:
    config = SFTData(apply_chat_template=True)
    quiet = {**SAID, "content": "", "reasoning_content": "two"}
    (found,) = exchange_rows(source(tmp_path, {"messages": [ASKED, quiet]}), config).rows
    assert isinstance(found.exchange, Exchange) and found.exchange.answer == (ASKED, quiet)


def test_what_a_table_adds_to_messages_is_no_part_of_them(tmp_path: Path) -> None:
    # Every struct of a column has all keys: those that this message has not are null.
    table = pa.table({"messages": [[ASKED, {**SAID, "reasoning_content": "two"}]]})
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = exchange_rows(read_file(str(tmp_path / "rows.parquet"), max_samples=9), SFTData(apply_chat_template=True)).rows
    (found,) = rows
    assert isinstance(found, ExchangeRow) and isinstance(found.exchange, Exchange)
    assert found.exchange.answer == (ASKED, {**SAID, "reasoning_content": "two"})


def test_the_order_is_fixed_by_the_seed_and_goes_on_from_a_few_numbers(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = exchange_rows(labelled_arithmetic.demonstrations(1, 10), SFTData())
    samples = samples_of(rows, tokenizer, SFTData())
    whole = list(SampleStream(samples, batch_size=4, seed=7, epochs=2))
    assert sorted(place for step in whole for place in step) == sorted([*range(10), *range(10)])
    assert [len(step) for step in whole] == [4, 4, 4, 4, 4] and whole[0] != next(SampleStream(samples, batch_size=4, seed=8, epochs=2))
    stream = SampleStream(samples, batch_size=4, seed=7, epochs=2)
    for _ in range(2):
        next(stream)
    assert list(SampleStream(samples, batch_size=4, seed=7, epochs=2, state=stream.state())) == whole[2:]
    with pytest.raises(DataError, match="the data has changed since the run was saved"):
        fewer = samples_of(dataclasses.replace(rows, rows=rows.rows[1:]), tokenizer, SFTData())
        SampleStream(fewer, batch_size=4, seed=7, epochs=2, state=stream.state())
