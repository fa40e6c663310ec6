"""Tile sizes by shape, from tables: nothing is searched for while serving.

Owns every number that trades one resource of the device for another. Each was chosen from the machine code for sm_90
(registers, shared memory, instructions) and stands until `make gpu` says otherwise.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DOT_MIN = 16  # the least side of a matrix instruction's operand


@dataclass(frozen=True)
class AttentionTile:
    """Rows (query tokens times heads of a group) by positions of the context."""

    rows: int
    positions: int
    num_warps: int
    num_stages: int


ATTENTION_ROWS = (16, 32, 64, 128)
LONG_QUERY_ROWS = 128  # a prompt's tile: arithmetic counts, so tiles that need no mask get a loop without one
HEAD_SIZE_LONG = 512  # key and value together: with larger heads, 128 rows of results do not fit into registers


def attention_rows_max(head_size: int) -> int:
    """The largest tile's rows; head_size: of key and value together."""
    return ATTENTION_ROWS[-1] if head_size <= HEAD_SIZE_LONG else ATTENTION_ROWS[-2]


def attention_rows(rows: NDArray[np.int64], heads: int, head_size: int) -> NDArray[np.int64]:
    """The tile's rows for sequences with `rows` each: the least that hold a short query, and one token's heads."""
    sizes = np.array([size for size in ATTENTION_ROWS if heads <= size <= attention_rows_max(head_size)])
    held: NDArray[np.int64] = sizes[np.minimum(np.searchsorted(sizes, rows), len(sizes) - 1)]
    return held


def attention_tile(rows: int, head_size: int) -> AttentionTile:
    """head_size: of key and value together."""
    is_large = head_size > HEAD_SIZE_LONG
    return AttentionTile(rows, positions=32 if is_large else 64, num_warps=8 if rows > 32 else 4, num_stages=3)
