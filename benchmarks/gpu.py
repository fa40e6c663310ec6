"""Everything that only a GPU can say of the kernels, in one run: `python -m benchmarks.gpu FOLDER`, or `make gpu`.

Owns the cases. First each kernel against its definition in fp64, then each one's time as a share of what the device can
do, measured in the same run; a whole model is not there yet. Writes `gpu.json` and `gpu.svg` to the folder, and
into both what was left out and why. Imports torch, Triton and numpy alone.

`--dry` runs tiny cases in Triton's interpreter on a machine without a GPU: its times say nothing, but the script ran.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from kernels import reference  # noqa: E402
from kernels.ops import AttentionBatch, SamplingRow  # noqa: E402
from kernels.triton import OPS  # noqa: E402
from kernels.triton.weights import INT4_DEPTHS, Matrices  # noqa: E402

DEVICE = "cpu" if DRY else "cuda"
BUDGET_S = 540.0  # a run fits into ten minutes; what does not fit is named
CACHE_BYTES = 50 << 20  # of an H100's second level: copies in turn are larger, so that each call reads memory
NUM_REPLAYS = 5
RUNS_PER_REPLAY = 20  # the host's own time between two is hidden by the device's
BITS = {"bf16": 16.0, "int8": 8.0, "int4": 5.0}


@dataclass
class Measured:
    """One line of the table."""

    what: str
    microseconds: float
    bytes: float  # that must be moved
    operations: float  # of the matrix products
    share: float = 0.0  # of the device's bound, the nearer of the two


@dataclass
class Report:
    """What a run found out."""

    device: str
    bytes_per_s: float = 0.0
    operations_per_s: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)  # of the norm, against fp64
    lines: list[Measured] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def main() -> None:
    """Runs all parts, and ends with an error where a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry", action="store_true")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    if DRY:
        from tests import triton_interpreter

        triton_interpreter.install()
    torch.manual_seed(0)
    end = time.monotonic() + BUDGET_S
    report = Report("interpreter" if DRY else torch.cuda.get_device_name())
    with torch.inference_mode():
        ceilings(report)
        wrong = check(report)
        for what, calls, num_bytes, operations in cases():
            if time.monotonic() > end:
                report.left_out.append(f"{what}: no time left")
                continue
            add(report, what, calls, num_bytes, operations)
    report.left_out.append("a whole model, time to first token, drafts, graphs on and off: not written yet")
    (folder / "gpu.json").write_text(json.dumps(asdict(report), indent=1))
    (folder / "gpu.svg").write_text(picture(report))
    for reason in report.left_out:
        print("left out:", reason)
    if wrong:
        raise SystemExit(f"wrong: {', '.join(wrong)}")


# ----------------------------------------------------------------------------------------------------------- measuring


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


# ------------------------------------------------------------------------------------------------------------ the cases


def random_matrices(kind: str, num: int, num_out: int, num_in: int) -> Matrices:
    """Random prepared weights, made where they stay."""
    scale = 0.5 / math.sqrt(num_in)
    match kind:
        case "bf16":
            values = torch.randn(num, num_out, num_in, device=DEVICE, dtype=torch.bfloat16).mul_(2 * scale)
            scales = values
        case "int8":
            values = torch.randint(-127, 128, (num, num_out, num_in), dtype=torch.int8, device=DEVICE)
            scales = torch.full((num, num_out), scale / 64, device=DEVICE)
        case _:
            depth = next(depth for depth in INT4_DEPTHS if num_in % depth == 0)
            shape = (num, num_in // depth, num_out, depth // 8)
            values = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=DEVICE)
            pair = torch.tensor([scale / 4, scale / 8], device=DEVICE).bfloat16().view(torch.int32)
            scales = pair.repeat(num * shape[1] * num_out * depth // 32).view(*shape[:3], depth // 32)
    return Matrices(kind, values, scales, num_out, num_in)


@dataclass(frozen=True)
class Mixture:
    """The experts of one model's layer."""

    name: str
    hidden: int
    intermediate: int
    num_experts: int
    num_chosen: int


MIXTURES = [
    Mixture("Mixtral", 4096, 14336, 8, 2),
    Mixture("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Mixture("DeepSeek-V2-Lite", 2048, 1408, 64, 6),
]
Case = tuple[str, list[Callable[[], object]], float, float]


def cases() -> Iterator[Case]:
    """Name, calls on copies in turn, bytes and operations."""
    yield from attention_cases()
    for mixture in MIXTURES[: 1 if DRY else None]:
        for kind in ("int4", "int8", "bf16"):
            yield from mixture_cases(replace(mixture, intermediate=64, hidden=128) if DRY else mixture, kind)
    yield from small_cases()


def mixture_cases(mixture: Mixture, kind: str) -> Iterator[Case]:
    """A layer's experts; the bytes are those of the experts that were chosen."""
    shapes = (2 * mixture.intermediate, mixture.hidden), (mixture.hidden, mixture.intermediate)
    weight_bytes = sum(out * num_in for out, num_in in shapes) * BITS[kind] / 8  # of one expert
    layers = [
        [random_matrices(kind, mixture.num_experts, *shape) for shape in shapes]
        for _ in range(1 if DRY else max(2, math.ceil(CACHE_BYTES / (weight_bytes * mixture.num_chosen))))
    ]
    for num_tokens in (1,) if DRY else (1, 4, 16, 32, 64, 256, 1024, 4096):
        for routing in ("uniform", "zipf")[: 1 if DRY else None]:
            x = torch.randn(num_tokens, mixture.hidden, device=DEVICE).bfloat16()
            logits = torch.randn(num_tokens, mixture.num_experts, device=DEVICE)
            if routing == "zipf":
                logits -= torch.arange(1, mixture.num_experts + 1, device=DEVICE).log()
            weights, chosen = reference.route(logits, mixture.num_chosen, "softmax", True)
            num_hit = int((torch.bincount(chosen.flatten(), minlength=mixture.num_experts) > 0).sum())
            linear = OPS.weights[kind].linear
            calls: list[Callable[[], object]] = [
                partial(OPS.experts, x, weights, chosen, gate_up, down, linear, OPS.swiglu) for gate_up, down in layers
            ]
            yield (
                f"{kind} experts, {mixture.name}, {num_tokens} tokens, {routing}",
                calls,
                num_hit * weight_bytes,
                2 * num_tokens * mixture.num_chosen * sum(out * num_in for out, num_in in shapes),
            )


def attention_cases() -> Iterator[Case]:
    """Decodes, drafts, a prompt and a chunk of one."""
    for num_sequences, num_queries, context in (
        [(2, 1, 70)] if DRY else [(1, 1, 32768), (64, 1, 1024), (64, 4, 1024), (1, 1024, 1024), (1, 512, 8192)]
    ):
        for name, num_heads, num_groups, size in (("Qwen3-30B-A3B", 32, 4, 128), ("GPT-OSS", 64, 8, 64)):
            inputs = [random_attention(num_sequences, num_queries, context, num_heads, num_groups, size)]
            num_bytes = 4 * num_sequences * context * num_groups * size
            seen = context - (num_queries - 1) / 2
            inputs += (
                inputs[:1]
                if DRY
                else [
                    random_attention(num_sequences, num_queries, context, num_heads, num_groups, size)
                    for _ in range(math.ceil(CACHE_BYTES / num_bytes))
                ]
            )
            yield (
                f"attention, {name}, {num_sequences} x {num_queries} of {context}",
                [partial(OPS.attention, *one, size**-0.5) for one in inputs],
                num_bytes,
                4 * num_sequences * num_queries * seen * num_heads * size,
            )


def random_attention(
    num_sequences: int, num_queries: int, context: int, num_heads: int, num_groups: int, size: int
) -> tuple[Tensor, Tensor, Tensor, AttentionBatch]:
    """Sequences of one length in blocks of 16, in random places."""
    num_blocks = math.ceil(context / 16)
    keys, values = torch.randn(2, num_sequences * num_blocks, 16, num_groups, size, device=DEVICE, dtype=torch.bfloat16)
    tables = torch.randperm(num_sequences * num_blocks, device=DEVICE).view(num_sequences, num_blocks)
    starts = [i * num_queries for i in range(num_sequences + 1)]
    batch = AttentionBatch(tables, starts, [context] * num_sequences, tables[:0, 0])
    query = torch.randn(starts[-1], num_heads, size, device=DEVICE, dtype=torch.bfloat16)
    return query, keys, values, batch


def small_cases() -> Iterator[Case]:
    """What is bound by memory, and at few tokens by its launch."""
    for num_tokens in (2,) if DRY else (1, 64, 4096):
        x, weight = torch.randn(num_tokens, 2048, device=DEVICE).bfloat16(), torch.ones(2048, device=DEVICE).bfloat16()
        gate_up = torch.randn(num_tokens, 2 * 4096, device=DEVICE).bfloat16()
        yield (
            f"sum and norm, {num_tokens} x 2048",
            [partial(OPS.add_rms_norm, x, x, weight, 1e-6)],
            8.0 * x.numel(),
            0.0,
        )
        yield f"swiglu, {num_tokens} x 4096", [partial(OPS.swiglu, gate_up)], 3.0 * gate_up.numel(), 0.0


# ------------------------------------------------------------------------------------------------------- against fp64


def check(report: Report) -> list[str]:
    """The kernels that are further from fp64 than bf16's rounding explains."""
    for name, actual, expected in checks():
        difference = (actual.double() - expected).norm() / expected.norm()
        report.errors[name] = float(difference)
        print(f"{name:40} off by {difference:.1e}")
    return [name for name, error in report.errors.items() if not error <= 2**-7]


def checks() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, what the kernel makes, and what it should."""
    size = 128 if DRY else 2048
    x, residual = torch.randn(2, 5, size, device=DEVICE).bfloat16()
    weight = torch.randn(size, device=DEVICE).bfloat16()
    total = (x + residual).double()
    norm = total * (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    yield "add_rms_norm", OPS.add_rms_norm(x, residual, weight, 1e-6)[0], norm
    gate, up = x.double().chunk(2, -1)
    yield "swiglu", OPS.swiglu(x), gate.sigmoid() * gate * up
    for sequences in ((2, 1, 700), (1, 4, 300), (1, 40, 90)):
        inputs = random_attention(*sequences, 8, 2, 64)
        query, keys, values, batch = inputs
        expected = reference.attention(query.float(), keys, values, batch, 0.125).double()
        yield f"attention, {sequences}", OPS.attention(*inputs, 0.125), expected
    for kind in BITS:
        gate_up, down = random_matrices(kind, 8, 256, 128), random_matrices(kind, 8, 128, 128)
        wide = [[widened(matrix).double() for matrix in matrices] for matrices in (gate_up, down)]
        for num_tokens in (1, 20) if DRY else (1, 20, 300):
            tokens = torch.randn(num_tokens, 128, device=DEVICE).bfloat16()
            routed = reference.route(torch.randn(num_tokens, 8, device=DEVICE), 2, "softmax", True)
            actual = OPS.experts(tokens, *routed, gate_up, down, OPS.weights[kind].linear, OPS.swiglu)
            yield f"{kind} experts, {num_tokens} tokens", actual, experts_fp64(tokens.double(), *routed, *wide)
    logits = torch.randn(4, 5000, device=DEVICE) * 3
    plain = SamplingRow(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, uniform=0.37)
    rows = [plain, replace(plain, temperature=0.0), replace(plain, top_k=0), replace(plain, top_k=0, top_p=1.0)]
    yield "sample", OPS.sample(logits, rows), reference.sample(logits, rows).double()


def widened(matrix: Matrices) -> Tensor:
    """One matrix by the device's own machine code: multiplied by the identity."""
    identity = torch.eye(matrix.num_in, device=DEVICE).bfloat16()
    return OPS.weights[matrix.format].linear(identity, matrix).T


def experts_fp64(x: Tensor, weights: Tensor, chosen: Tensor, gate_up: list[Tensor], down: list[Tensor]) -> Tensor:
    """The definition's sum, in fp64 from end to end."""
    total = torch.zeros_like(x)
    for expert in range(len(gate_up)):
        tokens, places = torch.where(chosen == expert)
        gate, up = (x[tokens] @ gate_up[expert].T).chunk(2, -1)
        output = (gate * gate.sigmoid() * up) @ down[expert].T
        total.index_add_(0, tokens, output * weights[tokens, places, None].double())
    return total


# ---------------------------------------------------------------------------------------------------------- the picture


def picture(report: Report) -> str:
    """Each line's share of its bound as a bar."""
    height = 18
    bars = [
        f'<text x="0" y="{y + 12}">{line.what}</text>'
        f'<rect x="380" y="{y}" width="{300 * min(line.share, 1.1):.0f}" height="12" fill="#4878a8"/>'
        f'<text x="{690}" y="{y + 12}">{line.share:.0%}, {line.microseconds:.0f} us</text>'
        for y, line in zip(range(40, 10**6, height), report.lines, strict=False)
    ]
    ceilings = f"{report.bytes_per_s / 1e12:.2f} TB/s or {report.operations_per_s / 1e12:.0f} TFLOP/s"
    title = f"{report.device}: share of {ceilings}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="820" height="{60 + height * len(bars)}" '
        f'font-family="sans-serif" font-size="11"><text x="0" y="20" font-size="14">{title}</text>{"".join(bars)}</svg>'
    )


if __name__ == "__main__":
    main()
