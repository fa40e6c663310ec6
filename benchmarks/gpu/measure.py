"""Time on the device, and what the device can do at most.

Owns how a time is taken. Where Triton's interpreter stands in for a device (`TRITON_INTERPRET=1`), all runs on the CPU,
and times say nothing.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks.gpu.report import Measured, Report

DRY = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if DRY else "cuda"
CACHE_BYTES = 50 << 20  # of an H100's second level: copies in turn are larger, so that each call reads memory
NUM_REPLAYS = 5
RUNS_PER_REPLAY = 20  # the host's own time between two is hidden by the device's


def measure(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of one call: the median of replays of a graph of all of them in turn."""
    for call in calls:
        call()
    if DRY:
        start = time.perf_counter()
        calls[0]()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(NUM_REPLAYS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(RUNS_PER_REPLAY):
            graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / RUNS_PER_REPLAY / len(calls))
    return statistics.median(times)


def add(
    report: Report, what: str, calls: Sequence[Callable[[], object]], num_bytes: float, operations: float = 0.0
) -> None:
    """One line, printed as it comes."""
    try:
        seconds = measure(calls)
    except Exception as error:  # noqa: BLE001  # a case that fails is named, and the others run
        report.left_out.append(f"{what}: {type(error).__name__}: {error}")
        return
    bound = max(num_bytes / report.bytes_per_s, operations / report.operations_per_s)
    line = Measured(what, seconds * 1e6, num_bytes, operations, bound / seconds)
    report.lines.append(line)
    print(f"{what:56} {line.microseconds:10.1f} us {line.share:6.1%} of the bound", flush=True)


def ceilings(report: Report) -> None:
    """What a copy and a large product of bf16 reach here."""
    size = 1 << (20 if DRY else 30)
    source, target = torch.empty(2, size, dtype=torch.uint8, device=DEVICE)
    report.bytes_per_s = 2 * size / measure([lambda: target.copy_(source)])
    side = 256 if DRY else 8192
    a = torch.randn(side, side, device=DEVICE).bfloat16()
    report.operations_per_s = 2 * side**3 / measure([lambda: a @ a])
    print(f"{report.bytes_per_s / 1e12:.2f} TB/s copied, {report.operations_per_s / 1e12:.0f} TFLOP/s multiplied")
