"""The kernels of attention: one works off a list of items, one joins what was cut into segments.

Flash attention (arXiv 2205.14135, 2307.08691) and flash decoding: softmax by tiles, with a running maximum.
"""

import triton
import triton.language as tl

from kernels.triton.cache import INT8, PLAIN, widened_rows

LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials are powers of two: one instruction


@triton.jit
def attend(
    query,
    key_cache,
    value_cache,
    block_tables,
    items,
    output,
    partial,
    partial_log,
    sinks,
    scale,
    window,
    query_token,
    query_head,
    key_slot,
    key_group,
    value_slot,
    value_group,
    table_stride,
    KEY_SIZE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_REST: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    VALUE_IS_KEY: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_UNMASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    ASM: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One item and one key-value head: rows are query tokens times the group's heads.

    An item is (sequence, row of its first query in the batch, number of queries, position of the first, start and end
    of the segment, partial result to write, the segment's number). A partial result of -1: the segment is the whole
    context, write the output.
    """
    group, num_groups = tl.program_id(1), tl.num_programs(1)
    item = items + tl.program_id(0) * 8
    table = block_tables + tl.load(item).to(tl.int64) * table_stride
    first_row, num_queries, first_position = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    start, end, place = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    if num_queries == 0:  # room that a plan of fixed size does not need
        return

    row = tl.arange(0, ROWS)
    token, head = row // GROUP_HEADS, group * GROUP_HEADS + row % GROUP_HEADS
    inside = token < num_queries
    position = first_position + token  # (ROWS,): the last that a row sees
    source = query + (first_row + token).to(tl.int64)[:, None] * query_token + head[:, None] * query_head
    column = tl.arange(0, KEY_BLOCK)[None, :]
    q = tl.load(source + column, mask=inside[:, None] & (column < KEY_SIZE), other=0.0)  # (ROWS, KEY_BLOCK)
    q_rest = q
    if KEY_REST > 0:
        column = KEY_BLOCK + tl.arange(0, KEY_REST)[None, :]
        q_rest = tl.load(source + column, mask=inside[:, None] & (column < KEY_SIZE), other=0.0)
    if KIND != PLAIN:  # which multiplies fp16
        q, q_rest = q.to(tl.float16), q_rest.to(tl.float16)

    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if HAS_SINKS:  # one more score, without a value, that the first segment alone counts
        is_first = tl.load(item + 7) == 0
        maximum = tl.where(is_first, tl.load(sinks + head).to(tl.float32) * LOG2_E, maximum)
        total = tl.where(is_first, 1.0, total)
    accumulated = tl.zeros((ROWS, VALUE_BLOCK), tl.float32)
    keys, values = key_cache + group * key_group, value_cache + group * value_group

    masked_from = start
    if HAS_UNMASKED:  # tiles that every row sees whole
        masked_from = tl.maximum(start, tl.minimum(first_position + 1, end) // TILE * TILE)
        for tile in range(start, masked_from, TILE):
            maximum, total, accumulated = _visit(
                q, q_rest, keys, values, table, tile, end, position, scale, window, key_slot, value_slot,
                maximum, total, accumulated, KEY_SIZE, KEY_BLOCK, KEY_REST, VALUE_SIZE, VALUE_BLOCK, VALUE_IS_KEY,
                KIND, BLOCK_SIZE, False, False, PRECISION, ASM, TILE,
            )  # fmt: skip
    for tile in range(masked_from, end, TILE):
        maximum, total, accumulated = _visit(
            q, q_rest, keys, values, table, tile, end, position, scale, window, key_slot, value_slot,
            maximum, total, accumulated, KEY_SIZE, KEY_BLOCK, KEY_REST, VALUE_SIZE, VALUE_BLOCK, VALUE_IS_KEY,
            KIND, BLOCK_SIZE, True, HAS_WINDOW, PRECISION, ASM, TILE,
        )  # fmt: skip

    # A row that sees nothing of this segment has no total: it counts as exp(-inf) when segments are joined.
    result = accumulated / tl.where(total > 0, total, 1.0)[:, None]
    column = tl.arange(0, VALUE_BLOCK)[None, :]
    writes = inside[:, None] & (column < VALUE_SIZE)
    if place >= 0:
        slot = (place.to(tl.int64) * num_groups + group) * ROWS + row
        tl.store(partial + slot[:, None] * VALUE_SIZE + column, result, mask=writes)
        logarithm = tl.where(total > 0, maximum + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(partial_log + slot, logarithm, mask=inside)
    else:
        target = ((first_row + token).to(tl.int64) * (num_groups * GROUP_HEADS) + head) * VALUE_SIZE
        tl.store(output + target[:, None] + column, result.to(output.dtype.element_ty), mask=writes)


@triton.jit
def _visit(
    q,
    q_rest,
    keys,
    values,
    table,
    tile,
    end,
    position,
    scale,
    window,
    key_slot,
    value_slot,
    maximum,
    total,
    accumulated,
    KEY_SIZE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_REST: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    VALUE_IS_KEY: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    ASM: tl.constexpr,
    TILE: tl.constexpr,
):
    # One tile of positions joins the running maximum, total and weighted sum of the values.
    there = tile + tl.arange(0, TILE)
    written = there < end  # slots beyond may hold anything, NaN included, which times nothing is NaN
    if BLOCK_SIZE % TILE == 0:  # the tile lies in one block
        block = tl.load(table + tile // BLOCK_SIZE)  # int64, and so all addresses
        slot = block * BLOCK_SIZE + tile % BLOCK_SIZE + tl.arange(0, TILE)
    elif MASKED:
        block = tl.load(table + there // BLOCK_SIZE, mask=written, other=0)
        slot = block * BLOCK_SIZE + there % BLOCK_SIZE
    else:
        block = tl.load(table + there // BLOCK_SIZE)
        slot = block * BLOCK_SIZE + there % BLOCK_SIZE

    key = _rows(
        keys + slot[:, None] * key_slot, written, 0, KEY_BLOCK, KEY_SIZE, MASKED, KIND, ASM
    )  # (TILE, KEY_BLOCK)
    scores = tl.dot(q, key.T, input_precision=PRECISION)
    if KEY_REST > 0:
        rest = _rows(keys + slot[:, None] * key_slot, written, KEY_BLOCK, KEY_REST, KEY_SIZE, MASKED, KIND, ASM)
        scores = tl.dot(q_rest, rest.T, scores, input_precision=PRECISION)
    scores *= scale  # (ROWS, TILE)
    if KIND == INT8:
        scores *= _scales(keys + slot * key_slot, written, KEY_SIZE, MASKED)[None, :]
    if MASKED:
        seen = there[None, :] <= position[:, None]  # so none of a segment's last tile beyond what is written
        if HAS_WINDOW:
            seen &= there[None, :] > position[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))

    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    base = new_maximum
    if MASKED:
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # a row that has seen nothing yet
    probabilities = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(maximum - base)
    total = total * shrink + tl.sum(probabilities, 1)
    if VALUE_IS_KEY:
        value = key
    else:
        value = _rows(
            values + slot[:, None] * value_slot, written, 0, VALUE_BLOCK, VALUE_SIZE, MASKED, KIND, ASM
        )  # (TILE, VALUE_BLOCK)
    if KIND == INT8:  # the values' scales are their probabilities' share, relative to the largest: fp16 is small
        scales = _scales(values + slot * value_slot, written, VALUE_SIZE, MASKED)
        largest = tl.max(scales, 0)
        probabilities *= (scales / tl.where(largest > 0, largest, 1.0))[None, :]
        accumulated = accumulated * shrink[:, None] + tl.dot(probabilities.to(value.dtype), value) * largest
    else:
        accumulated = tl.dot(
            probabilities.to(value.dtype), value, accumulated * shrink[:, None], input_precision=PRECISION
        )  # (ROWS, VALUE_BLOCK)
    return new_maximum, total, accumulated


@triton.jit
def _rows(
    pointers,
    written,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    MASKED: tl.constexpr,
    KIND: tl.constexpr,
    ASM: tl.constexpr,
):
    # COLUMNS columns from FIRST on of rows of SIZE numbers; 0 beyond them and, where MASKED, beyond what is written.
    if KIND == PLAIN:
        rows = _elements(pointers, written, FIRST, COLUMNS, SIZE, MASKED)
    else:
        rows = widened_rows(_elements(pointers, written, FIRST // 4, COLUMNS // 4, SIZE // 4, MASKED), KIND, ASM)
    return rows


@triton.jit
def _elements(pointers, written, FIRST: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr):
    column = FIRST + tl.arange(0, COLUMNS)[None, :]
    if FIRST + COLUMNS <= SIZE:
        if MASKED:
            return tl.load(pointers + column, mask=written[:, None], other=0)
        return tl.load(pointers + column)
    if MASKED:
        return tl.load(pointers + column, mask=written[:, None] & (column < SIZE), other=0)
    return tl.load(pointers + column, mask=column < SIZE, other=0)


@triton.jit
def _scales(pointers, written, SIZE: tl.constexpr, MASKED: tl.constexpr):
    # Those of int8's rows (TILE,) fp32, which stand behind their levels.
    if MASKED:
        return tl.load(pointers + SIZE // 4, mask=written, other=0).to(tl.float32, bitcast=True)
    return tl.load(pointers + SIZE // 4).to(tl.float32, bitcast=True)


@triton.jit
def join(
    joins,
    output,
    partial,
    partial_log,
    VALUE_SIZE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """One row of one tile: the mean of its segments' results, weighted by their totals.

    A join is (row of the tile's first query in the batch, number of queries, first partial result, number of them).
    """
    group, num_groups, row = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    join = joins + tl.program_id(0) * 4
    first_row, num_queries, first, num_segments = tl.load(join), tl.load(join + 1), tl.load(join + 2), tl.load(join + 3)
    token = row // GROUP_HEADS
    if token >= num_queries:
        return
    segment = tl.arange(0, SEGMENTS)
    there = segment < num_segments
    slot = ((first + segment).to(tl.int64) * num_groups + group) * ROWS + row
    logarithm = tl.load(partial_log + slot, mask=there, other=float("-inf"))
    weight = tl.exp2(logarithm - tl.max(logarithm, 0))  # the last segment has seen at least the row's own position
    column = tl.arange(0, VALUE_BLOCK)
    mask = there[:, None] & (column < VALUE_SIZE)[None, :]
    result = tl.load(partial + slot[:, None] * VALUE_SIZE + column[None, :], mask=mask, other=0.0)
    mean = tl.sum(result * weight[:, None], 0) / tl.sum(weight, 0)
    head = group * GROUP_HEADS + row % GROUP_HEADS
    target = ((first_row + token).to(tl.int64) * (num_groups * GROUP_HEADS) + head) * VALUE_SIZE
    tl.store(output + target + column, mean.to(output.dtype.element_ty), mask=column < VALUE_SIZE)
