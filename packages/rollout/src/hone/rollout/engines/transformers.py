"""An engine in this process: batched decoding of a Hugging Face causal language model, on any platform torch runs on.

For a debugger, for tests and for machines without vLLM. Shapes: R requests of a batch, U different prompts among them,
W the longest prompt, L the longest response, V vocabulary. Prompts are prefilled once each, left-padded to W.
"""

import asyncio
import threading
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from hone.algos.batch import Attachment
from hone.rollout.engines.shaping import Decoder, ends_at_text, shaping_of
from hone.rollout.errors import EngineError, StaleWeights
from hone.rollout.pictures import processed
from hone.rollout.types import Completion, Request


class TransformersEngine:
    """Samples from `model`, which is its own (not the learner's) and is called as transformers' causal models are.

    `generate` takes requests of several prompts at once, and is much faster so; `max_rows` of them are decoded together.
    A sample depends on its prompt, contract and weights only: its company in the batch changes logits by rounding, no more.
    `version` is the policy version that is served; whoever loads weights sets it. A vision-language model (of a Qwen-VL family) comes
    with its `image_processor`. Responses end at a text only where there is a `tokenizer`; none is held to a grammar.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_ids: Collection[int],
        name: str = "transformers",
        version: int = 0,
        max_rows: int = 256,
        image_processor: Any = None,
        tokenizer: Decoder | None = None,
    ) -> None:
        self.name = name
        self.version = version
        self._model = model.eval()
        self._eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.long)
        self._max_rows = max_rows
        self._image_processor = image_processor
        self._tokenizer = tokenizer
        self._half_loaded = False
        # Decoding runs in threads; weights must not change under it.
        self._lock = threading.Lock()

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Draw all requests, in the order asked. Cancelling stops the decoding at its next token."""
        for request in requests:
            self._check(request)
        stop = threading.Event()
        try:
            return await asyncio.to_thread(self._generate, requests, stop)
        except (RuntimeError, IndexError) as error:  # torch's, for want of memory or beyond the model's positions
            raise EngineError(
                f"engine {self.name} failed on {len(requests)} requests of up to {max(len(request.tokens) for request in requests)} prompt "
                f"tokens: {type(error).__name__}: {error}"
            ) from error
        finally:
            stop.set()

    async def prompt_logp(self, tokens: Sequence[int], images: Sequence[Attachment] = ()) -> list[float]:
        """Log-probabilities [nats] of `tokens[1:]` at temperature 1 under the weights held now."""
        return await asyncio.to_thread(self._prompt_logp, tokens, images)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Copy every parameter from `weights`, by name, and serve them as `version`; StaleWeights names what does not fit.

        Of tied parameters one name is enough. On an error the version stays as it was, some weights may be new, and nothing is
        answered until all have been loaded. Names are the model's own, or its checkpoint's where transformers fuses weights as it
        reads them (experts of a mixture).
        """
        if self._fuses():
            weights = self._fused(weights, version=version)
        held = self._model.state_dict()
        loaded: set[int] = set()
        with self._lock, torch.no_grad():
            self._half_loaded = True
            for name, value in weights:
                target = held.get(name)
                if target is None:
                    raise StaleWeights(f"engine {self.name} has no parameter {name!r}; engine and learner must hold the same model")
                if target.shape != value.shape:
                    raise StaleWeights(
                        f"engine {self.name} holds {name!r} as {tuple(target.shape)} but was sent {tuple(value.shape)}; "
                        "engine and learner must hold the same model"
                    )
                target.copy_(value)
                loaded.add(target.data_ptr())
            missing = [name for name, parameter in self._model.named_parameters() if parameter.data_ptr() not in loaded]
            if missing:
                raise StaleWeights(
                    f"engine {self.name} was not sent {len(missing)} of its parameters for version {version} ({', '.join(missing[:3])}"
                    f"{', ...' if len(missing) > 3 else ''}), which stay at version {self.version}; send all of them"
                )
            self.version, self._half_loaded = version, False

    def held(self) -> dict[str, Tensor]:
        """Every weight by the name it has in the model's checkpoint; tied ones under each of their names."""
        state = self._model.state_dict()
        return revert_weight_conversion(self._model, state) if self._fuses() else state

    def _fuses(self) -> bool:
        """Whether transformers reads several weights of the checkpoint into one of the model."""
        return any(isinstance(one, WeightConverter) for one in getattr(self._model, "_weight_conversions", None) or ())

    def _fused(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> Iterable[tuple[str, Tensor]]:
        """The weights as the model holds them, read as transformers reads a checkpoint; StaleWeights where they are not all there."""
        sent = {name: value.clone() for name, value in weights}
        wanted = self.held()
        if odd := sorted(sent.keys() - wanted.keys()):
            raise StaleWeights(f"engine {self.name} has no parameter {odd[0]!r}; engine and learner must hold the same model")
        tied = getattr(self._model, "all_tied_weights_keys", None) or {}
        if missing := [name for name in wanted if name not in sent and name not in tied]:
            raise StaleWeights(
                f"engine {self.name} was not sent {len(missing)} of its parameters for version {version} ({', '.join(missing[:3])}), "
                f"which stay at version {self.version}; send all of them"
            )
        read = type(self._model).from_pretrained(None, config=self._model.config, state_dict=sent, dtype=self._model.dtype)
        return [(name, value.to(self._model.device)) for name, value in read.state_dict().items()]

    def _check(self, request: Request) -> None:
        contract = request.contract
        if contract.structured_outputs:
            raise EngineError(
                f"engine {self.name} holds no response to a grammar, and request {request.request_id} is to be of "
                f"{contract.structured_outputs:.80}; use vLLM"
            )
        if contract.stop and self._tokenizer is None:
            raise EngineError(
                f"engine {self.name} has no tokenizer, and request {request.request_id} ends at the text {contract.stop[0]!r:.80}"
            )
        if not request.tokens:
            raise EngineError(f"engine {self.name} got an empty prompt in request {request.request_id}; a prompt has at least one token")
        entries = self._model.config.get_text_config().vocab_size
        if not 0 <= min(request.tokens) <= max(request.tokens) < entries:
            raise EngineError(
                f"engine {self.name} got the id {max(request.tokens)} in request {request.request_id}, but the model's vocabulary has "
                f"{entries} entries; use the model's own tokenizer"
            )
        if request.images:
            self._check_images(request)
        if request.max_new_tokens < 1:
            raise EngineError(
                f"engine {self.name} got max_new_tokens {request.max_new_tokens} in request {request.request_id}; ask for 1 or more"
            )

    def _check_images(self, request: Request) -> None:
        if self._image_processor is None:
            raise EngineError(
                f"engine {self.name} serves a language model, and request {request.request_id} has images; serve one that sees"
            )
        written, shown = request.tokens.count(self._model.config.image_token_id), sum(one.count for one in request.images)
        if written != shown:
            raise EngineError(
                f"engine {self.name} got {written} image tokens in request {request.request_id} for images of {shown}: the policy or an "
                "environment wrote the image token itself, which transformers takes for an image; the vLLM engine does not"
            )

    def _generate(self, requests: Sequence[Request], stop: threading.Event) -> list[Completion]:
        completions: list[Completion] = []
        for start in range(0, len(requests), self._max_rows):
            with self._lock:
                self._refuse_half_loaded("sample")
                completions += self._decode(requests[start : start + self._max_rows], stop)
        return completions

    def _refuse_half_loaded(self, what: str) -> None:
        if self._half_loaded:
            raise StaleWeights(
                f"engine {self.name} refuses to {what}: an update of its weights was begun and not finished; send all weights again"
            )

    @torch.no_grad()
    def _decode(self, requests: Sequence[Request], stop: threading.Event) -> list[Completion]:
        version = self.version
        device = next(self._model.parameters()).device
        eos_ids = self._eos_ids.to(device)
        limits = torch.tensor([request.max_new_tokens for request in requests], device=device)
        temperature = torch.tensor([request.contract.temperature for request in requests], device=device)
        greedy = torch.tensor([request.greedy for request in requests], device=device)
        uniforms = _uniforms(requests).to(device)
        longest = uniforms.shape[1]
        tokens = torch.zeros((len(requests), longest), dtype=torch.long, device=device)
        logp = torch.zeros((len(requests), longest), device=device)
        lengths = torch.zeros(len(requests), dtype=torch.long, device=device)
        stopped = torch.zeros(len(requests), dtype=torch.bool, device=device)

        prompts = list(dict.fromkeys((request.tokens, request.images) for request in requests))
        index_of = {prompt: index for index, prompt in enumerate(prompts)}
        prompt_of = torch.tensor([index_of[request.tokens, request.images] for request in requests], device=device)
        ids, mask = (tensor.to(device) for tensor in _left_padded([tokens for tokens, _ in prompts]))
        position_ids, shown = self._seen(ids, mask, [images for _, images in prompts])
        output = self._model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=True, logits_to_keep=1, **shown)
        cache, logits = output.past_key_values, output.logits[prompt_of, -1]
        cache.batch_select_indices(prompt_of)
        mask, position = mask[prompt_of], position_ids[..., -1].reshape(-1, len(prompts)).amax(0)[prompt_of]
        held = torch.arange(len(requests), device=device)  # request of each row that is still in the cache
        live = torch.ones(len(requests), dtype=torch.bool, device=device)  # rows that are not finished

        shaping = shaping_of(requests, eos_ids=self._eos_ids.tolist(), vocabulary=logits.shape[-1], device=device)

        for step in range(longest):
            if stop.is_set():
                raise EngineError(f"engine {self.name} was stopped after {step} of {longest} tokens")
            if shaping is None:
                tempered = logits.float() / temperature[held, None]
            else:
                tempered = shaping.before_temperature(logits.float(), held, step) / temperature[held, None]
                tempered = shaping.after_temperature(tempered, held)
            sampled, sampled_logp = _draw(tempered, uniforms[held, step], greedy[held])
            at_eos = torch.isin(sampled, eos_ids)
            if shaping is not None:
                shaping.drawn(held, sampled)
                at_eos |= shaping.ended(held, sampled)
            tokens[held, step], logp[held, step] = sampled, sampled_logp
            for row, index in enumerate(held.tolist()) if self._tokenizer is not None else ():
                if requests[index].contract.stop and live[row]:
                    at_eos[row] |= ends_at_text(tokens[index, : step + 1].tolist(), requests[index], self._tokenizer)
            ended = live & (at_eos | (limits[held] == step + 1))
            lengths[held[ended]], stopped[held[ended]] = step + 1, at_eos[ended]
            live = live & ~ended
            alive = int(live.sum())
            if alive == 0:
                break
            position = position + 1
            # Finished rows are dropped once they are half of the cache: dropping copies it.
            if 2 * alive <= held.numel():
                rows = live.nonzero().squeeze(1)
                cache.batch_select_indices(rows)
                held, live, mask, position, sampled = held[rows], live[rows], mask[rows], position[rows], sampled[rows]
            mask = torch.cat([mask, mask.new_ones((held.numel(), 1))], dim=1)
            output = self._model(
                input_ids=sampled[:, None], attention_mask=mask, position_ids=position[:, None], past_key_values=cache, use_cache=True
            )
            cache, logits = output.past_key_values, output.logits[:, -1]

        first_of = {(request.tokens, request.images): index for index, request in reversed(list(enumerate(requests)))}
        return [
            Completion(
                request_id=request.request_id,
                tokens=tuple(tokens[row, :length].tolist()),
                logp=tuple(logp[row, :length].tolist()),
                version=(version,) * length,
                finish_reason="stop" if stopped[row] else "length",
                cached_tokens=0 if first_of[request.tokens, request.images] == row else len(request.tokens),
            )
            for row, (request, length) in enumerate(zip(requests, lengths.tolist(), strict=True))
        ]

    def _seen(
        self, ids: Int[Tensor, "U W"], mask: Int[Tensor, "U W"], images: Sequence[Sequence[Attachment]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Positions of left-padded prompts, [U, W] or with images [3, U, W], and what the model is shown beside them."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if not any(images):
            return positions, {}
        shown = {
            name: tensor.to(ids.device) for name, tensor in processed(self._image_processor, [one for row in images for one in row]).items()
        }
        kinds = torch.zeros_like(ids)
        for row, own in enumerate(images):
            padding = int(mask.shape[1] - mask[row].sum())
            for one in own:
                kinds[row, padding + one.start : padding + one.start + one.count] = 1
        model: Any = self._model.base_model
        grids = shown["image_grid_thw"]
        positions, _ = model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grids, attention_mask=mask)
        return positions, shown

    @torch.no_grad()
    def _prompt_logp(self, tokens: Sequence[int], images: Sequence[Attachment]) -> list[float]:
        ids = torch.tensor([list(tokens)], device=next(self._model.parameters()).device)
        positions, shown = self._seen(ids, torch.ones_like(ids), [images])
        with self._lock:
            self._refuse_half_loaded("answer")
            logits = self._model(input_ids=ids, position_ids=positions, use_cache=False, **shown).logits[0, :-1]
        return torch.log_softmax(logits.float(), dim=-1).gather(1, ids[0, 1:, None]).squeeze(1).tolist()


def _uniforms(requests: Sequence[Request]) -> Float[Tensor, "R L"]:
    """One number in [0, 1) for every token that may be drawn, fp64, from a generator of each request's own."""
    uniforms = torch.zeros((len(requests), max(request.max_new_tokens for request in requests)), dtype=torch.float64)
    for row, request in enumerate(requests):
        generator = torch.Generator().manual_seed(request.contract.seed)
        uniforms[row, : request.max_new_tokens] = torch.rand(request.max_new_tokens, dtype=torch.float64, generator=generator)
    return uniforms


def _left_padded(prompts: Sequence[tuple[int, ...]]) -> tuple[Int[Tensor, "U W"], Int[Tensor, "U W"]]:
    """Prompt ids that end in the same column, and the mask that is 1 where there is a token."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _draw(
    tempered: Float[Tensor, "R V"], uniform: Float[Tensor, " R"], greedy: Bool[Tensor, " R"]
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"]]:
    """One id for each row by inversion of its distribution, and the id's log-probability [nats] in fp32.

    id = min{v: cdf(v) > u cdf(V)}, cdf the running sum of softmax(tempered) in fp64, so that rounding of the
    logits by other rows of the batch moves an id only where u falls into a gap as small as that rounding. A greedy row takes the
    likeliest id instead.
    """
    logp = torch.log_softmax(tempered, dim=-1)
    cdf = logp.double().exp().cumsum(dim=-1)
    ids = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True).clamp(max=cdf.shape[1] - 1)
    ids = torch.where(greedy[:, None], logp.argmax(dim=-1, keepdim=True), ids)
    return ids.squeeze(1), logp.gather(1, ids).squeeze(1)
