"""Where ZeRO keeps what: DeepSpeed's sharded masters and optimiser state as `Held`, and the parameters renewed from the masters.

Stage 0 holds every parameter on every rank and steps it directly. Stages 1 and 2 lay each parameter group end to end and give every
rank an equal range of that, which may begin and end inside a parameter (`_hp_mapping`). Stage 3 cuts each parameter into equal
parts, one per rank, the last padded (`grad_position`). Read from deepspeed 0.19: runtime/zero/stage_1_and_2.py, stage3.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hone.learner.checkpoint.pieces import Fragment
from hone.learner.engines.state import Held
from hone.learner.muon import Matrix


def held(optimiser: Any, named: Sequence[tuple[str, nn.Parameter]], stage: int) -> Held:
    """A rank's part of the trained parameters `named`; `optimiser` is what `deepspeed.initialize` returned."""
    if stage == 0:
        fragments = [
            Fragment(name=name, shape=tuple(one.shape), start=0, flat=index, offset=0, numel=one.numel())
            for index, (name, one) in enumerate(named)
        ]
        return Held(masters=[parameter for _, parameter in named], fragments=fragments, optimiser=optimiser, named=named)
    names = {id(parameter): name for name, parameter in named}
    if stage == 3:
        fragments = [fragment for name, parameter in named if (fragment := _part(optimiser, name, parameter)).numel > 0]
        return Held(masters=optimiser.fp32_partitioned_groups_flat, fragments=fragments, optimiser=optimiser.optimizer, named=named)
    fragments = [
        Fragment(
            name=names[id(parameter)],
            shape=tuple(parameter.shape),
            start=mapping.lp_fragment_address.start,
            flat=index,
            offset=mapping.hp_fragment_address.start,
            numel=mapping.hp_fragment_address.numel,
        )
        for index, group in enumerate(optimiser.bit16_groups)
        for parameter in group
        if (mapping := parameter._hp_mapping) is not None
    ]
    return Held(masters=optimiser.single_partition_of_fp32_groups, fragments=fragments, optimiser=optimiser.optimizer, named=named)


@torch.no_grad()
def renew_parameters(optimiser: Any, stage: int) -> None:
    """The parameters of the forward pass, on all ranks, from the masters; collective."""
    if stage == 3:
        optimiser.checkpoint_event_prologue()
        for index in range(len(optimiser.fp16_groups)):
            optimiser._reassign_or_swap_out_partitioned_parameters(index)
        optimiser.invalidate_secondary_tensor()
        optimiser.checkpoint_event_epilogue()
    elif stage > 0:
        optimiser.update_lp_params()


def matrices(optimiser: Any, held: Held, stage: int) -> dict[Tensor, list[Matrix]]:
    """Of every flat master, the parameters that are matrices, or stacks of them, in DeepSpeed's order, which is that of all ranks."""
    groups = optimiser.fp16_groups if stage == 3 else optimiser.bit16_groups
    names = {id(parameter): name for name, parameter in held.named}
    parts = {fragment.name: fragment for fragment in held.fragments}
    found: dict[Tensor, list[Matrix]] = {}
    for flat, group in zip(held.masters, groups, strict=True):
        shapes = [(parts.get(names[id(one)]), tuple(one.ds_shape if stage == 3 else one.shape)) for one in group]
        found[flat] = [Matrix(shape=shape, part=part) for part, shape in shapes if len(shape) > 1]
    return found


def parameter_memory(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """What the forward pass reads, stage 3's shards included (persistent, and hpZ's second ones), and the gradients beside it."""
    parameters, gradients = [], []
    for parameter in module.parameters():
        parameters.append(parameter.detach())
        for name in ("ds_tensor", "ds_secondary_tensor"):
            shard = vars(parameter).get(name)
            if isinstance(shard, Tensor):
                parameters.append(shard)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    return parameters, gradients


def _part(optimiser: Any, name: str, parameter: Any) -> Fragment:
    """Stage 3's range of a parameter on this rank, without its padding."""
    flat, offset, size = optimiser.grad_position[optimiser.get_param_id(parameter)]
    start = size * optimiser._get_param_partition_rank(parameter)
    numel = max(0, min(size, parameter.ds_numel - start))
    return Fragment(name=name, shape=tuple(parameter.ds_shape), start=start, flat=flat, offset=offset, numel=numel)
