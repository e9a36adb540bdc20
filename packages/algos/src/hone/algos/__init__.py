"""Advantages, losses and algorithms for RL post-training, as pure functions on packed tensors.

The names below are fetched when first used, so that importing `hone.algos` or its `ranges` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hone.algos.advantages import discounted_returns as discounted_returns
    from hone.algos.advantages import gae as gae
    from hone.algos.advantages import group_centred as group_centred
    from hone.algos.advantages import group_normalised as group_normalised
    from hone.algos.advantages import whiten as whiten
    from hone.algos.algorithms import ALGORITHMS as ALGORITHMS
    from hone.algos.algorithms.grpo import GRPO as GRPO
    from hone.algos.algorithms.ppo import PPO as PPO
    from hone.algos.batch import Batch as Batch
    from hone.algos.batch import SamplerContract as SamplerContract
    from hone.algos.batch import Scored as Scored
    from hone.algos.batch import Trajectory as Trajectory
    from hone.algos.batch import pack as pack
    from hone.algos.batch import select as select
    from hone.algos.kl import kl_loss as kl_loss
    from hone.algos.policy_losses import clipped_surrogate as clipped_surrogate
    from hone.algos.policy_losses import entropy_bonus as entropy_bonus
    from hone.algos.protocol import Algorithm as Algorithm
    from hone.algos.protocol import Loss as Loss
    from hone.algos.protocol import Outputs as Outputs
    from hone.algos.reduce import Reduction as Reduction
    from hone.algos.reduce import token_weights as token_weights
    from hone.algos.supervised import nll as nll
    from hone.algos.value_losses import clipped_value_loss as clipped_value_loss
    from hone.algos.value_losses import squared_value_loss as squared_value_loss

_HOMES = {
    "advantages": ("discounted_returns", "gae", "group_centred", "group_normalised", "whiten"),
    "algorithms": ("ALGORITHMS", "GRPO", "PPO"),
    "batch": ("Batch", "SamplerContract", "Scored", "Trajectory", "pack", "select"),
    "kl": ("kl_loss",),
    "policy_losses": ("clipped_surrogate", "entropy_bonus"),
    "protocol": ("Algorithm", "Loss", "Outputs"),
    "reduce": ("Reduction", "token_weights"),
    "supervised": ("nll",),
    "value_losses": ("clipped_value_loss", "squared_value_loss"),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"hone.algos.{module}"), name)
    raise AttributeError(f"module 'hone.algos' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *(name for names in _HOMES.values() for name in names)])
