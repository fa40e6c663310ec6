"""Containment: a request that kills its worker does not do so for ever.

An attempt is on record before it is made: the position's metadata counts it, and only a life that finishes the request,
or lets go of it alive, takes it back. But a record that came after its owner had taken the partition over cannot have
killed anybody before. So only what was in the log by then is counted, and waits for the flush: healthy traffic does not
wait at all, a backlog waits some 40 ms longer than it has, and the first death of a request goes uncounted.

Whoever was there when a worker died may have been killed by others of its batch, or by nobody: machines go away. So all
but the last attempt are made in company, and the last one alone: no other can be hurt then, or take the blame. After
that the request is answered `POISONED` and not begun again.

Pure: no clock, no broker, no engine.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from worker.brokers.base import Record
from worker.partition import Partition


@dataclass
class Waiting:
    """A record that was taken over and is not with the engine yet."""

    partition: Partition
    record: Record
    is_suspect: bool  # its next attempt is its last
    is_counted: bool = False  # the attempt, where it must be

    @property
    def may_pass(self) -> bool:
        """Whether its turn has come and its attempt is on record."""
        return self.is_counted and not self.partition.awaits_record(self.record.offset)


class Gate:
    """Records go in as they come; each comes out once its attempt is on record, and a suspect with nobody beside it.

    In order, and an attempt is counted only when nothing but the record of it is in the way: whoever still waits behind
    a suspect must not be blamed for its death.
    """

    def __init__(self, attempts_max: int) -> None:
        """`attempts_max`: of the attempts at a request that end with the worker's death, three at least.

        With two nobody's last attempt would be made alone, and bystanders would be given up.
        """
        self._counted_max = attempts_max - 1  # the first may have gone uncounted
        self._waiting: deque[Waiting] = deque()
        self._is_solo = False  # what runs is a suspect

    def __len__(self) -> int:
        """How many wait. While any do, nothing more should be polled: they do not count as room taken yet."""
        return len(self._waiting)

    def add(self, partition: Partition, record: Record) -> bool:
        """The record, begun, waits for its turn. False: it has had all its attempts, and does not."""
        attempts = partition.attempts(record.offset)
        if attempts >= self._counted_max:
            return False
        self._waiting.append(Waiting(partition, record, is_suspect=attempts == self._counted_max - 1))
        return True

    def next(self, num_running: int) -> Waiting | None:
        """Who goes to the engine now, in which so many requests run. None: nobody may, until a flush or an answer."""
        if self._is_solo and num_running:
            return None
        self._count(num_running)
        if not self._waiting or not self._waiting[0].may_pass:
            return None
        self._is_solo = self._waiting[0].is_suspect
        return self._waiting.popleft()

    def drop(self, partitions: Collection[Partition]) -> None:
        """These partitions are others' now."""
        self._waiting = deque(waiting for waiting in self._waiting if waiting.partition not in partitions)

    def _count(self, num_running: int) -> None:
        """The attempts of all that may go together: those before the first suspect, or a suspect that is first."""
        for waiting in self._waiting:
            is_first = waiting is self._waiting[0]
            if waiting.is_suspect and (num_running or not is_first):
                return
            if not waiting.is_counted:
                waiting.is_counted = True
                waiting.partition.attempt(waiting.record.offset)
            if waiting.is_suspect:
                return
