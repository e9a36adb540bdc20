"""The agent of openai_agent.py written for Anthropic's client, with streaming.

It finds the policy by ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY:

    uv run launch grpo --rollout.agent-command "python examples/anthropic_agent.py" \
        --actor.model-name-or-path DIR --data.prompt-dataset examples/sums.jsonl --data.input-key question --data.label-key answer

It is started for every episode; the row comes on standard input.
"""

import json
import sys

from anthropic import Anthropic

ADD = {
    "name": "add",
    "description": "Adds two whole numbers.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]},
}


def add(given: dict) -> str:
    """What the tool says; the model may have given it anything."""
    return str(given["a"] + given["b"]) if set(given) == {"a", "b"} else "give a and b"


def main() -> None:
    row = json.load(sys.stdin)
    client = Anthropic()
    messages = [{"role": "user", "content": row["prompt"]}]
    calls = 0
    for _ in range(4):
        with client.messages.stream(model="policy", max_tokens=64, messages=messages, tools=[ADD]) as stream:
            reply = stream.get_final_message()
        messages.append({"role": "assistant", "content": reply.content})
        uses = [block for block in reply.content if block.type == "tool_use"]
        if not uses:
            break
        calls += len(uses)
        messages.append(
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": add(use.input)} for use in uses]}
        )
    answer = "".join(block.text for block in reply.content if block.type == "text")
    print(json.dumps({"reward": float(answer == row["label"]) + 0.1 * (calls > 0), "tool_calls": calls}))


main()
