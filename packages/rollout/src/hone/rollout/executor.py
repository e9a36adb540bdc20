"""Single-turn rollout: Prompt -> n Requests -> engine -> Completions -> judge -> Group of Samples, ready to train on.

Prompts run concurrently and finish in any order; what `collect` returns is ordered by prompt, then by sample. Any failure
(an engine's, a reward's, a deadline) stops the run and cancels the rest; a reward's may cost its group alone (`tolerance`).
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

import torch

from hone.algos.batch import SamplerContract, Trajectory
from hone.rollout.calls import all_of, draw
from hone.rollout.config import RolloutConfig
from hone.rollout.rewards.result import Judgement, RewardItem
from hone.rollout.sampling import contract_of, requests
from hone.rollout.tolerance import Tolerance, kept
from hone.rollout.types import Completion, Engine, Prompt, Request


@runtime_checkable
class Judge(Protocol):
    """What judges responses: `rewards.pool.RewardPool`, or a stand-in."""

    async def judge(self, items: Sequence[RewardItem]) -> list[Judgement]:
        """A judgement for each item, in order; raises RewardError."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that turns ids into text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """The text of the ids."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One judged response: the trajectory that is trained on, and what the rollout log shows of it.

    `response_text` keeps special tokens; `cached_tokens` counts the prompt tokens served from the engine's prefix cache.
    Of an episode of several segments `trajectory` is the last, the one that ended it; `earlier` are those before it.
    """

    trajectory: Trajectory
    prompt_text: str
    response_text: str
    label: object
    reward: float
    score: float
    extra_logs: dict[str, float]
    cached_tokens: int
    earlier: tuple[Trajectory, ...] = ()

    @property
    def segments(self) -> tuple[Trajectory, ...]:
        """Every row of the sample, in order."""
        return (*self.earlier, self.trajectory)


@dataclass(frozen=True, kw_only=True)
class Group:
    """The samples of one prompt, in the order of their seeds; `greedy`, where it was asked for, is no part of what is trained on."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    greedy: Sample | None = None


@runtime_checkable
class Executor(Protocol):
    """What turns prompts into judged samples: `SingleTurn`, or `multi_turn.MultiTurn`."""

    async def collect(self, prompts: Sequence[Prompt], *, step: int, on_group: Callable[[Group], None] | None = None) -> list[Group]:
        """The groups in the order of `prompts`; `on_group` sees each as it is finished."""
        ...


@dataclass(frozen=True, kw_only=True)
class SingleTurn:
    """One response per sample: the prompt goes to the engine, the response to the judge.

    `engine_version`, `tokenizer_hash` and `template_hash` go into the sampler contract. `max_len` bounds prompt and
    response together [tokens]. `prompts_per_call` prompts share one call of the engine (one that batches by itself
    wants 1); `samples_in_flight` bounds what the engine holds at a time. With `greedy` every group has a greedy response, too.
    """

    engine: Engine
    judge: Judge
    tokenizer: Tokenizer
    config: RolloutConfig
    run_seed: int
    max_len: int
    engine_version: str
    tokenizer_hash: str
    template_hash: str
    prompts_per_call: int = 1
    samples_in_flight: int = 1024
    greedy: bool = False
    tolerance: Tolerance = field(default_factory=Tolerance)

    async def collect(self, prompts: Sequence[Prompt], *, step: int, on_group: Callable[[Group], None] | None = None) -> list[Group]:
        """Sample and judge every prompt; `on_group` sees each group as it is finished, the result is in the order of `prompts`."""
        calls = [prompts[start : start + self.prompts_per_call] for start in range(0, len(prompts), self.prompts_per_call)]
        samples_per_call = self.prompts_per_call * (self.config.n_samples_per_prompt + self.greedy)
        gate = asyncio.Semaphore(max(1, self.samples_in_flight // samples_per_call))
        groups = await all_of(self._call(call, step, gate, on_group) for call in calls)
        return [group for call in groups for group in call]

    async def _call(
        self, prompts: Sequence[Prompt], step: int, gate: asyncio.Semaphore, on_group: Callable[[Group], None] | None
    ) -> list[Group]:
        asked = [self._requests(prompt, step) for prompt in prompts]
        flat = [request for of_prompt in asked for request in of_prompt]
        async with gate:
            drawn = await draw(self.engine, flat, of=[prompt.prompt_id for prompt in prompts], timeout_s=self.config.timeout_s)
        n = self.config.n_samples_per_prompt + self.greedy
        # The engine is free for others while these are judged.
        judging = (
            self.tolerance.group(prompt, partial(self._group, prompt, of_prompt, drawn[index * n : (index + 1) * n], on_group))
            for index, (prompt, of_prompt) in enumerate(zip(prompts, asked, strict=True))
        )
        return kept(await all_of(judging))

    def _requests(self, prompt: Prompt, step: int) -> list[Request]:
        budget = min(self.config.max_new_tokens, self.max_len - len(prompt.tokens))
        if budget < 1:
            raise ValueError(
                f"prompt {prompt.prompt_id!r} has {len(prompt.tokens)} tokens, which leaves no room for a response in {self.max_len}; "
                "raise data.max-len or drop the prompt"
            )
        contract = contract_of(
            self.config,
            seed=self.run_seed,
            engine=self.engine_version,
            tokenizer=self.tokenizer_hash,
            template=self.template_hash,
        )
        n = self.config.n_samples_per_prompt
        return requests(prompt, n=n, step=step, run_seed=self.run_seed, max_new_tokens=budget, contract=contract, greedy=self.greedy)

    async def _group(
        self, prompt: Prompt, asked: Sequence[Request], drawn: Sequence[Completion], on_group: Callable[[Group], None] | None
    ) -> Group:
        head = self._text(prompt.tokens)
        responses = [self._response_text(prompt, head, completion) for completion in drawn]
        judgements = await self.judge.judge(
            [
                RewardItem(
                    prompt_id=prompt.prompt_id,
                    query=prompt.text + response,
                    prompt=prompt.text,
                    label=prompt.label,
                    response=self._plain_text(completion),
                    columns=prompt.columns,
                )
                for response, completion in zip(responses, drawn, strict=True)
            ]
        )
        samples = tuple(
            Sample(
                trajectory=_trajectory(prompt, index, asked[index].contract, completion, judgement),
                prompt_text=prompt.text,
                response_text=response,
                label=prompt.label,
                reward=judgement.reward,
                score=judgement.score,
                extra_logs=judgement.extra_logs,
                cached_tokens=completion.cached_tokens,
            )
            for index, (completion, response, judgement) in enumerate(zip(drawn, responses, judgements, strict=True))
        )
        n = self.config.n_samples_per_prompt
        group = Group(prompt=prompt, samples=samples[:n], greedy=samples[n] if self.greedy else None)
        if on_group is not None:
            on_group(group)
        return group

    def _text(self, tokens: Iterable[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _plain_text(self, completion: Completion) -> str:
        return self.tokenizer.decode(list(completion.tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _response_text(self, prompt: Prompt, head: str, completion: Completion) -> str:
        # Decoded behind its prompt: alone, some tokenizers drop a response's leading space.
        whole = self._text((*prompt.tokens, *completion.tokens))
        return whole[len(head) :] if whole.startswith(head) else self._text(completion.tokens)


def _trajectory(prompt: Prompt, sample: int, contract: SamplerContract, completion: Completion, judgement: Judgement) -> Trajectory:
    """Prompt ids unmasked, sampled ids as actions, the reward on the last of them."""
    fed, sampled = len(prompt.tokens), len(completion.tokens)
    action_mask = torch.zeros(fed + sampled, dtype=torch.bool)
    action_mask[fed:] = True
    rewards = torch.zeros(fed + sampled)
    rewards[-1] = judgement.reward
    return Trajectory(
        prompt_id=prompt.prompt_id,
        sample=sample,
        tokens=torch.tensor(prompt.tokens + completion.tokens, dtype=torch.long),
        action_mask=action_mask,
        rollout_logp=torch.tensor((0.0,) * fed + completion.logp, dtype=torch.float32),
        rewards=rewards,
        # The version that sampled the first token is the one that was fed the prompt.
        version=torch.tensor((completion.version[0],) * fed + completion.version, dtype=torch.long),
        truncated=completion.finish_reason == "length",
        score=judgement.score,
        contract=contract,
        attached=prompt.images,
    )
