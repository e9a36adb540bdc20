"""The tables of other projects' names lead to settings that exist."""

import re

import pytest

from hone.launch.config import default_config
from hone.launch.foreign import ANSWERS, VERB_OF
from hone.launch.names import ALIASES, RENAMED, SECRETS, WITHOUT_COUNTERPART, closest
from hone.launch.schema import settings
from hone.launch.verbs import VERBS
from tests.launch.asking import typed

SETTINGS = {name: one for verb in VERBS for name, one in settings(default_config(verb)).items()}
EVERY = set(SETTINGS)


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_flag_leads_to_a_setting_or_an_alias_of_one(old: str) -> None:
    new = RENAMED[old]
    assert all(target in EVERY for target in (ALIASES[new].targets if new in ALIASES else (new,)))


def test_the_tables_do_not_contradict_each_other_or_hide_a_setting() -> None:
    tables = [set(ALIASES), set(RENAMED), set(ANSWERS), set(WITHOUT_COUNTERPART), set(SECRETS), EVERY]
    assert sum(map(len, tables)) == len(set.union(*tables))


def test_an_answer_that_depends_on_a_value_is_found_and_never_missing() -> None:
    for answers in ANSWERS.values():
        assert "" in answers
        assert all("-" not in value and value == value.lower() for value in answers)


@pytest.mark.parametrize("mend", sorted({mend for answers in ANSWERS.values() for mend in answers.values()}))
def test_what_an_answer_says_can_be_typed(mend: str) -> None:
    commands = [command for command in re.findall(r"`launch ([^`]+)`", mend) if not command.startswith("COMMAND")]
    flags = re.findall(r"(--[\w.-]+)(?: ([a-z_]+)\b)?", "" if commands else mend.replace(",", ""))
    assert commands or flags or mend.startswith("drop it") or "COMMAND" in mend
    assert [problem for command in commands for problem in typed(command)] == []
    for name, value in flags:
        setting = next(one for one in SETTINGS.values() if one.flag == name)
        assert not setting.choices or not value or value in setting.choices


def test_an_algorithm_of_another_name_is_a_command() -> None:
    assert set(VERB_OF.values()) <= set(VERBS)
    assert not set(VERB_OF) & set(VERBS)


def test_names_are_written_with_underscores() -> None:
    assert not [name for name in (*ALIASES, *RENAMED, *ANSWERS, *WITHOUT_COUNTERPART, *SECRETS) if "-" in name]


def test_the_closest_name_is_close() -> None:
    assert closest("pppo", ["ppo", "grpo"]) == ["ppo"]
    assert closest("zebra", ["ppo", "grpo"]) == []
