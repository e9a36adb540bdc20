"""TextArena's games (its protocol; the package itself is not needed here): the policy has one seat, `opponent` has the others.

`reset(num_players, seed)`, `get_observation() -> (seat, observation)`, `step(text) -> (done, info)`, `close() -> (rewards, game_info)`
with one entry per seat. A game that ends gives its rewards then, and none before.
"""

from collections.abc import Callable, Mapping
from typing import Any

from hone.rollout.agents.blocking import called
from hone.rollout.env import Action, Turn
from hone.rollout.errors import EnvironmentFailure

_GAME = -1


class TextArenaEnv:
    """An `Env` over one game of `players`, in which the policy has the seat `seat`.

    `opponent` answers an observation with an action, as TextArena's own agents do; it plays every other seat. What the policy
    reads is the prompt, then each observation through `render`, which writes the chat template's markup around it. Of games made
    with the suffix `-raw` only what is new is read; the others tell their whole history again, of which what was read is left out.
    """

    def __init__(
        self,
        environment: Any,
        *,
        players: int = 1,
        seat: int = 0,
        opponent: Callable[[str], Any] | None = None,
        render: Callable[[str], str] = lambda observation: observation,
    ) -> None:
        if not 0 <= seat < players or (players > 1 and opponent is None):
            raise EnvironmentFailure(
                f"a game of {players} needs a seat from 0 to {players - 1} for the policy (it has {seat}) and an opponent for the others: "
                "TextArenaEnv(environment, players=2, seat=0, opponent=FUNCTION)"
            )
        self._environment, self._render, self._opponent = environment, render, opponent
        self._players, self._seat = players, seat
        self._told: dict[int, str] = {}

    async def reset(self, prompt: str, label: object, *, seed: int) -> str:
        """The prompt, then what the policy sees when its turn comes first."""
        await called(self._environment.reset, num_players=self._players, seed=seed % 2**32)
        seen = await self._until_the_policys_turn()
        if seen is None:
            raise EnvironmentFailure("the game was over before the policy had a turn")
        return prompt + self._render(seen)

    async def step(self, action: Action) -> Turn:
        """The policy's move and those of the others; the game's reward for its seat where that ended it."""
        done, _ = await called(self._environment.step, action.text.strip())
        seen = None if done else await self._until_the_policys_turn()
        if seen is not None:
            return Turn(terminated=False, feedback=self._render(seen))
        rewards, information = await called(self._environment.close)
        if not isinstance(rewards, Mapping) or self._seat not in rewards:
            raise EnvironmentFailure(f"the game gave the rewards {rewards!r:.200} at its end, without one for seat {self._seat}")
        told = information.get(self._seat, {}) if isinstance(information, Mapping) else {}
        figures = {name: float(value) for name, value in told.items() if isinstance(value, int | float)}
        return Turn(terminated=True, reward=float(rewards[self._seat]), extra_logs=figures)

    async def close(self) -> None:
        """Nothing: a game holds nothing, and its `close` is what ends it."""

    async def _until_the_policys_turn(self) -> str | None:
        """What the policy sees next, after the others have moved; None: the game is over."""
        while True:
            seat, observation = await called(self._environment.get_observation)
            seen = self._new(seat, observation)
            if seat == self._seat:
                return seen
            assert self._opponent is not None
            done, _ = await called(self._environment.step, await called(self._opponent, seen))
            if done:
                return None

    def _new(self, seat: int, observation: object) -> str:
        """What of an observation the seat has not been told; its own moves stand in its row already."""
        if isinstance(observation, str):
            before, self._told[seat] = self._told.get(seat, ""), observation
            return observation.removeprefix(before)
        if not isinstance(observation, list):
            raise EnvironmentFailure(f"the game showed {observation!r:.200} ({type(observation).__name__}), neither text nor messages")
        lines = [(sender, text) for sender, text, *_ in observation if sender != seat]
        return "".join(f"\n[{'GAME' if sender == _GAME else f'Player {sender}'}] {text}" for sender, text in lines)
