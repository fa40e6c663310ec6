"""A batch on its way from rank 0 to the others.

Owns how it is packed: what the host must know goes down each follower's pipe, and wakes it; the tensors follow as one,
from device to device, so that rank 0 never waits for its own.
"""

from collections.abc import Iterable
from multiprocessing.connection import Connection

import numpy as np
import torch

from engine.batch import Batch
from engine.ranks import Ranks
from kernels.ops import AttentionBatch

END = b""  # in the place of a batch: there will be no more


def send(batch: Batch, connections: Iterable[Connection], ranks: Ranks) -> None:
    """Every follower has the batch, or is about to have it."""
    attention = batch.attention
    sizes = (len(batch.token_ids), *attention.block_tables.shape, len(batch.rows))
    message = np.array([*sizes, *attention.query_starts, *attention.context_lens], dtype=np.int64).tobytes()
    for connection in connections:
        connection.send_bytes(message)
    tensors = (batch.token_ids, batch.positions, attention.slots, batch.rows, attention.block_tables.flatten())
    ranks.broadcast(torch.cat(tensors))


def receive(message: bytes, ranks: Ranks) -> Batch:
    """The batch of which rank 0 has sent the message."""
    numbers = np.frombuffer(message, dtype=np.int64).tolist()
    (T, S, N, R), rest = numbers[:4], numbers[4:]
    packed = ranks.broadcast(torch.empty(3 * T + R + S * N, dtype=torch.int64, device=ranks.device))
    token_ids, positions, slots, rows, tables = torch.split(packed, [T, T, T, R, S * N])
    attention = AttentionBatch(tables.view(S, N), rest[: S + 1], rest[S + 1 :], slots)
    return Batch(token_ids, positions, attention, rows)
