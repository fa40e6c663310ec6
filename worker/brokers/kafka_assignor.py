"""Which member of the group gets which partitions: whoever held them before, as far as that is fair.

Each partition that changes hands costs what its worker has half done. aiokafka's own round robin moves most of them
whenever somebody comes or goes; its sticky assignor levels all topics together, so that in the end one worker may have
all of a busy topic and another all of an idle one. Here each topic is levelled by itself.

The group's leader deals out, and members tell it what they hold; that is all that passes between them. One for each
consumer: it keeps what that one holds. Pure: no clock, no broker.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from aiokafka.cluster import ClusterMetadata
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata
from msgspec import Struct

PROTOCOL = "tokenmill-keep"  # members of a group must have one in common
VERSION = 0  # of aiokafka's structs


class Held(Struct, frozen=True, array_like=True):
    """What a member says that it holds, and of which generation that is: the younger is right."""

    generation: int
    partitions: dict[str, list[int]]


NOTHING = Held(-1, {})


class KeepingAssignor:
    """Stands in the place of aiokafka's assignors, which are classes and keep what they know for a whole process."""

    name = PROTOCOL

    def __init__(self, generation: Callable[[], int]) -> None:
        """`generation`: the consumer's own, at present; -1 once the group has given it up."""
        self._generation = generation
        self._held: dict[str, list[int]] = {}

    def metadata(self, topics: Iterable[str]) -> ConsumerProtocolMemberMetadata:
        """What the member tells the leader when it joins."""
        held = msgspec.msgpack.encode(Held(self._generation(), self._held))
        return ConsumerProtocolMemberMetadata(VERSION, list(topics), held)

    def on_assignment(self, assignment: ConsumerProtocolMemberAssignment) -> None:
        """The member holds these now."""
        self._held = {topic: list(numbers) for topic, numbers in assignment.assignment}

    def assign(
        self, cluster: ClusterMetadata, members: Mapping[str, ConsumerProtocolMemberMetadata]
    ) -> dict[str, ConsumerProtocolMemberAssignment]:
        """Called of the leader: the share of each member."""
        holders = _holders({member: _held(metadata.user_data) for member, metadata in members.items()})
        shares: dict[str, dict[str, list[int]]] = {member: {} for member in members}
        loads = Counter[str]()
        for topic in sorted({topic for metadata in members.values() for topic in metadata.subscription}):
            readers = sorted(member for member, metadata in members.items() if topic in metadata.subscription)
            numbers = sorted(cluster.partitions_for_topic(topic) or ())
            for member, share in deal(numbers, readers, holders.get(topic, {}), loads).items():
                shares[member][topic] = share
                loads[member] += len(share)
        return {
            member: ConsumerProtocolMemberAssignment(VERSION, sorted(share.items()), b"")
            for member, share in shares.items()
        }


def deal(
    numbers: Sequence[int], readers: Sequence[str], holders: Mapping[int, str], loads: Mapping[str, int]
) -> dict[str, list[int]]:
    """Each reader's share of one topic's partitions: numbers that differ by one at most.

    `holders` are those who held them before, `loads` what each has been given of other topics. Where the division
    leaves a rest, it goes to whom has least; among equals to those who can keep more by it.
    """
    shares = {reader: [number for number in numbers if holders.get(number) == reader] for reader in readers}
    share, rest = divmod(len(numbers), len(readers))
    favoured = sorted(readers, key=lambda reader: (loads[reader], -len(shares[reader]), reader))[:rest]
    room = {reader: share + (reader in favoured) for reader in readers}
    shares = {reader: kept[: room[reader]] for reader, kept in shares.items()}
    kept = {number for held in shares.values() for number in held}
    free = iter([number for number in numbers if number not in kept])
    return {
        reader: sorted([*held, *(next(free) for _ in range(room[reader] - len(held)))])
        for reader, held in shares.items()
    }


def _holders(said: Mapping[str, Held]) -> dict[str, dict[int, str]]:
    """Who holds each partition of each topic. A member that slept through rebalances says what was once true."""
    holders: dict[str, dict[int, str]] = {}
    for member, held in sorted(said.items(), key=lambda one: one[1].generation):
        for topic, numbers in held.partitions.items():
            holders.setdefault(topic, {}).update(dict.fromkeys(numbers, member))
    return holders


def _held(said: bytes) -> Held:
    """What a member says; nothing, if it is not ours to read."""
    try:
        return msgspec.msgpack.decode(said, type=Held)
    except ValueError:  # msgspec's own errors and UnicodeDecodeError are both ValueErrors
        return NOTHING
