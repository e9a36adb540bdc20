"""What `import hone.algos` adds to `import torch`: alone, and with every public name fetched. Each round a new process."""

import subprocess
import sys
from statistics import median

from pytest_benchmark.fixture import BenchmarkFixture

MEASURE = """
import time
begun = time.perf_counter()
import torch
torch_done = time.perf_counter()
import hone.algos
imported = time.perf_counter()
for name in dir(hone.algos):
    getattr(hone.algos, name)
print(torch_done - begun, imported - torch_done, time.perf_counter() - torch_done)
"""


def test_import(benchmark: BenchmarkFixture) -> None:
    rounds: list[list[float]] = []

    def once() -> None:
        printed = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True).stdout
        rounds.append([float(seconds) for seconds in printed.split()])

    benchmark.pedantic(once, rounds=5, warmup_rounds=1)  # the warm-up reads the files from the disk
    torch_s, package_s, names_s = (median(column) for column in zip(*rounds[1:], strict=True))
    benchmark.extra_info.update(import_torch_s=torch_s, import_hone_algos_adds_s=package_s, with_every_name_adds_s=names_s)
