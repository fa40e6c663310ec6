"""Products by prepared weights: of one matrix, and of each token's chosen experts.

Owns what is multiplied in which order, and where partial results are summed. The kernel is `multiply.py`'s, its tiles
are those of `tiles.py`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels import reference
from kernels.ops import Linear
from kernels.triton import tiles
from kernels.triton.alignment import Aligned, align
from kernels.triton.combine import combine
from kernels.triton.elementwise import swiglu
from kernels.triton.multiply import Gate, multiply, multiply_and_quantize
from kernels.triton.quantize import TwoForms, plain, rows_for
from kernels.triton.weights import Matrices
from kernels.triton.widen import widen

# One pair a tile, without sorting, while that repeats few experts: with a quarter of E pairs, two in eight share one.
UNSORTED_SHARE = 4


def linear(x: Tensor | TwoForms, weight: Matrices) -> Tensor:
    """The product of x (T, in) and one matrix: (T, out) in x's dtype, with fp32 sums.

    Operands are bf16, or e4m3 where the weight is: `reference.quantize_rows_fp8`.
    """
    tokens = plain(x)
    if not len(tokens):
        return tokens.new_empty(0, weight.num_out)
    if len(tokens) > tiles.DENSE_TOKENS_MAX and weight.format != "fp8":
        return functional.linear(tokens.bfloat16(), widen(weight)).to(tokens.dtype)
    tile = tiles.product_tile(weight.format, weight.depth, len(tokens), 1, weight.num_out, weight.num_in)
    product = multiply(rows_for(weight.format, x), weight, tile, num_pairs=len(tokens))  # (splits, T, out)
    return (product[0] if len(product) == 1 else combine(product, 1, None)).to(tokens.dtype)


def linear_bf16(x: Tensor | TwoForms, weight: Matrices) -> Tensor:
    """As `linear`, by cuBLAS, which is as fast at any number of tokens."""
    tokens = plain(x)
    return functional.linear(tokens.bfloat16(), weight.values[0]).to(tokens.dtype)


def experts(
    x: Tensor | TwoForms,
    chosen_weights: Tensor,
    chosen: Tensor,
    gate_up: Sequence[Any],
    down: Sequence[Any],
    linear: Linear,
    activation: Callable[[Tensor], Tensor],
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    shared: Tensor | None = None,
) -> Tensor:
    """As the definition, from operands as in `linear`; either gate of the table within the first product."""
    tokens = plain(x)
    if not isinstance(gate_up, Matrices) or not isinstance(down, Matrices):  # fp32: for comparison, not for serving
        biases = gate_up_bias, down_bias
        return reference.experts(tokens, chosen_weights, chosen, gate_up, down, linear, activation, *biases, shared)
    if not len(tokens):
        return torch.empty_like(tokens)
    chosen, chosen_weights = chosen.contiguous(), chosen_weights.contiguous()
    gate, num_pairs, num_experts = _gate(activation), chosen.numel(), len(gate_up)
    inner_tile, outer_tile = (
        tiles.product_tile(
            matrices.format,
            matrices.depth,
            num_pairs,
            num_experts,
            matrices.num_out // (2 if one_gate else 1),
            matrices.num_in,
            is_gated=one_gate is not None,
        )
        for matrices, one_gate in ((gate_up, gate), (down, None))
    )
    places: Aligned | Tensor = chosen
    if num_pairs * UNSORTED_SHARE > num_experts:
        places = align(chosen, num_experts, inner_tile.tokens)
    rows, num_chosen = rows_for(gate_up.format, x), chosen.shape[1]
    if gate and gate_up.format == "fp8":
        inner = multiply_and_quantize(rows, gate_up, inner_tile, num_pairs, places, gate_up_bias, num_chosen, gate)
    else:
        product = multiply(rows, gate_up, inner_tile, num_pairs, places, gate_up_bias, num_chosen, gate)
        inner = rows_for(down.format, _summed(product) if gate else activation(_summed(product)))
    outer = multiply(inner, down, outer_tile, num_pairs, places, down_bias)  # (splits, T * K, C)
    return combine(outer, num_chosen, chosen_weights, shared).to(tokens.dtype)


def _summed(product: Tensor) -> Tensor:
    return product[0] if len(product) == 1 else combine(product, 1, None)


def _gate(activation: Callable[[Tensor], Tensor]) -> Gate | None:
    """The activation as a part of the product; None where it is another function."""
    if activation is swiglu:
        return Gate()
    if isinstance(activation, partial) and activation.func is reference.clamped_swiglu:
        return Gate(**activation.keywords)
    return None
