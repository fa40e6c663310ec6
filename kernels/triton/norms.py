"""Norms, and the residual's sum before them: one pass over memory.

Owns what a norm gives to products: bf16, and e4m3 beside it where one of them would round that. Bound by memory: the
bytes beside each function are its whole cost on a full device, and its launch on an empty one. Sums run in fp32. A row
may begin anywhere (a view of some columns); within it the elements are neighbours.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.elementwise import warps
from kernels.triton.quantize import TwoForms, empty_rows, round_groups
from kernels.weights import FP8_GROUP


@dataclass(frozen=True)
class RoundingNorm:
    """A norm's weight, where what it gives is wanted rounded, too."""

    weight: Tensor  # (C,) bf16


def prepare_norm(weight: Tensor, layouts: Collection[str]) -> Tensor | RoundingNorm:
    """As the table has it. fp32 is for comparison, not for serving: there each product rounds what it reads."""
    return RoundingNorm(weight) if "fp8" in layouts and weight.dtype == torch.bfloat16 else weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the definition. Reads and writes x once: 4 T C bytes in bf16."""
    rows = x.reshape(-1, x.shape[-1])  # (T, C)
    normed = torch.empty_like(rows)
    _launch(rows, None, weight, normed, normed, None, eps)
    return normed.view(x.shape)


def add_rms_norm(
    x: Tensor, residual: Tensor, norm: Tensor | RoundingNorm, eps: float
) -> tuple[Tensor | TwoForms, Tensor]:
    """As the definition. Two reads and two writes: 8 T C bytes in bf16, and T C more of e4m3."""
    normed, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if isinstance(norm, Tensor):
        _launch(x, residual, norm, normed, total, None, eps)
        return normed, total
    forms = TwoForms(normed, empty_rows(x.shape[0], x.shape[1], x.device))
    _launch(x, residual, norm.weight, normed, total, forms, eps)
    return forms, total


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    normed: Tensor,
    total: Tensor,
    forms: TwoForms | None,
    eps: float,
) -> None:
    """One program for each row, of which it holds the whole. Without a residual `total` is not written."""
    if not len(x):
        return
    block = triton.next_power_of_2(x.shape[1])
    block = max(block, FP8_GROUP) if forms else block
    _rms_norm[len(x),](
        x,
        x if residual is None else residual,
        weight,
        normed,
        total,
        forms.rounded.values if forms else normed,
        forms.rounded.scales if forms else normed,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        x.shape[1],
        eps,
        ADD=residual is not None,
        ROUND=forms is not None,
        GROUP=FP8_GROUP,
        BLOCK=block,
        num_warps=warps(block),
    )


@triton.jit
def _rms_norm(
    x,
    residual,
    weight,
    normed,
    total,
    rounded,
    scales,
    x_stride,
    residual_stride,
    C,
    eps,
    ADD: tl.constexpr,
    ROUND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program a row, which stays in registers between the sum and the product.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    if ADD:
        other = tl.load(residual + row * residual_stride + columns, mask=inside, other=0.0)
        values = (values.to(tl.float32) + other.to(tl.float32)).to(values.dtype)  # rounded as the residual will be
        tl.store(total + row * C + columns, values, mask=inside)
    values = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / C + eps)
    scaled = values * scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    narrow = scaled.to(normed.dtype.element_ty)
    tl.store(normed + row * C + columns, narrow, mask=inside)
    if ROUND:  # what the other products read, not what was before it: as if they rounded it themselves
        groups = tl.reshape(narrow.to(tl.float32), (BLOCK // GROUP, GROUP))
        levels, group_scales = round_groups(groups)
        tl.store(rounded + row * C + columns, tl.reshape(levels, (BLOCK,)), mask=inside)
        group = tl.arange(0, BLOCK // GROUP)
        tl.store(scales + group * tl.num_programs(0) + row, group_scales, mask=group * GROUP < C)
