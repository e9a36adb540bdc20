"""What passes between the controller, the engines and the rewards: Prompt -> Request (one per sample) -> Completion.

Plain frozen data: they cross process borders, so no tensors and no handles.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from hone.algos.batch import Attachment, SamplerContract

PauseMode = Literal["keep", "wait", "abort"]
"""What becomes of requests in flight while an engine is paused: they are held and go on, are waited for, or end at once."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt drawn for one step.

    `prompt_id` is unique per draw ("<dataset fingerprint>:<epoch>:<index>"), `text` is the rendered prompt that was
    tokenised, `label` is handed to the reward function as it stood in the data, and so are `columns`, by name. `tokens` have
    every placeholder of the `images`: as many as the image has features, where its Attachment says. `given` is the prompt before
    it was rendered, text or chat messages, for an agent that renders it itself; None: `text` is all there is.
    """

    prompt_id: str
    tokens: tuple[int, ...]
    text: str
    label: object
    columns: Mapping[str, object] = field(default_factory=dict)
    images: tuple[Attachment, ...] = ()
    given: object = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sample to draw: prompt ids (and what images stand in them), the longest response [tokens], and how to draw it.

    A `greedy` one takes the likeliest token each time: a yardstick, which is judged and never trained on.
    """

    request_id: str
    tokens: tuple[int, ...]
    max_new_tokens: int
    contract: SamplerContract
    greedy: bool = False
    images: tuple[Attachment, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled response, as the engine drew it.

    `tokens` are the sampled ids (end of sequence included when it was sampled); `logp` their log-probabilities [nats]
    under the contract's temperature; `version` the policy version that sampled each; all three have the same length.
    `finish_reason` is "stop" or "length"; `cached_tokens` counts the prompt tokens served from the prefix cache.
    """

    request_id: str
    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    version: tuple[int, ...]
    finish_reason: str
    cached_tokens: int


@runtime_checkable
class Engine(Protocol):
    """What samples."""

    name: str

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Draw all samples of one prompt, in the order asked; raises EngineError."""
        ...

    async def prompt_logp(self, tokens: Sequence[int], images: Sequence[Attachment] = ()) -> list[float]:
        """Log-probabilities [nats] of `tokens[1:]` at temperature 1, recomputed under the weights served now (the canary)."""
        ...
