"""The settings of off-policy corrections, one group of flags that every policy-gradient algorithm has (`algo.correction`)."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hone.algos.batch import Batch, Scored
from hone.algos.corrections import correction_weights, off_policy_sequence_mask, second_moment_mask, self_normalised, sequence_mask_tis
from hone.algos.protocol import Outputs
from hone.algos.ranges import Range
from hone.algos.reduce import Reduction, token_weights


@dataclass(frozen=True, kw_only=True)
class Correction:
    """How samples count for which the engine's log-probabilities and the learner's disagree.

    TIS: level token, mode truncate. IcePop: token, mask, 0.5 to 5. Sequence TIS: sequence, truncate. MIS: sequence, mask.
    Sequence-mask TIS: geometric. Whatever is chosen, advantages are multiplied, and rejected tokens stay in the denominator.
    """

    level: Literal["off", "token", "sequence", "geometric"] = "off"
    """Whose ratio decides: none, each token's, its row's product, or (as a gate before the token's own) its row's geometric mean."""
    mode: Literal["truncate", "clip", "mask"] = "truncate"
    """Outside the bounds weights are cut to `high`, cut to both bounds, or the samples are rejected; a gate always rejects."""
    low: Annotated[float, Range(low=0)] = 0.0
    """Smallest ratio, learner over engine, at least 0; 1 is no mismatch."""
    high: Annotated[float, Range(low=0)] = 2.0
    """Largest ratio, learner over engine, at least 0; 1 is no mismatch."""
    token_cap: Annotated[float, Range(low=0)] = 2.0
    """Largest token ratio inside a row that passes the gate of level geometric, at least 0."""
    normalize: bool = False
    """Divide the weights by their mean over the rollout, so that the size of a step does not follow the mismatch."""
    second_moment: Annotated[float, Range(low=0, open_low=True)] | None = None
    """M2PO: reject the widest tokens until the mean squared log-ratio is below this [nats^2], above 0; the paper takes 0.04."""
    left_behind: Annotated[float, Range(low=0)] | None = None
    """OPSM: reject bad rows whose mean log-ratio, engine over the current policy, is above this [nats], at least 0; TRL suggests 0.5."""

    def __post_init__(self) -> None:
        if self.level != "off" and self.low > self.high:
            raise ValueError(f"correction bounds [{self.low}, {self.high}]: low must not be above high")
        if self.level in ("token", "sequence") and self.mode == "truncate" and self.low > 0:
            raise ValueError(
                f"correction low is {self.low}, but 'truncate' has no lower bound; 'clip' raises small weights, 'mask' rejects them"
            )

    def factor(self, batch: Batch) -> Float[Tensor, " T"] | None:
        """What every advantage of a whole rollout is multiplied by (zero off the mask); None where nothing is corrected."""
        if self.level == "off" and self.second_moment is None:
            return None
        old_logp, rollout_logp, mask, cu_seqlens = batch.require("old_logp"), batch.rollout_logp, batch.action_mask, batch.cu_seqlens
        bounds = {"low": self.low, "high": self.high}
        if self.level == "off":
            factor = mask.to(rollout_logp.dtype)
        elif self.level == "geometric":
            factor = sequence_mask_tis(old_logp, rollout_logp, mask, cu_seqlens, **bounds, cap=self.token_cap)
        else:
            factor = correction_weights(old_logp, rollout_logp, mask, cu_seqlens, level=self.level, mode=self.mode, **bounds)
        if self.second_moment is not None:
            kept = second_moment_mask(old_logp, rollout_logp, mask, threshold=self.second_moment)
            factor = torch.where(kept == 0, 0.0, factor)
        if self.normalize:
            over = Reduction(over="sequence" if self.level == "sequence" else "token")
            factor = self_normalised(factor, token_weights(mask, cu_seqlens, over), mask)
        return factor

    def keep(self, outputs: Outputs, scored: Scored) -> Float[Tensor, " T"] | None:
        """What advantages are multiplied by under the current policy: OPSM's 0 or 1; None where it is not asked for. Whole rows."""
        if self.left_behind is None:
            return None
        return off_policy_sequence_mask(
            outputs.logp, scored.rollout_logp, scored.advantages, scored.action_mask, scored.cu_seqlens, threshold=self.left_behind
        )
