"""One partition: what is begun once, waits in the outbox, and leaves it when it is committed."""

import pytest

from worker.brokers.base import Outgoing, Place, Position
from worker.offsets import OffsetLedger
from worker.partition import Outcome, Partition

ME = "me"


def a_partition(committed: Position | None = None, end: int = 10) -> Partition:
    return Partition(Place("tokenmill.requests", 3), committed or Position(10), ME, end)


def an_outcome(name: str = "") -> Outcome:
    return Outcome(records=[Outgoing(topic="tokenmill.completions", key=None, value=name.encode())])


def finished_by_the_next_owner(position: Position, offsets: range) -> set[int]:
    ledger = OffsetLedger(position, "next")
    return {offset for offset in offsets if not ledger.begin(offset)}


def test_a_record_is_begun_once():
    partition = a_partition()
    assert partition.begin(10)
    assert not partition.begin(10)


def test_what_the_last_owner_finished_is_not_begun():
    left = a_partition()
    for offset in (10, 11):
        left.begin(offset)
    left.finish(11, an_outcome())
    burst = left.burst()
    assert burst
    heir = a_partition(burst.position)
    assert [heir.begin(offset) for offset in (10, 11, 12)] == [True, False, True]


def test_there_is_no_burst_before_something_is_finished():
    partition = a_partition()
    partition.begin(10)
    assert partition.burst() is None


def test_a_burst_has_all_outcomes_in_the_order_in_which_they_came_and_the_position_that_says_so():
    partition = a_partition()
    for offset in range(10, 14):
        partition.begin(offset)
    outcomes = [an_outcome(name) for name in ("first", "second")]
    partition.finish(12, outcomes[0])
    partition.finish(10, outcomes[1])
    burst = partition.burst()
    assert burst
    assert list(burst.outcomes) == outcomes
    assert burst.before == Position(10)
    assert burst.position.offset == 11
    assert finished_by_the_next_owner(burst.position, range(11, 14)) == {12}


def test_an_outcome_stays_until_its_burst_is_settled():
    partition = a_partition()
    partition.begin(10)
    partition.finish(10, an_outcome())
    assert partition.burst() == partition.burst()


def test_settling_a_burst_leaves_what_came_in_since():
    partition = a_partition()
    for offset in (10, 11):
        partition.begin(offset)
    partition.finish(10, an_outcome("sent"))
    burst = partition.burst()
    assert burst
    late = an_outcome("late")
    partition.finish(11, late)
    partition.settle(burst)
    assert partition.committed == burst.position
    following = partition.burst()
    assert following
    assert list(following.outcomes) == [late]
    assert following.before == burst.position
    partition.settle(following)
    assert partition.burst() is None


def test_a_record_that_was_never_begun_cannot_be_finished():
    with pytest.raises(KeyError):
        a_partition().finish(10, an_outcome())


def test_reading_goes_on_behind_what_was_begun():
    partition = a_partition()
    assert partition.resume_at == 10
    partition.begin(10)
    partition.begin(13)  # offsets between are markers
    assert partition.resume_at == 14


def test_only_what_was_there_when_it_was_taken_over_is_put_on_record():
    partition = a_partition(end=11)
    for offset in (10, 11):
        partition.begin(offset)
        partition.attempt(offset)
    assert [partition.awaits_record(offset) for offset in (10, 11)] == [True, False]
    burst = partition.burst()
    assert burst
    assert list(burst.attempts) == [10]
    heir = a_partition(burst.position)
    assert [heir.attempts(offset) for offset in (10, 11)] == [1, 0]
    partition.settle(burst)
    assert not partition.has_news


def test_an_owner_that_lets_go_alive_leaves_no_attempt_behind_and_counts_it_again_if_the_partition_comes_back():
    partition = a_partition(end=11)
    partition.begin(10)
    partition.attempt(10)
    first = partition.burst()
    assert first
    partition.settle(first)
    last = partition.last_burst()
    assert last
    partition.settle(last)
    assert a_partition(last.position).attempts(10) == 0
    assert partition.last_burst() is None
    partition.go_on()
    again = partition.burst()
    assert again
    assert a_partition(again.position).attempts(10) == 1
