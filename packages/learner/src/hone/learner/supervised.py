"""Supervised learning as one more loss over the same learner: negative log-likelihood of the action tokens."""

from dataclasses import dataclass

from hone.algos.batch import Scored
from hone.algos.protocol import Loss, Outputs
from hone.algos.supervised import nll


@dataclass(frozen=True, kw_only=True)
class NextToken:
    """What `Learner.update_policy` takes for supervised learning; advantages are not looked at."""

    def loss(self, outputs: Outputs, scored: Scored) -> Loss:
        """Weighted negative log-likelihood over any part of an optimiser step."""
        return nll(outputs.logp, scored.weights, scored.action_mask)
