"""Commands and algorithms: every one has a command, and what a command is like follows from it."""

import pytest

from hone.algos.algorithms import ALGORITHMS
from hone.launch.config import default_config
from hone.launch.groups import compares_samples
from hone.launch.schema import replaced, settings
from hone.launch.verbs import VERBS


def test_every_algorithm_has_a_command() -> None:
    assert set(VERBS) == set(ALGORITHMS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_command_is_its_algorithm_with_the_algorithms_own_defaults(verb: str) -> None:
    algo, length = default_config(verb).algo, ALGORITHMS[verb]().reduction.length
    assert (type(algo), algo.name) == (ALGORITHMS[verb], verb)
    assert (algo if length is None else replaced(algo, {"reduction.length": length})) == ALGORITHMS[verb]()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_whether_samples_are_compared_is_asked_of_the_algorithm(name: str) -> None:
    # By the papers: a critic, the rollout's own mean, a greedy response or a teacher stands in for the group.
    assert compares_samples(ALGORITHMS[name]()) == (name not in ("ppo", "vapo", "reinforce", "remax", "on_policy_distill"))


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_can_correct_for_the_engine(verb: str) -> None:
    assert {f"algo.correction.{name}" for name in ("level", "mode", "low", "high")} <= settings(default_config(verb)).keys()


def test_a_critic_is_set_up_where_there_is_one() -> None:
    assert [verb for verb in VERBS if "critic.adam.lr" in settings(default_config(verb))] == ["ppo", "vapo"]
