"""The table from role to group, and how weights travel between them."""

import pytest

from hone.launch.placement import PlacedGroup, groups, sync_backend

ROLES = ("policy", "critic", "reference")


def test_roles_of_one_group_share_its_processes() -> None:
    sizes = dict.fromkeys(ROLES, (2, 4))
    assert groups(dict.fromkeys(ROLES, "learner"), sizes, ROLES) == (PlacedGroup(name="learner", roles=ROLES, ranks=8, nodes=2),)


def test_a_role_may_have_a_group_of_its_own_size() -> None:
    table = {"policy": "learner", "critic": "values", "reference": "learner"}
    placed = groups(table, {"policy": (1, 2), "critic": (1, 4), "reference": (1, 2)}, ROLES)
    assert [(group.name, group.roles, group.ranks) for group in placed] == [
        ("learner", ("policy", "reference"), 2),
        ("values", ("critic",), 4),
    ]


def test_roles_that_share_a_group_must_agree_on_its_size() -> None:
    with pytest.raises(ValueError, match=r"policy and critic share the group 'learner' but ask for 2 and 4 .* --placement.critic"):
        groups(dict.fromkeys(ROLES, "learner"), {"policy": (1, 2), "critic": (1, 4), "reference": (1, 2)}, ROLES)


@pytest.mark.parametrize(
    ("asked", "gpus", "engine_group", "expected"),
    [
        ("auto", 0, "rollout", "shared_memory"),
        ("auto", 8, "rollout", "nccl"),
        ("auto", 8, "learner", "ipc"),
        ("nccl", 8, "learner", "nccl"),
    ],
)
def test_weights_take_the_shortest_way(asked: str, gpus: int, engine_group: str, expected: str) -> None:
    assert sync_backend(asked, gpus=gpus, engine_group=engine_group, policy_group="learner") == expected
