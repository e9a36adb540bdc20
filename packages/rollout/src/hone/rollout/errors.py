"""What can go wrong while acting; str() of each is the whole message: what, where, how to mend."""


class RewardError(Exception):
    """A reward function raised, hung, or returned something that is not a reward."""


class EngineError(Exception):
    """An engine died, hung, or refused a request; names the engine and the requests."""


class EngineLost(EngineError):
    """An engine's process died or hangs: whatever was asked of it can be asked of another. `engine` is its name."""

    def __init__(self, engine: str, what: str) -> None:
        super().__init__(engine, what)
        self.engine = engine

    def __str__(self) -> str:
        return "engine {} {}".format(*self.args)


class StaleWeights(EngineError):
    """After an update an engine does not serve the weights it was sent; names the engine and what is stale."""


class EnvironmentFailure(Exception):
    """An environment raised, hung, or answered with something that is no turn; names it, its file and the prompt."""
