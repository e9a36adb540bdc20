"""What sampler contracts do to logits, in the order vLLM does it, for the engine in this process.

Shapes: R requests of a batch, H rows of it that are still decoded, V vocabulary. A row is named by its request (`held`).
"""

from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hone.rollout.types import Request


@runtime_checkable
class Decoder(Protocol):
    """The part of a Hugging Face tokenizer that turns ids into text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str | list[str]:
        """The text of the ids."""
        ...


class Shaping:
    """The contracts of a batch as columns; made only where a contract asks for more than a temperature (`shaping_of`)."""

    def __init__(self, requests: Sequence[Request], *, eos_ids: Collection[int], vocabulary: int, device: torch.device) -> None:
        def column(name: str, plain: float) -> Float[Tensor, "R 1"]:
            values = [plain if request.greedy else float(getattr(request.contract, name)) for request in requests]
            return torch.tensor(values, device=device)[:, None]

        contracts = [request.contract for request in requests]
        self._top_p, self._top_k, self._min_p = column("top_p", 1.0), column("top_k", 0.0).long(), column("min_p", 0.0)
        penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        self._repetition, self._presence, self._frequency = (
            torch.tensor([getattr(contract, name) for contract in contracts], device=device)[:, None] for name in penalties
        )
        self._min_tokens = torch.tensor([contract.min_tokens for contract in contracts], device=device)
        self.ends = torch.zeros((len(requests), vocabulary), dtype=torch.bool, device=device)
        self._prompt = torch.zeros_like(self.ends)
        for row, request in enumerate(requests):
            self.ends[row, [*eos_ids, *request.contract.stop_token_ids]] = True
            self._prompt[row, list(request.tokens)] = True
        self._written = torch.zeros(self.ends.shape, dtype=torch.float32, device=device)

    def before_temperature(self, logits: Float[Tensor, "H V"], held: Int[Tensor, " H"], step: int) -> Float[Tensor, "H V"]:
        """Without what may not end a response yet, less the penalties of what stands there; `step` tokens have been drawn."""
        logits = logits.masked_fill(self.ends[held] & (self._min_tokens[held] > step)[:, None], -torch.inf)
        written = self._written[held]
        factor = torch.where(self._prompt[held] | (written > 0), self._repetition[held], 1.0)
        logits = torch.where(logits > 0, logits / factor, logits * factor)
        return logits - self._frequency[held] * written - self._presence[held] * (written > 0)

    def after_temperature(self, logits: Float[Tensor, "H V"], held: Int[Tensor, " H"]) -> Float[Tensor, "H V"]:
        """Min-p of the tempered distribution, top-k of what is left, top-p of that: the rest at -inf."""
        probability = logits.softmax(dim=-1)
        logits = logits.masked_fill(probability < self._min_p[held] * probability.amax(dim=-1, keepdim=True), -torch.inf)
        ascending, order = logits.sort(dim=-1)
        width = logits.shape[1]
        asked = self._top_k[held]
        smallest = ascending.gather(1, width - torch.where(asked > 0, asked, width).clamp(max=width))
        ascending = ascending.masked_fill(ascending < smallest, -torch.inf)
        below = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - self._top_p[held]
        below[:, -1] = False
        return logits.scatter(1, order, ascending.masked_fill(below, -torch.inf))

    def drawn(self, held: Int[Tensor, " H"], sampled: Int[Tensor, " H"]) -> None:
        """Remember what was drawn, for the penalties."""
        self._written[held, sampled] += 1

    def ended(self, held: Int[Tensor, " H"], sampled: Int[Tensor, " H"]) -> Bool[Tensor, " H"]:
        """Rows whose last token ends them."""
        return self.ends[held, sampled]


def shaping_of(requests: Sequence[Request], *, eos_ids: Collection[int], vocabulary: int, device: torch.device) -> Shaping | None:
    """None where every contract is a temperature and no more."""
    plain = not any(request.contract.reshaped or request.contract.stop_token_ids for request in requests)
    return None if plain else Shaping(requests, eos_ids=eos_ids, vocabulary=vocabulary, device=device)


def ends_at_text(tokens: Sequence[int], request: Request, decoder: Decoder | None) -> bool:
    """Whether the last of these tokens, the first `min_tokens` apart, completes one of the texts that end the response."""
    stops, free = request.contract.stop, request.contract.min_tokens
    if decoder is None or not stops or len(tokens) <= free:
        return False
    # A character takes at most four tokens: what was completed by the last one stands in so many of them.
    for window in (tokens[-(4 * max(len(stop) for stop in stops) + 8) :], tokens):
        text = decoder.decode(list(window), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not any(stop in text for stop in stops):
            return False
    return True
