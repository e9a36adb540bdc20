"""Which role lives where: a table from role to group, and what each group asks of the machines.

Roles of one group share processes and memory; every colocation mode is one line of the table. A group has one process
per rank; with GPUs each rank owns one, which it shares with an engine when the engine's group is the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PlacedGroup:
    """A group of processes: `ranks` of them, spread over `nodes` machines, each hosting every one of `roles`."""

    name: str
    roles: tuple[str, ...]
    ranks: int
    nodes: int


def groups(table: Mapping[str, str], sizes: Mapping[str, tuple[int, int]], roles: Sequence[str]) -> tuple[PlacedGroup, ...]:
    """The groups that host `roles`, in the order their first role is named.

    `table` maps role -> group name, `sizes` role -> (nodes, processes per node). Raises ValueError when roles of one
    group ask for different sizes.
    """
    placed: dict[str, PlacedGroup] = {}
    for role in roles:
        name, (nodes, per_node) = table[role], sizes[role]
        group = placed.get(name)
        if group is None:
            placed[name] = PlacedGroup(name=name, roles=(role,), ranks=nodes * per_node, nodes=nodes)
        elif (group.nodes, group.ranks) != (nodes, nodes * per_node):
            raise ValueError(
                f"roles {group.roles[0]} and {role} share the group {name!r} but ask for {group.ranks} and {nodes * per_node} processes; "
                f"give them the same --*.num-nodes and --*.num-gpus-per-node, or a group of its own with --placement.{role} {role}"
            )
        else:
            placed[name] = PlacedGroup(name=name, roles=(*group.roles, role), ranks=group.ranks, nodes=nodes)
    return tuple(placed.values())


def sync_backend(asked: str, *, gpus: int, engine_group: str, policy_group: str) -> str:
    """The way weights travel: as asked, or shared_memory without GPUs, ipc on a shared GPU, nccl across GPUs."""
    if asked != "auto":
        return asked
    if gpus == 0:
        return "shared_memory"
    return "ipc" if engine_group == policy_group else "nccl"
