"""A transformer compiled by torch, under DeepSpeed: `engine.compile()`, which on CUDA is DeepCompile where the settings say so.

Heads, rings, and packed attention without a kernel stay as they are: what they call depends on the numbers in a batch. So on the CPU,
where compiling is for trying it out, a graph ends at each layer's attention.
"""

import warnings
from typing import Any

import torch

from hone.learner.model import CriticModel, PolicyModel

NOISE: tuple[tuple[str, type[Warning]], ...] = (
    # Of Dynamo's own doing while it traces: it looks at every tensor for a gradient, and makes a context of every autograd function.
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning),
    (r"<class 'torch\.autograd\.function\.Function'> should not be instantiated", DeprecationWarning),
)


BACKEND = "inductor"
"""Torch's name of what makes code of a graph."""


def compile_transformer(engine: Any, module: PolicyModel | CriticModel) -> None:
    """Has `engine` (DeepSpeed's, around `module`) compile the forward and backward of the transformer in `module`."""
    for message, category in NOISE:
        warnings.filterwarnings("ignore", message=message, category=category)
    head = module.head if isinstance(module, PolicyModel) else module.value_head
    name = "forward" if isinstance(module, PolicyModel) else "read"
    setattr(head, name, torch.compiler.disable(getattr(head, name)))
    engine.compile(backend=BACKEND)
