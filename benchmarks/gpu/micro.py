"""Each kernel's time at the shapes of published models.

Owns the cases: name, calls on copies in turn, and the bytes and operations that bound them. A new kernel is one more
function of cases, named in `cases`.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.gpu.inputs import BITS, random_attention, random_matrices
from benchmarks.gpu.measure import CACHE_BYTES, DEVICE, DRY, add
from benchmarks.gpu.report import Report
from kernels import reference
from kernels.triton import OPS


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


def run(report: Report, end: float) -> None:
    """The report has a line for each case that could begin before `end`, by time.monotonic."""
    for what, calls, num_bytes, operations in cases():
        if time.monotonic() > end:
            report.left_out.append(f"{what}: no time left")
            continue
        add(report, what, calls, num_bytes, operations)


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
