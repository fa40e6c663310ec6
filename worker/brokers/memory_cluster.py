"""A cluster in memory: logs, groups and producers with Kafka's semantics and none of its time.

Owns all state that outlives a worker. Shared by any number of `MemoryBroker`s on one event loop; everything that a real
cluster decides by a clock is a call here (`expire` is the session timeout), so a run is a function of its inputs.
Markers take offsets as they do in Kafka, so logs have gaps.
"""

import asyncio
from collections.abc import Collection, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from zlib import crc32

from worker.brokers.base import Headers, Membership, Outgoing, Place, Position, Record
from worker.errors import Misconfigured


class MemoryCluster:
    """The logs, groups and producers. Made with the number of partitions of each topic."""

    def __init__(self, topics: Mapping[str, int]) -> None:
        self.topics: dict[str, int] = {}
        self.logs: dict[Place, _Log] = {}
        self.groups: dict[str, Group] = {}
        self.producers: dict[str, Producer] = {}
        self._changed = asyncio.Event()
        for topic, count in topics.items():
            self.create_topic(topic, count)

    def create_topic(self, topic: str, partitions: int) -> None:
        """The topic exists, empty. Groups deal it out at their next rebalance."""
        self.topics[topic] = partitions
        self.logs.update((Place(topic, number), _Log()) for number in range(partitions))

    def produce(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        headers: Headers = (),
        partition: int | None = None,
    ) -> Record:
        """A record of a client that uses no transactions, as it is kept."""
        return self.append(Outgoing(topic=topic, key=key, value=value, headers=headers, partition=partition), None)

    def committed(self, topic: str) -> list[Record]:
        """What a read_committed reader sees of the topic, partition by partition."""
        return [
            record for place, log in sorted(self.logs.items()) if place.topic == topic for record in log.readable(0)
        ]

    def positions(self, group: str) -> dict[Place, Position]:
        """What the group has committed."""
        return dict(self.groups[group].positions)

    async def expire(self, broker: "Member") -> None:
        """The group gives up waiting for a silent member, without its knowledge; the others have its partitions."""
        broker.group.remove(broker)
        await broker.group.rebalance()

    def append(self, record: Outgoing, transaction: "Transaction | None") -> Record:
        """The record at the end of its log; visible when its transaction, if any, is committed."""
        place = Place(record.topic, self._partition(record))
        if place not in self.logs:
            raise Misconfigured(f"topic {record.topic!r} does not exist; create it with `tokenmill topics create`")
        log = self.logs[place]
        kept = Record(
            place=place,
            offset=len(log.entries),
            key=record.key,
            value=record.value,
            headers=record.headers,
            timestamp_ms=0,  # no clock here
        )
        log.entries.append(_Entry(kept, transaction))
        if transaction:
            transaction.touched[place] = None
        self.wake()
        return kept

    def end(self, transaction: "Transaction", state: Literal["committed", "aborted"]) -> None:
        """The transaction is over: a marker in each log that it wrote to, and its positions hold or are forgotten."""
        transaction.state = state
        for place in transaction.touched:
            self.logs[place].entries.append(_Entry(None, transaction))
        if state == "committed" and transaction.group:
            transaction.group.positions.update(transaction.positions)
        self.wake()

    def open_producer(self, transactional_id: str, owner: "Member | None") -> int:
        """The epoch of a new producer of this id: the one before is fenced, and its transaction over."""
        producer = self.producers.setdefault(transactional_id, Producer())
        if producer.transaction:
            self.end(producer.transaction, "aborted")
        producer.epoch, producer.transaction, producer.owner = producer.epoch + 1, None, owner
        return producer.epoch

    def time_out(self) -> None:
        """The transactions that are open now have been for too long: they are over, and their producers fenced."""
        for transactional_id, producer in self.producers.items():
            if producer.transaction:
                self.open_producer(transactional_id, None)

    def wake(self) -> None:
        """Whoever waits for a change looks again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Waits for the next change."""
        await self._changed.wait()

    def _partition(self, record: Outgoing) -> int:
        count = self.topics.get(record.topic)
        if record.partition is not None or count is None:  # a topic that does not exist has no log 0 either
            return record.partition or 0
        if record.key is not None:
            return crc32(record.key) % count
        return sum(len(self.logs[Place(record.topic, number)].entries) for number in range(count)) % count


class Member(Protocol):
    """What the cluster knows of a broker object."""

    worker: str
    group: "Group"
    is_dead: bool
    gone: asyncio.Event
    strays: set[asyncio.Task[None]]

    def reads(self, topic: str) -> bool:
        """Whether it has asked for the topic."""

    async def revoke(self) -> None:
        """Its partitions are in doubt."""

    async def assign(self, places: Sequence[Place], membership: Membership) -> None:
        """These partitions are its own under this membership."""


@dataclass(eq=False)
class Transaction:
    """What one producer has sent since it began, and the positions that become true with it."""

    state: Literal["open", "committed", "aborted"] = "open"
    touched: dict[Place, None] = field(default_factory=dict)  # in order
    group: "Group | None" = None
    positions: dict[Place, Position] = field(default_factory=dict)


@dataclass(eq=False)
class Producer:
    """A transactional id's present producer; those of lower epochs are fenced."""

    epoch: int = 0
    owner: "Member | None" = None
    transaction: Transaction | None = None


@dataclass(frozen=True)
class _Entry:
    record: Record | None  # None: a marker
    transaction: Transaction | None


@dataclass
class _Log:
    entries: list[_Entry] = field(default_factory=list)

    def readable(self, start: int) -> Iterator[Record]:
        """The committed records from here on, up to the first that is still undecided."""
        for entry in self.entries[start:]:
            state = entry.transaction.state if entry.transaction else "committed"
            if state == "open":
                return
            if state == "committed" and entry.record:
                yield entry.record


class Group:
    """A consumer group: who is in, in which generation, and how far it has come."""

    def __init__(self, name: str, cluster: MemoryCluster) -> None:
        self.positions: dict[Place, Position] = {}
        self._name = name
        self._cluster = cluster
        self._generation = 0
        self._num_joined = 0
        self._members: dict[Member, str] = {}
        self._rebalancing = asyncio.Lock()

    def has(self, broker: Member) -> bool:
        """Whether the broker is a member, whatever it believes itself."""
        return broker in self._members

    def membership_of(self, broker: Member) -> Membership | None:
        """Its right to commit; None if it is no member."""
        if not self.has(broker):
            return None
        return Membership(group=self._name, generation=self._generation, member=self._members[broker])

    async def join(self, broker: Member) -> None:
        """The broker is a member, and the partitions are dealt out anew."""
        if not self.has(broker):
            self._num_joined += 1
            self._members[broker] = f"{broker.worker}-{self._num_joined}"  # each time another, as Kafka has it
            broker.gone = asyncio.Event()
        await self.rebalance()

    def remove(self, broker: Member) -> None:
        """The broker is no member; what waited for it goes on."""
        self._members.pop(broker, None)
        self.give_up(broker)

    def give_up(self, broker: Member) -> None:
        """Nobody waits for the broker any more."""
        broker.gone.set()

    async def rebalance(self) -> None:
        """Every member has given up its partitions, and has its share of all of them."""
        async with self._rebalancing:
            self._bury()
            for broker in list(self._members):
                await _unless_gone(broker, broker.revoke())
            self._bury()
            self._generation += 1
            for broker, share in self._shares().items():
                if membership := self.membership_of(broker):
                    await _unless_gone(broker, broker.assign(share, membership))

    def is_unstable(self, places: Collection[Place]) -> bool:
        """Whether an open transaction will move one of these positions."""
        return any(
            transaction.group is self and transaction.positions.keys() & set(places)
            for producer in self._cluster.producers.values()
            if (transaction := producer.transaction)
        )

    def end_abandoned(self) -> None:
        """The transactions of those who are not, or no longer, members of this group are over, and they are fenced."""
        for transactional_id, producer in self._cluster.producers.items():
            owner = producer.owner
            if producer.transaction and owner and owner.group is self and (owner.is_dead or not self.has(owner)):
                self._cluster.open_producer(transactional_id, None)

    def _bury(self) -> None:
        for broker in [broker for broker in self._members if broker.is_dead]:
            self.remove(broker)

    def _shares(self) -> dict[Member, list[Place]]:
        """Round robin over the members, in the order of joining."""
        brokers = list(self._members)
        shares: dict[Member, list[Place]] = {broker: [] for broker in brokers}
        for topic in sorted({place.topic for place in self._cluster.logs}):
            readers = [broker for broker in brokers if broker.reads(topic)]
            for number in range(self._cluster.topics[topic] if readers else 0):
                shares[readers[number % len(readers)]].append(Place(topic, number))
        return shares


async def _unless_gone(broker: Member, call: Coroutine[Any, Any, None]) -> None:
    """The call has ended; or the group no longer waits, and the call goes on by itself, as a zombie's would."""
    running, gone = asyncio.create_task(call), asyncio.create_task(broker.gone.wait())
    await asyncio.wait((running, gone), return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    broker.strays.add(running)  # asyncio itself keeps no hold of a task
    running.add_done_callback(broker.strays.discard)
