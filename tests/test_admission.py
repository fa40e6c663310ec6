"""Intake: bounded by the engine's room, what was handed over first, realtime before batch, batch never starved."""

from worker.admission import AGED_RECORDS_MAX, BATCH, HANDOFF, NOTHING, POLL_RECORDS_MAX, REALTIME, Admission


def test_a_full_worker_polls_nothing_until_room_is_released():
    admission = Admission(tokens_max=100, ageing_s=10)
    admission.reserve(125)
    assert admission.next_poll(0) == NOTHING
    admission.release(60)
    assert admission.next_poll(0) != NOTHING


def test_both_tiers_are_polled_while_realtime_is_quiet():
    admission = Admission(tokens_max=100, ageing_s=10)
    assert admission.next_poll(0).lanes == {HANDOFF, REALTIME, BATCH}


def test_batch_waits_while_realtime_records_keep_coming():
    admission = Admission(tokens_max=100, ageing_s=10)
    admission.polled(admission.next_poll(1), {REALTIME: 3}, now_s=1)
    assert admission.next_poll(2).lanes == {HANDOFF, REALTIME}
    admission.polled(admission.next_poll(2), {}, now_s=2)
    assert BATCH in admission.next_poll(3).lanes


def test_batch_shut_out_for_the_ageing_time_gets_one_small_poll_of_its_own():
    admission = Admission(tokens_max=100, ageing_s=10)
    admission.polled(admission.next_poll(1), {REALTIME: POLL_RECORDS_MAX}, now_s=1)
    assert admission.next_poll(10.9).lanes == {HANDOFF, REALTIME}
    aged = admission.next_poll(11)
    assert aged.lanes == {HANDOFF, BATCH}
    assert aged.num_max == AGED_RECORDS_MAX
    admission.polled(aged, {}, now_s=11)
    assert admission.next_poll(11.1).lanes == {HANDOFF, REALTIME}


def test_the_last_quarter_of_the_room_is_kept_for_realtime():
    admission = Admission(tokens_max=100, ageing_s=10)
    admission.reserve(75)
    assert admission.next_poll(0).lanes == {HANDOFF, REALTIME}


def test_beyond_the_room_there_is_some_for_what_was_handed_over():
    admission = Admission(tokens_max=100, ageing_s=10)
    admission.reserve(100)
    assert admission.next_poll(0).lanes == {HANDOFF}
    admission.reserve(25)
    assert admission.next_poll(0) == NOTHING


def test_nothing_fresh_is_polled_while_handed_over_records_keep_coming():
    admission = Admission(tokens_max=100, ageing_s=10)
    admission.polled(admission.next_poll(1), {HANDOFF: 1, BATCH: 1}, now_s=1)
    assert admission.next_poll(20).lanes == {HANDOFF}
    admission.polled(admission.next_poll(20), {}, now_s=20)
    assert admission.next_poll(21).lanes == {HANDOFF, REALTIME, BATCH}
