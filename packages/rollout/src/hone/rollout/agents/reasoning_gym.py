"""A task of reasoning-gym as an environment of one turn (its protocol; the package itself is not needed here).

`dataset[index] -> {"question", "answer", "metadata"}`, `dataset.score_answer(answer, entry) -> [0, 1]`. A group's samples must be
asked the same, so the row says which entry: its label is the entry itself (as `--data.prompt-dataset reasoning-gym:TASK` gives it)
or the entry's number.
"""

from collections.abc import Callable, Mapping
from typing import Any

from hone.rollout.agents.blocking import called
from hone.rollout.env import Action, Turn
from hone.rollout.errors import EnvironmentFailure
from hone.rollout.rewards.answers import last_tagged


class ReasoningGymEnv:
    """An `Env` over one `dataset`: the question, one answer, and the score of the task's own grader.

    With an entry's number as label the policy reads the prompt and then the question through `render`; with the entry itself the
    prompt has the question already. What stands in the last <answer> tags is the answer, or without them the whole turn.
    """

    def __init__(self, dataset: Any, *, render: Callable[[str], str] = lambda question: question) -> None:
        self._dataset, self._render = dataset, render
        self._entry: Mapping[str, Any] = {}

    async def reset(self, prompt: str, label: object, *, seed: int) -> str:
        """The prompt, and the question where it is not in it."""
        if isinstance(label, Mapping) and {"question", "answer", "metadata"} <= label.keys():
            self._entry = label
            return prompt
        number = int(label) if isinstance(label, int | str) and str(label).isdecimal() else -1
        if not 0 <= number < len(self._dataset):
            raise EnvironmentFailure(
                f"the label {label!r:.80} is no entry of the task and no number from 0 to {len(self._dataset) - 1}; use "
                "--data.prompt-dataset reasoning-gym:TASK, or give each row the number of its entry as label"
            )
        self._entry = await called(self._dataset.__getitem__, number)
        return prompt + self._render(self._entry["question"])

    async def step(self, action: Action) -> Turn:
        """The score. A grader that raises on what the policy wrote, and not on the task's own answer, has read no answer: 0."""
        answer = last_tagged(action.text)
        try:
            score = await called(self._dataset.score_answer, (action.text if answer is None else answer).strip(), dict(self._entry))
        except Exception:
            await called(self._dataset.score_answer, self._entry["answer"], dict(self._entry))
            return Turn(terminated=True, reward=0.0, extra_logs={"unreadable": 1.0})
        return Turn(terminated=True, reward=float(score), extra_logs={"unreadable": 0.0})

    async def close(self) -> None:
        """Nothing is held."""
