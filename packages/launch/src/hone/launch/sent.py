"""A shard as it travels to a learner rank: nothing that can be counted again, and ids in 32 bits.

Positions count up from each row's start, and ids and versions are small numbers: 33 bytes a token become 17.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hone.algos.batch import Packed
from hone.learner.packing import Shard

NARROW = ("tokens", "version")
"""Fields of whole numbers that 32 bits hold."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A shard on its way; `shard()` gives it back as it was."""

    make: Callable[..., Packed]
    tensors: dict[str, Tensor]
    others: dict[str, Any]
    counted: bool
    plan: dict[str, Any]

    def shard(self) -> Shard:
        """The shard, to the last bit."""
        fields = self.others | {name: value.long() if name in NARROW else value for name, value in self.tensors.items()}
        if self.counted:
            fields["position_ids"] = counted(fields["cu_seqlens"])
        return Shard(batch=self.make(**fields), **self.plan)


def sent(shard: Shard) -> Sent:
    """The shard as it travels. Raises ValueError for ids or versions beyond 32 bits."""
    batch = shard.batch
    tensors, others = {}, {}
    for name in (field.name for field in dataclasses.fields(batch)):
        value = getattr(batch, name)
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            others[name] = value
    for name in NARROW:
        if name in tensors:
            narrow = tensors[name].int()
            if not torch.equal(narrow, tensors[name]):
                raise ValueError(
                    f"{name} has numbers beyond 32 bits, the largest {int(tensors[name].abs().max())}; ids and versions are small"
                )
            tensors[name] = narrow
    as_counted = torch.equal(tensors["position_ids"], counted(batch.cu_seqlens))
    if as_counted:
        del tensors["position_ids"]
    plan = {field.name: getattr(shard, field.name) for field in dataclasses.fields(shard) if field.name != "batch"}
    return Sent(make=type(batch), tensors=tensors, others=others, counted=as_counted, plan=plan)


def counted(cu_seqlens: Tensor) -> Tensor:
    """Positions 0, 1, 2, ... within every row."""
    lengths = cu_seqlens.diff().long()
    return torch.arange(int(cu_seqlens[-1])) - cu_seqlens[:-1].long().repeat_interleave(lengths)
