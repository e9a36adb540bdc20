"""Multi-turn rollout: Prompt -> n episodes, each a conversation of the policy with an Env -> Group of Samples, ready to train on.

The policy's ids are kept as they were sampled, and the environment's text is tokenised once, by itself: every request begins
with the ids of the one before it. A turn's reward stands on the last id of its action. A failure stops the run, unless `tolerance`
says otherwise.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

import torch

from hone.algos.batch import Attachment, SamplerContract, Trajectory
from hone.rollout.calls import all_of, draw
from hone.rollout.config import RolloutConfig
from hone.rollout.env import Action, Env, Observation, checked_turn
from hone.rollout.errors import EnvironmentFailure
from hone.rollout.executor import Group, Sample
from hone.rollout.pictures import Placeholders
from hone.rollout.sampling import contract_of, seed_of
from hone.rollout.tolerance import Tolerance, kept
from hone.rollout.types import Completion, Engine, Prompt, Request


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that turns ids into text and back."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """The text of the ids."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of the text."""
        ...


_UNFED = -1


@dataclass(kw_only=True)
class _Episode:
    """What an episode has come to: one entry per token in each list."""

    text: str
    tokens: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    version: list[int] = field(default_factory=list)
    images: list[Attachment] = field(default_factory=list)
    judged: bool = False
    truncated: bool = False
    turns: int = 0
    score: float | None = None
    extra_logs: dict[str, float] = field(default_factory=dict)
    cached_tokens: int = 0

    def read(self, ids: Sequence[int], images: Sequence[Attachment] = ()) -> None:
        """Add what the policy reads and did not write."""
        self.tokens += ids
        self.images += images
        self.mask += [False] * len(ids)
        self.logp += [0.0] * len(ids)
        self.rewards += [0.0] * len(ids)
        self.version += [_UNFED] * len(ids)

    def wrote(self, completion: Completion) -> None:
        """Add an action, as it was sampled."""
        # The version that sampled the first of these is the one that was fed what stands before them.
        self.version = [completion.version[0] if version == _UNFED else version for version in self.version]
        self.tokens += completion.tokens
        self.mask += [True] * len(completion.tokens)
        self.logp += completion.logp
        self.rewards += [0.0] * len(completion.tokens)
        self.version += completion.version
        self.cached_tokens += completion.cached_tokens
        self.turns += 1


@dataclass(frozen=True, kw_only=True)
class MultiTurn:
    """Episodes of at most `max_turns` turns and `max_len` tokens in all; `environment` makes an Env for each.

    `where` is the environment's name for messages, `step_timeout_s` its deadline for one answer [s]. `episodes_in_flight`
    bounds how many go on at a time. The other fields are those of `executor.SingleTurn`. An episode that runs out of turns or
    tokens is truncated. `placeholders` are for models that see; without them an image is an environment's fault.
    """

    engine: Engine
    environment: Callable[[], Env]
    where: str
    tokenizer: Tokenizer
    config: RolloutConfig
    run_seed: int
    max_len: int
    max_turns: int
    step_timeout_s: float
    engine_version: str
    tokenizer_hash: str
    template_hash: str
    episodes_in_flight: int = 1024
    greedy: bool = False
    placeholders: Placeholders | None = None
    tolerance: Tolerance = field(default_factory=Tolerance)

    async def collect(self, prompts: Sequence[Prompt], *, step: int, on_group: Callable[[Group], None] | None = None) -> list[Group]:
        """Play every prompt's episodes; `on_group` sees each group as it is finished, the result is in the order of `prompts`."""
        gate = asyncio.Semaphore(self.episodes_in_flight)
        played = (self.tolerance.group(prompt, partial(self._group, prompt, step, gate, on_group)) for prompt in prompts)
        return kept(await all_of(played))

    async def _group(self, prompt: Prompt, step: int, gate: asyncio.Semaphore, on_group: Callable[[Group], None] | None) -> Group:
        async def play(sample: int) -> Sample:
            async with gate:
                return await self.tolerance.episode(prompt, partial(self._episode, prompt, step, sample))

        n = self.config.n_samples_per_prompt
        samples = await all_of(play(sample) for sample in range(n + self.greedy))
        group = Group(prompt=prompt, samples=tuple(samples[:n]), greedy=samples[n] if self.greedy else None)
        if on_group is not None:
            on_group(group)
        return group

    async def _episode(self, prompt: Prompt, step: int, sample: int) -> Sample:
        env = self.environment()
        try:
            seed = seed_of(self.run_seed, step, f"{prompt.prompt_id}:environment", sample)
            begun = await self._asked("reset", env.reset(prompt.text, prompt.label, seed=seed), prompt)
            if not isinstance(begun, str | Observation):
                raise self._failure(f"returned {begun!r:.200} ({type(begun).__name__}) from reset, not the text to begin with", prompt)
            first = Observation(text=begun, images=[one.data for one in prompt.images]) if isinstance(begun, str) else begun
            episode = _Episode(text=first.text)
            if begun == prompt.text:
                # The prompt's own ids wherever it is unchanged: they were made with its special tokens.
                episode.read(prompt.tokens, prompt.images)
            else:
                episode.read(*self._seen(first.text, first.images, prompt, start=0))
                if len(episode.tokens) >= self.max_len:
                    what = f"began with {len(episode.tokens)} tokens, which leaves no room for a turn in {self.max_len}"
                    raise self._failure(f"{what} (raise data.max-len if it may)", prompt)
            while await self._turn(episode, env, self._request(episode, prompt, step, sample), prompt):
                pass
        finally:
            await self._asked("close", env.close(), prompt)
        if not episode.judged:
            raise self._failure("ended an episode without any reward (None is not zero)", prompt)
        return self._sample(episode, prompt, sample, self._contract(prompt, step, sample, turn=0))

    def _request(self, episode: _Episode, prompt: Prompt, step: int, sample: int) -> Request:
        room = min(self.config.max_new_tokens, self.max_len - len(episode.tokens))
        if room < 1:
            raise ValueError(
                f"prompt {prompt.prompt_id!r} has {len(episode.tokens)} tokens, which leaves no room for a turn in {self.max_len}; "
                "raise data.max-len or drop the prompt"
            )
        return Request(
            request_id=f"{step}:{prompt.prompt_id}:{sample}#{episode.turns}",
            tokens=tuple(episode.tokens),
            max_new_tokens=room,
            contract=self._contract(prompt, step, sample, turn=episode.turns),
            greedy=sample == self.config.n_samples_per_prompt,
            images=tuple(episode.images),
        )

    def _contract(self, prompt: Prompt, step: int, sample: int, *, turn: int) -> SamplerContract:
        return contract_of(
            self.config,
            # A stream of its own for every turn: from one seed the engine would draw the same numbers again.
            seed=seed_of(self.run_seed, step, f"{prompt.prompt_id}#{turn}" if turn else prompt.prompt_id, sample),
            engine=self.engine_version,
            tokenizer=self.tokenizer_hash,
            template=self.template_hash,
        )

    async def _turn(self, episode: _Episode, env: Env, request: Request, prompt: Prompt) -> bool:
        """One action and its answer, added to `episode`; whether it goes on."""
        (completion,) = await draw(self.engine, [request], of=[prompt.prompt_id], timeout_s=self.config.timeout_s)
        episode.wrote(completion)
        action = Action(
            text=self._text(completion.tokens, special=False),
            raw=self._text(completion.tokens, special=True),
            cut=completion.finish_reason == "length",
        )
        episode.text += action.raw
        turn = checked_turn(await self._asked("step", env.step(action), prompt), where=self.where, prompt_id=prompt.prompt_id)
        if turn.reward is not None:
            episode.rewards[-1] = float(turn.reward)
            episode.judged = True
        episode.score = episode.score if turn.score is None else float(turn.score)
        episode.extra_logs.update({name: float(value) for name, value in turn.extra_logs.items()})
        feedback, images = self._seen(turn.feedback, turn.images, prompt, start=len(episode.tokens))
        spent = episode.turns >= self.max_turns or len(episode.tokens) + len(feedback) >= self.max_len
        if turn.terminated or turn.truncated or spent:
            episode.truncated = not turn.terminated
            return False
        episode.read(feedback, images)
        episode.text += turn.feedback
        return True

    async def _asked(self, what: str, answer: Awaitable[object], prompt: Prompt) -> object:
        """The environment's answer within its deadline; whatever it raises is an EnvironmentFailure."""
        deadline = asyncio.timeout(self.step_timeout_s)
        try:
            async with deadline:
                return await answer
        except TimeoutError as error:
            if deadline.expired():
                raise self._failure(
                    f"did not answer {what} within {self.step_timeout_s:g} s (raise reward.timeout-s if it may)", prompt
                ) from error
            raise self._failure(f"raised {type(error).__name__}: {error} in {what}", prompt) from error
        except EnvironmentFailure:
            raise
        except Exception as error:
            raise self._failure(f"raised {type(error).__name__}: {error} in {what}", prompt) from error

    def _failure(self, what: str, prompt: Prompt) -> EnvironmentFailure:
        return EnvironmentFailure(f"environment {self.where} {what}, on prompt {prompt.prompt_id!r}; mend the environment")

    def _seen(self, text: str, images: Sequence[object], prompt: Prompt, *, start: int) -> tuple[list[int], list[Attachment]]:
        """The ids of what the policy reads next, at `start` of the row, and the images among them."""
        ids = self._ids(text)
        if self.placeholders is None:
            if images:
                raise self._failure(f"showed {len(images)} images to a model that reads text only", prompt)
            return ids, []
        try:
            return self.placeholders.expanded(ids, images, start=start)
        except (ValueError, OSError) as error:
            raise self._failure(f"gave {error}", prompt) from error

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _text(self, tokens: Sequence[int], *, special: bool) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False)

    def _sample(self, episode: _Episode, prompt: Prompt, sample: int, contract: SamplerContract) -> Sample:
        total = sum(episode.rewards)
        score = total if episode.score is None else episode.score
        trajectory = Trajectory(
            prompt_id=prompt.prompt_id,
            sample=sample,
            tokens=torch.tensor(episode.tokens, dtype=torch.long),
            action_mask=torch.tensor(episode.mask, dtype=torch.bool),
            rollout_logp=torch.tensor(episode.logp, dtype=torch.float32),
            rewards=torch.tensor(episode.rewards, dtype=torch.float32),
            version=torch.tensor(episode.version, dtype=torch.long),
            truncated=episode.truncated,
            score=score,
            contract=contract,
            attached=tuple(episode.images),
        )
        return Sample(
            trajectory=trajectory,
            prompt_text=prompt.text,
            response_text=episode.text.removeprefix(prompt.text),
            label=prompt.label,
            reward=total,
            score=score,
            extra_logs={**episode.extra_logs, "turns": float(episode.turns)},
            cached_tokens=episode.cached_tokens,
        )
