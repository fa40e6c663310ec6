"""The port in memory: one member and one producer of a `MemoryCluster`, for simulating crashes.

Faults come in by a hook before and after each port call. It may raise `Crash` (the process is gone: every later call
raises it too), raise `OutcomeUnknown` (before: it did not happen; after: it did, and the answer was lost), or wait, as
a frozen worker does. Misuse of the port that Kafka would punish at random fails an assertion here.
"""

import asyncio
from asyncio import Future
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Literal

from worker.brokers.base import Membership, Outgoing, Place, Position, RebalanceListener, Record
from worker.brokers.memory_cluster import Group, MemoryCluster, Producer, Transaction
from worker.errors import Fenced, Misconfigured, OutcomeUnknown

Moment = Literal["before", "after"]
Fault = Callable[[str, Moment], Awaitable[None]]  # given the call's name

PATIENCE_TURNS = 5  # of the event loop; Kafka's successor waits a second before it ends a transaction in its way


class Crash(BaseException):
    """The process died here. Not an Exception: nothing may handle it."""


READS = frozenset(("poll", "positions", "ends"))  # nothing has changed after one: the next point is as good


class FaultAt:
    """A hook that raises `error` at the n-th point of a run, from 1 on; let n grow until a run does not reach it.

    The points are before each call, and after each that changes something.
    """

    def __init__(self, number: int, error: BaseException) -> None:
        self._left = number
        self._error = error

    @property
    def reached(self) -> bool:
        """Whether the run came as far as the fault."""
        return self._left <= 0

    async def __call__(self, call: str, moment: Moment) -> None:
        """Counts, and raises when it is time."""
        if moment == "after" and call in READS:
            return
        self._left -= 1
        if self._left == 0:
            raise self._error


class MemoryBroker:
    """A worker's place in the group, as `KafkaBroker` is. `fault` is called around each port call."""

    def __init__(self, cluster: MemoryCluster, group: str, worker: str, fault: Fault | None = None) -> None:
        self.cluster = cluster
        self.group = cluster.groups.setdefault(group, Group(group, cluster))
        self.worker = worker
        self.is_dead = False
        self._transactional_id = f"{group}/{worker}"
        self._fault = fault
        self._is_broken = False
        self._must_rejoin = False
        self._failure: BaseException | None = None
        self._held: dict[Place, int] = {}  # with the offset to read next
        self._is_holding = False
        self._epoch = 0
        self.gone = asyncio.Event()  # the group no longer waits for us
        self._in_callback = asyncio.Lock()  # one at a time, however late: a member makes them on one task
        self.strays: set[asyncio.Task[None]] = set()  # calls of the group that it no longer waits for

    async def start(self, topics: Sequence[str], listener: RebalanceListener) -> None:
        async with self._port("start"):
            if missing := [topic for topic in topics if topic not in self.cluster.topics]:
                raise Misconfigured(f"topic {missing[0]!r} does not exist; create it with `tokenmill topics create`")
            self._topics, self._listener = tuple(topics), listener
            self._epoch = self.cluster.open_producer(self._transactional_id, self)
            self.group.end_abandoned()
            await self.group.join(self)

    async def stop(self) -> None:
        async with self._port("stop"):
            self._held.clear()
            self.group.remove(self)
            await self.group.rebalance()

    async def poll(self, places: Collection[Place], num_max: int, timeout_s: float) -> list[Record]:
        async with self._port("poll"):
            if self._failure:
                raise self._failure
            if self._must_rejoin or not self.group.has(self):
                self._must_rejoin = False
                await self.revoke()  # before it asks to join, as every Kafka client does
                await self.group.join(self)
            if not (records := self._read(places, num_max)):
                with suppress(TimeoutError):
                    async with asyncio.timeout(timeout_s):  # wait_for loses a cancel that comes with the change
                        await self.cluster.changed()
                records = self._read(places, num_max)
            self._held.update((record.place, record.offset + 1) for record in records)
        return records

    def seek(self, place: Place, offset: int) -> None:
        assert place in self._held, f"{place} is not ours"
        self._held[place] = offset

    async def positions(self, places: Collection[Place]) -> Mapping[Place, Position]:
        async with self._port("positions"):
            turns = 0
            while self.group.is_unstable(places):
                turns += 1
                if turns == PATIENCE_TURNS:
                    self.group.end_abandoned()
                elif turns < PATIENCE_TURNS:
                    await asyncio.sleep(0)
                else:
                    await self.cluster.changed()  # its owner lives, and will end it
            return {place: self.group.positions.get(place, Position(0)) for place in places}

    async def ends(self, places: Collection[Place]) -> Mapping[Place, int]:
        async with self._port("ends"):
            return {place: len(self.cluster.logs[place].entries) for place in places}

    async def begin(self) -> None:
        async with self._port("begin", in_transaction=True):
            producer = self._producer()
            assert producer.transaction is None, "begin within a transaction"
            producer.transaction = Transaction()

    async def send(self, record: Outgoing) -> Awaitable[None]:
        async with self._port("send", in_transaction=True):
            self.cluster.append(record, self._transaction())
            sent: Future[None] = asyncio.get_running_loop().create_future()
            sent.set_result(None)
        return sent

    async def send_positions(self, positions: Mapping[Place, Position], membership: Membership) -> None:
        async with self._port("send_positions", in_transaction=True):
            transaction = self._transaction()
            if membership != self.group.membership_of(self):
                self._must_rejoin = self.group.membership_of(self) is not None
                raise Fenced(f"{membership} is not the group's present one")
            transaction.group = self.group
            transaction.positions.update(positions)

    async def commit(self) -> None:
        async with self._port("commit", in_transaction=True):
            self.cluster.end(self._transaction(), "committed")
            self._producer().transaction = None

    async def abort(self) -> None:
        async with self._port("abort", in_transaction=True):
            self.cluster.end(self._transaction(), "aborted")
            self._producer().transaction = None

    async def renew(self) -> None:
        async with self._port("renew"):
            self._epoch = self.cluster.open_producer(self._transactional_id, self)
            self._is_broken = False

    async def preview(self, record: Outgoing) -> None:
        async with self._port("preview"):
            with suppress(Misconfigured):
                self.cluster.append(record, None)

    async def lag(self) -> Mapping[Place, int]:
        return {place: len(self.cluster.logs[place].entries) - offset for place, offset in self._held.items()}

    def reads(self, topic: str) -> bool:
        """Whether it is one that we asked for."""
        return topic in self._topics

    async def revoke(self) -> None:
        """Called by the group: the partitions are in doubt."""
        async with self._in_callback:
            if self._is_holding:
                self._is_holding = False
                await self._kept(self._listener.revoked())
            self._held.clear()

    async def assign(self, places: Sequence[Place], membership: Membership) -> None:
        """Called by the group: these are ours."""
        async with self._in_callback:
            self._held = dict.fromkeys(places, 0)
            self._is_holding = True
            await self._kept(self._listener.assigned(places, membership))

    @asynccontextmanager
    async def _port(self, call: str, *, in_transaction: bool = False) -> AsyncIterator[None]:
        assert not (in_transaction and self._is_broken), f"{call} after OutcomeUnknown: only renew may follow"
        await self._point(call, "before")
        yield
        await self._point(call, "after")

    async def _point(self, call: str, moment: Moment) -> None:
        await asyncio.sleep(0)  # a call to a broker always lets the others run
        if self.is_dead:
            raise Crash
        if self._fault is None:
            return
        try:
            await self._fault(call, moment)
        except Crash:
            self.die()
            raise
        except OutcomeUnknown:
            self._is_broken = True
            raise

    def die(self) -> None:
        """The process is gone: every later call raises Crash."""
        self.is_dead = True
        self.group.give_up(self)

    async def _kept(self, call: Awaitable[None]) -> None:
        try:
            await call
        except Crash:  # its own tasks will meet it at their next call
            return
        except Exception as error:  # noqa: BLE001  # raised by the next poll, as with Kafka
            self._failure = error

    def _producer(self) -> Producer:
        producer = self.cluster.producers[self._transactional_id]
        if producer.epoch != self._epoch:
            self._must_rejoin = True
            raise Fenced(f"another producer of {self._transactional_id} has taken our place")
        return producer

    def _transaction(self) -> Transaction:
        transaction = self._producer().transaction
        assert transaction, "begin comes first"
        return transaction

    def _read(self, places: Collection[Place], num_max: int) -> list[Record]:
        records: list[Record] = []
        for place in sorted(set(places) & self._held.keys()):
            for record in self.cluster.logs[place].readable(self._held[place]):
                if len(records) >= num_max:
                    return records
                records.append(record)
        return records
