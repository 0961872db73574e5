"""Measure importing the package and reading a large body, and fail if a target is missed.

Usage: python benchmarks/imports.py

It needs nothing but this package, and takes half a minute.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tracemalloc

from promptlayer_exec._api.messages import Response
from promptlayer_exec._api.runs import NodeMapReader

ROUNDS = 41
MOST_IMPORT = 1.15
BODY = 50 * 2**20
MOST_PEAK = 3.5


def import_time(modules: str) -> float:
    """Return the CPU seconds that importing modules takes in a new process."""
    program = f"from time import process_time as t; a = t(); import {modules}; print(t() - a)"
    command = [sys.executable, "-c", program]
    return float(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)


def import_ratio() -> float:
    """Return the import time of the package ÷ that of its dependencies: the median over rounds."""
    return statistics.median(
        import_time("promptlayer_exec") / import_time("aiohttp, cattrs") for _ in range(ROUNDS)
    )


def peak_ratio() -> float:
    """Return the peak memory of reading a body, without the decoded objects, ÷ the body's size."""
    nodes = {f"node {i}": {"status": "SUCCESS", "value": "x" * 2**20} for i in range(BODY // 2**20)}
    tracemalloc.start()
    body = json.dumps(nodes).encode()
    del nodes
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0] - len(body)
    node_map = NodeMapReader().read(Response(202, body), 7)
    size = len(body)
    _, peak = tracemalloc.get_traced_memory()
    del body
    objects = tracemalloc.get_traced_memory()[0] - before
    assert len(node_map.nodes) == BODY // 2**20
    tracemalloc.stop()
    return (peak - before - objects) / size


def main() -> int:
    """Print both, and return 1 if a target is missed."""
    importing, peak = import_ratio(), peak_ratio()
    sys.stdout.write(
        f"import promptlayer_exec: {importing:.2f} of import aiohttp, cattrs (≤ {MOST_IMPORT})\n"
        f"reading {BODY // 2**20} MiB: {peak:.2f} of the body beyond its objects (≤ {MOST_PEAK})\n"
    )
    return int(importing > MOST_IMPORT or peak > MOST_PEAK)


if __name__ == "__main__":
    sys.exit(main())
