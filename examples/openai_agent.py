"""An agent as it is written for any server that speaks OpenAI's protocol: it knows nothing of training.

    uv run launch grpo --rollout.agent-command "python examples/openai_agent.py" \
        --actor.model-name-or-path DIR --data.prompt-dataset examples/sums.jsonl --data.input-key question --data.label-key answer

It is started for every episode. The client finds the policy by OPENAI_BASE_URL and OPENAI_API_KEY; the row comes on standard input.
"""

import json
import sys

from openai import OpenAI

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two whole numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]},
    },
}


def add(arguments: str) -> str:
    """What the tool says; the model may have given it anything."""
    given = json.loads(arguments)
    return str(given["a"] + given["b"]) if set(given) == {"a", "b"} else "give a and b"


def main() -> None:
    row = json.load(sys.stdin)
    client = OpenAI()
    messages = [{"role": "user", "content": row["prompt"]}]
    calls = 0
    for _ in range(4):
        message = client.chat.completions.create(model="policy", messages=messages, tools=[ADD]).choices[0].message
        messages.append(message)
        for call in message.tool_calls or []:
            messages.append({"role": "tool", "tool_call_id": call.id, "content": add(call.function.arguments)})
            calls += 1
        if not message.tool_calls:
            break
    # The last line is the reward, a little of it for having calculated; the rest of the object is logged.
    reward = float(message.content == row["label"]) + 0.1 * (calls > 0)
    print(json.dumps({"reward": reward, "tool_calls": calls}))


main()
