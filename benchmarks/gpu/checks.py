"""Each kernel against its definition in fp64, on the device's own machine code.

Owns the cases and how far off a kernel may be.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu.inputs import BITS, random_attention, random_matrices
from benchmarks.gpu.measure import DEVICE, DRY
from benchmarks.gpu.report import Report
from kernels import reference
from kernels.ops import SamplingRow
from kernels.triton import OPS
from kernels.triton.weights import Matrices

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
