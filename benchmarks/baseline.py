"""Condenses a run's JSON to what is worth keeping: `uv run python benchmarks/baseline.py bench.json baselines/NAME.json`.

Machine, commit, and each benchmark's `extra_info`; not the single rounds, nor the machine's name.
"""

import json
import platform
import sys
from pathlib import Path
from typing import Any


def condensed(run: dict[str, Any]) -> dict[str, Any]:
    """The run without rounds, to four digits."""
    machine, commit = run["machine_info"], run["commit_info"]
    return {
        "commit": commit["id"] + (" and uncommitted changes" if commit["dirty"] else ""),
        "date": run["datetime"][:10],
        "machine": f"{machine['cpu'].get('brand_raw', platform.processor())}, {machine['cpu'].get('count')} cores, {machine['system']}",
        "python": machine["python_version"],
        "figures": {
            benchmark["name"]: {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in figures.items()}
            for benchmark in run["benchmarks"]
            if (figures := benchmark["extra_info"])
        },
    }


def main() -> None:
    """Reads the first path, writes the second."""
    if len(sys.argv) != 3:
        raise SystemExit("usage: baseline.py RUN.json OUT.json, the first as `--benchmark-json` writes it")
    source, target = (Path(argument) for argument in sys.argv[1:])
    target.write_text(json.dumps(condensed(json.loads(source.read_text())), indent=1) + "\n")


if __name__ == "__main__":
    main()
