"""Each kernel against its definition in fp64, on the device's own machine code.

Owns the cases and how far off a kernel may be.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu.inputs import BITS, Heads, random_attention, random_matrices
from benchmarks.gpu.measure import DEVICE, DRY
from benchmarks.gpu.report import Report
from kernels import reference
from kernels.cache import CACHE_DTYPES, decode, row_size
from kernels.ops import HeadNorms, SamplingRow
from kernels.triton import OPS
from kernels.triton.quantize import Rows
from kernels.triton.weights import Matrices
from kernels.weights import FP8_GROUP

ERROR_MAX = 2**-7  # of the norm: bf16 rounds by 2^-8 at most, and what is between two products is rounded too


def run(report: Report) -> list[str]:
    """The kernels that are further from fp64 than bf16's rounding explains."""
    for name, actual, expected in checks():
        difference = (actual.double() - expected).norm() / expected.norm()
        report.errors[name] = float(difference)
        print(f"{name:40} off by {difference:.1e}")
    return [name for name, error in report.errors.items() if not error <= ERROR_MAX]


def checks() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, what the kernel makes, and what it should."""
    size = 128 if DRY else 2048
    x, residual = torch.randn(2, 5, size, device=DEVICE).bfloat16()
    weight = torch.randn(size, device=DEVICE).bfloat16()
    total = (x + residual).double()
    norm = total * (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    yield "add_rms_norm", OPS.add_rms_norm(x, residual, weight, 1e-6)[0], norm
    forms, _ = OPS.add_rms_norm(x, residual, OPS.prepare_norm(weight, ["fp8"]), 1e-6)
    yield "add_rms_norm, rounded too", unrounded(forms.rounded), rounded_fp8(forms.plain)
    gate, up = x.double().chunk(2, -1)
    yield "swiglu", OPS.swiglu(x), gate.sigmoid() * gate * up
    yield from attention_checks()
    yield from product_checks()
    logits = torch.randn(5, 64, device=DEVICE)
    weights, chosen = OPS.route(logits, 6, "softmax", True, 1.0, 8, 3)
    best, experts = reference.route(logits.double(), 6, "softmax", True, 1.0, 8, 3)
    yield "route, in groups", weights + chosen, best + experts.double()
    logits = torch.randn(4, 5000, device=DEVICE) * 3
    plain = SamplingRow(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, uniform=0.37)
    rows = [plain, replace(plain, temperature=0.0), replace(plain, top_k=0), replace(plain, top_k=0, top_p=1.0)]
    yield "sample", OPS.sample(logits, rows), reference.sample(logits, rows).double()
    own, ids, top = OPS.logprobs(logits, torch.arange(4, device=DEVICE), 20)
    scores = logits.double().log_softmax(-1)
    best, best_ids = (column[:, :20] for column in scores.sort(dim=-1, descending=True, stable=True))
    yield "logprobs", torch.cat([own[:, None], top], 1), torch.cat([scores.diagonal()[:, None], best], 1)
    yield "logprobs, of the likeliest tokens", ids, best_ids.double()


def attention_checks() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Caches of all kinds, and what stands before them."""
    usual, latent = Heads("usual", 8, 2, 64), Heads("latent", 16, 1, 80, value_size=64)
    for heads, kept in ((usual, "bf16"), (usual, "fp8"), (usual, "int8"), (latent, "bf16"), (latent, "fp8")):
        for sequences in ((2, 1, 700), (1, 4, 300), (1, 40, 90)):
            inputs = random_attention(*sequences, heads, CACHE_DTYPES[kept])
            query, keys, values, batch = inputs
            expected = reference.attention(query.float(), keys, values, batch, 0.125).double()
            yield f"attention, {kept}, {heads.name}, {sequences}", OPS.attention(*inputs, 0.125), expected
    qkv, angle = torch.randn(5, 12, 64, device=DEVICE).bfloat16(), torch.randn(5, 32, device=DEVICE)
    norms = HeadNorms(torch.randn(64, device=DEVICE).bfloat16(), torch.randn(64, device=DEVICE).bfloat16(), 1e-6)
    for kept, dtype in CACHE_DTYPES.items():
        caches = torch.zeros(2, 2, 1, 8, 2, row_size(64, dtype), dtype=dtype, device=DEVICE)
        slots = torch.tensor([7, 0, 3, 2, 5], device=DEVICE)
        for table, (keys, values) in zip((OPS, reference.OPS), caches, strict=True):
            table.rotate_and_write(qkv, norms, angle.cos(), angle.sin(), keys, values, slots)
        yield f"rotate and write, {kept}", decode(caches[0]), decode(caches[1]).double()


def product_checks() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Experts in all formats."""
    for kind in BITS:
        gate_up, down = random_matrices(kind, 8, 256, 128), random_matrices(kind, 8, 128, 128)
        wide = [[widened(one).double() for one in gate_up], [widened(one).double() for one in down]]
        rounded = rounded_fp8 if gate_up.format == "fp8" else torch.clone
        for num_tokens in (1, 20) if DRY else (1, 20, 300):
            tokens = torch.randn(num_tokens, 128, device=DEVICE).bfloat16()
            routed = reference.route(torch.randn(num_tokens, 8, device=DEVICE), 2, "softmax", True)
            actual = OPS.experts(tokens, *routed, gate_up, down, OPS.weights[gate_up.format].linear, OPS.swiglu)
            expected = experts_fp64(tokens.double(), *routed, wide[0], wide[1], rounded)
            yield f"{kind} experts, {num_tokens} tokens", actual, expected


def rounded_fp8(x: Tensor) -> Tensor:
    """Activations as products with fp8 weights read them."""
    return reference.quantize_rows_fp8(x).double()


def unrounded(rows: Rows) -> Tensor:
    """What rounded activations stand for."""
    assert rows.scales is not None
    return rows.values.float() * rows.scales.T.repeat_interleave(FP8_GROUP, 1)[:, : rows.values.shape[1]]


def widened(matrix: Matrices) -> Tensor:
    """One matrix by the device's own machine code: multiplied by the identity. fp8 has none to be widened by."""
    if matrix.format == "fp8":
        scales = matrix.scales[0]
        each = scales[:, None] if scales.ndim == 1 else scales.T.repeat_interleave(FP8_GROUP, 1)[:, : matrix.num_in]
        return matrix.values[0].float() * each
    identity = torch.eye(matrix.num_in, device=DEVICE).bfloat16()
    return OPS.weights[matrix.format].linear(identity, matrix).T


def experts_fp64(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    gate_up: list[Tensor],
    down: list[Tensor],
    rounded: Callable[[Tensor], Tensor],
) -> Tensor:
    """The definition's sum, in fp64 from end to end, of activations `rounded` before each product."""
    total = torch.zeros_like(x)
    for expert in range(len(gate_up)):
        tokens, places = torch.where(chosen == expert)
        gate, up = (rounded(x[tokens]) @ gate_up[expert].T).chunk(2, -1)
        output = rounded(gate * gate.sigmoid() * up) @ down[expert].T
        total.index_add_(0, tokens, output * weights[tokens, places, None].double())
    return total
