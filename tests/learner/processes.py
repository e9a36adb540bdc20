"""The processes of multi-rank tests: one per rank in the repository, or one that starts its own; their logs are told if they fail."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(module: str, *arguments: object, root: Path, ranks: int, timeout_s: float) -> None:
    """`python -m MODULE ARGUMENTS RANK` once for each rank; fails the test if one fails or does not end. Warnings are errors there."""
    _run([[module, *map(str, arguments), str(rank)] for rank in range(ranks)], root=root, timeout_s=timeout_s)


def run_once(module: str, *arguments: object, root: Path, timeout_s: float) -> None:
    """`python -m MODULE ARGUMENTS`, which starts its ranks itself; see `run_ranks`."""
    _run([[module, *map(str, arguments)]], root=root, timeout_s=timeout_s)


def _run(commands: list[list[str]], *, root: Path, timeout_s: float) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    logs = [root / f"{command[0].rpartition('.')[2]}-{rank}.log" for rank, command in enumerate(commands)]
    processes: list[subprocess.Popen[bytes]] = []
    for command, log in zip(commands, logs, strict=True):
        with log.open("w") as output:
            whole = [sys.executable, "-W", "error", "-m", *command]
            processes.append(subprocess.Popen(whole, env=environment, stdout=output, stderr=subprocess.STDOUT))
    try:
        codes = _wait(processes, timeout_s=timeout_s)
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        pytest.fail("\n".join(log.read_text()[-8000:] for log in logs))


def _wait(processes: list[subprocess.Popen[bytes]], *, timeout_s: float) -> list[int | None]:
    """Exit codes once all have ended, or as soon as one has failed, for then its peer would wait in a collective.

    One that has not ended in time counts as failed.
    """
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return codes
        time.sleep(0.1)
    return [1 if process.poll() is None else process.returncode for process in processes]
