"""The configuration dataclasses: documented, frozen, in range by default; and the settings read off them."""

import dataclasses
import shlex
from collections.abc import Iterator

import pytest

from hone.algos.ranges import violations
from hone.algos.reduce import Reduction
from hone.launch.config import PolicyGradientConfig, default_config
from hone.launch.resolve import resolve
from hone.launch.schema import from_text, from_toml, replaced, settings, value_of
from hone.launch.screens import options
from hone.launch.verbs import VERBS
from tests.launch.asking import crossed


def dataclasses_in(config: object) -> Iterator[object]:
    yield config
    for field in dataclasses.fields(config):  # pyright: ignore[reportArgumentType] - walked from a dataclass
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            yield from dataclasses_in(value)


@pytest.mark.parametrize("verb", VERBS)
def test_every_setting_says_what_it_means(verb: str) -> None:
    bare = [name for name, setting in settings(default_config(verb)).items() if len(setting.doc) < 10 or not setting.doc.endswith(".")]
    assert bare == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_group_is_frozen_and_keyword_only(verb: str) -> None:
    for config in dataclasses_in(default_config(verb)):
        assert config.__dataclass_params__.frozen, type(config)  # pyright: ignore[reportAttributeAccessIssue]
        assert all(field.kw_only for field in dataclasses.fields(config)) or type(config).__name__ == "Reduction"  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("verb", VERBS)
def test_defaults_are_in_range(verb: str) -> None:
    assert list(violations(default_config(verb))) == []


def test_groups_are_those_users_know() -> None:
    groups = [field.name for field in dataclasses.fields(PolicyGradientConfig)]
    assert groups == ["actor", "critic", "ref", "reward", "rollout", "vllm", "ds", "data", "algo", "train", "ckpt", "run", "placement"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_group_baseline_has_a_group_by_default(verb: str) -> None:
    alone = verb in ("ppo", "vapo", "reinforce", "remax", "on_policy_distill")
    assert default_config(verb).rollout.n_samples_per_prompt == (1 if alone else 8)


def test_a_constant_length_is_the_longest_response() -> None:
    config = default_config("dr_grpo")
    assert config.algo.reduction == Reduction(over="constant", length=config.rollout.max_new_tokens)


def test_grpo_has_no_settings_of_a_critic() -> None:
    assert not [name for name in settings(default_config("grpo")) if "critic" in name]
    assert "critic.adam.lr" in settings(default_config("ppo"))


def test_settings_of_a_group_stand_together() -> None:
    groups = [setting.group for setting in settings(default_config("ppo")).values()]
    runs = [group for group, before in zip(groups, ["", *groups], strict=False) if group != before]
    assert len(runs) == len(set(runs))


def test_replaced_changes_what_is_named_and_nothing_else() -> None:
    base = default_config("ppo")
    config = replaced(base, {"actor.adam.lr": 0.5, "actor.num_nodes": 3, "train.seed": 7})
    changed = [name for name in settings(base) if value_of(base, name) != value_of(config, name)]
    assert changed == ["actor.num_nodes", "actor.adam.lr", "train.seed"]
    assert (config.actor.adam.lr, config.actor.num_nodes, config.train.seed) == (0.5, 3, 7)


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("train.batch_size", "at least 1"),
        ("actor.adam.lr", "in [0, 1)"),
        ("actor.adam.eps", "above 0"),
        ("actor.adam.betas", "each in [0, 1)"),
        ("vllm.sync_tolerance", "above 0"),
        ("data.input_key", ""),
    ],
)
def test_limits_are_told_in_words(name: str, limits: str) -> None:
    assert settings(default_config("ppo"))[name].limits == limits


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("train.batch_size", "32", "int"),
        ("train.batch_size", 3.0, "int"),
        ("train.batch_size", True, "int"),
        ("train.batch_size", [3], "int"),
        ("data.input_key", 5, "text"),
        ("data.apply_chat_template", "yes", "True or False"),
        ("data.apply_chat_template", 1, "True or False"),
        ("actor.adam.betas", 0.9, "2 values"),
        ("actor.adam.betas", [0.9], "2 values"),
        ("ds.zero_stage", 4, "one of 0, 1, 2, 3"),
        ("ds.param_dtype", 16, "one of fp32, bf16"),
        ("train.seed", {"a": 1}, "int"),
    ],
)
def test_a_value_of_a_file_must_have_the_settings_type(name: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        from_toml(settings(default_config("ppo"))[name], value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("actor.adam.lr", 0, 0.0),
        ("actor.adam.betas", [0.5, 0.75], (0.5, 0.75)),
        ("algo.value_clip", "None", None),
        ("ds.zero_stage", 3, 3),
        ("data.input_key", "None", "None"),
        ("data.apply_chat_template", True, True),
    ],
)
def test_a_value_of_a_file_keeps_its_meaning(name: str, value: object, expected: object) -> None:
    got = from_toml(settings(default_config("ppo"))[name], value)
    assert got == expected and type(got) is type(expected)


def test_a_long_value_is_cut_in_its_message() -> None:
    with pytest.raises(ValueError, match=r"x{77}\.\.\.") as refused:
        from_text(settings(default_config("ppo"))["train.seed"], ["x" * 5000])
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("verb", VERBS)
def test_examples_can_be_pasted_from_a_narrow_terminal(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    options(verb, settings(default_config(verb)), "")
    shown = capsys.readouterr().out.split("\nexamples\n")[1].split("\n\n")[0]
    assert max(map(len, shown.splitlines())) <= 80
    commands = [shlex.split(command) for command in shown.replace("\\\n", "").splitlines()]
    assert [words[:2] for words in commands] == [["launch", verb]] * 3
    assert all(not resolve(verb, words[2:], gpus=0).problems for words in commands[:2])
    assert commands[1][-2:] == ["--reward.remote-url", "reward.py"]
    assert "--ref.model-name-or-path" in commands[0] or not crossed(f"{verb}")
