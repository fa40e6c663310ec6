"""The port between the worker and a broker of ordered, partitioned logs with transactions.

Owns the plain data and the protocol; `kafka.py` and `memory.py` are its two sides, held to one contract suite. Bytes
and numbers only: what a record means is `schemas/codec.py`.
"""

from collections.abc import Awaitable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

from msgspec import Struct

Headers = tuple[tuple[str, bytes | None], ...]  # Kafka allows a name twice, and a value of null

METADATA_CHARS_MAX = 4096  # the brokers' default offset.metadata.max.bytes; they count characters


class Place(NamedTuple):
    """The name of a partition."""

    topic: str
    partition: int


class Record(Struct, frozen=True, kw_only=True):
    """One consumed record."""

    place: Place
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int


class Outgoing(Struct, frozen=True, kw_only=True):
    """One record to send. `partition` None: chosen by the key."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    partition: int | None = None


class Position(Struct, frozen=True):
    """How far a group has come in a partition: the lowest unfinished offset, and what is finished above it."""

    offset: int
    metadata: str = ""

    def __post_init__(self) -> None:
        if len(self.metadata) > METADATA_CHARS_MAX:  # refused here, for the broker's refusal comes amid a transaction
            raise ValueError(f"metadata of {len(self.metadata)} characters, more than {METADATA_CHARS_MAX}")


class Membership(Struct, frozen=True, kw_only=True):
    """The right to commit, as a value: taken together with an assignment, checked by the broker in the transaction."""

    group: str
    generation: int
    member: str


class RebalanceListener(Protocol):
    """What the worker does when partitions come and go. The broker awaits both before it hands out another record."""

    async def revoked(self) -> None:
        """All partitions are in doubt: after this returns no commit is under way and none will start."""

    async def assigned(self, places: Sequence[Place], membership: Membership) -> None:
        """These partitions are ours under this membership; positions must be read and sought before it returns."""


class Broker(Protocol):
    """One group member and one transactional producer.

    Transaction calls come in bursts and in this order: begin, send..., send_positions, commit; or abort at any point
    after begin. Only `worker/flush.py` calls them. After OutcomeUnknown nothing but `renew` may be called.
    """

    async def start(self, topics: Sequence[str], listener: RebalanceListener) -> None:
        """Joins the group. Ends the open transactions that dead workers of the group left. Raises Unavailable or
        Misconfigured (a topic is missing, a right is missing: it names which).
        """

    async def stop(self) -> None:
        """Leaves the group at once, so that others take over without waiting for a timeout."""

    async def poll(self, places: Collection[Place], num_max: int, timeout_s: float) -> list[Record]:
        """At most `num_max` records of these partitions, in order within each. The other partitions are paused. Must be
        called steadily even with no places: it keeps the membership alive.
        """

    def seek(self, place: Place, offset: int) -> None:
        """The next record polled from the partition is the first at or after `offset`."""

    async def positions(self, places: Collection[Place]) -> Mapping[Place, Position]:
        """The committed positions, waiting until no transaction on them is open. Partitions without one are given the
        start of their log, with empty metadata.
        """

    async def ends(self, places: Collection[Place]) -> Mapping[Place, int]:
        """Where these partitions end: what cannot be polled yet has this offset or a higher one."""

    async def begin(self) -> None:
        """A transaction is open. Raises OutcomeUnknown when the producer is broken."""

    async def send(self, record: Outgoing) -> Awaitable[None]:
        """Hands the record over; the awaitable returned is done when the broker has it."""

    async def send_positions(self, positions: Mapping[Place, Position], membership: Membership) -> None:
        """Raises Fenced when the membership is not the group's present one."""

    async def commit(self) -> None:
        """Raises OutcomeUnknown when no answer came, Fenced when another producer has taken our place."""

    async def abort(self) -> None:
        """Nothing of the open transaction will be seen. Raises as `commit` does."""

    async def renew(self) -> None:
        """Drops the producer and opens a new one in its place; any transaction of the old one is over afterwards."""

    async def preview(self, record: Outgoing) -> None:
        """Sends outside transactions, best effort: may be lost, never blocks for long, never raises for the broker."""

    async def lag(self) -> Mapping[Place, int]:
        """Records between our position and the end of each held partition, as far as is known without asking."""
