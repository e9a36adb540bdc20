"""The algorithms by the names users know them by: two plain dicts, no registry. `docs/algorithms.md` has a line for each."""

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
from hone.algos.algorithms.remax import ReMax
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
    "remax": ReMax,
    "vapo": VAPO,
    "opo": OPO,
}
