"""What the loops learn from: the answer is known by hand for every rule, tie and reward."""

import math

import pytest

from hone.launch.loops.condition import fault, filled
from hone.launch.loops.select import Group, best, conditioned, figures, pairs


def group(name: str, rewards: list[float], *, ids: list[int] | None = None) -> Group:
    """A prompt's responses; the i-th is the id 10 + i unless `ids` says otherwise."""
    return [
        {
            "prompt_id": name,
            "sample": place,
            "prompt": f"{name}?",
            "response": f"answer {place}",
            "prompt_ids": [1, 2],
            "response_ids": [(ids or range(10, 99))[place]],
            "reward": reward,
            "length": 2 * place + 1,
            "truncated": place == 0,
        }
        for place, reward in enumerate(rewards)
    ]


CLEAR, TIED, EQUAL, LOW = group("a", [0.2, 0.9, 0.5]), group("b", [0.0, 1.0, 0.0, 1.0]), group("c", [0.5, 0.5]), group("d", [-1.0, 0.1])


def test_the_best_of_each_prompt_the_first_of_equals() -> None:
    chosen = best([CLEAR, TIED, EQUAL, LOW], above=None)
    assert [(row["prompt_id"], row["sample"], row["completion_ids"]) for row in chosen.rows] == [
        ("a", 1, [11]),
        ("b", 1, [11]),
        ("c", 0, [10]),
        ("d", 1, [11]),
    ]
    assert chosen.counts() == {"kept": 4, "equal": 1, "tied_best": 1, "tied_worst": 1, "below": 0, "same": 0}


def test_a_best_that_is_not_good_enough_is_left_out_and_counted() -> None:
    chosen = best([CLEAR, TIED, EQUAL, LOW], above=0.5)
    assert [row["prompt_id"] for row in chosen.rows] == ["a", "b"]
    assert chosen.counts() == {"kept": 2, "equal": 1, "tied_best": 1, "tied_worst": 1, "below": 2, "same": 0}


def test_best_and_worst_make_a_pair_and_equals_make_none() -> None:
    chosen = pairs([CLEAR, TIED, EQUAL, LOW])
    assert [(row["prompt_id"], row["chosen_ids"], row["rejected_ids"]) for row in chosen.rows] == [
        ("a", [11], [10]),
        ("b", [11], [10]),
        ("d", [11], [10]),
    ]
    assert (chosen.rows[1]["chosen_reward"], chosen.rows[1]["rejected_reward"]) == (1.0, 0.0)
    assert chosen.counts() == {"kept": 3, "equal": 1, "tied_best": 1, "tied_worst": 1, "below": 0, "same": 0}


def test_one_response_judged_in_two_ways_is_no_pair() -> None:
    chosen = pairs([group("a", [0.0, 1.0], ids=[7, 7])])
    assert chosen.rows == [] and chosen.counts()["same"] == 1 and chosen.counts()["equal"] == 0


def test_every_response_stands_under_its_reward() -> None:
    def condition(prompt: str, reward: float) -> tuple[str, list[int]]:
        return filled("{reward:.2f} {input}", prompt, reward), [99]

    plain = conditioned([CLEAR, EQUAL], normalize=False, condition=condition)
    assert [row["prompt"] for row in plain.rows] == ["0.20 a?", "0.90 a?", "0.50 a?", "0.50 c?", "0.50 c?"]
    assert all(row["prompt_ids"] == [99] for row in plain.rows)
    assert [row["completion_ids"] for row in plain.rows] == [[10], [11], [12], [10], [11]]


def test_rewards_are_normalised_over_all_responses() -> None:
    # Of 0, 0, 3 the mean is 1 and the variance (1 + 1 + 4) / 2 = 3.
    rows = conditioned([group("a", [0.0, 0.0, 3.0])], normalize=True, condition=lambda prompt, reward: (prompt, [1])).rows
    assert [row["condition"] for row in rows] == pytest.approx([-1 / math.sqrt(3), -1 / math.sqrt(3), 2 / math.sqrt(3)])
    even = conditioned([EQUAL], normalize=True, condition=lambda prompt, reward: (prompt, [1])).rows
    assert [row["condition"] for row in even] == [0.0, 0.0]


def test_figures_are_means_over_responses_and_prompts() -> None:
    found = figures([CLEAR, EQUAL])
    assert found["reward_mean"] == pytest.approx((0.2 + 0.9 + 0.5 + 0.5 + 0.5) / 5)
    assert found["reward_best"] == pytest.approx((0.9 + 0.5) / 2)
    assert (found["prompts"], found["samples"], found["truncated"], found["length_mean"]) == (2, 5, 0.4, (1 + 3 + 5 + 1 + 3) / 5)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{input}", "needs {input} and {reward}"),
        ("{input} {reward} {more}", "and nothing else in braces"),
        ("{input} {reward.real}", "and nothing else in braces"),
        ("{input} {reward:.2q}", "a format that does not apply"),
        ("{input} {reward", "cannot be read"),
        ("{input} {}{reward}", "and nothing else in braces"),
    ],
)
def test_a_template_that_tells_no_reward_is_refused(template: str, said: str) -> None:
    assert said in fault(template) and "; write for example" in fault(template)


def test_braces_of_a_prompt_stand_for_themselves() -> None:
    assert fault("{reward:+.1f} {input}") == ""
    assert filled("{reward:+.1f} {input}", "what is {x}?", 1.25) == "+1.2 what is {x}?"
