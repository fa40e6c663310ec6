"""A plan as tensors: what the decoder reads in one step.

Owns the translation of positions into places in the cache. Built anew for every step, from shares alone: what a
sequence's share becomes does not depend on the others in the batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sequence import Share
from kernels.ops import AttentionBatch
from kernels.transfer import send

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One step's input: T tokens of S sequences, R of which have a token sampled or scored behind them."""

    token_ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64
    attention: AttentionBatch
    rows: Tensor  # (R,) int64, into T, in the order of the shares


def build_batch(shares: list[Share], block_size: int, drawn: Tensor) -> Batch:
    """The tensors of a step, on the device; worked out on the host in a few arrays, whatever the number of shares.

    drawn (R,) int64, on the device: the tokens of the step before, for those that the host does not know yet.
    """
    lengths = np.array([len(share.tokens) for share in shares], dtype=np.int64)  # (S,)
    starts = np.array([share.start for share in shares], dtype=np.int64)  # (S,)
    num_rows = np.array([share.num_scored + share.num_rows for share in shares], dtype=np.int64)  # (S,)
    token_ids = np.array([token for share in shares for token in share.tokens], dtype=np.int64)  # (T,)
    ends = lengths.cumsum()  # (S,) behind each share's last token
    owners = np.repeat(np.arange(len(shares)), lengths)  # (T,) the share of each token
    places = np.arange(len(token_ids)) - (ends - lengths)[owners]  # (T,) of each token in its share
    positions = starts[owners] + places  # (T,)
    tables = _block_tables(shares)  # (S, N)
    slots = tables[owners, positions // block_size] * block_size + positions % block_size  # (T,)

    rows = np.flatnonzero(places >= (lengths - num_rows)[owners])  # (R,)
    unknown = np.flatnonzero(token_ids < 0)
    gaps = [unknown, ~token_ids[unknown]] if len(unknown) else []
    arrays = [token_ids, positions, slots, rows, tables, *gaps]
    token_ids_there, positions_there, slots_there, rows_there, tables_there, *gaps_there = send(arrays, drawn.device)
    if gaps_there:
        at, row = gaps_there
        token_ids_there.index_copy_(0, at, drawn[row])
    attention = AttentionBatch(tables_there, [0, *ends.tolist()], (starts + lengths).tolist(), slots_there)
    return Batch(token_ids_there, positions_there, attention, rows_there)


def none_drawn(device: torch.device) -> Tensor:
    """In the place of the tokens of the step before, where the host knows all tokens."""
    return torch.empty(0, dtype=torch.int64, device=device)


def _block_tables(shares: list[Share]) -> Integers:
    """Each sequence's blocks, padded with 0: (S, blocks of the longest) int64."""
    blocks = [share.sequence.blocks for share in shares]
    nums = np.array([len(own) for own in blocks])
    tables = np.zeros((len(shares), nums.max()), dtype=np.int64)
    tables[np.arange(tables.shape[1]) < nums[:, None]] = np.frombuffer(b"".join(blocks), dtype=np.int64)
    return tables
