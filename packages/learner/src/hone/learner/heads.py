"""Heads on top of a transformer's hidden states: token log-probabilities (language model head) and values (critic)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hone.learner.logprobs import Slopes, token_logprobs


class TokenHead(nn.Module):
    """The language model's own output embedding, shared, read as log-probabilities in chunks.

    A module of its own because sharding gathers a parameter when a module that holds it is called: one call, and so one
    gather, per micro-batch, however many chunks each rank has.
    """

    def __init__(self, output_embedding: nn.Linear, *, softcap: float | None, chunk_logits: int) -> None:
        super().__init__()
        self.weight = output_embedding.weight
        self.bias = output_embedding.bias
        self.softcap = softcap
        self.chunk_tokens = max(1, chunk_logits // output_embedding.out_features)

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
    ) -> tuple[Float[Tensor, " T"], Float[Tensor, " T"] | None]:
        """As `token_logprobs`."""
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
        )


class ValueHead(nn.Linear):
    """One value per state, from its hidden state; bias-free, as transformers' sequence classifiers have it.

    Starts at zero, so a fresh critic says 0 everywhere: the first advantages are the returns themselves, without the noise a
    random head would add, and the head's own gradient does not vanish.
    """

    def __init__(self, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, 1, bias=False, dtype=dtype)
        nn.init.zeros_(self.weight)
