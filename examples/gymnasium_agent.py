"""A Gymnasium environment whose observations and actions are text; anything with its `reset`, `step` and `close` will do.

uv run launch grpo --rollout.agent-func-path examples/gymnasium_agent.py
"""

from hone.rollout.agents.gymnasium import GymnasiumEnv


class Digits:
    """Write the digit that is asked for: 1 for the right one, and one more try otherwise."""

    def reset(self, *, seed=None, options=None):
        """The digit that is wanted."""
        self.wanted, self.tries = str(seed % 10), 0
        return f" {self.wanted} ", {}

    def step(self, action):
        """Whether it was written; there are two tries."""
        self.tries += 1
        right = action == self.wanted
        return f" {self.wanted} ", float(right), right, self.tries == 2, {"tries": self.tries}

    def close(self):
        """Nothing is held."""


def make_env():
    return GymnasiumEnv(Digits())
