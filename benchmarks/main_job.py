"""The main job against what it must reach: `launch ppo` and `launch grpo` with no arguments, on seeds 0, 1 and 2.

    uv run python benchmarks/main_job.py [--seeds 0 1 2] [--verbs ppo grpo] [--out FILE.json]

Per run: seconds from pressing enter to the first step and to the end, mean reward of the first three and of the last five
steps, the largest gap between engine and learner, peak memory, and a warm weight sync with its verification. Prints a
table, writes JSON with commit and hardware, and ends with 1 when a limit is missed. The times are those of the machine it
runs on; nothing in the test suite asserts them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMITS = {
    "first_step_s": (None, 120.0),
    "total_s": (None, 360.0),
    "reward_first_3": (None, 0.5),
    "reward_last_5": (0.85, None),
    "gap_max_nats": (None, 1e-4),
    "peak_memory_gb": (None, 10.0),
    "sync_ms_median": (None, 100.0),
}


def measure(verb: str, seed: int, directory: Path) -> dict[str, float]:
    """One run, started as a user would start it, and its figures."""
    run = directory / f"{verb}-{seed}"
    command = [sys.executable, "-c", "from hone.launch.cli import main; raise SystemExit(main())", verb]
    began, first = time.monotonic(), None
    with (directory / f"{verb}-{seed}.log").open("w") as log:
        process = subprocess.Popen([*command, "--train.seed", str(seed), "--run.dir", str(run)], stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if first is None and (run / "metrics.jsonl").exists():
                first = time.monotonic() - began
            time.sleep(0.1)
    total = time.monotonic() - began
    if process.returncode != 0 or first is None:
        sys.exit(
            f"launch {verb} --train.seed {seed} ended with {process.returncode}:\n{(directory / f'{verb}-{seed}.log').read_text()[-2000:]}"
        )
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rewards = [step["rollout/reward_mean"] for step in steps]
    return {
        "first_step_s": first,
        "total_s": total,
        "reward_first_3": statistics.mean(rewards[:3]),
        "reward_last_5": statistics.mean(rewards[-5:]),
        "gap_max_nats": max(step["mismatch/logp_abs_diff_mean"] for step in steps),
        "peak_memory_gb": max(step["perf/peak_memory_gb"] for step in steps),
        "sync_ms_median": statistics.median(step["perf/sync_ms"] for step in steps[3:]),
    }


def missed(figures: dict[str, float]) -> list[str]:
    """Names of the figures outside their limits."""
    return [
        name
        for name, (low, high) in LIMITS.items()
        if (low is not None and figures[name] < low) or (high is not None and figures[name] > high)
    ]


def main() -> int:
    """Run everything, print the table, write the file."""
    from hone.launch.builtin import builtin_model
    from hone.launch.observe import manifest

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--verbs", nargs="+", default=["ppo", "grpo"])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    began = time.monotonic()
    builtin_model()
    print(f"the built-in model: {time.monotonic() - began:.0f} s (0 when it is cached)")
    results: dict[str, dict[str, float]] = {}
    print(f"{'run':10}" + "".join(f"{name:>16}" for name in LIMITS))
    failures = 0
    with tempfile.TemporaryDirectory() as directory:
        for verb in asked.verbs:
            for seed in asked.seeds:
                figures = results[f"{verb} {seed}"] = measure(verb, seed, Path(directory))
                beyond = missed(figures)
                failures += len(beyond)
                print(
                    f"{verb} {seed:<5}" + "".join(f"{figures[name]:>15.3g}{'!' if name in beyond else ' '}" for name in LIMITS), flush=True
                )
    described = manifest.collect(verb="benchmark", seed=asked.seeds[0], argv=sys.argv)
    if asked.out is not None:
        kept = {name: described[name] for name in ("started", "commit", "packages", "hardware")}
        asked.out.write_text(json.dumps({**kept, "limits": LIMITS, "results": results}, indent=2) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
