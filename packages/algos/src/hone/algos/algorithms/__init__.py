"""The algorithms by the names users know them by: two plain dicts, no registry. `docs/algorithms.md` has a line for each."""

from hone.algos.algorithms.cispo import CISPO
from hone.algos.algorithms.dapo import DAPO
from hone.algos.algorithms.distillation import Distillation
from hone.algos.algorithms.dpo import DPO
from hone.algos.algorithms.dr_grpo import DrGRPO
from hone.algos.algorithms.gmpo import GMPO
from hone.algos.algorithms.grpo import GRPO
from hone.algos.algorithms.gspo import GSPO
from hone.algos.algorithms.ipo import IPO
from hone.algos.algorithms.kto import KTO
from hone.algos.algorithms.on_policy_distillation import OnPolicyDistillation
from hone.algos.algorithms.opo import OPO
from hone.algos.algorithms.orpo import ORPO
from hone.algos.algorithms.ppo import PPO
from hone.algos.algorithms.process_reward_model import ProcessRewardModel
from hone.algos.algorithms.reinforce import Reinforce
from hone.algos.algorithms.reinforce_baseline import ReinforceBaseline
from hone.algos.algorithms.remax import ReMax
from hone.algos.algorithms.reward_model import RewardModel
from hone.algos.algorithms.rloo import RLOO
from hone.algos.algorithms.sapo import SAPO
from hone.algos.algorithms.sft import SFT
from hone.algos.algorithms.simpo import SimPO
from hone.algos.algorithms.vapo import VAPO
from hone.algos.offline import Offline
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
    "on_policy_distill": OnPolicyDistillation,
}
"""Those that judge what the policy sampled."""

OFFLINE: dict[str, type[Offline]] = {
    "sft": SFT,
    "rm": RewardModel,
    "prm": ProcessRewardModel,
    "dpo": DPO,
    "ipo": IPO,
    "simpo": SimPO,
    "orpo": ORPO,
    "kto": KTO,
    "kd": Distillation,
}
"""Those that learn from labelled rows (`offline.py`)."""
