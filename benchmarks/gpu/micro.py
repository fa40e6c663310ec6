"""Each kernel's time at the shapes of published models, and others' beside it.

Owns the cases: name, calls on copies in turn, and the bytes and operations that bound them. A new kernel is one more
function of cases, named in `cases`.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.gpu import baselines
from benchmarks.gpu.inputs import BITS, Heads, random_attention, random_matrices
from benchmarks.gpu.measure import CACHE_BYTES, DEVICE, DRY, add
from benchmarks.gpu.report import Report
from kernels import reference
from kernels.cache import CACHE_DTYPES, row_size
from kernels.ops import HeadNorms, SamplingRow
from kernels.triton import OPS
from kernels.triton.quantize import quantize


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
GPT_OSS_EXPERTS = Mixture("GPT-OSS-20B", 2880, 2880, 32, 4)  # published in mxfp4
TINY = Mixture("tiny", 128, 64, 8, 2)
NUM_TOKENS = (1, 4, 8, 16, 32, 64, 256, 1024, 4096)

QWEN3 = Heads("Qwen3-30B-A3B", 32, 4, 128)
GPT_OSS = Heads("GPT-OSS", 64, 8, 64)
V2_LITE = Heads("DeepSeek-V2-Lite", 16, 1, 576, 512)


class Case(NamedTuple):
    """One line of the table to be."""

    what: str
    calls: list[Callable[[], object]]
    num_bytes: float
    operations: float = 0.0
    is_fp8: bool = False
    is_eager: bool = False


def run(report: Report, end: float) -> None:
    """The report has a line for each case that could begin before `end`, by time.monotonic."""
    report.left_out += baselines.missing()
    for case in cases():
        if time.monotonic() > end:
            report.left_out.append(f"{case.what}: no time left")
            continue
        add(report, *case)


def cases() -> Iterator[Case]:
    """Those that a bar is set for come first."""
    for kind in ("int4-g128", "fp8-blocks", "bf16", "int4", "fp8", "int8", "mxfp4"):
        for mixture in [TINY] if DRY else [GPT_OSS_EXPERTS] if kind == "mxfp4" else MIXTURES:
            yield from mixture_cases(mixture, kind)
    yield from attention_cases()
    yield from matrix_cases()
    yield from small_cases()
    yield from sample_cases()
    yield from logprobs_cases()


def mixture_cases(mixture: Mixture, kind: str) -> Iterator[Case]:
    """A layer's experts; the bytes are those of the experts that were chosen."""
    shapes = (2 * mixture.intermediate, mixture.hidden), (mixture.hidden, mixture.intermediate)
    weight_bytes = sum(out * num_in for out, num_in in shapes) * BITS[kind] / 8  # of one expert
    layers = [
        [random_matrices(kind, mixture.num_experts, *shape) for shape in shapes]
        for _ in range(1 if DRY else max(2, math.ceil(CACHE_BYTES / (weight_bytes * mixture.num_chosen))))
    ]
    for num_tokens in (1,) if DRY else NUM_TOKENS:
        for routing in ("uniform", "zipf")[: 1 if DRY else None]:
            x = torch.randn(num_tokens, mixture.hidden, device=DEVICE).bfloat16()
            logits = torch.randn(num_tokens, mixture.num_experts, device=DEVICE)
            if routing == "zipf":
                logits -= torch.arange(1, mixture.num_experts + 1, device=DEVICE).log()
            weights, chosen = reference.route(logits, mixture.num_chosen, "softmax", True)
            num_hit = int((torch.bincount(chosen.flatten(), minlength=mixture.num_experts) > 0).sum())
            linear = OPS.weights[layers[0][0].format].linear
            case = Case(
                f"{kind} experts, {mixture.name}, {num_tokens} tokens, {routing}",
                [
                    partial(OPS.experts, x, weights, chosen, gate_up, down, linear, OPS.swiglu)
                    for gate_up, down in layers
                ],
                num_hit * weight_bytes,
                2 * num_tokens * mixture.num_chosen * sum(out * num_in for out, num_in in shapes),
                kind.startswith("fp8"),
            )
            yield case
            if kind == "bf16" and routing == "uniform":
                yield from beside(case, *(list(baselines.experts(x, weights, chosen, *layer)) for layer in layers))
                yield case._replace(
                    what=f"{case.what}: torch's loop over experts, eager",
                    calls=[partial(baselines.experts_in_a_loop, x, weights, chosen, *layer) for layer in layers],
                    is_eager=True,
                )


def beside(case: Case, *calls: list[tuple[str, Callable[[], object]]]) -> Iterator[Case]:
    """The case as others do it; `calls`: each one's name and call, on each of the copies."""
    for named in zip(*calls, strict=True):
        yield case._replace(what=f"{case.what}: {named[0][0]}", calls=[call for _, call in named])


def attention_cases() -> Iterator[Case]:
    """Decodes, drafts, a prompt and a chunk of one, over caches of 16 and 8 bits, and over latents."""
    shapes = [(2, 1, 70)] if DRY else [(64, 1, 1024), (1, 1, 32768), (64, 4, 1024), (1, 1024, 1024), (1, 512, 8192)]
    for shape in shapes:
        for heads in (QWEN3, V2_LITE) if DRY else (QWEN3, GPT_OSS, V2_LITE):
            for kept in ("bf16", "fp8"):
                yield from attention_case(*shape, heads, kept)
    yield from attention_case(*shapes[0], QWEN3, "int8")


def attention_case(num_sequences: int, num_queries: int, context: int, heads: Heads, kept: str) -> Iterator[Case]:
    """One shape over one kind of cache, by our kernel; over one of bf16 that is no latent one by others too."""
    dtype = CACHE_DTYPES[kept]
    row = row_size(heads.size, dtype) * dtype.itemsize
    num_bytes = num_sequences * context * heads.num_groups * row * (1 if heads.value_size else 2)
    copies = 1 if DRY else 1 + math.ceil(CACHE_BYTES / num_bytes)
    inputs = [random_attention(num_sequences, num_queries, context, heads, dtype) for _ in range(copies)]
    scale, seen = heads.size**-0.5, context - (num_queries - 1) / 2
    multiplied = heads.size + (heads.value_size or heads.size)
    case = Case(
        f"attention, {heads.name}, {kept}, {num_sequences} x {num_queries} of {context}",
        [partial(OPS.attention, *one, scale) for one in inputs],
        num_bytes,
        2 * num_sequences * num_queries * seen * heads.num_heads * multiplied,
    )
    yield case
    if kept == "bf16" and not heads.value_size and num_queries in (1, context):
        whole = num_sequences, -1, heads.num_groups, heads.size
        yield from beside(
            case,
            *(
                list(
                    baselines.attention(
                        query.view(num_sequences, num_queries, heads.num_heads, heads.size),
                        keys.view(whole)[:, :context],
                        values.view(whole)[:, :context],
                        scale,
                    )
                )
                for query, keys, values, _ in inputs
            ),
        )


def matrix_cases() -> Iterator[Case]:
    """The projection of queries, keys and values of Qwen3-30B-A3B."""
    num_out, num_in = (256, 128) if DRY else (5120, 2048)
    for kind in ("int4-g128", "fp8"):
        num_bytes = num_out * num_in * BITS[kind] / 8
        copies = [
            random_matrices(kind, 1, num_out, num_in) for _ in range(1 if DRY else math.ceil(CACHE_BYTES / num_bytes))
        ]
        for num_tokens in (2,) if DRY else (1, 16, 64, 1024, 4096):
            x = torch.randn(num_tokens, num_in, device=DEVICE).bfloat16()
            linear = OPS.weights[copies[0].format].linear
            case = Case(
                f"{kind} matrix, {num_tokens} tokens",
                [partial(linear, x, matrix) for matrix in copies],
                num_bytes,
                2 * num_tokens * num_out * num_in,
                kind == "fp8",
            )
            yield case
            if kind == "fp8":
                yield from beside(case, *(list(baselines.product(x, matrix)) for matrix in copies))


def small_cases() -> Iterator[Case]:
    """What is bound by memory, and at few tokens by its launch."""
    for num_tokens in (2,) if DRY else (1, 64, 4096):
        x, weight = torch.randn(num_tokens, 2048, device=DEVICE).bfloat16(), torch.ones(2048, device=DEVICE).bfloat16()
        gate_up = torch.randn(num_tokens, 2 * 4096, device=DEVICE).bfloat16()
        yield Case(
            f"sum and norm, {num_tokens} x 2048", [partial(OPS.add_rms_norm, x, x, weight, 1e-6)], 8.0 * x.numel()
        )
        rounding = OPS.prepare_norm(weight, ["fp8"])
        yield Case(
            f"sum and norm, rounded too, {num_tokens} x 2048",
            [partial(OPS.add_rms_norm, x, x, rounding, 1e-6)],
            9.0 * x.numel(),
        )
        yield Case(f"rounding alone, {num_tokens} x 2048", [partial(quantize, x)], 3.0 * x.numel())
        yield Case(f"swiglu, {num_tokens} x 4096", [partial(OPS.swiglu, gate_up)], 3.0 * gate_up.numel())
        logits = torch.randn(num_tokens, 128, device=DEVICE)
        yield Case(f"route, {num_tokens} x 128", [partial(OPS.route, logits, 8, "softmax", True)], 4.0 * logits.numel())
        heads = torch.randn(num_tokens, QWEN3.num_heads + 2 * QWEN3.num_groups, QWEN3.size, device=DEVICE).bfloat16()
        norms = HeadNorms(weight[: QWEN3.size], weight[: QWEN3.size], 1e-6)
        angle = torch.randn(num_tokens, QWEN3.size // 2, device=DEVICE)
        caches = torch.zeros(2, num_tokens, 1, QWEN3.num_groups, QWEN3.size, device=DEVICE, dtype=torch.bfloat16)
        slots = torch.arange(num_tokens, device=DEVICE)
        yield Case(
            f"rotate and write, {num_tokens}, {QWEN3.name}",
            [partial(OPS.rotate_and_write, heads, norms, angle.cos(), angle.sin(), caches[0], caches[1], slots)],
            4.0 * heads.numel(),
        )


def sample_cases() -> Iterator[Case]:
    """Of Qwen3's vocabulary. The settings of each row come from the host, which a graph would not copy again."""
    plain = SamplingRow(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=0.37)
    rows = {
        "greedy": replace(plain, temperature=0.0),
        "plain": plain,
        "top-k, top-p": replace(plain, top_k=20, top_p=0.9),
    }
    for num_rows in (2,) if DRY else (1, 64):
        logits = torch.randn(num_rows, 300 if DRY else 151_936, device=DEVICE) * 3
        for name, row in rows.items():
            case = Case(
                f"sample, {num_rows} rows, {name}",
                [partial(OPS.sample, logits, [row] * num_rows)],
                4.0 * logits.numel(),
            )
            yield case
            if name == "plain":
                yield from beside(case, list(baselines.sample(logits)))


def logprobs_cases() -> Iterator[Case]:
    """Of Qwen3's vocabulary: a token's own alone, and with as many others as a request may ask for."""
    for num_rows in (2,) if DRY else (1, 64, 1024):
        logits = torch.randn(num_rows, 300 if DRY else 151_936, device=DEVICE) * 3
        chosen = torch.arange(num_rows, device=DEVICE)
        for num_top in (0, 20):
            case = Case(
                f"logprobs, {num_rows} rows, the {num_top} likeliest",
                [partial(OPS.logprobs, logits, chosen, num_top)],
                4.0 * logits.numel(),
            )
            yield case
            yield from beside(case, list(baselines.logprobs(logits, chosen, num_top)))
