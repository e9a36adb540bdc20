"""GEM: one of its environments, played turn by turn against the endpoint, in an environment of GEM's own (`just foreign`).

    uv run launch grpo --rollout.agent-command ".foreign/gem/bin/python examples/foreign/gem_agent.py" \
        --actor.model-name-or-path DIR --data.prompt-dataset examples/sums.jsonl --data.input-key question --data.label-key answer

The row gives only its seed; the rewards of the turns are kept apart. GEM seeds Python's own generators: one process per episode.
"""

import json
import os
import sys

import gem
from openai import OpenAI

GAME = os.environ.get("GEM_GAME", "game:GuessTheNumber-v0-easy")


def shown(observation: str, information: dict) -> str:
    """What the policy is to read, of an observation and what belongs around it."""
    return information.get("prefix", "") + observation + information.get("suffix", "")


def main() -> None:
    row = json.load(sys.stdin)
    client, environment = OpenAI(), gem.make(GAME)
    messages, rewards = [{"role": "user", "content": shown(*environment.reset(seed=row["seed"]))}], []
    ended = False
    while not ended:
        message = client.chat.completions.create(model="policy", messages=messages).choices[0].message
        observation, reward, terminated, truncated, information = environment.step(message.content or "")
        messages += [message, {"role": "user", "content": shown(observation, information)}]
        rewards.append(float(reward))
        ended = terminated or truncated
    # One reward for each reply, in their order.
    print(json.dumps({"rewards": rewards, "turns": len(rewards)}))


main()
