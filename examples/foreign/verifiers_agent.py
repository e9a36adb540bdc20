"""verifiers: a taskset, its rewards and a harness of its own, run as one episode against the endpoint (`just foreign`).

    uv run launch grpo --rollout.agent-command ".foreign/verifiers/bin/python examples/foreign/verifiers_agent.py" \
        --actor.model-name-or-path DIR --data.prompt-dataset examples/sums.jsonl --data.input-key question --data.label-key answer

A package of tasks is used the same way, its name in place of this file's. The reward is the trace's: the sum of score times weight.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

import verifiers.v1 as vf
from openai import AsyncOpenAI

__all__ = ["Again", "Sums"]


class SumData(vf.TaskData):
    """A question, and its answer beside it."""

    answer: str


class Sum(vf.Task[SumData]):
    """Scored by the last reply, and a little for a short one."""

    @vf.reward
    async def right(self, task: SumData, trace: vf.Trace) -> float:
        """Whether the last reply is the answer."""
        return float((trace.last_reply or "").strip() == task.answer)

    @vf.reward(weight=0.1)
    async def short(self, trace: vf.Trace) -> float:
        """Whether the last reply is short."""
        return float(len(trace.last_reply or "") < 9)


class SumsConfig(vf.TasksetConfig):
    """The row."""

    question: str = ""
    answer: str = ""


class Sums(vf.Taskset[Sum, SumsConfig]):
    """The one task of this episode."""

    def load(self) -> list[Sum]:
        """The row as a task."""
        return [Sum(SumData(prompt=self.config.question, answer=self.config.answer), self.config.task)]


class Again(vf.Harness[vf.HarnessConfig]):
    """Asks once more whatever was said; a loop in this process, as a harness may have."""

    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data) -> vf.ProgramResult:
        """Two turns through verifiers' own endpoint, which passes them on to ours."""
        messages = [{"role": "user", "content": data.prompt}]
        async with AsyncOpenAI(base_url=endpoint, api_key=secret) as client:
            for _ in range(2):
                message = (await client.chat.completions.create(model=ctx.model, messages=messages)).choices[0].message
                messages += [message, {"role": "user", "content": "Are you sure?"}]
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


async def main() -> None:
    row = json.load(sys.stdin)
    this = Path(__file__).stem
    taskset = {"id": this, "question": row["prompt"], "answer": str(row["label"])}
    # Its runtime is a paid cloud unless another is named.
    agent = {"harness": {"id": this}, "runtime": {"type": "subprocess"}}
    environment = vf.SingleAgentEnv(vf.SingleAgentEnvConfig.model_validate({"taskset": taskset, "agent": agent}))
    client = vf.EvalClientConfig(base_url=os.environ["OPENAI_BASE_URL"], api_key_var="OPENAI_API_KEY")
    async with environment.serving():
        (task,) = environment.taskset
        (slot,) = environment.slots(task)
        episode = await environment.run_slot(slot, vf.ModelContext(model="policy", client=client))
    if not episode.ok:
        sys.exit(f"the episode failed: {[*episode.errors, *(error for trace in episode.traces for error in trace.errors)]}")
    (trace,) = episode.traces
    print(json.dumps({"reward": trace.reward, **{name: reward.value for name, reward in trace.rewards.items()}}))


if __name__ == "__main__":
    asyncio.run(main())
