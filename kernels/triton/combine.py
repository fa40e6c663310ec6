"""Partial results of a product become one: the sum over splits of its inputs, and over each token's experts.

Bound by memory: every partial result is read once, 4 bytes of a split, 2 of an expert's or of what all tokens share.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS_PER_PROGRAM = 1024


def combine(product: Tensor, num_chosen: int, chosen_weights: Tensor | None, shared: Tensor | None = None) -> Tensor:
    """The weighted sum (T, out) bf16 of product (splits, T * num_chosen, out), and of `shared` (T, out), in fp32."""
    splits, num_pairs, num_out = product.shape
    num_tokens = num_pairs // num_chosen
    output = torch.empty(num_tokens, num_out, dtype=torch.bfloat16, device=product.device)
    block = min(triton.next_power_of_2(num_out), COLUMNS_PER_PROGRAM)
    _sum[num_tokens, triton.cdiv(num_out, block)](
        product,
        product if chosen_weights is None else chosen_weights,
        product if shared is None else shared,
        output,
        num_pairs,
        num_out,
        0 if shared is None else shared.stride(0),
        HAS_WEIGHTS=chosen_weights is not None,
        HAS_SHARED=shared is not None,
        CHOSEN=num_chosen,
        SPLITS=splits,
        BLOCK=block,
    )
    return output


@triton.jit
def _sum(
    product,
    chosen_weights,
    shared,
    output,
    num_pairs,
    num_out,
    shared_stride,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    CHOSEN: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_out
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(CHOSEN):
        pair = token * CHOSEN + choice
        weight, counts = tl.full((BLOCK,), 1.0, tl.float32), inside
        if HAS_WEIGHTS:
            weight *= tl.load(chosen_weights + pair)
            counts &= weight != 0.0  # what counts nothing may not have been computed
        for split in tl.static_range(SPLITS):
            part = tl.load(product + (split * num_pairs + pair) * num_out + column, mask=counts, other=0.0)
            total += weight * part.to(tl.float32)
    if HAS_SHARED:
        total += tl.load(shared + token * shared_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + token * num_out + column, total.to(output.dtype.element_ty), mask=inside)
