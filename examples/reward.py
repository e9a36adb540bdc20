"""A reward file: the last integer of the response against the label, with a little for answering at all.

`launch ppo --reward.remote-url examples/reward.py ...` calls it with lists of length one, outside the engine's event loop,
under a deadline. Whatever it raises, or returns that is no number, stops the run and names the prompt; it never counts as 0.
"""

import re


def reward_func(queries, prompts, labels):
    """`queries` are prompt and response, `prompts` the prompts alone, `labels` the values of --data.label-key."""
    rewards, answered = [], []
    for query, prompt, label in zip(queries, prompts, labels, strict=True):
        integers = re.findall(r"-?\d+", query.removeprefix(prompt))
        answered.append(float(bool(integers)))
        rewards.append(1.0 if integers and int(integers[-1]) == int(label) else 0.1 * answered[-1])
    scores = [float(reward == 1.0) for reward in rewards]
    return {"rewards": rewards, "scores": scores, "extra_logs": {"answered": answered}}
