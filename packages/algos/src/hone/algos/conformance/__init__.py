"""The laws of RL losses as reusable checks, to be pointed at anyone's functions, in any layout.

A law takes the function under test and raises `LawBroken` with what it saw; `LAWS[kind]` lists them by name. With pytest:

    pytest -p hone.algos.conformance.plugin test_mine.py

    def test_my_loss(loss_law):        # one test per law
        loss_law(lambda case: my_loss(case.logp, case.old_logp, case.advantages, case.action_mask, case.step_tokens))
"""

from hone.algos.conformance.case import Case as Case
from hone.algos.conformance.case import LawBroken as LawBroken
from hone.algos.conformance.case import example as example
from hone.algos.conformance.case import from_padded as from_padded
from hone.algos.conformance.estimators import GROUP_LAWS as GROUP_LAWS
from hone.algos.conformance.estimators import KL_LAWS as KL_LAWS
from hone.algos.conformance.estimators import LOGP_LAWS as LOGP_LAWS
from hone.algos.conformance.estimators import RETURN_LAWS as RETURN_LAWS
from hone.algos.conformance.estimators import WHITENING_LAWS as WHITENING_LAWS
from hone.algos.conformance.losses import CLIP_LAWS as CLIP_LAWS
from hone.algos.conformance.losses import LOSS_LAWS as LOSS_LAWS
from hone.algos.conformance.losses import STEP_LAWS as STEP_LAWS

LAWS = {
    "loss": LOSS_LAWS,
    "clip": CLIP_LAWS,
    "step": STEP_LAWS,
    "kl": KL_LAWS,
    "logp": LOGP_LAWS,
    "whitening": WHITENING_LAWS,
    "group": GROUP_LAWS,
    "return": RETURN_LAWS,
}
"""Kind of function -> name of law -> law."""
