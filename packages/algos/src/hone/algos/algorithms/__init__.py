"""Every algorithm, under the name users type."""

from hone.algos.algorithms.grpo import GRPO
from hone.algos.algorithms.ppo import PPO
from hone.algos.protocol import Algorithm

ALGORITHMS: dict[str, type[Algorithm]] = {"ppo": PPO, "grpo": GRPO}
