"""What a `make_env` returned, as an `Env`: each protocol is known by its methods and what their signatures take.

An object that fits two protocols is nobody's, and told so: wrap it in the class that is meant.
"""

import inspect
from collections.abc import Callable
from typing import Any

from hone.rollout.agents.gymnasium import GymnasiumEnv
from hone.rollout.agents.reasoning_gym import ReasoningGymEnv
from hone.rollout.agents.textarena import TextArenaEnv
from hone.rollout.env import Env
from hone.rollout.errors import EnvironmentFailure

FITTING = (
    "hone.rollout.env.Env (coroutines reset, step and close), a Gymnasium environment, a game of TextArena, a task of reasoning-gym, or an "
    "OpenEnv in hone.rollout.agents.openenv.OpenEnv"
)


def adapted(made: Any, *, where: str) -> Env:
    """The object as an Env. Raises EnvironmentFailure for one that fits no protocol, or several."""
    fits = {name: adapt for name, (is_one, adapt) in PROTOCOLS.items() if is_one(made)}
    if len(fits) == 1:
        return next(iter(fits.values()))(made)
    if isinstance(made, type):
        raise EnvironmentFailure(f"{where} returned the class {made.__name__} itself, not an object of it; call it")
    kind = type(made).__name__
    if fits:
        raise EnvironmentFailure(
            f"{where} returned {kind}, which could be {' or '.join(fits)}; wrap it in the class of hone.rollout.agents that is meant"
        )
    if _is_openenv(made):
        raise EnvironmentFailure(
            f"{where} returned {kind}, an OpenEnv, whose actions are objects: say how they are made of text, "
            "OpenEnv(IT, parse=FUNCTION OF THE TEXT), of hone.rollout.agents.openenv"
        )
    missing = [name for name in ("reset", "step", "close") if not callable(getattr(made, name, None))]
    what = f"which lacks {', '.join(missing)}" if missing else "whose reset takes arguments of no protocol that is known"
    raise EnvironmentFailure(f"{where} returned {kind}, {what}; return {FITTING}")


def _is_ours(made: Any) -> bool:
    if not all(inspect.iscoroutinefunction(getattr(made, name, None)) for name in ("reset", "step", "close")):
        return False
    try:
        inspect.signature(made.reset).bind("prompt", "label", seed=0)
    except TypeError:
        return False
    return True


def _is_gymnasium(made: Any) -> bool:
    return _has(made, "reset", "step", "close") and {"seed", "options"} <= _takes(made.reset)


def _is_textarena(made: Any) -> bool:
    return _has(made, "reset", "step", "close", "get_observation") and {"num_players", "seed"} <= _takes(made.reset)


def _is_reasoning_gym(made: Any) -> bool:
    return _has(made, "score_answer", "__getitem__", "__len__")


def _is_openenv(made: Any) -> bool:
    return _has(made, "reset", "step", "close") and ("episode_id" in _takes(made.reset) or _has(made, "_step_payload"))


PROTOCOLS: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Env]]] = {
    "an Env of hone": (_is_ours, lambda made: made),
    "a Gymnasium environment": (_is_gymnasium, GymnasiumEnv),
    "a game of TextArena": (_is_textarena, TextArenaEnv),
    "a task of reasoning-gym": (_is_reasoning_gym, ReasoningGymEnv),
}
"""Protocol -> (whether an object has it, how it becomes an Env)."""


def _has(made: Any, *names: str) -> bool:
    return not isinstance(made, type) and all(callable(getattr(made, name, None)) for name in names)


def _takes(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)
