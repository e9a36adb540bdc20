"""Heads on top of a transformer's hidden states: token log-probabilities (language model), values (critic), scores (reward model) and
label logits (process reward model).

S states here, T packed tokens, N rows, H hidden size, C labels. Each head starts where `head_files` finds none stored.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hone.learner.kernels.tiles import Projection
from hone.learner.kernels.vocabulary import Vocabulary
from hone.learner.logprobs import Slopes, predicting_states, scored_positions, state_values, states_at, token_logprobs
from hone.learner.over_logits import OverLogits


class TokenHead(nn.Module):
    """The language model's own output embedding, shared, read as log-probabilities in chunks.

    A module of its own because sharding gathers a parameter when a module that holds it is called: one call, and so one
    gather, per micro-batch, however many chunks each rank has.
    """

    def __init__(self, output_embedding: nn.Linear, *, softcap: float | None, chunk_bytes: int) -> None:
        super().__init__()
        self.weight = output_embedding.weight
        self.bias = output_embedding.bias
        self.softcap, self.chunk_bytes = softcap, chunk_bytes
        self.vocabulary: Vocabulary | None = None
        self.words = output_embedding.out_features

    def cut(self, weight: nn.Parameter, bias: nn.Parameter | None, vocabulary: Vocabulary) -> None:
        """From here on only this rank's rows of the output embedding; chunks are the same on all ranks."""
        self.weight, self.bias, self.vocabulary = weight, bias, vocabulary
        self.words = max(1, vocabulary.cut.shape[0] // vocabulary.cut.wire.size)

    @property
    def chunk_tokens(self) -> int:
        """Tokens whose logits exist at once."""
        return max(1, self.chunk_bytes // (self.words * self.weight.element_size()))

    def forward(
        self,
        hidden: Float[Tensor, "S H"],
        tokens: Int[Tensor, " T"],
        cu_seqlens: Int[Tensor, " N_plus_1"],
        action_mask: Bool[Tensor, " T"],
        temperature: float,
        with_entropy: bool,
        places: Int[Tensor, " T"] | None = None,
        slopes: Slopes | None = None,
        over: OverLogits | None = None,
    ) -> tuple[Tensor, ...] | tuple[Float[Tensor, " T"], Float[Tensor, " T"] | None]:
        """As `token_logprobs`; or, given one, what a reader of whole logits makes of them, which knows no temperature."""
        if over is not None:
            read = states_at if over.at_token else predicting_states
            wanted = action_mask.nonzero().squeeze(1) if over.at_token else scored_positions(cu_seqlens, action_mask)
            positions, states = read(wanted, places)
            projection = Projection(weight=self.weight, bias=self.bias, temperature=1.0, softcap=self.softcap, vocabulary=self.vocabulary)
            own = hidden.index_select(0, states)
            if self.vocabulary is None:
                return over.run(projection, own, positions, self.chunk_tokens)
            # Its logits are of all words, not of a rank's.
            chunk_tokens = max(1, self.chunk_tokens // self.vocabulary.cut.wire.size)
            return over.run(projection, self.vocabulary.entered(own), positions, chunk_tokens)
        return token_logprobs(
            hidden,
            self.weight,
            tokens,
            cu_seqlens,
            action_mask,
            temperature=temperature,
            chunk_tokens=self.chunk_tokens,
            with_entropy=with_entropy,
            head_bias=self.bias,
            softcap=self.softcap,
            places=places,
            slopes=slopes,
            vocabulary=self.vocabulary,
        )


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Mean and standard deviation of a reward model's scores, kept in its configuration as `mean` and `std`, as OpenRLHF has them."""

    mean: float
    std: float

    def normalised(self, scores: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """Scores in standard deviations from the mean."""
        return (scores - self.mean) / self.std


def statistics_of(scores: Float[Tensor, " N"]) -> Statistics:
    """Mean and unbiased standard deviation (at least 1e-8), in fp64. Raises ValueError for fewer than two scores."""
    if scores.numel() < 2 or not bool(scores.isfinite().all()):
        raise ValueError(f"{scores.numel()} scores, {int((~scores.isfinite()).sum())} of them not finite, have no mean and deviation")
    return Statistics(mean=float(scores.double().mean()), std=max(float(scores.double().std()), 1e-8))


class ValueHead(nn.Linear):
    """One value per state, from its hidden state; bias-free, as transformers' sequence classifiers have it.

    Starts at zero, so a fresh critic says 0 everywhere: the first advantages are the returns themselves, without the noise a
    random head would add, and the head's own gradient does not vanish.
    """

    architecture: ClassVar[str] = "ForSequenceClassification"

    def __init__(self, hidden_size: int, labels: int, *, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, labels, bias=False, dtype=dtype)
        nn.init.zeros_(self.weight)
        self.statistics: Statistics | None = None

    def read(
        self, hidden: Float[Tensor, "S H"], cu_seqlens: Int[Tensor, " N_plus_1"], mask: Bool[Tensor, " T"], places: Int[Tensor, " T"] | None
    ) -> Float[Tensor, " T"]:
        """Value of the state before each token in the mask; see `state_values`. Normalised where the head has statistics."""
        return state_values(hidden, self._values, cu_seqlens, mask, places)

    def _values(self, states: Float[Tensor, "M H"]) -> Float[Tensor, "M 1"]:
        values = self(states).float()
        return values if self.statistics is None else self.statistics.normalised(values)


class RewardHead(nn.Linear):
    """One score per row [reward], from the state after its last token: what `AutoModelForSequenceClassification` computes.

    Starts at zero, as `ValueHead`: a fresh reward model prefers nothing, and no answer's first gradient is noise.
    """

    architecture: ClassVar[str] = "ForSequenceClassification"

    def __init__(self, hidden_size: int, labels: int, *, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, labels, bias=False, dtype=dtype)
        nn.init.zeros_(self.weight)
        self.statistics: Statistics | None = None

    def read(
        self, hidden: Float[Tensor, "S H"], cu_seqlens: Int[Tensor, " N_plus_1"], mask: Bool[Tensor, " T"], places: Int[Tensor, " T"] | None
    ) -> Float[Tensor, " N"]:
        """Score of each row in fp32, as it is learnt (not normalised); zero where another rank of a ring has the last token."""
        last = cu_seqlens[1:].long() - 1
        here = last if places is None else places[last]
        scores = self(hidden.index_select(0, here.clamp(min=0))).squeeze(-1).float()
        return torch.where(here >= 0, scores, 0.0)


class ProcessHead(nn.Linear):
    """C label logits at each token, from the state after it: what `AutoModelForTokenClassification` computes. Starts at zero."""

    architecture: ClassVar[str] = "ForTokenClassification"

    def __init__(self, hidden_size: int, labels: int, *, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, labels, dtype=dtype)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.statistics: Statistics | None = None

    def read(
        self, hidden: Float[Tensor, "S H"], cu_seqlens: Int[Tensor, " N_plus_1"], mask: Bool[Tensor, " T"], places: Int[Tensor, " T"] | None
    ) -> Float[Tensor, "T C"]:
        """Logits in fp32 at the tokens in the mask; zero elsewhere, and where another rank of a ring has the token."""
        positions, states = states_at(mask.nonzero().squeeze(1), places)
        empty = torch.zeros(mask.shape[0], self.out_features, dtype=torch.float32, device=hidden.device)
        return empty.index_copy(0, positions, self(hidden.index_select(0, states)).float())


Head = ValueHead | RewardHead | ProcessHead
HEADS: dict[str, type[ValueHead] | type[RewardHead] | type[ProcessHead]] = {
    "critic": ValueHead,
    "reward": RewardHead,
    "process": ProcessHead,
}
"""By the kind of role."""
