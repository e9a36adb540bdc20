"""The algorithms by the name the command line and the reports know them by: one plain dict, no registry.

All of them judge a plain `Batch`, but for ReMax, which needs greedy samples (`remax.with_greedy`) and so is used by name.
"""

from hone.algos.algorithms.cispo import CISPO
from hone.algos.algorithms.dapo import DAPO
from hone.algos.algorithms.dr_grpo import DrGRPO
from hone.algos.algorithms.gmpo import GMPO
from hone.algos.algorithms.grpo import GRPO
from hone.algos.algorithms.gspo import GSPO
from hone.algos.algorithms.opo import OPO
from hone.algos.algorithms.ppo import PPO
from hone.algos.algorithms.reinforce import Reinforce
from hone.algos.algorithms.reinforce_baseline import ReinforceBaseline
from hone.algos.algorithms.rloo import RLOO
from hone.algos.algorithms.sapo import SAPO
from hone.algos.algorithms.vapo import VAPO
from hone.algos.protocol import Algorithm

ALGORITHMS: dict[str, type[Algorithm]] = {
    "ppo": PPO,
    "reinforce": Reinforce,
    "reinforce_baseline": ReinforceBaseline,
    "rloo": RLOO,
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "sapo": SAPO,
    "gmpo": GMPO,
    "vapo": VAPO,
    "opo": OPO,
}
