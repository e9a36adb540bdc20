"""A run that never happened, to look at the display: python tests/launch/observe/demo.py [--steps N] [--seconds S] [--fail].

Feeds made-up steps through the same calls the launcher makes; `step_metrics` serves the tests too.
"""

import argparse
import math
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from hone.launch.observe.display import make_display
from hone.launch.observe.ledger import Ledger
from hone.launch.observe.manifest import collect
from hone.launch.observe.peak_memory import PeakMemory
from hone.launch.observe.progress import READY, RunInfo
from hone.launch.observe.report import conclude
from hone.launch.observe.run_directory import RunDirectory
from hone.launch.observe.summary import Summary

SHARES = {"generation": 0.46, "make_experience": 0.12, "ppo_train": 0.36, "broadcast": 0.04}


def step_metrics(step: int, total: int, seconds: float) -> dict[str, float | int]:
    """Plausible figures of one step; the reward rises from 0.3 to 0.9."""
    noise = np.random.default_rng(step).normal()
    done = step / total
    return {
        "step": step,
        "rollout/reward_mean": 0.3 + 0.6 / (1 + math.exp(-8 * (done - 0.45))) + 0.02 * noise,
        "rollout/reward_std": 0.4,
        "rollout/score_mean": 0.5,
        "rollout/response_length_mean": 5.3 + 0.1 * noise,
        "rollout/truncated_rate": 0.004,
        "rollout/num_samples": 256.0,
        "train/policy_loss": -0.012 + 0.01 * noise,
        "train/critic_loss": 0.21 * (1.2 - done),
        "train/kl": 0.002 + 0.01 * done,
        "train/entropy": 1.3 - 0.6 * done,
        "train/ppo_clip_ratio": 0.02,
        "train/actor_grad_norm": 0.8,
        "mismatch/logp_abs_diff_mean": 2.1e-6,
        "mismatch/logp_abs_diff_max": 9.4e-6 if step != 4 else 1.7,
        **{f"timing/{name}": share * seconds for name, share in SHARES.items()},
        "timing/step_total": seconds,
        "perf/rollout_tokens_per_second": 8421.0 + 90 * noise,
        "perf/train_tokens_per_second": 15030.0,
        "perf/peak_memory_gb": 3.4,
        "perf/sync_ms": 52.0,
    }


def main() -> None:
    """Play the run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.6)
    parser.add_argument("--startup", type=float, default=1.5)
    parser.add_argument("--fail", action="store_true")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory.create(Path(folder) / "ppo-demo", "ppo")
        run.write_manifest(collect(verb="ppo", seed=0, argv=["launch", "ppo"]))
        ledger = Ledger(run.append_event)
        info = RunInfo(
            verb="ppo",
            model="built in: tiny arithmetic (0.8 M)",
            data="arithmetic, seed 0",
            directory=str(run.path),
            total_steps=options.steps,
        )
        with PeakMemory(os.getpid(), interval_s=0.5) as memory, make_display(Console(), info) as display:
            display.startup("learner", "starting Ray")
            time.sleep(options.startup)
            display.startup("learner", "loading weights")
            display.startup("rollout engine", "importing vllm")
            time.sleep(options.startup)
            display.startup("learner", READY)
            time.sleep(options.startup)
            display.startup("rollout engine", READY)
            print("a stray print of a user's reward function \x1b[31mred\x1b[0m [bold]x[/bold]")
            for step in range(1, options.steps + 1):
                ids = [f"demo:{step}:{index}" for index in range(4)]
                ledger.issue(ids, step=step)
                for name, share in SHARES.items():
                    display.phase(name, None)
                    time.sleep(share * options.seconds)
                    display.phase(name, share * options.seconds)
                ledger.train(ids, step=step)
                metrics = step_metrics(step, options.steps, options.seconds)
                run.append_metrics(metrics)
                display.step(metrics)
                if options.fail and step == 3:
                    raise RuntimeError("the engine died")
            summary = Summary(
                outcome="finished",
                elapsed_s=time.monotonic() - began,
                peak_memory_gb=memory.peak_gb,
                model=str(run.model),
                next_commands=("uv run launch ppo --train.seed 1", "uv run launch grpo"),
            )
            display.done(summary)
            conclude(run, summary)


if __name__ == "__main__":
    main()
