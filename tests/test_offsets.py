"""The offset ledger: what is committed says exactly what is finished, and always fits."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.admission import POLL_RECORDS_MAX
from worker.brokers.base import METADATA_CHARS_MAX, Position
from worker.errors import Misconfigured
from worker.offsets import ATTEMPTS_KEPT_MAX, ATTEMPTS_OPEN_MAX, UNFINISHED_MAX, WINDOW_MAX, OffsetLedger, pack, unpack

ME = "0123abcd"


def nothing_above(offset: int) -> Position:
    """The position of an owner who finished all below the offset and nothing above it."""
    return Position(offset, f"2{ME},,")


def finished_after(position: Position, offsets: range) -> set[int]:
    """The offsets that the next owner skips when the whole range is offered to it."""
    ledger = OffsetLedger(position, ME)
    return {offset for offset in offsets if not ledger.begin(offset)}


def test_a_new_partition_commits_where_it_began():
    assert OffsetLedger(Position(7), ME).position() == nothing_above(7)


def test_finishing_in_order_moves_the_offset_and_needs_no_metadata():
    ledger = OffsetLedger(Position(0), ME)
    for offset in range(3):
        assert ledger.begin(offset)
        ledger.finish(offset)
    assert ledger.position() == nothing_above(3)


def test_an_unfinished_offset_holds_the_position_back_and_the_finished_ones_above_it_are_skipped_by_the_next_owner():
    ledger = OffsetLedger(Position(10), ME)
    for offset in range(10, 16):
        ledger.begin(offset)
    for offset in (11, 12, 14):
        ledger.finish(offset)
    position = ledger.position()
    assert position.offset == 10
    assert finished_after(position, range(10, 16)) == {11, 12, 14}


def test_an_offset_is_begun_once():
    ledger = OffsetLedger(Position(0), ME)
    assert ledger.begin(0)
    assert not ledger.begin(0)


def test_what_the_last_owner_left_unfinished_and_the_log_no_longer_has_does_not_hold_the_position_back():
    left = OffsetLedger(Position(0), ME)
    for offset in range(4):
        left.begin(offset)
    left.finish(3)
    ledger = OffsetLedger(left.position(), ME)
    assert not ledger.begin(3)  # 0 to 2 were deleted by retention
    assert ledger.begin(4)
    ledger.finish(4)
    assert ledger.position() == nothing_above(5)


def test_finishing_what_was_not_begun_is_an_error():
    with pytest.raises(KeyError):
        OffsetLedger(Position(0), ME).finish(0)


def test_two_owners_who_came_equally_far_can_tell_their_commits_apart():
    assert OffsetLedger(Position(7), "a").position() != OffsetLedger(Position(7), "b").position()


def test_metadata_of_another_format_is_refused_not_guessed():
    with pytest.raises(Misconfigured, match="unknown format"):
        OffsetLedger(Position(0, "?abc"), ME)


def test_a_kept_partition_resumes_at_what_is_still_awaited():
    left = OffsetLedger(Position(0), ME)
    for offset in range(3):
        left.begin(offset)
    left.finish(2)
    ledger = OffsetLedger(left.position(), ME)
    assert ledger.resume_at == 0
    ledger.begin(0)
    assert ledger.resume_at == 1
    ledger.begin(1)
    assert ledger.resume_at == 3


@given(st.integers(0, 2**40), st.lists(st.booleans(), min_size=1, max_size=300))
def test_packing_loses_nothing(first: int, done: list[bool]):
    unfinished = [first + i for i, is_done in enumerate(done) if not is_done]
    highest = first + len(done)
    attempts = {offset: offset % 3 + 1 for offset in unfinished}
    kept = dict(list(attempts.items())[:ATTEMPTS_KEPT_MAX])
    packed = pack(ME, first, unfinished, highest, attempts)
    assert unpack(Position(first, packed)) == (unfinished, highest + 1, kept)


@given(st.randoms(use_true_random=False), st.integers(1, 200))
def test_every_owner_in_a_chain_works_on_exactly_what_is_unfinished(rng: random.Random, length: int):
    """Owners take over at any moment, with gaps in the log; each offset is finished once, and the end is reached."""
    log = [offset for offset in range(length) if rng.random() < 0.9]
    finished: list[int] = []
    position = Position(0)
    while set(finished) != set(log):
        ledger = OffsetLedger(position, ME)
        todo = [offset for offset in log if offset >= position.offset and ledger.begin(offset)]
        assert not set(todo) & set(finished)
        for offset in rng.sample(todo, rng.randint(1, len(todo))):
            ledger.finish(offset)
            finished.append(offset)
        position = ledger.position()
    assert len(finished) == len(log)
    assert unpack(position)[0] == []


def test_an_attempt_counts_until_the_offset_is_finished():
    ledger = OffsetLedger(Position(10), ME)
    for offset in (10, 11, 12):
        ledger.begin(offset)
        ledger.attempt(offset)
    ledger.finish(11)
    heir = OffsetLedger(ledger.position(), "heir")
    assert [heir.attempts(offset) for offset in (10, 11, 12)] == [1, 0, 1]
    heir.begin(10)
    heir.attempt(10)
    assert [OffsetLedger(heir.position(), "next").attempts(offset) for offset in (10, 12)] == [2, 1]


def test_whoever_lets_go_alive_takes_back_its_own_attempts_alone():
    dead = OffsetLedger(Position(10), "dead")
    for offset in (10, 11):
        dead.begin(offset)
        dead.attempt(offset)
    ledger = OffsetLedger(dead.position(), ME)
    ledger.begin(10)
    ledger.attempt(10)
    released = OffsetLedger(ledger.position(released=True), "heir")
    assert [released.attempts(offset) for offset in (10, 11)] == [1, 1]


def test_attempts_at_what_the_log_has_lost_are_forgotten():
    dead = OffsetLedger(Position(10), "dead")
    for offset in (10, 11):
        dead.begin(offset)
        dead.attempt(offset)
    ledger = OffsetLedger(dead.position(), ME)
    ledger.begin(12)  # 10 and 11 were deleted by retention
    assert ledger.position().metadata == f"2{ME},,"


def test_reading_stops_while_many_attempts_are_open():
    ledger = OffsetLedger(Position(0), ME)
    for offset in range(ATTEMPTS_OPEN_MAX):
        assert not ledger.is_full
        ledger.begin(offset)
        ledger.attempt(offset)
    assert ledger.is_full
    ledger.finish(5)
    assert not ledger.is_full


@pytest.mark.parametrize("attempts_apart", [1, 5, 128])
@pytest.mark.parametrize("pattern", ["alternating", "random", "one straggler", "jump"])
def test_a_commit_never_overflows_the_metadata(pattern: str, attempts_apart: int):
    rng = random.Random(5)
    ledger = OffsetLedger(Position(0), "x" * 100)
    ledger.begin(0)  # the straggler
    offset = 1
    while not ledger.is_full or (ledger.num_unfinished < UNFINISHED_MAX and offset < WINDOW_MAX):
        if pattern == "jump" and offset == 900:
            offset += 2**40
        ledger.begin(offset)
        if offset % attempts_apart == 0:
            ledger.attempt(offset)
        if pattern == "one straggler" or (offset % 2 if pattern in ("alternating", "jump") else rng.random() < 0.94):
            ledger.finish(offset)
        offset += 1
    assert ledger.num_unfinished == UNFINISHED_MAX or offset >= WINDOW_MAX
    for late in range(offset, offset + POLL_RECORDS_MAX):  # of the poll that filled it up
        ledger.begin(late)
        ledger.attempt(late)
    ledger.begin(offset + POLL_RECORDS_MAX)
    ledger.finish(offset + POLL_RECORDS_MAX)
    position = ledger.position()
    assert len(position.metadata) <= METADATA_CHARS_MAX
    unfinished, _, _ = unpack(position)
    assert ledger.num_unfinished == len(unfinished)
