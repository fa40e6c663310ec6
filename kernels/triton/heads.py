"""What stands between the projection of queries, keys and values and attention, in one pass.

Bound by memory, and by its launch where tokens are few: it takes the place of two norms, a copy, a rotation and a
write. Reads all heads once, writes queries out and keys and values into the cache: 4 T (H + 2 G) D bytes in bf16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import HeadNorms
from kernels.triton.cache import FP8, PLAIN, as_fp8, as_levels, kind_of, level_size, store_scales
from kernels.triton.elementwise import COLUMNS_PER_PROGRAM, warps


def rotate_and_write(
    heads: Tensor,
    norms: HeadNorms | None,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """As the definition; rounded where it rounds."""
    num_tokens, num_heads, head_size = heads.shape
    num_groups = key_cache.shape[2]
    queries = torch.empty(num_tokens, num_heads - 2 * num_groups, head_size, dtype=heads.dtype, device=heads.device)
    if not num_tokens:
        return queries
    half = triton.next_power_of_2(head_size // 2)
    heads_at_once = min(max(COLUMNS_PER_PROGRAM // 2 // half, 1), triton.next_power_of_2(num_heads))
    _rotate_and_write[num_tokens, triton.cdiv(num_heads, heads_at_once)](
        heads,
        cos if norms is None else norms.query,
        cos if norms is None else norms.key,
        cos,
        sin,
        queries,
        key_cache,
        value_cache,
        slots,
        *heads.stride()[:2],
        *key_cache.stride()[1:3],  # a block's slots are evenly apart, and so are all blocks'
        *value_cache.stride()[1:3],
        num_heads - 2 * num_groups,
        num_groups,
        head_size // 2,
        0.0 if norms is None else norms.eps,
        HAS_NORMS=norms is not None,
        KIND=kind_of(key_cache),
        HEADS=heads_at_once,
        HALF=half,
        num_warps=warps(2 * heads_at_once * half),
    )
    return queries


@triton.jit
def _rotate_and_write(
    heads,
    query_norm,
    key_norm,
    cos,
    sin,
    queries,
    key_cache,
    value_cache,
    slots,
    token_stride,
    head_stride,
    key_slot,
    key_group,
    value_slot,
    value_group,
    H,
    G,
    half,
    eps,
    HAS_NORMS: tl.constexpr,
    KIND: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF)
    inside = pair < half
    source = heads + token * token_stride + head[:, None] * head_stride + pair[None, :]
    mask = (head < H + 2 * G)[:, None] & inside[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    is_rotated = (head < H + G)[:, None]
    if HAS_NORMS:
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * half) + eps)[:, None]
        is_query = (head < H)[:, None]
        normed = first * scale * _weight(query_norm, key_norm, is_query, pair, inside)
        first = tl.where(is_rotated, normed.to(heads.dtype.element_ty).to(tl.float32), first)
        normed = second * scale * _weight(query_norm + half, key_norm + half, is_query, pair, inside)
        second = tl.where(is_rotated, normed.to(heads.dtype.element_ty).to(tl.float32), second)
    c = tl.load(cos + token * half + pair, mask=inside, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * half + pair, mask=inside, other=0.0).to(tl.float32)[None, :]
    turned_first, turned_second = first * c - second * s, second * c + first * s
    first = tl.where(is_rotated, turned_first, first).to(heads.dtype.element_ty)
    second = tl.where(is_rotated, turned_second, second).to(heads.dtype.element_ty)

    target = queries + (token * H + head[:, None]) * (2 * half)
    _store(target, first, second, head < H, pair, half, PLAIN)
    slot = tl.load(slots + token)  # int64: times its stride it is beyond 2^31 on a large device
    target = key_cache + slot * key_slot + (head[:, None] - H) * key_group
    _store(target, first, second, (head >= H) & (head < H + G), pair, half, KIND)
    target = value_cache + slot * value_slot + (head[:, None] - H - G) * value_group
    _store(target, first, second, (head >= H + G) & (head < H + 2 * G), pair, half, KIND)


@triton.jit
def _weight(query_norm, key_norm, is_query, pair, inside):
    query = tl.load(query_norm + pair, mask=inside, other=0.0).to(tl.float32)[None, :]
    key = tl.load(key_norm + pair, mask=inside, other=0.0).to(tl.float32)[None, :]
    return tl.where(is_query, query, key)


@triton.jit
def _store(target, first, second, mine, pair, half, KIND: tl.constexpr):
    # Those heads that are `mine` as rows at target (heads, 1), which have two halves.
    mask = mine[:, None] & (pair < half)[None, :]
    target_pair = target + pair[None, :]
    if KIND == PLAIN:
        tl.store(target_pair, first.to(target.dtype.element_ty), mask=mask)
        tl.store(target_pair + half, second.to(target.dtype.element_ty), mask=mask)
    elif KIND == FP8:
        tl.store(target_pair, as_fp8(first.to(tl.float32)), mask=mask)
        tl.store(target_pair + half, as_fp8(second.to(tl.float32)), mask=mask)
    else:
        a, b = tl.abs(first.to(tl.float32)), tl.abs(second.to(tl.float32))
        is_finite = tl.min(((a < float("inf")) & (b < float("inf"))).to(tl.int32), 1)
        scale = level_size(tl.maximum(tl.max(a, 1), tl.max(b, 1)), is_finite)
        tl.store(target_pair, as_levels(first.to(tl.float32), scale[:, None]), mask=mask)
        tl.store(target_pair + half, as_levels(second.to(tl.float32), scale[:, None]), mask=mask)
        store_scales(target + 2 * half, scale, mine)
