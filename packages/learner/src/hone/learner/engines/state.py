"""What training has changed of a role, as pieces and back: the same for plain torch and for every ZeRO stage.

A rank holds flat fp32 tensors, the masters, which an optimiser steps; fragments say which range of which parameter lies where in
them. Per-element optimiser state (and any extra section, such as an average of the weights) lies as its master does.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from hone.learner.checkpoint.pieces import MASTER, Fragment, Piece, Source

OPTIMISER = "optimiser."
"""Before the optimiser's own name of a section, so that no extra section is taken for one of its."""
STEP = "step"
"""The one piece of optimiser state that is a number and not a tensor of the parameter's shape."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """A rank's part of a role: the masters, the optimiser that steps them, and extra sections, each a tensor per master.

    `named` are the parameters the masters are of, where they are not one for one.
    """

    masters: Sequence[Tensor]
    fragments: Sequence[Fragment]
    optimiser: torch.optim.Optimizer
    extra: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    named: Sequence[tuple[str, Tensor]] = ()


def pieces(held: Held, written: Iterable[Fragment], *, copy_of: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> list[Piece]:
    """Masters, optimiser state and extra sections of the fragments `written`, as views; of what sleeps, `copy_of` it."""
    result = []
    for fragment in written:
        master = held.masters[fragment.flat]
        state = {OPTIMISER + key: value for key, value in held.optimiser.state.get(master, {}).items()}
        extra = {name: flats[fragment.flat] for name, flats in held.extra.items()}
        for section, value in {MASTER: master, **extra, **state}.items():
            if isinstance(value, Tensor) and value.shape == master.shape:
                values = copy_of(value.detach()).view(-1)[fragment.offset : fragment.offset + fragment.numel]
                result.append(
                    Piece(
                        section=section,
                        name=fragment.name,
                        shape=fragment.shape,
                        start=fragment.start,
                        values=values,
                        columns=fragment.columns,
                    )
                )
            elif section == OPTIMISER + STEP:
                if fragment.start == 0:  # one for the parameter, so only its first range carries it
                    count = torch.tensor([int(value)])
                    result.append(Piece(section=section, name=fragment.name, shape=(), start=0, values=count))
            else:
                raise TypeError(f"{section} of {fragment.name} is neither a step count nor of its parameter's shape; it cannot be saved")
    return result


@torch.no_grad()
def restore(held: Held, source: Source) -> None:
    """Masters, optimiser state and extra sections from `source`. The parameters are the caller's to renew from the masters.

    Raises CheckpointError for a range that is not there.
    """
    for flat, _ in groupby(held.fragments, key=lambda fragment: fragment.flat):
        state = held.optimiser.state.get(held.masters[flat], {})
        for key, value in state.items():
            state[key] = value.zero_() if isinstance(value, Tensor) else 0
    for fragment in held.fragments:
        master = held.masters[fragment.flat]
        found = {name.removeprefix(OPTIMISER) for name in source.sections(fragment.name) if name.startswith(OPTIMISER)}
        for key in sorted(found):
            state = held.optimiser.state[master]
            if key == STEP:
                steps = int(source.read(OPTIMISER + key, fragment.name, start=0, numel=1))
                state[key] = _count(held.optimiser, max(steps, int(state.get(key, 0))), device=master.device)
            else:
                _copy(state.setdefault(key, torch.zeros_like(master)), fragment, OPTIMISER + key, source)
        for section, flats in {MASTER: held.masters, **held.extra}.items():
            _copy(flats[fragment.flat], fragment, section, source)


def _copy(flat: Tensor, fragment: Fragment, section: str, source: Source) -> None:
    values = source.read(section, fragment.name, start=fragment.start, numel=fragment.numel, columns=fragment.columns)
    flat.view(-1)[fragment.offset : fragment.offset + fragment.numel].copy_(values)


def _count(optimiser: torch.optim.Optimizer, steps: int, *, device: torch.device) -> Tensor | int:
    """A step count as this optimiser keeps it; parameters that share a flat tensor share the largest of theirs."""
    if not type(optimiser).__module__.startswith(("torch.", "hone.")):
        return steps
    on_device = optimiser.defaults.get("fused") or optimiser.defaults.get("capturable")
    return torch.tensor(float(steps), device=device if on_device else "cpu")
