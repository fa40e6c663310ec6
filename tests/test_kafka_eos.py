"""What exactly-once rests on, against a real broker: late requests, lost answers, zombies, transactions of the dead.

The stock halves are the controls: they go on with the producer that raised, send no generation, and do not wait for
what is open or still loads.
"""

import asyncio
import struct
import time
import uuid
from collections.abc import Awaitable, Mapping

import pytest

from tests.broker_contract import Owner, read, transact
from tests.kafka_proxy import END_TXN, HEARTBEAT, JOIN_GROUP, OFFSET_FETCH, TXN_OFFSET_COMMIT
from tests.kafka_stage import EPOCHS, STOCK, STRICT, Stage, modes
from worker.brokers.base import Broker, Outgoing, Place, Position
from worker.brokers.kafka_client import Sender, TopicSpec, create_topics
from worker.brokers.kafka_ending import OPEN_TOO_LONG_S
from worker.errors import Fenced, Misconfigured, OutcomeUnknown

LOAD_IN_PROGRESS = 14


async def renewed_if_unknown(broker: Broker, call: Awaitable[None]) -> None:
    """The call, and what the worker does about an unknown outcome."""
    try:
        await call
    except OutcomeUnknown:
        await broker.renew()


async def test_an_epoch_for_each_transaction_is_used_where_the_cluster_has_it(stage):
    a = await stage.owner("a")
    epochs = []
    for _ in range(3):
        await transact(a.broker, [stage.record(b"x")], {}, a.membership)
        await a.broker.commit()
        epochs.append(a.broker._producer._txn_manager.producer_epoch)
    assert epochs == [epochs[0], epochs[0] + 1, epochs[0] + 2]


@modes((STRICT,))
async def test_the_older_transactions_of_older_clusters_work_too(stage):
    a = await stage.owner("a")
    for number in range(3):
        await transact(a.broker, [stage.record(b"%d" % number)], {stage.place: Position(number)}, a.membership)
        await a.broker.commit()
    assert a.broker._producer.transaction_version == 0
    assert await stage.committed() == [b"0", b"1", b"2"]
    assert await a.broker.positions([stage.place]) == {stage.place: Position(2)}


@modes((EPOCHS, [b"2a", b"2b"]), (STRICT, [b"2a", b"2b"]), (STOCK, [b"2b"]))
async def test_a_late_abort_does_not_reach_the_next_transaction(stage, expected):
    a = await stage.owner("a")
    stage.proxy.hold_next(END_TXN)
    await transact(a.broker, [stage.record(b"1")], {}, a.membership)
    await renewed_if_unknown(a.broker, a.broker.abort())
    await a.broker.begin()
    await (await a.broker.send(stage.record(b"2a", partition=0)))
    await stage.proxy.deliver()
    await (await a.broker.send(stage.record(b"2b", partition=1)))
    await a.broker.send_positions({stage.place: Position(2)}, a.membership)
    await a.broker.commit()
    assert await stage.committed() == expected


@modes((EPOCHS, []), (STRICT, []), (STOCK, [b"2a"]))
async def test_a_late_commit_does_not_reach_the_next_transaction(stage, expected):
    a = await stage.owner("a")
    stage.proxy.hold_next(END_TXN)
    await transact(a.broker, [stage.record(b"1")], {stage.place: Position(1)}, a.membership)
    await renewed_if_unknown(a.broker, a.broker.commit())
    await a.broker.begin()
    await (await a.broker.send(stage.record(b"2a", partition=0)))
    await stage.proxy.deliver()
    await (await a.broker.send(stage.record(b"2b", partition=1)))
    await a.broker.abort()
    assert [value for value in await stage.committed() if value.startswith(b"2")] == expected


@modes((EPOCHS, 2), (STRICT, 2), (STOCK, 1))
async def test_late_positions_do_not_reach_the_next_transaction(stage, expected):
    a = await stage.owner("a")
    stage.proxy.hold_next(TXN_OFFSET_COMMIT)
    await a.broker.begin()
    await renewed_if_unknown(a.broker, a.broker.send_positions({stage.place: Position(1)}, a.membership))
    if stage.direct.transaction_version != 0:
        await a.broker.commit()
    await transact(a.broker, [stage.record(b"2")], {stage.place: Position(2)}, a.membership)
    await stage.proxy.deliver()
    await a.broker.commit()
    assert await positions_settled(a) == {stage.place: Position(expected)}


async def positions_settled(owner: Owner) -> Mapping[Place, Position]:
    """Stock positions are read while the commit still completes: wait for it."""
    await asyncio.sleep(0.3)
    return await owner.broker.positions(owner.places)


@modes((EPOCHS,))
async def test_a_commit_whose_answer_is_lost_is_asked_for_again_and_recognised(stage):
    a = await stage.owner("a")
    await transact(a.broker, [stage.record(b"1")], {stage.place: Position(1)}, a.membership)
    stage.proxy.lose_next_answer(END_TXN)
    await a.broker.commit()
    assert await stage.committed() == [b"1"]


@modes((STRICT,))
async def test_without_epochs_a_lost_answer_is_an_unknown_outcome_that_the_positions_tell(stage):
    a = await stage.owner("a")
    await transact(a.broker, [stage.record(b"1")], {stage.place: Position(1)}, a.membership)
    stage.proxy.lose_next_answer(END_TXN)
    with pytest.raises(OutcomeUnknown):
        await a.broker.commit()
    await a.broker.renew()
    assert await a.broker.positions([stage.place]) == {stage.place: Position(1)}


@modes((EPOCHS, None), (STRICT, None), (STOCK, [b"a", b"b"]))
async def test_a_worker_that_slept_through_its_session_is_fenced(stage, expected):
    """Stock aiokafka commits the same record for both."""
    a = await stage.owner("a")
    stage.proxy.lose_requests(HEARTBEAT, JOIN_GROUP)
    b = await stage.owner("b", proxied=False)  # waits for the session to expire
    await transact(b.broker, [stage.record(b"b")], {stage.place: Position(1)}, b.membership)
    await b.broker.commit()
    if expected is None:
        with pytest.raises(Fenced):
            await transact(a.broker, [stage.record(b"a")], {stage.place: Position(1)}, a.membership)
        await a.broker.abort()
    else:
        await transact(a.broker, [stage.record(b"a")], {stage.place: Position(1)}, a.membership)
        await a.broker.commit()
    assert await stage.committed() == (expected or [b"b"])


@modes((EPOCHS, 7), (STOCK, 0))
async def test_a_broker_that_still_loads_positions_is_asked_again(stage, expected):
    """Stock aiokafka takes the answer for "no position" and starts from the beginning."""
    a = await stage.owner("a", proxied=False)
    await transact(a.broker, [], {stage.place: Position(7)}, a.membership)
    await a.broker.commit()
    await positions_settled(a)
    await a.broker.stop()
    stage.proxy.answer_next(OFFSET_FETCH, *[loading] * 3)
    b = await stage.owner("b")
    assert b.positions == {stage.place: Position(expected)}


def loading(version: int, _answer: bytes) -> bytes:
    """An OffsetFetch answer as brokers give it while they load: an error for the whole group, and no topics."""
    if version >= 6:
        return struct.pack(">xiBhx", 0, 1, LOAD_IN_PROGRESS)  # tags, throttle, no topics, error, tags
    return struct.pack(">iih", 0, 0, LOAD_IN_PROGRESS)


async def test_the_transaction_of_a_worker_that_just_died_is_ended_long_before_its_timeout(stage):
    a = await stage.owner("a")
    await transact(a.broker, [stage.record(b"a")], {stage.place: Position(1)}, a.membership)
    await a.broker.stop()  # leaves the transaction open, as dying does
    begun_s = time.monotonic()
    b = await stage.owner("b")
    assert time.monotonic() - begun_s < stage.direct.transaction_timeout_s / 2
    assert b.positions == {stage.place: Position(0)}
    await transact(b.broker, [stage.record(b"b")], {stage.place: Position(1)}, b.membership)
    await b.broker.commit()
    assert await stage.committed() == [b"b"]


async def test_the_transaction_of_a_worker_long_dead_is_ended_at_the_start(stage):
    a = await stage.owner("a")
    await transact(a.broker, [stage.record(b"a")], {}, a.membership)
    await a.broker.stop()
    await asyncio.sleep(OPEN_TOO_LONG_S + 0.2)
    b = await stage.owner("b")
    await transact(b.broker, [stage.record(b"b")], {}, b.membership)
    await b.broker.commit()
    assert await stage.committed() == [b"b"]  # readers are not held up by it either


async def test_the_open_transactions_of_other_groups_are_left_alone(stage, kafka):
    other = Stage(kafka.brokers, stage.proxy, {})
    other.topic, other.place = stage.topic, stage.place
    a = await other.owner("a")
    await transact(a.broker, [stage.record(b"a")], {}, a.membership)
    await asyncio.sleep(OPEN_TOO_LONG_S + 0.2)
    await stage.owner("b")
    await a.broker.commit()
    await a.broker.stop()
    assert await stage.committed() == [b"a"]


async def test_a_record_that_its_topic_refuses_names_the_setting_to_raise(stage):
    a = await stage.owner("a")
    await a.broker.begin()
    incompressible = b"".join(uuid.uuid4().bytes for _ in range(1 << 17))  # 2 MiB; a topic takes 1 MiB
    with pytest.raises(Misconfigured, match=r"max\.message\.bytes"):
        await (await a.broker.send(stage.record(incompressible)))
    await a.broker.renew()
    await transact(a.broker, [stage.record(b"small")], {}, a.membership)
    await a.broker.commit()
    assert await stage.committed() == [b"small"]


async def test_a_record_larger_than_a_fetch_is_read(stage):
    big = TopicSpec(name=f"{stage.topic}-big", partitions=1, config={"max.message.bytes": str(8 << 20)})
    await create_topics(stage.patient, [big])
    value = b"".join(uuid.uuid4().bytes for _ in range(3 << 16))  # 3 MiB; a partition's share of a fetch is 1 MiB
    async with Sender(stage.direct) as sender:
        await (await sender.send(Outgoing(topic=big.name, key=None, value=value)))
    stage.topic, stage.place = big.name, Place(big.name, 0)
    a = await stage.owner("a", proxied=False)
    (record,) = await read(a.broker, a.places, 1)
    assert record.value == value
