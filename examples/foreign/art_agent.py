"""ART: a rollout function and its trajectory group, gathered against the endpoint (`just foreign`).

    uv run launch grpo --rollout.agent-command ".foreign/art/bin/python examples/foreign/art_agent.py" \
        --actor.model-name-or-path DIR --data.prompt-dataset examples/sums.jsonl --data.input-key question --data.label-key answer

The rollout function is as one writes it for ART; what is trained on are the ids our endpoint kept, the reward is the trajectory's.
"""

import asyncio
import json
import os
import sys

import art


async def rollout(model: art.Model, row: dict) -> art.Trajectory:
    client = model.openai_client()
    trajectory = art.Trajectory(messages_and_choices=[{"role": "user", "content": row["prompt"]}])
    for tries in (1, 2):
        completion = await client.chat.completions.create(model=model.get_inference_name(), messages=trajectory.messages(), logprobs=True)
        trajectory.messages_and_choices.append(completion.choices[0])
        if (completion.choices[0].message.content or "").strip() == str(row["label"]):
            trajectory.reward = 1.0 / tries
            break
        trajectory.messages_and_choices.append({"role": "user", "content": "No. Once more."})
    trajectory.metrics["tries"] = tries
    return trajectory


async def main() -> None:
    row = json.load(sys.stdin)
    model = art.Model(
        name="policy",
        project="hone",
        inference_base_url=os.environ["OPENAI_BASE_URL"],
        inference_api_key=os.environ["OPENAI_API_KEY"],
        inference_model_name="policy",
    )
    (group,) = await art.gather_trajectory_groups([art.TrajectoryGroup([rollout(model, row)])], pbar_desc=None)
    (trajectory,) = group.trajectories
    print(json.dumps({"reward": trajectory.reward, **trajectory.metrics}))


asyncio.run(main())
