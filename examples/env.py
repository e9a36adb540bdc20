"""An environment of one's own: the protocol `hone.rollout.env.Env`, all of it coroutines.

uv run launch grpo --rollout.agent-func-path examples/env.py
"""

from hone.rollout.env import Turn


class Again:
    """The sum is asked until it is right, three times at most; every try costs a little."""

    async def reset(self, prompt, label, *, seed):
        """The prompt, as it is."""
        self.question, self.label, self.tries = prompt, str(label), 0
        return prompt

    async def step(self, action):
        """1 for the right answer, less 0.1 for every try."""
        self.tries += 1
        right = action.text.strip() == self.label
        return Turn(terminated=right, truncated=self.tries == 3, reward=float(right) - 0.1, feedback="" if right else self.question)

    async def close(self):
        """Nothing is held."""


def make_env():
    return Again()
