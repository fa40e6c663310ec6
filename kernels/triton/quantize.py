"""Activations as products read them: as they are, or rounded to e4m3 by groups.

Owns the rounding that `reference.quantize_rows_fp8` defines. Bound by memory: 3 bytes a number are moved.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cache import FP8_MAX as _FP8_MAX
from kernels.weights import FP8_GROUP

FP8_MAX = tl.constexpr(_FP8_MAX)
GROUPS_PER_PROGRAM = 8  # 1,024 numbers: a thread of four warps loads 16 bytes


@dataclass(frozen=True)
class Rows:
    """Rows of numbers, with the scales of their groups where they are e4m3."""

    values: Tensor  # (rows, in) bf16 or e4m3
    scales: Tensor | None  # (in / 128, rows) fp32: a tile's tokens are neighbours


@dataclass(frozen=True)
class TwoForms:
    """The same activations for products of either kind: what `add_rms_norm` gives where both may follow."""

    plain: Tensor  # (rows, in) bf16
    rounded: Rows


def plain(x: Tensor | TwoForms) -> Tensor:
    """Activations (rows, in) as they are."""
    return x.plain if isinstance(x, TwoForms) else x


def rows_for(format: str, x: Tensor | TwoForms) -> Rows:
    """Activations (rows, in) as products with matrices of the format read them."""
    if format != "fp8":
        return Rows(plain(x).bfloat16(), None)
    return x.rounded if isinstance(x, TwoForms) else quantize(x)


def empty_rows(num_rows: int, num_in: int, device: torch.device) -> Rows:
    """Room for rounded rows."""
    values = torch.empty(num_rows, num_in, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(triton.cdiv(num_in, FP8_GROUP), num_rows, dtype=torch.float32, device=device)
    return Rows(values, scales)


def quantize(x: Tensor) -> Rows:
    """As the definition, in e4m3 and apart from the scales. A NaN stays one by itself: no product cares which."""
    num_rows, num_in = x.shape
    rows, num_groups = empty_rows(num_rows, num_in, x.device), triton.cdiv(num_in, FP8_GROUP)
    groups = min(triton.next_power_of_2(num_groups), GROUPS_PER_PROGRAM)
    _quantize[num_rows, triton.cdiv(num_groups, groups)](
        x, rows.values, rows.scales, x.stride(0), num_rows, num_in, GROUPS=groups, GROUP=FP8_GROUP
    )
    return rows


@triton.jit
def _quantize(x, values, scales, stride, num_rows, num_in, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < num_in
    numbers = tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    levels, group_scales = round_groups(numbers)
    tl.store(values + row * num_in + column, levels, mask=inside)
    tl.store(scales + group.to(tl.int64) * num_rows + row, group_scales, mask=group * GROUP < num_in)


@triton.jit
def round_groups(numbers):
    """Numbers (groups, 128) fp32 in e4m3, and the scale of each group."""
    most = tl.max(tl.abs(numbers), 1)
    return (numbers * per_level(most)[:, None]).to(tl.float8e4nv), most / FP8_MAX


@triton.jit
def per_level(most):
    """By what a group's numbers are multiplied whose largest magnitude is `most`."""
    return tl.where(most == 0, 0.0, FP8_MAX / tl.where(most == 0, 1.0, most))
