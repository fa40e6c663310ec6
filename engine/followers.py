"""The other ranks' processes, as rank 0 sees them: started, told of every batch, watched, and ended.

Owns their lives. Each is at the other end of a pipe of its own. A follower ends when the pipe does, so none can outlive
us, however we end. When one ends unasked we hear it at once. `engine/follow.py` is their side.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Self

import torch
from torch import Tensor

from engine import relay
from engine.batch import Batch
from engine.config import EngineConfig
from engine.errors import RankLost
from engine.loader import read_spec
from engine.models.parts import part_of
from engine.ranks import ALONE, Ranks, join

START_S_MAX = 300.0  # importing torch takes seconds; from a cold disk, with others at it, minutes
END_S_MAX = 5.0  # a follower ends at once when told to
BLAME_S_MAX = 2.0  # a dead process is noticed in milliseconds, on a busy machine in some more

Forward = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Order:
    """What a follower is to be; the first thing that it hears."""

    rank: int
    config: EngineConfig
    model_path: Path
    folder: Path  # where the ranks find each other


@dataclass(frozen=True)
class _Follower:
    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection


class Followers:
    """Ranks 1 and up of an engine; nobody where one rank does it all. One thread's, but for `on_loss`."""

    def __init__(self, followers: Sequence[_Follower], ranks: Ranks) -> None:
        self.ranks = ranks
        self._followers = followers
        self._loss: RankLost | None = None
        self._is_lost = Event()
        self._is_ending = False
        self._tell: Callable[[BaseException], None] = lambda _error: None
        if followers:
            Thread(target=self._watch, name="followers", daemon=True).start()

    @classmethod
    def start(cls, config: EngineConfig, model_path: Path, device: torch.device) -> Self:
        """As many as the settings ask for, waiting for each other and for us.

        Raises EngineMisconfigured, before any is started, where so many cannot share the model, and RankLost where one
        does not come up.
        """
        if config.ranks == 1:
            return cls((), ALONE)
        whole_experts = config.experts == "whole"
        part_of(read_spec(model_path), Ranks(size=config.ranks, whole_experts=whole_experts))
        started: list[_Follower] = []
        try:
            with TemporaryDirectory(prefix="tokenmill-ranks-") as folder:
                started += (_start(Order(rank, config, model_path, Path(folder))) for rank in range(1, config.ranks))
                for follower in started:
                    _await_ready(follower)
                return cls(started, join(0, config.ranks, Path(folder), device, whole_experts=whole_experts))
        except BaseException:
            for follower in started:
                _end(follower)
            raise

    def leading(self, forward: Forward) -> Forward:
        """`forward`, of which every rank computes its part. It raises RankLost where one has died."""
        if not self._followers:
            return forward
        connections = [follower.connection for follower in self._followers]

        def lead(batch: Batch) -> Tensor:
            with self.blaming():
                relay.send(batch, connections, self.ranks)
                return forward(batch)

        return lead

    @contextmanager
    def blaming(self) -> Iterator[None]:
        """What fails within because a rank has died is a RankLost."""
        try:
            yield
        except (RuntimeError, OSError) as error:  # what the group and the pipes raise
            if self._followers and self._is_lost.wait(BLAME_S_MAX) and self._loss:
                raise self._loss from error
            raise

    def on_loss(self, tell: Callable[[BaseException], None]) -> None:
        """`tell` hears, from a thread of ours unless it is so already, when a follower ends that was not told to."""
        self._tell = tell
        if self._loss:
            tell(self._loss)

    def end(self) -> None:
        """They have ended."""
        self._is_ending = True
        for follower in self._followers:
            _end(follower)

    def _watch(self) -> None:
        """Until the first of them says or ends something: none of them does while all is well."""
        ready = wait([follower.connection for follower in self._followers])
        follower = next(one for one in self._followers if one.connection in ready)
        self._loss = _loss(follower)
        self._is_lost.set()
        if not self._is_ending:
            self._tell(self._loss)


def _start(order: Order) -> _Follower:
    ours, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "engine.follow", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,  # Ctrl-C is for us: they work until we have left
        )
    with suppress(OSError):  # it has died: `_await_ready` says so
        ours.send(order)
    return _Follower(order.rank, process, ours)


def _await_ready(follower: _Follower) -> None:
    if not follower.connection.poll(START_S_MAX):
        raise RankLost(f"rank {follower.rank} has not started within {START_S_MAX:.0f} s")
    try:
        said = follower.connection.recv()
    except (EOFError, OSError):
        said = ""
    if said is not None:
        raise _loss(follower, said)


def _loss(follower: _Follower, said: str | None = None) -> RankLost:
    """That the follower has ended, with its last words, or how."""
    if said is None:
        with suppress(EOFError, OSError):
            said = follower.connection.recv()
    with suppress(subprocess.TimeoutExpired):
        follower.process.wait(BLAME_S_MAX)
    return RankLost(f"rank {follower.rank} has ended: {said or f'exit code {follower.process.returncode}'}")


def _end(follower: _Follower) -> None:
    with suppress(OSError):  # it has died before
        follower.connection.send_bytes(relay.END)
    try:
        follower.process.wait(END_S_MAX)
    except subprocess.TimeoutExpired:  # it is stopped, or within a driver
        follower.process.kill()
        follower.process.wait()
    follower.connection.close()
