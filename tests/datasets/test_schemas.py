"""Validation of prompts: what each kind of faulty row is told, and that one error tells all."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hone.datasets.config import DataConfig
from hone.datasets.errors import DataError
from hone.datasets.records import PromptSet
from hone.datasets.schemas import load_prompts

Write = Callable[[bytes | str], str]
HI = {"role": "user", "content": "hi"}
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"


def load(write: Write, *rows: object, chat: bool = True, **settings: object) -> PromptSet:
    path = write("\n".join(json.dumps(row) for row in rows))
    return load_prompts(DataConfig(prompt_dataset=path, apply_chat_template=chat, **settings))


def message_of(write: Write, *rows: object, chat: bool = True, **settings: object) -> str:
    with pytest.raises(DataError) as caught:
        load(write, *rows, chat=chat, **settings)
    return str(caught.value).replace(str(Path(write("")).parent) + "/", "")


def test_rows_become_prompts_with_uid_label_and_line(write: Write) -> None:
    prompts = load(write, {"input": "a", "y": 0}, {"input": [HI], "y": {"k": False}}, label_key="y")
    assert [(row.prompt, row.label, row.line) for row in prompts.rows] == [("a", 0, 1), ((HI,), {"k": False}, 2)]
    assert [row.uid for row in prompts.rows] == [f"{prompts.fingerprint[:12]}:0", f"{prompts.fingerprint[:12]}:1"]


def test_without_a_label_key_labels_are_none(write: Write) -> None:
    assert load(write, {"input": "a", "label": 3}).rows[0].label is None


def test_max_samples_takes_the_first_rows(write: Write) -> None:
    assert [row.prompt for row in load(write, {"input": "a"}, {"input": "b"}, {"nothing": 1}, max_samples=2).rows] == ["a", "b"]


def test_a_column_no_row_has_is_a_wrong_flag(write: Write) -> None:
    assert message_of(write, {"inputs": "a", "z": 1}, {"inputs": "b"}) == (
        "rows.jsonl: 2 of 2 rows cannot be used\n"
        "  no column 'input' (2 rows); columns found: 'inputs', 'z'; name one with --data.input-key; did you mean 'inputs'?\n"
        "    rows.jsonl:1\n"
        "    rows.jsonl:2"
    )


def test_a_usual_name_is_offered_when_none_is_near(write: Write) -> None:
    assert "--data.input-key; did you mean 'question'?" in message_of(write, {"question": "a", "answer": 1})
    assert "--data.label-key; did you mean 'answer'?" in message_of(write, {"input": "a", "answer": 1}, label_key="gold")


def test_a_column_some_rows_lack_is_a_wrong_row(write: Write) -> None:
    message = message_of(write, {"input": "a", "y": 1}, {"text": "b"}, {"input": "c", "y": None}, label_key="y")
    assert "  no column 'input' (1 row); add it to the rows, or delete them\n    rows.jsonl:2: columns found: 'text'" in message
    assert "  no column 'y' (1 row); add it to the rows, or delete them\n    rows.jsonl:2: columns found: 'text'" in message
    assert "  label 'y' is null (1 row); give the rows a label" in message
    assert message.startswith("rows.jsonl: 2 of 3 rows")


@pytest.mark.parametrize("empty", [None, "", " \t\n", []])
def test_an_empty_prompt_is_named(write: Write, empty: object) -> None:
    assert "prompt 'input' is empty (1 row); give the rows a prompt, or delete them\n    rows.jsonl:2: " in message_of(
        write, {"input": "a"}, {"input": empty}
    )


@pytest.mark.parametrize("value", [7, True, {"role": "user", "content": "x"}])
def test_a_prompt_of_another_type_is_shown(write: Write, value: object) -> None:
    assert f"neither text nor messages (1 row); write a string or a list of chat messages\n    rows.jsonl:1: {value!r}" in message_of(
        write, {"input": value}
    )


@pytest.mark.parametrize(
    ("messages", "fault", "detail"),
    [
        ([{"role": "user"}], "a message without role or content", "message 0 has no content; keys found: 'role'"),
        ([HI, {}], "a message without role or content", "message 1 has no role and no content; keys found: none"),
        ([HI, "x"], "a message is not an object", "message 1 is 'x'"),
        ([{"role": "assitant", "content": "x"}, HI], "unknown role", "message 0 has role 'assitant'; did you mean 'assistant'?"),
        ([{"role": "human", "content": "x"}], "unknown role", "message 0 has role 'human'"),
        ([{"role": 3, "content": "x"}], "unknown role", "message 0 has role 3"),
        ([{"role": "system", "content": "x"}, HI, {"role": "system", "content": "y"}], "more than one system message", "messages 0, 2"),
        ([HI, {"role": "assistant", "content": "x"}], "the messages end with the assistant", "message 1"),
        ([{"role": "user", "content": None}], "content is not text", "message 0 has content null"),
        ([{"role": "user", "content": {"type": "image"}}], "content is not text", "message 0 has content {'type': 'image'}"),
        (
            [{"role": "user", "content": [{"type": "sound"}]}],
            "a part of a message that is neither text nor image",
            "message 0, part 0 is {'type': 'sound'}",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "a text part without text", "message 0, part 0 is {'type': 'text'}"),
        ([{"role": "user", "content": " "}], "an empty user message", "message 0"),
        ([{"role": "user", "content": "\ud800"}], "text with half a surrogate pair", r"character 1 is '\ud800'"),
    ],
)
def test_faulty_messages_are_named_by_row_and_index(write: Write, messages: list[object], fault: str, detail: str) -> None:
    message = message_of(write, {"input": [HI]}, {"input": messages})
    assert message.splitlines()[1].startswith(f"  {fault} (1 row); ")
    assert message.splitlines()[2] == f"    rows.jsonl:2: {detail}"
    assert len(message.splitlines()) == 3


def test_the_allowed_roles_are_listed(write: Write) -> None:
    assert "use one of system, developer, user, assistant, tool" in message_of(write, {"input": [{"role": "bot", "content": "x"}]})


def test_messages_without_the_template_say_how_to_turn_it_on(write: Write) -> None:
    message = message_of(write, {"input": [HI]}, {"input": "plain"}, chat=False)
    assert "chat messages without a chat template (1 row); turn on --data.apply-chat-template\n    rows.jsonl:1" in message


def test_half_a_surrogate_in_a_plain_prompt_is_named(write: Write) -> None:
    assert r"rows.jsonl:1: character 2 is '\udc00'" in message_of(write, {"input": "a\udc00"})


def test_one_error_holds_unreadable_lines_and_the_first_ten_of_every_kind(write: Write) -> None:
    rows = ['{"input": "ok"}', "{", *['{"input": ""}'] * 12, *['{"input": 5}'] * 10]
    with pytest.raises(DataError) as caught:
        load_prompts(DataConfig(prompt_dataset=write("\n".join(rows))))
    lines = [line.replace(str(Path(write("")).parent) + "/", "") for line in str(caught.value).splitlines()]
    assert lines[0] == "rows.jsonl: 23 of 24 rows cannot be used"
    assert lines[1:3] == [
        "  invalid JSON (1 row); mend or delete the lines",
        "    rows.jsonl:2: column 2, Expecting property name enclosed in double quotes: '{'",
    ]
    assert lines[3].startswith("  prompt 'input' is empty (12 rows); ")
    assert lines[4:14] == [f"    rows.jsonl:{line}: ''" for line in range(3, 13)]
    assert lines[14] == "    and 2 more"
    assert lines[16:] == [f"    rows.jsonl:{line}: 5" for line in range(15, 25)]


def test_control_characters_of_the_data_never_reach_the_terminal(write: Write) -> None:
    message = message_of(write, {"\x1b[2J": 1, "input": {"\x1b]52;c;x\x07": "\u202e"}})
    assert not {"\x1b", "\x07", "\u202e"} & set(message)


@pytest.mark.skipif(not GSM8K.exists(), reason="the gsm8k problems are not beside this checkout (../shared/data/gsm8k)")
def test_real_word_problems_load_and_the_default_keys_are_answered_with_the_right_ones() -> None:
    prompts = load_prompts(DataConfig(prompt_dataset=str(GSM8K), input_key="question", label_key="answer"))
    assert len(prompts.rows) == 7473
    assert str(prompts.rows[0].prompt).startswith("Natalia sold clips")
    assert str(prompts.rows[0].label).endswith("#### 72")
    recognised = load_prompts(DataConfig(prompt_dataset=str(GSM8K)))
    assert [(row.prompt, row.label) for row in recognised.rows[:50]] == [(row.prompt, row.label) for row in prompts.rows[:50]]
    with pytest.raises(DataError, match=r"columns found: 'question', 'answer'; name one with --data\.input-key; did you mean 'question'\?"):
        load_prompts(DataConfig(prompt_dataset=str(GSM8K), input_key="prompt"))


VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [HI],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "72"},
    "extra_info": {"split": "train", "index": 0},
}


def test_the_layouts_of_verl_and_trl_are_recognised_and_their_other_columns_kept(write: Write) -> None:
    (row,) = load(write, VERL).rows
    assert (row.prompt, row.label) == ((HI,), "72")
    assert row.columns == {name: VERL[name] for name in VERL if name != "prompt"}
    (row,) = load(write, {"prompt": "2+2?", "solution": "4", "level": 1}).rows
    assert (row.prompt, row.label, row.columns) == ("2+2?", None, {"solution": "4", "level": 1})
    (row,) = load(write, {"messages": [HI], "id": 7}).rows
    assert (row.prompt, row.columns) == ((HI,), {"id": 7})


def test_columns_named_by_a_flag_come_before_a_layout(write: Write) -> None:
    (row,) = load(write, {**VERL, "other": "x", "mine": 3}, input_key="other", label_key="mine").rows
    assert (row.prompt, row.label) == ("x", 3)
    (row,) = load(write, {**VERL, "mine": 3}, label_key="mine").rows
    assert (row.prompt, row.label) == ((HI,), 3)
    (row,) = load(write, {"input": "x", "prompt": "y"}).rows
    assert row.prompt == "x"


def test_a_label_is_found_by_a_path_into_an_object(write: Write) -> None:
    assert load(write, {"input": "a", "meta": {"gold": 5}, "a.b": 6}, label_key="meta.gold").rows[0].label == 5
    assert load(write, {"input": "a", "a.b": 6}, label_key="a.b").rows[0].label == 6
    message = message_of(write, {"input": "a", "meta": {"gold": 5}}, {"input": "b", "meta": {}}, label_key="meta.gold")
    assert (
        "  no column 'meta.gold' (1 row); add it to the rows, or delete them\n    rows.jsonl:2: columns found: 'input', 'meta'" in message
    )


def test_the_same_settings_and_file_are_read_once_and_a_changed_file_again(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write('{"input": "a"}')
    config = DataConfig(prompt_dataset=path)
    assert load_prompts(config) is load_prompts(config)
    Path(path).write_text('{"input": "other"}')
    assert load_prompts(config).rows[0].prompt == "other"
