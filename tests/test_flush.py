"""What a failed flush means: every row of the decision table, against a broker whose calls fail where the test says."""

import asyncio
from dataclasses import dataclass, field

import pytest

from tests.virtual_time import virtually
from worker.brokers.base import Membership, Outgoing, Place, Position
from worker.brokers.memory import Fault, FaultAt, MemoryBroker
from worker.brokers.memory_cluster import MemoryCluster
from worker.errors import Fenced, Misconfigured, OutcomeUnknown, Unavailable
from worker.flush import ATTEMPTS_MAX, BURST_BYTES_MAX, flush, portions
from worker.partition import Burst, Outcome

IN, OUT = Place("in", 0), Place("out", 0)
START, DONE = Position(0), Position(1, "1me,")
ANSWER, NOTE = b"answer", b"note"


@dataclass
class Owner:
    """A member of the group that takes what it is assigned, and its broker."""

    broker: MemoryBroker
    memberships: list[Membership] = field(default_factory=list)

    async def revoked(self) -> None:
        pass

    async def assigned(self, places, membership) -> None:
        self.memberships.append(membership)

    async def flush(self, position: Position = DONE, membership: Membership | None = None) -> int:
        """One answer, a note, and the position that says so."""
        burst = Burst(outcomes=[Outcome(records=[record(ANSWER)])], attempts=(), before=START, position=position)
        return await flush(self.broker, {IN: burst}, [record(NOTE)], membership or self.memberships[-1])


def record(value: bytes, topic: str = OUT.topic) -> Outgoing:
    return Outgoing(topic=topic, key=None, value=value)


async def joined(cluster: MemoryCluster, name: str = "me", fault: Fault | None = None) -> Owner:
    owner = Owner(MemoryBroker(cluster, "group", name, fault))
    await owner.broker.start([IN.topic], owner)
    return owner


def a_cluster() -> MemoryCluster:
    return MemoryCluster({IN.topic: 1, OUT.topic: 1})


def seen(cluster: MemoryCluster) -> list[bytes | None]:
    return [record.value for record in cluster.committed(OUT.topic)]


class At:
    """Does something at a call's moment, each time or the first time only."""

    def __init__(self, call: str, moment: str, action, *, once: bool = True) -> None:
        self._point = (call, moment)
        self._action = action
        self._once = once
        self._is_over = False

    async def __call__(self, call, moment):
        if (call, moment) == self._point and not self._is_over:
            self._is_over = self._once
            await self._action()


async def lose_sight() -> None:
    raise OutcomeUnknown("no answer came")


@virtually
async def test_a_flush_that_nothing_hinders_takes_one_attempt():
    cluster = a_cluster()
    owner = await joined(cluster)
    assert await owner.flush() == 1
    assert seen(cluster) == [ANSWER, NOTE]
    assert cluster.positions("group") == {IN: DONE}


@virtually
async def test_a_commit_whose_answer_was_lost_is_not_repeated():
    cluster = a_cluster()
    owner = await joined(cluster, fault=At("commit", "after", lose_sight))
    assert await owner.flush() == 1
    assert seen(cluster) == [ANSWER, NOTE]


@virtually
async def test_a_commit_that_did_not_happen_is_repeated():
    cluster = a_cluster()
    owner = await joined(cluster, fault=At("commit", "before", lose_sight))
    assert await owner.flush() == 2
    assert seen(cluster) == [ANSWER, NOTE]
    assert cluster.positions("group") == {IN: DONE}


@pytest.mark.parametrize("call", ["begin", "send", "send_positions", "commit"])
@pytest.mark.parametrize("moment", ["before", "after"])
@virtually
async def test_whichever_call_was_lost_sight_of_the_answer_is_there_once(call, moment):
    cluster = a_cluster()
    owner = await joined(cluster, fault=At(call, moment, lose_sight))
    await owner.flush()
    assert seen(cluster) == [ANSWER, NOTE]
    assert cluster.positions("group") == {IN: DONE}


@pytest.mark.parametrize("owner_after", [DONE.offset, DONE.offset + 1], ids=["equally far", "further"])
@virtually
async def test_another_owner_in_between_leaves_the_outcome_unknown(owner_after):
    """The group gives up the owner in its commit; another answers the same record and commits under its own name."""
    cluster = a_cluster()

    async def lose_the_partition() -> None:
        await cluster.expire(owner.broker)
        other = await joined(cluster, "other")
        await other.flush(Position(owner_after, "1other,"))
        await lose_sight()

    owner = await joined(cluster, fault=At("commit", "before", lose_the_partition))
    with pytest.raises(Fenced) as caught:
        await owner.flush()
    assert not caught.value.outcome_known
    assert seen(cluster) == [ANSWER, NOTE]  # the other's


@virtually
async def test_a_stale_generation_is_fenced_and_nothing_of_the_flush_is_seen():
    cluster = a_cluster()
    owner = await joined(cluster)
    stale = owner.memberships[-1]
    await joined(cluster, "other")
    with pytest.raises(Fenced) as caught:
        await owner.flush(membership=stale)
    assert caught.value.outcome_known
    assert seen(cluster) == []
    assert await owner.flush() == 1  # under the present one, with the producer that took the place of the fenced one


@virtually
async def test_a_flush_that_never_succeeds_ends_the_worker():
    cluster = a_cluster()
    begun = []

    async def count_and_lose() -> None:
        begun.append(1)
        await lose_sight()

    owner = await joined(cluster, fault=At("commit", "before", count_and_lose, once=False))
    with pytest.raises(Unavailable):
        await owner.flush()
    assert len(begun) == ATTEMPTS_MAX
    assert seen(cluster) == []
    assert cluster.positions("group") == {}


class Rejecting(MemoryBroker):
    """Takes every record, and rejects it later, as a broker does with one that is too large."""

    async def send(self, record):
        await super().send(record)
        answer = asyncio.get_running_loop().create_future()
        answer.set_exception(Misconfigured("the record is too large"))
        return answer


@virtually
async def test_a_record_that_is_rejected_late_stops_the_commit():
    cluster = a_cluster()
    owner = Owner(Rejecting(cluster, "group", "me"))
    await owner.broker.start([IN.topic], owner)
    with pytest.raises(Misconfigured, match="too large"):
        await owner.flush()
    assert seen(cluster) == []
    assert cluster.positions("group") == {}


@virtually
async def test_a_missing_topic_stops_the_commit():
    cluster = a_cluster()
    owner = await joined(cluster)
    burst = Burst(
        outcomes=[Outcome(records=[record(ANSWER), record(ANSWER, "missing")])],
        attempts=(),
        before=START,
        position=DONE,
    )
    with pytest.raises(Misconfigured, match="missing"):
        await flush(owner.broker, {IN: burst}, [], owner.memberships[-1])
    assert seen(cluster) == []


@virtually
async def test_notes_alone_need_no_membership():
    cluster = a_cluster()
    owner = await joined(cluster)
    assert await flush(owner.broker, {}, [record(NOTE)], None) == 1
    assert seen(cluster) == [NOTE]


@virtually
async def test_notes_alone_that_were_lost_sight_of_are_sent_again():
    cluster = a_cluster()
    owner = await joined(cluster, fault=At("commit", "after", lose_sight))
    assert await flush(owner.broker, {}, [record(NOTE)], None) == 2
    assert seen(cluster) == [NOTE, NOTE]


@virtually
async def test_two_faults_in_a_row_are_resolved_like_one():
    """At every pair of neighbouring points, until a flush ends before them."""
    number, reached = 0, True
    while reached:
        number += 1
        first, second = FaultAt(number, OutcomeUnknown()), FaultAt(number + 1, OutcomeUnknown())

        async def in_transactions(call, moment, first=first, second=second):
            if call in ("begin", "send", "send_positions", "commit"):
                for fault in (second, first):
                    await fault(call, moment)

        cluster = a_cluster()
        owner = await joined(cluster, fault=in_transactions)
        await owner.flush()
        assert seen(cluster) == [ANSWER, NOTE], f"faults at points {number} and after"
        reached = first.reached
    assert number > 8  # four kinds of calls, each with two moments


def a_burst(num_bytes: int) -> Burst:
    return Burst(outcomes=[Outcome(records=[record(bytes(num_bytes))])], attempts=(), before=START, position=DONE)


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ([], [[]]),
        ([1, BURST_BYTES_MAX - 1, 1], [[0, 1], [2]]),
        ([BURST_BYTES_MAX + 1, 1, 1], [[0], [1, 2]]),
        ([1, BURST_BYTES_MAX + 1, 1], [[0], [1], [2]]),
    ],
)
def test_partitions_share_a_transaction_as_long_as_it_stays_small(sizes, parts):
    bursts = {Place("in", number): a_burst(size) for number, size in enumerate(sizes)}
    assert [[place.partition for place in part] for part in portions(bursts)] == parts
