"""The tables of other projects' names lead to settings that exist."""

import pytest

from hone.launch.config import default_config
from hone.launch.names import ALIASES, RENAMED, SECRETS, WITHOUT_COUNTERPART, closest
from hone.launch.schema import settings

PPO, GRPO = settings(default_config("ppo")), settings(default_config("grpo"))
EVERY = PPO | GRPO


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_flag_leads_to_a_setting_or_an_alias_of_one(old: str) -> None:
    new = RENAMED[old]
    assert all(target in EVERY for target in (ALIASES[new].targets if new in ALIASES else (new,)))


def test_the_tables_do_not_contradict_each_other_or_hide_a_setting() -> None:
    tables = [set(ALIASES), set(RENAMED), set(WITHOUT_COUNTERPART), set(SECRETS), set(EVERY)]
    assert sum(map(len, tables)) == len(set.union(*tables))


def test_names_are_written_with_underscores() -> None:
    assert not [name for name in (*ALIASES, *RENAMED, *WITHOUT_COUNTERPART, *SECRETS) if "-" in name]


def test_the_closest_name_is_close() -> None:
    assert closest("pppo", ["ppo", "grpo"]) == ["ppo"]
    assert closest("zebra", ["ppo", "grpo"]) == []
