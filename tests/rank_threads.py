"""Several ranks in one process: a thread for each, and between them the groups that processes would have."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import TypeVar

import torch

from engine.ranks import Ranks, join

T = TypeVar("T")

TIMEOUT_S = 60  # for what takes a fraction of a second, on a machine that may be busy


def together(size: int, work: Callable[[Ranks], T], *, whole_experts: bool = False) -> list[T]:
    """What each rank's work returns, in the order of the ranks. Raises what the first of them raises: others may wait
    for it for ever.
    """
    ended: Queue[tuple[int, T | Exception]] = Queue()

    def run(rank: int) -> None:
        try:
            ranks = join(rank, size, Path(folder), torch.device("cpu"), whole_experts=whole_experts)
            with torch.inference_mode():
                ended.put((rank, work(ranks)))
        except Exception as error:  # noqa: BLE001  whatever it is
            ended.put((rank, error))

    results: dict[int, T] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(size):
            Thread(target=run, args=(rank,), daemon=True).start()
        for _ in range(size):
            rank, result = ended.get(timeout=TIMEOUT_S)
            if isinstance(result, Exception):
                raise result
            results[rank] = result
    return [results[rank] for rank in range(size)]
