"""Gymnasium environments whose observations and actions are text (its protocol; the package itself is not needed here).

`reset(seed=) -> (observation, info)`, `step(action) -> (observation, reward, terminated, truncated, info)`, `close()`.
"""

import math
from collections.abc import Callable
from typing import Any

from hone.rollout.agents.blocking import called
from hone.rollout.env import Action, Turn
from hone.rollout.errors import EnvironmentFailure


class GymnasiumEnv:
    """An `Env` over one Gymnasium environment.

    The first text is the prompt with the first observation through `render`, and each later observation is rendered the same:
    `render` writes the chat template's markup around it. The action is what the policy wrote, without special tokens and outer
    spaces. Figures in `info` (numbers by name) are logged; one that is not finite says nothing of the reward: it is left out, and
    `info_not_finite` counts those of the episode. A reward that is not finite is the environment's failure.
    """

    def __init__(self, environment: Any, *, render: Callable[[str], str] = lambda observation: observation) -> None:
        self._environment, self._render, self._left_out = environment, render, 0

    async def reset(self, prompt: str, label: object, *, seed: int) -> str:
        """The prompt, then the first observation."""
        observation, _ = await called(self._environment.reset, seed=seed % 2**32)
        return prompt + self._shown(observation)

    async def step(self, action: Action) -> Turn:
        """The environment's answer. With both flags set, as single-turn environments do, it has terminated."""
        observation, reward, terminated, truncated, info = await called(self._environment.step, action.text.strip())
        figures = {name: float(value) for name, value in info.items() if isinstance(value, int | float)}
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        self._left_out += len(figures) - len(finite)
        return Turn(
            terminated=bool(terminated),
            truncated=bool(truncated) and not terminated,
            feedback="" if terminated or truncated else self._shown(observation),
            reward=float(reward),
            extra_logs={**finite, **({"info_not_finite": float(self._left_out)} if self._left_out else {})},
        )

    async def close(self) -> None:
        """The environment's own close."""
        await called(self._environment.close)

    def _shown(self, observation: object) -> str:
        if not isinstance(observation, str):
            raise EnvironmentFailure(
                f"the environment observed {observation!r:.200} ({type(observation).__name__}); only text can be shown to a policy: "
                "wrap it so that it observes text"
            )
        return self._render(observation)
