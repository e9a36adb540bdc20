"""An environment of several turns: a wrong answer is asked again, twice at most, and counts for less.

    uv run launch grpo --rollout.agent-func-path examples/agent.py

Written for OpenRLHF, such a file needs one changed import here.
"""

from hone.rollout.agents.openrlhf import AgentInstanceBase, MultiTurnAgentExecutor


class AgentInstance(AgentInstanceBase):
    """One episode: up to three tries at one sum."""

    def __init__(self):
        self.tries = 0

    async def reset(self, states, **kwargs):
        """The prompt as it is; it is kept, to be asked again."""
        self.question = states["observation"]
        return states

    async def step(self, states, **kwargs):
        """1 for a right answer at once, 1/2 and 1/3 for a later one, else 0."""
        self.tries += 1
        right = states["action_text"].startswith(str(states["label"]))
        done = right or self.tries == 3
        feedback = "" if done else self.question
        return {"rewards": 1.0 / self.tries if right else 0.0, "environment_feedback": feedback, "done": done}


class AgentExecutor(MultiTurnAgentExecutor):
    """What OpenRLHF looks for in such a file."""

    def __init__(self):
        super().__init__(AgentInstance)
