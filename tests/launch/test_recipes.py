"""Recipes: chosen by the machine, announced, below what the user says."""

import pytest

from hone.launch import machine
from hone.launch.config import default_config
from hone.launch.recipes import BUILT_IN, RECIPES
from hone.launch.schema import from_toml, settings
from hone.launch.verbs import VERBS
from tests.launch.asking import crossed, settled, typed

OWN = "--actor.model-name-or-path m --data.prompt-dataset p.jsonl --reward.remote-url r.py"
TAUGHT = {"on_policy_distill": "--ref.model-name-or-path t"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_names_settings_and_gives_them_values_they_accept(recipe: str) -> None:
    known = {name: one for verb in VERBS for name, one in settings(default_config(verb)).items()}
    for name, value in (RECIPES[recipe] | BUILT_IN.get(recipe, {})).items():
        assert from_toml(known[name], value) == value


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("words", ["", OWN])
def test_a_recipe_breaks_no_rule(verb: str, words: str) -> None:
    assert crossed(f"{verb} --recipe laptop {words} {TAUGHT.get(verb, '')}") == []


@pytest.mark.parametrize("verb", VERBS)
def test_the_plain_defaults_break_no_rule_on_two_gpus(verb: str) -> None:
    assert crossed(f"{verb} {OWN} {TAUGHT.get(verb, '')}", gpus=2) == []


def test_the_laptop_is_chosen_without_a_gpu_and_says_so() -> None:
    answer = settled("ppo")
    assert (answer.recipe, answer.recipe_reason) == ("laptop", "no GPU is visible")
    assert answer.config.rollout.batch_size == RECIPES["laptop"]["rollout.batch_size"]
    assert answer.sources["rollout.batch_size"] == "recipe laptop"


def test_with_gpus_only_the_built_in_model_gets_it() -> None:
    assert settled("ppo", gpus=8).recipe == "laptop"
    assert settled(f"ppo {OWN}", gpus=8).recipe == "none"
    assert settled(f"ppo {OWN}").recipe == "laptop"


def test_a_recipe_asked_for_is_taken_without_a_word() -> None:
    answer = settled("ppo --recipe none")
    assert (answer.recipe, answer.recipe_reason) == ("none", "")
    assert set(answer.sources.values()) == {"default"}
    assert settled(f"ppo {OWN} --recipe laptop", gpus=8).config.ds.param_dtype == "fp32"


def test_only_the_built_in_task_has_short_answers() -> None:
    assert settled("ppo").config.rollout.max_new_tokens == BUILT_IN["laptop"]["rollout.max_new_tokens"]
    assert settled(f"ppo {OWN}").config.rollout.max_new_tokens == RECIPES["laptop"]["rollout.max_new_tokens"]
    assert settled("ppo --actor.model-name-or-path m").config.rollout.max_new_tokens == RECIPES["laptop"]["rollout.max_new_tokens"]


def test_an_unknown_recipe_is_answered_with_the_nearest() -> None:
    (problem,) = typed("ppo --recipe labtop")
    assert problem.mend == "did you mean laptop?"


@pytest.mark.parametrize(("visible", "count"), [(None, 3), ("", 0), ("-1", 0), ("0", 1), ("0,2", 2), ("0,-1,1", 1), ("0,1,2,3,4", 3)])
def test_gpus_are_counted_as_cuda_would_show_them(monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int) -> None:
    monkeypatch.setattr(machine, "_present", lambda: 3)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.visible_gpus() == count
