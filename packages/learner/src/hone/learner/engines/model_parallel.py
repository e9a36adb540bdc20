"""What DeepSpeed asks of ranks that hold parts of one model: by the names it calls, an object it knows as `mpu`.

Ranks with the same part of the model are data-parallel: DeepSpeed averages gradients and shards optimiser states over them, and
adds up over the others what of the gradient's norm is cut.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, distributed

from hone.learner.attention.wire import GroupWire
from hone.learner.checkpoint.pieces import Fragment
from hone.learner.engines.state import Held
from hone.learner.tensor_parallel.cut import cut_of


class ModelParallel:
    """The calling rank's tensor-parallel group, and its data-parallel one. Collective over the whole job."""

    def __init__(self, tensor: GroupWire, *, rank: int, world_size: int) -> None:
        self.tensor, self.copies = tensor, world_size // tensor.size
        self.data_ranks = list(range(rank % tensor.size, world_size, tensor.size))
        # Everybody makes every group, as in `group_of`; here also groups of one, which DeepSpeed wants to see.
        groups = [distributed.new_group(list(range(first, world_size, tensor.size))) for first in range(tensor.size)]
        self.data: Any = groups[tensor.rank]

    def get_model_parallel_group(self) -> Any:
        """The ranks that hold one model together."""
        return self.tensor.group

    def get_model_parallel_rank(self) -> int:
        """Which part of the model is here."""
        return self.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        """Parts of the model."""
        return self.tensor.size

    def get_data_parallel_group(self) -> Any:
        """The ranks that hold this part."""
        return self.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their numbers in the job."""
        return self.data_ranks

    def get_data_parallel_rank(self) -> int:
        """Its number among them."""
        return distributed.get_rank(self.data)

    def get_data_parallel_world_size(self) -> int:
        """How many of them there are."""
        return self.copies


def placed(held: Held, named: Sequence[tuple[str, Tensor]]) -> Held:
    """What a rank holds, its fragments as ranges of the whole parameters and not of this rank's parts."""
    cuts = {name: cut for name, parameter in named if (cut := cut_of(parameter)) is not None}

    def moved(fragment: Fragment) -> Fragment:
        cut = cuts.get(fragment.name)
        if cut is None:
            return fragment
        if cut.dim == 0:  # whole rows, which lie together
            start = fragment.start + cut.low * math.prod(cut.shape[1:])
            return dataclasses.replace(fragment, shape=cut.shape, start=start)
        return dataclasses.replace(fragment, shape=cut.shape, columns=(cut.low, cut.high))

    return dataclasses.replace(held, fragments=[moved(fragment) for fragment in held.fragments])
