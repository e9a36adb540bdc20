"""Rollout of agents that own their loop: Prompt -> n episodes, each an agent at the endpoint -> Group of Samples, ready to train on.

An episode's calls become segments (`tree.py`): one, unless its history was rewritten or branched. The reward stands on the last
action of every segment; rewards of turns stand each on the last action of its reply. A failure stops the run, unless
`tolerance` says otherwise; a request the endpoint refuses is the agent's to handle.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from hone.algos.batch import Trajectory
from hone.rollout.agents.calling import CallingAgent, Outcome
from hone.rollout.calls import all_of
from hone.rollout.config import RolloutConfig
from hone.rollout.endpoint.rendering import ChatTokenizer, Renderer
from hone.rollout.endpoint.server import Server, serving
from hone.rollout.endpoint.session import Budget, Session
from hone.rollout.endpoint.templates import Served
from hone.rollout.endpoint.tree import Ledger, Segment
from hone.rollout.errors import EnvironmentFailure
from hone.rollout.executor import Group, Judge, Sample
from hone.rollout.pictures import Placeholders, collapsed
from hone.rollout.rewards.result import RewardItem
from hone.rollout.sampling import contract_of, seed_of
from hone.rollout.tolerance import Tolerance, kept
from hone.rollout.types import Engine, Prompt

_COUNTED = ("calls_root", "calls_append", "calls_rerender", "calls_resample", "respelled", "tool_parse_errors", "request_errors")
"""What the tree counts of an episode, by its name in the log."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """An agent that owns its loop, the chat template it is served with, and who judges it, if it does not do so itself."""

    agent: CallingAgent
    served: Served | None
    judge: Judge | None = None


@dataclass(kw_only=True)
class _Post:
    """The server, and the gate that bounds how many agents go on: one of each for all calls of `collect` that go on at a time."""

    users: int = 0
    opening: "asyncio.Task[tuple[AsyncExitStack, Server, asyncio.Semaphore]] | None" = None

    @asynccontextmanager
    async def held(self, renderer: Renderer, *, agents: int) -> AsyncIterator[tuple[Server, asyncio.Semaphore]]:
        """Opened by the first who comes, closed by the last who goes."""
        self.users += 1
        if self.users == 1 or self.opening is None:
            self.opening = asyncio.ensure_future(_opened(renderer, agents))
        opening = self.opening
        try:
            _, server, gate = await asyncio.shield(opening)
            yield server, gate
        finally:
            self.users -= 1
            if not self.users and opening.done() and opening.exception() is None:
                await opening.result()[0].aclose()


async def _opened(renderer: Renderer, agents: int) -> tuple[AsyncExitStack, Server, asyncio.Semaphore]:
    stack = AsyncExitStack()
    server = await stack.enter_async_context(serving(renderer))
    return stack, server, asyncio.Semaphore(agents)


@dataclass(frozen=True, kw_only=True)
class Calling:
    """Episodes of an agent at the endpoint. `judge` gives the rewards where the agent does not; `served` is the chat template
    (None: only plain text is completed). An engine that `stops_at_text` knows the tokenizer, and draws no further than where a client
    wants its reply to end; of any other's the rest is cut off. `placeholders` are for models that see; of others an image is
    refused. The other fields are those of `executor.SingleTurn`.
    """

    engine: Engine
    agent: CallingAgent
    judge: Judge | None
    tokenizer: ChatTokenizer
    served: Served | None
    stop_ids: tuple[int, ...]
    config: RolloutConfig
    run_seed: int
    max_len: int
    engine_version: str
    tokenizer_hash: str
    template_hash: str
    greedy: bool = False
    stops_at_text: bool = False
    placeholders: Placeholders | None = None
    tolerance: Tolerance = field(default_factory=Tolerance)
    _post: "_Post" = field(default_factory=lambda: _Post())

    async def collect(self, prompts: Sequence[Prompt], *, step: int, on_group: Callable[[Group], None] | None = None) -> list[Group]:
        """Play every prompt's episodes; `on_group` sees each group as it is finished, the result is in the order of `prompts`."""
        renderer = Renderer(self.tokenizer, closers=()) if self.served is None else self.served.renderer
        async with self._post.held(renderer, agents=self.config.agents_in_flight) as (server, gate):
            group = partial(self._group, server, renderer, step=step, gate=gate, on_group=on_group)
            return kept(await all_of(self.tolerance.group(prompt, partial(group, prompt)) for prompt in prompts))

    async def _group(
        self,
        server: Server,
        renderer: Renderer,
        prompt: Prompt,
        step: int,
        gate: asyncio.Semaphore,
        on_group: Callable[[Group], None] | None,
    ) -> Group:
        async def play(sample: int) -> Sample:
            async with gate:
                session = self._session(renderer, prompt, step, sample)
                outcome = await self._played(server, session, prompt, step, sample)
            return await self._sample(session, renderer, outcome, prompt, sample)

        def played(sample: int) -> Coroutine[Any, Any, Sample]:
            return self.tolerance.episode(prompt, partial(play, sample))

        n = self.config.n_samples_per_prompt
        samples = await all_of(played(sample) for sample in range(n + self.greedy))
        group = Group(prompt=prompt, samples=tuple(samples[:n]), greedy=samples[n] if self.greedy else None)
        if on_group is not None:
            on_group(group)
        return group

    def _session(self, renderer: Renderer, prompt: Prompt, step: int, sample: int) -> Session:
        config = self.config
        contract = contract_of(
            config,
            seed=self.run_seed,
            engine=self.engine_version,
            tokenizer=self.tokenizer_hash,
            template=self.template_hash,
        )
        return Session(
            engine=self.engine,
            renderer=renderer,
            served=self.served,
            stop_ids=self.stop_ids,
            history=config.agent_history,
            budget=Budget(calls=config.max_turns, new_tokens=config.max_new_tokens, max_len=self.max_len, timeout_s=config.timeout_s),
            prompt_id=prompt.prompt_id,
            step=step,
            sample=sample,
            run_seed=self.run_seed,
            contract=contract,
            greedy=sample == config.n_samples_per_prompt,
            stops_at_text=self.stops_at_text,
            placeholders=self.placeholders,
        )

    async def _played(self, server: Server, session: Session, prompt: Prompt, step: int, sample: int) -> Outcome:
        """The agent's outcome within its deadline; an engine that fails meanwhile is what is raised, not what the agent makes of it."""
        opened = server.open(session)
        row = {
            "prompt": prompt.text if prompt.given is None else prompt.given,
            "label": prompt.label,
            "columns": dict(prompt.columns),
            "prompt_id": prompt.prompt_id,
            "sample": sample,
            "seed": seed_of(self.run_seed, step, f"{prompt.prompt_id}:environment", sample) % 2**32,
        }
        playing = asyncio.ensure_future(self.agent.play(opened.base_url, opened.key, row))
        failing = asyncio.ensure_future(session.failure.wait())
        try:
            limit = self.config.agent_timeout_s
            done, _ = await asyncio.wait([playing, failing], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if session.error is not None:
                raise session.error
            if not done:
                raise self._failure(f"did not finish an episode within {limit:g} s (raise rollout.agent-timeout-s if it may)", prompt)
            try:
                return playing.result()
            except EnvironmentFailure as error:
                raise self._failure(f"{error}{self._hint(session)}", prompt) from error
            except Exception as error:
                raise self._failure(f"raised {type(error).__name__}: {error}{self._hint(session)}", prompt) from error
        finally:
            failing.cancel()
            playing.cancel()
            await server.close(opened)
            with suppress(asyncio.CancelledError, Exception):  # what became of it stands above
                await playing

    def _hint(self, session: Session) -> str:
        """What the endpoint last refused it, if that may be why it failed."""
        return f" (its last request was refused: {session.refused})" if session.refused else ""

    def _failure(self, what: str, prompt: Prompt) -> EnvironmentFailure:
        return EnvironmentFailure(f"agent {self.agent.where} {what}, on prompt {prompt.prompt_id!r}; mend the agent")

    async def _sample(self, session: Session, renderer: Renderer, outcome: Outcome, prompt: Prompt, sample: int) -> Sample:
        segments, ledger = session.tree.segments()
        if not segments:
            raise self._failure("ended an episode without reading one reply of the policy", prompt)
        last = segments[-1]
        first = last.nodes[0].place
        head = collapsed(first.prompt, first.images)
        prompt_text = renderer.decoded(head)
        response_text = renderer.decoded(collapsed(last.tokens, last.images)[len(head) :], behind=head)
        outcome = await self._judged(outcome, prompt, last, response_text)
        assert outcome.reward is not None
        if outcome.turns and (len(segments) > 1 or len(outcome.turns) != len(last.nodes)):
            what = f"{len(segments)} conversations" if len(segments) > 1 else f"{len(last.nodes)} replies"
            raise self._failure(
                f"gave the rewards of {len(outcome.turns)} turns for {what}; give one for each reply of one conversation, or one reward",
                prompt,
            )
        truncated = bool(session.refused) or last.nodes[-1].finish_reason == "length"
        score = outcome.reward if outcome.score is None else outcome.score
        rows = [
            _trajectory(
                segment,
                prompt,
                sample,
                index,
                rewards=_placed(segment, outcome.turns or (outcome.reward,)),
                score=score,
                truncated=truncated and segment is last,
            )
            for index, segment in enumerate(segments)
        ]
        return Sample(
            trajectory=rows[-1],
            earlier=tuple(rows[:-1]),
            prompt_text=prompt_text,
            response_text=response_text,
            label=prompt.label,
            reward=outcome.reward,
            score=score,
            extra_logs={**outcome.extra_logs, **_figures(session, segments, ledger)},
            cached_tokens=sum(node.cached_tokens for node in session.tree.nodes),
        )

    async def _judged(self, outcome: Outcome, prompt: Prompt, last: Segment, response: str) -> Outcome:
        if self.judge is None:
            if outcome.reward is None:
                raise self._failure(
                    "gave no reward (None is not zero): return one, or name a reward function (--reward.remote-url)", prompt
                )
            return outcome
        if outcome.reward is not None:
            raise self._failure("gave a reward, and --reward.remote-url names another judge; drop one of them", prompt)
        item = RewardItem(
            prompt_id=prompt.prompt_id,
            query=prompt.text + response,
            prompt=prompt.text,
            label=prompt.label,
            response=last.nodes[-1].text,
            columns=prompt.columns,
        )
        (judgement,) = await self.judge.judge([item])
        logs = {**outcome.extra_logs, **judgement.extra_logs}
        return Outcome(reward=judgement.reward, score=judgement.score, extra_logs=logs)


def _placed(segment: Segment, rewards: Sequence[float]) -> torch.Tensor:
    """A reward for each token: those of the last replies on the last action of each, one alone on the segment's last action."""
    placed = torch.zeros(len(segment.tokens))
    ends = [*(len(node.place.prompt) for node in segment.nodes[1:]), len(segment.tokens)]
    for end, reward in zip(ends[-len(rewards) :], rewards, strict=True):
        placed[max(place for place in range(end) if segment.mask[place])] = reward
    return placed


def _trajectory(
    segment: Segment, prompt: Prompt, sample: int, index: int, *, rewards: torch.Tensor, score: float, truncated: bool
) -> Trajectory:
    """A segment as a row, with the contract of the first call that is trained in it."""
    own = next(node for node in segment.nodes if segment.mask[len(node.place.prompt)])
    return Trajectory(
        prompt_id=prompt.prompt_id,
        sample=sample,
        tokens=torch.tensor(segment.tokens, dtype=torch.long),
        action_mask=torch.tensor(segment.mask, dtype=torch.bool),
        rollout_logp=torch.tensor(segment.logp, dtype=torch.float32),
        rewards=rewards,
        version=torch.tensor(segment.version, dtype=torch.long),
        truncated=truncated,
        score=score,
        contract=own.contract,
        segment=index,
        attached=segment.images,
    )


def _figures(session: Session, segments: Sequence[Segment], ledger: Ledger) -> dict[str, float]:
    """What the log tells of an episode at the endpoint: calls and how they were placed, segments, ids that were not trained on, oddities
    of the agent.
    """
    counts = session.tree.counts
    return {
        "endpoint/calls": float(len(session.tree.nodes)),
        "endpoint/segments": float(len(segments)),
        "endpoint/ids_not_trained": float(ledger.sampled - ledger.trained),
        **{f"endpoint/{name}": float(counts[name]) for name in _COUNTED},
    }
