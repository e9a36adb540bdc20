"""OpenRLHF's agent files: an `AgentInstance` with `reset` and `step` that pass dictionaries.

A file written for it runs here after one changed import:

    from hone.rollout.agents.openrlhf import AgentInstanceBase, MultiTurnAgentExecutor

Its dictionaries: `reset({"observation", "label"}) -> {"observation"}`; `step({"observation_text", "action_text", "label",
"sampling_params"}) -> {"rewards", "environment_feedback", "done"}`, and optionally "scores", "extra_logs" and "truncated".
"""

import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from hone.rollout.agents.blocking import called
from hone.rollout.env import Action, Scalar, Turn
from hone.rollout.errors import EnvironmentFailure

REQUIRED = ("rewards", "environment_feedback", "done")


class AgentInstanceBase(ABC):
    """One episode; subclasses define `step`, and may define `reset`."""

    async def reset(self, states: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """The states to begin with: {"observation": the text that the policy reads first}."""
        return states

    @abstractmethod
    async def step(self, states: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """The answer to {"observation_text", "action_text", "label", "sampling_params"}."""


class MultiTurnAgentExecutor:
    """Names the class of the episodes; an agent file defines `class AgentExecutor(MultiTurnAgentExecutor)`."""

    def __init__(self, agent_instance_cls: type[Any]) -> None:
        self.agent_instance_cls = agent_instance_cls


class OpenRLHFEnv:
    """An `Env` over one `AgentInstance`. The text it is told is what stands in the row, special tokens included."""

    def __init__(self, instance: Any) -> None:
        self._instance = instance
        self._label: object = None
        self._text = ""

    async def reset(self, prompt: str, label: object, *, seed: int) -> str:
        """The observation of the instance's `reset`; it is not told the seed, its protocol has none."""
        self._label = label
        states = await called(self._instance.reset, {"observation": prompt, "label": label})
        if not isinstance(states, Mapping) or not isinstance(states.get("observation"), str):
            raise EnvironmentFailure(
                f'AgentInstance.reset returned {states!r:.200}; it must return a dict whose "observation" is the text to begin with'
            )
        self._text = states["observation"]
        return self._text

    async def step(self, action: Action) -> Turn:
        """The instance's answer, read from its dictionary."""
        given = {"observation_text": self._text, "action_text": action.raw, "label": self._label, "sampling_params": None}
        answer = await called(self._instance.step, given)
        turn = _turn(answer)
        self._text += action.raw + turn.feedback
        return turn

    async def close(self) -> None:
        """Nothing: the protocol has no such call."""


def _turn(answer: object) -> Turn:
    if not isinstance(answer, Mapping):
        raise EnvironmentFailure(f"AgentInstance.step returned {answer!r:.200} ({type(answer).__name__}); it must return a dict")
    if missing := [key for key in REQUIRED if key not in answer]:
        raise EnvironmentFailure(
            f"AgentInstance.step returned no {', '.join(missing)} (it returned {', '.join(map(str, answer)) or 'nothing'})"
        )
    if answer.get("sampling_params") is not None:
        raise EnvironmentFailure(
            "AgentInstance.step returned sampling_params; how tokens are sampled is the run's to say (rollout.temperature), since the "
            "learner recomputes log-probabilities under it: leave them out"
        )
    return Turn(
        terminated=bool(answer["done"]) and not bool(answer.get("truncated", False)),
        truncated=bool(answer.get("truncated", False)),
        feedback=answer["environment_feedback"],
        reward=_number(answer["rewards"]),
        score=_number(answer.get("scores")),
        images=answer.get("environment_images") or (),
        extra_logs={str(name): _number(value) for name, value in (answer.get("extra_logs") or {}).items()},
    )


def _number(value: Any) -> Any:
    """Tensors and arrays of one element as their number, numbers as floats; anything else as it is, for `checked_turn` to judge."""
    plain = value.item() if isinstance(value, Scalar) else value
    return float(plain) if isinstance(plain, numbers.Real) else plain
