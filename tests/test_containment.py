"""Who may go to the engine: whose attempt is on record, and a suspect alone."""

from worker.brokers.base import Place, Position, Record
from worker.containment import Gate
from worker.partition import Partition

PLACE = Place("tokenmill.requests", 0)
ATTEMPTS_MAX = 4


def record(offset: int) -> Record:
    return Record(place=PLACE, offset=offset, key=None, value=b"", headers=(), timestamp_ms=0)


def a_partition(committed: Position | None = None, end: int = 100) -> Partition:
    return Partition(PLACE, committed or Position(0), "me", end)


def died_with(*offsets: int, times: int) -> Position:
    """Where so many owners in a row have died, with these offsets under way."""
    position = Position(0)
    for _ in range(times):
        owner = a_partition(position)
        for offset in range(max(offsets) + 1):
            owner.begin(offset)
            if offset in offsets:
                owner.attempt(offset)
        burst = owner.burst()
        assert burst
        position = burst.position
    return position


def flushed(partition: Partition) -> list[int]:
    """The offsets whose attempts the flush puts on record."""
    if not (burst := partition.burst()):
        return []
    partition.settle(burst)
    return list(burst.attempts)


def passing(gate: Gate, num_running: int = 0) -> list[int]:
    """The offsets that go to the engine now."""
    passed: list[int] = []
    while waiting := gate.next(num_running + len(passed)):
        passed.append(waiting.record.offset)
    return passed


def waiting_at(partition: Partition, *offsets: int) -> Gate:
    gate = Gate(ATTEMPTS_MAX)
    for offset in offsets:
        partition.begin(offset)
        assert gate.add(partition, record(offset))
    return gate


def test_what_came_after_the_takeover_passes_at_once():
    partition = a_partition(end=5)
    gate = waiting_at(partition, 5, 6)
    assert passing(gate, num_running=3) == [5, 6]
    assert flushed(partition) == []


def test_what_was_there_before_waits_until_its_attempt_is_on_record():
    partition = a_partition()
    gate = waiting_at(partition, 0, 1)
    assert passing(gate, num_running=3) == []
    assert flushed(partition) == [0, 1]
    assert passing(gate, num_running=3) == [0, 1]


def test_who_died_once_or_twice_runs_in_company():
    partition = a_partition(died_with(0, 1, times=1))
    gate = waiting_at(partition, 0, 1)
    passing(gate)
    flushed(partition)
    assert passing(gate, num_running=3) == [0, 1]


def test_the_last_attempt_is_made_alone_and_counted_when_its_turn_has_come():
    partition = a_partition(died_with(1, 2, times=2))
    gate = waiting_at(partition, 0, 1, 2, 3)
    passing(gate)
    assert flushed(partition) == [0]  # not those behind a suspect: they cannot be blamed for its death
    assert passing(gate) == [0]
    assert passing(gate, num_running=1) == []
    assert flushed(partition) == []
    assert passing(gate, num_running=0) == []
    assert flushed(partition) == [1]
    assert passing(gate) == [1]
    assert passing(gate, num_running=1) == []  # alone
    assert passing(gate, num_running=0) == []
    assert flushed(partition) == [2]
    assert passing(gate) == [2]
    assert passing(gate, num_running=1) == []
    passing(gate)
    flushed(partition)
    assert passing(gate, num_running=0) == [3]


def test_who_has_had_all_attempts_gets_no_more():
    partition = a_partition(died_with(0, times=ATTEMPTS_MAX - 1))
    partition.begin(0)
    assert not Gate(ATTEMPTS_MAX).add(partition, record(0))


def test_with_the_fewest_attempts_that_there_may_be_the_second_on_record_is_made_alone():
    partition = a_partition(died_with(0, times=1))
    partition.begin(0)
    partition.begin(1)
    gate = Gate(3)
    assert gate.add(partition, record(0))
    assert gate.add(partition, record(1))
    assert passing(gate) == []
    flushed(partition)
    assert passing(gate) == [0]


def test_what_waits_for_a_partition_that_is_gone_is_dropped():
    kept, lost = a_partition(end=0), Partition(Place("tokenmill.requests", 1), Position(0), "me", 0)
    gate = waiting_at(kept, 0)
    lost.begin(0)
    gate.add(lost, record(0))
    gate.drop([lost])
    assert len(gate) == 1
    assert [waiting.partition for waiting in iter(lambda: gate.next(0), None)] == [kept]


def test_after_a_rebalance_what_waits_is_put_on_record_again_before_it_passes():
    partition = a_partition(end=1)
    gate = waiting_at(partition, 0, 1)
    assert passing(gate) == []
    flushed(partition)
    last = partition.last_burst()
    assert last
    partition.settle(last)
    partition.go_on()
    assert passing(gate) == []
    assert flushed(partition) == [0]
    assert passing(gate) == [0, 1]
