"""An agent that owns its loop, as a function: whatever it says to the endpoint is trained on, what it returns is the reward.

    uv run launch grpo --rollout.agent-func-path examples/function_agent.py

It completes plain text, which every model does; `client.chat.completions` asks for a model with a chat template.
"""

from openai import AsyncOpenAI


async def agent(base_url, api_key, model, row):
    """Up to two tries at one sum, the first answer left to be read."""
    text, reward = row["prompt"], 0.0
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        for tries in (1, 2):
            answer = (await client.completions.create(model=model, prompt=text, max_tokens=4)).choices[0].text
            reward = float(answer == str(row["label"])) / tries
            if reward:
                break
            text += answer + " " + row["prompt"]
    return {"reward": reward, "tries": tries}
