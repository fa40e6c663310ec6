"""Time on the device, and what the device can do at most.

Owns how a time is taken. Where Triton's interpreter stands in for a device (`TRITON_INTERPRET=1`), all runs on the CPU,
and times say nothing.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.gpu.report import Measured, Report

DRY = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if DRY else "cuda"
CACHE_BYTES = 50 << 20  # of an H100's second level: copies in turn are larger, so that each call reads memory
NUM_REPLAYS = 5
RUNS_PER_REPLAY = 20  # the host's own time between two is hidden by the device's
RUNS_EAGER = 2  # a call takes milliseconds, most of them the host's


def measure(calls: Sequence[Callable[[], object]], *, is_eager: bool = False) -> float:
    """Seconds of one call: the median of replays of a graph of all of them in turn, or of the calls themselves."""
    _in_turn(calls)
    if DRY:
        start = time.perf_counter()
        calls[0]()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    run: Callable[[], object] = partial(_in_turn, calls) if is_eager else _recorded(calls).replay
    num_runs = RUNS_EAGER if is_eager else RUNS_PER_REPLAY
    times = []
    for _ in range(NUM_REPLAYS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(num_runs):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / num_runs / len(calls))
    return statistics.median(times)


def _recorded(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _in_turn(calls)
    return graph


def _in_turn(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def add(
    report: Report,
    what: str,
    calls: Sequence[Callable[[], object]],
    num_bytes: float,
    operations: float = 0.0,
    is_fp8: bool = False,
    is_eager: bool = False,
) -> None:
    """One line, printed as it comes. `is_fp8`: the operations are those of e4m3. `is_eager`: as in `measure`."""
    try:
        seconds = measure(calls, is_eager=is_eager)
    except Exception as error:  # noqa: BLE001  # a case that fails is named, and the others run
        report.left_out.append(f"{what}: {type(error).__name__}: {error}")
        return
    most = (is_fp8 and report.fp8_operations_per_s) or report.operations_per_s
    bound = max(num_bytes / report.bytes_per_s, operations / most)
    speed = num_bytes / seconds / 1e9, operations / seconds / 1e12
    line = Measured(what, seconds * 1e6, num_bytes, operations, bound / seconds, *speed)
    report.lines.append(line)
    print(
        f"{what:64} {line.microseconds:10.1f} us {speed[0]:6.0f} GB/s {speed[1]:6.1f} TFLOP/s {line.share:6.1%}",
        flush=True,
    )


def ceilings(report: Report) -> None:
    """What a copy and large products of bf16 and e4m3 reach here."""
    size = 1 << (20 if DRY else 30)
    source, target = torch.empty(2, size, dtype=torch.uint8, device=DEVICE)
    report.bytes_per_s = 2 * size / measure([lambda: target.copy_(source)])
    side = 256 if DRY else 8192
    a = torch.randn(side, side, device=DEVICE).bfloat16()
    report.operations_per_s = 2 * side**3 / measure([lambda: a @ a])
    e4m3, ones = a.to(torch.float8_e4m3fn), torch.ones((), device=DEVICE)
    try:
        seconds = measure([lambda: torch._scaled_mm(e4m3, e4m3.t(), ones, ones, out_dtype=torch.bfloat16)])
        report.fp8_operations_per_s = 2 * side**3 / seconds
    except RuntimeError as error:  # a device without e4m3
        report.left_out.append(f"the ceiling of fp8: {error}")
    print(
        f"{report.bytes_per_s / 1e12:.2f} TB/s copied, {report.operations_per_s / 1e12:.0f} TFLOP/s multiplied, "
        f"{report.fp8_operations_per_s / 1e12:.0f} in fp8"
    )
