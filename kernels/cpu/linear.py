"""Multiplying by a weight on the CPU, one `WeightKernel` for each format.

Owns `WEIGHTS`. A decode step reads every weight once for a few rows and is bound by memory, so quantized weights are
widened inside torch's weight-only kernels; those compute too slowly for many rows, for which the weight is widened in
pieces that stay in the cache and multiplied by a GEMM.

The product is taken in the precision of the format: fp32 for fp32, bf16 operands with fp32 sums for all others. Rows
are independent of each other on every path.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels import reference
from kernels.ops import WeightKernel
from kernels.weights import INT4_GROUP, Parts, dequantize_int4, int4_by, unpack_nibbles

# oneDNN packs for an expected number of rows; 16 packs well for 1 to 256 (within 5 % of packing for the exact number).
ROWS_EXPECTED = 16
PIECE_ELEMENTS = 2**18  # 1 MB in fp32: a widened piece is multiplied before it leaves the second-level cache


def _prepacks(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs and multiplies this dtype here: bf16 needs AVX-512 or AVX-NE-CONVERT."""
    try:
        _linear_prepacked(torch.ones(1, 16, dtype=dtype), _prepack({"weight": torch.ones(16, 16, dtype=dtype)}))
    except (RuntimeError, AttributeError):  # the processor's refusal; a torch without these ops
        return False
    return True


def _prepack(parts: Parts) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(parts["weight"].contiguous(), ROWS_EXPECTED)
    return packed


def _linear_prepacked(x: Tensor, weight: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(weight.dtype), weight, None, "none", [], "")
    return product.to(x.dtype)


HAS_FP32_PACKING = _prepacks(torch.float32)
HAS_BF16 = _prepacks(torch.bfloat16)

# Rows up to which a kernel that widens as it goes beats widening in pieces. Measured with AVX2 at 576 x 1536 and
# 1024 x 4096: int8 wins at 16 rows and loses at 64, int4 wins at 64 and loses at 256, bf16 wins at 4 and loses at 8.
INT8_ROWS_MAX = 32
INT4_ROWS_MAX = 128
BF16_ROWS_MAX = 4


def _linear_by_pieces(x: Tensor, num_out: int, widen: Callable[[slice], Tensor]) -> Tensor:
    """Multiplies x by the matrix whose rows `widen` gives: (T, num_out) in x's dtype, with one piece wide at a time."""
    x_wide = x if HAS_BF16 and x.dtype == torch.bfloat16 else x.float()
    product = x_wide.new_empty(len(x), num_out)
    num_rows = max(1, PIECE_ELEMENTS // x.shape[1])
    for start in range(0, num_out, num_rows):
        piece = slice(start, min(start + num_rows, num_out))
        torch.mm(x_wide, widen(piece).to(x_wide.dtype).t(), out=product[:, piece])
    return product.to(x.dtype)


def _keep_bf16(parts: Parts) -> Tensor:
    warnings.warn(
        "this processor has no bf16 multiplication: bf16 weights are widened at each use. "
        "Where memory allows, fp32 is faster with several sequences; int8 is faster always.",
        RuntimeWarning,
        stacklevel=2,
    )
    return parts["weight"].contiguous()


def _linear_bf16(x: Tensor, weight: Tensor) -> Tensor:
    """For processors without bf16 multiplication."""
    x16 = x.bfloat16()
    if len(x) <= BF16_ROWS_MAX:
        return functional.linear(x16, weight).to(x.dtype)
    return _linear_by_pieces(x16, len(weight), lambda piece: weight[piece]).to(x.dtype)


@dataclass(frozen=True)
class _Int8:
    q: Tensor  # (out, in) int8
    scale: Tensor  # (out,) bf16
    has_kernel: bool


def _prepare_int8(parts: Parts) -> _Int8:
    # torch's kernel reads whole vectors (32 values with AVX-512) and runs over the row's end without a check.
    return _Int8(parts["q"].contiguous(), parts["scale"].bfloat16(), has_kernel=parts["q"].shape[1] % 32 == 0)


def _linear_int8(x: Tensor, weight: _Int8) -> Tensor:
    x16 = x.bfloat16()
    if weight.has_kernel and len(x) <= INT8_ROWS_MAX:
        return torch._weight_int8pack_mm(x16, weight.q, weight.scale).to(x.dtype)
    product = _linear_by_pieces(x16, len(weight.q), lambda piece: weight.q[piece])
    return product.mul_(weight.scale).to(x.dtype)


@dataclass(frozen=True)
class _Int4:
    """The levels twice, a byte a weight in all: the kernel's own layout cannot be widened."""

    packed: Tensor | None  # None where the kernel does not fit
    scale_and_zero: Tensor  # (in / 32, out, 2) bf16
    parts: Parts

    def widen(self, piece: slice) -> Tensor:
        return dequantize_int4({name: part[piece] for name, part in self.parts.items()})


def _prepare_int4(parts: Parts) -> _Int4:
    parts = int4_by(parts, INT4_GROUP)
    scale_and_zero = torch.stack([parts["scale"], parts["zero"]], dim=-1).transpose(0, 1).contiguous()
    if len(parts["q"]) % 16:  # torch's kernel takes no other number of output features
        return _Int4(None, scale_and_zero, parts)
    levels = unpack_nibbles(parts["q"]).int()
    return _Int4(torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1), scale_and_zero, parts)


def _linear_int4(x: Tensor, weight: _Int4) -> Tensor:
    x16 = x.bfloat16()
    if weight.packed is not None and len(x) <= INT4_ROWS_MAX:
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x16, weight.packed, INT4_GROUP, weight.scale_and_zero
        )
    else:
        product = _linear_by_pieces(x16, len(weight.parts["q"]), weight.widen)
    return product.to(x.dtype)


_PREPACKED = WeightKernel(prepare=_prepack, linear=_linear_prepacked)

WEIGHTS = {
    "fp32": _PREPACKED if HAS_FP32_PACKING else reference.OPS.weights["fp32"],
    "bf16": _PREPACKED if HAS_BF16 else WeightKernel(prepare=_keep_bf16, linear=_linear_bf16),
    "int8": WeightKernel(prepare=_prepare_int8, linear=_linear_int8),
    "int4": WeightKernel(prepare=_prepare_int4, linear=_linear_int4),
}
