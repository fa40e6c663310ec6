"""What stock aiokafka 0.14 does wrong where a worker like ours would use it, and that ours is unharmed by the same.

Each defect is shown twice: a stock client, used as its documentation says, loses or repeats; our flush does not. When a
stock half fails, a newer aiokafka may have mended it: then what `kafka_eos.py` does about it can go.
"""

import asyncio
import struct
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition, errors
from aiokafka.structs import OffsetAndMetadata

from tests.broker_contract import PATIENCE_S, Owner, transact
from tests.kafka_proxy import PRODUCE, TXN_OFFSET_COMMIT, Answer
from tests.kafka_stage import EPOCHS, STRICT, Stage, modes, staged
from worker.brokers.base import Outgoing, Position
from worker.brokers.kafka_eos import StableConsumer
from worker.brokers.kafka_errors import GROUP_AUTHORIZATION_FAILED, NETWORK_EXCEPTION, OFFSET_METADATA_TOO_LARGE
from worker.errors import Misconfigured
from worker.flush import flush
from worker.local_broker import Cluster
from worker.partition import Burst, Outcome

METADATA_MAX = 4096  # offset.metadata.max.bytes, as brokers have it by default; we never send more
RECORD_BYTES_MAX = 1 << 20  # max.message.bytes, as topics have it by default
COMMITTED = 7
COMMITS = 3000  # of 4 KB: loading them takes some hundred milliseconds
RESTARTS_MAX = 5  # a client may come after that all the same
RESTART_S = 60.0  # on a busy machine


class TestE1PositionsAreForgottenWhileABrokerLoadsThem:
    """OffsetFetch from v2 on has one error for the whole group. Stock reads the partitions, of which there are none."""

    async def test_stock_starts_from_the_beginning_and_our_worker_waits_for_them(self, tmp_path):
        with Cluster(tmp_path) as cluster:
            async with staged(cluster.brokers, {}) as stage:
                await advance(stage)
                found = set()
                for _ in range(RESTARTS_MAX):
                    found.add(await positions_after_restart(cluster, stage))
                    if (0, COMMITTED) in found:
                        break
        assert (0, COMMITTED) in found
        assert {ours for _, ours in found} == {COMMITTED}


class TestE2AnAbortDoesNotReachTheBroker:
    """After an error that calls for an abort, stock takes the transaction for empty and sends no EndTxn."""

    async def test_stock_commits_what_it_aborted(self, stage):
        stage.proxy.answer_next(TXN_OFFSET_COMMIT, refused(TXN_OFFSET_COMMIT, GROUP_AUTHORIZATION_FAILED))
        async with stock(stage) as producer:
            with pytest.raises(errors.GroupAuthorizationFailedError):
                await answer(stage, producer, b"aborted")
            await answer(stage, producer, b"next")
        assert await stage.committed() == [b"aborted", b"next"]

    @modes((EPOCHS,), (STRICT,))
    async def test_ours_is_aborted(self, stage):
        a = await stage.owner("a")
        stage.proxy.answer_next(TXN_OFFSET_COMMIT, refused(TXN_OFFSET_COMMIT, GROUP_AUTHORIZATION_FAILED))
        with pytest.raises(Misconfigured, match="READ group"):
            await flushed(a, stage.record(b"aborted"))
        await a.broker.renew()
        await flushed(a, stage.record(b"next"))
        assert await stage.committed() == [b"next"]


class TestE3ACommitSucceedsWithoutARecordThatWasRefused:
    async def test_stock_commits_the_position_of_an_answer_that_is_nowhere(self, stage):
        async with stock(stage) as producer, producer.transaction():
            await producer.send(stage.out, incompressible(2 * RECORD_BYTES_MAX), partition=0)
            await producer.send_offsets_to_transaction({partition_of(stage): position(1)}, stage.direct.group)
        assert await stage.committed() == []
        a = await stage.owner("a")
        assert a.positions == {stage.place: Position(1)}

    @modes((EPOCHS,), (STRICT,))
    async def test_ours_is_not_committed(self, stage):
        a = await stage.owner("a")
        with pytest.raises(Misconfigured, match=r"max\.message\.bytes"):
            await flushed(a, stage.record(incompressible(2 * RECORD_BYTES_MAX)))
        await a.broker.renew()
        assert await a.broker.positions([stage.place]) == {stage.place: Position(0)}

    @modes((EPOCHS,), (STRICT,))
    async def test_ours_would_be_if_it_did_not_await_what_it_sends_before_the_positions(self, stage, monkeypatch):
        async def nothing(*_: object) -> None:
            pass

        monkeypatch.setattr("worker.flush.gather", nothing)
        a = await stage.owner("a")
        await flushed(a, stage.record(incompressible(2 * RECORD_BYTES_MAX)))
        assert await stage.committed() == []
        assert await a.broker.positions([stage.place]) == {stage.place: Position(1)}


class TestE4AnUnexpectedAnswerToPositionsKillsTheProducer:
    async def test_stock_can_neither_commit_nor_abort_nor_begin(self, stage):
        async with stock(stage) as producer:
            await producer.begin_transaction()
            await producer.send_and_wait(stage.out, b"1", partition=0)
            with pytest.raises(errors.KafkaError):
                await producer.send_offsets_to_transaction(
                    {partition_of(stage): position(1, "m" * (METADATA_MAX + 1))}, stage.direct.group
                )
            for call in (producer.commit_transaction, producer.abort_transaction, producer.begin_transaction):
                with pytest.raises((AssertionError, errors.KafkaError)):
                    await call()

    @modes((EPOCHS,), (STRICT,))
    async def test_ours_names_the_setting_aborts_and_goes_on(self, stage):
        a = await stage.owner("a")
        stage.proxy.answer_next(TXN_OFFSET_COMMIT, refused(TXN_OFFSET_COMMIT, OFFSET_METADATA_TOO_LARGE))
        with pytest.raises(Misconfigured, match=r"offset\.metadata\.max\.bytes"):
            await flushed(a, stage.record(b"1"), "m" * METADATA_MAX)
        await a.broker.abort()
        await flushed(a, stage.record(b"2"), "m" * METADATA_MAX)
        assert await stage.committed() == [b"2"]


@pytest.mark.parametrize("request_key", [PRODUCE, TXN_OFFSET_COMMIT], ids=["records", "positions"])
class TestE5ANetworkExceptionIsFatal:
    """Brokers answer so when two checks of one transaction meet (aiokafka's issue 1004)."""

    async def test_stock_gives_up(self, stage, request_key):
        stage.proxy.answer_next(request_key, refused(request_key, NETWORK_EXCEPTION))
        async with stock(stage) as producer:
            with pytest.raises(errors.KafkaError):
                await answer(stage, producer, b"1")

    @modes((EPOCHS,), (STRICT,))
    async def test_ours_is_answered_once(self, stage, request_key):
        a = await stage.owner("a")
        stage.proxy.answer_next(request_key, refused(request_key, NETWORK_EXCEPTION))
        await flushed(a, stage.record(b"1"))
        assert await stage.committed() == [b"1"]
        assert await a.broker.positions([stage.place]) == {stage.place: Position(1)}


@asynccontextmanager
async def stock(stage: Stage) -> AsyncIterator[AIOKafkaProducer]:
    """A transactional producer of aiokafka's, behind the proxy."""
    producer = AIOKafkaProducer(
        bootstrap_servers=stage.proxy.brokers,
        transactional_id=stage.direct.group,
        max_request_size=8 * RECORD_BYTES_MAX,
    )
    await producer.start()
    try:
        yield producer
    finally:
        with suppress(errors.KafkaError, AssertionError):  # it is broken: that was shown
            await asyncio.wait_for(producer.stop(), PATIENCE_S)


async def answer(stage: Stage, producer: AIOKafkaProducer, value: bytes) -> None:
    """A transaction of one answer and its position, as aiokafka's documentation has it."""
    async with producer.transaction():
        await producer.send_and_wait(stage.out, value, partition=0)
        await producer.send_offsets_to_transaction({partition_of(stage): position(1)}, stage.direct.group)


async def flushed(owner: Owner, record: Outgoing, metadata: str = "") -> None:
    """The same by ours."""
    (place,) = owner.places
    burst = Burst(
        outcomes=[Outcome(records=[record])],
        attempts=(),
        before=owner.positions[place],
        position=Position(1, metadata),
    )
    await flush(owner.broker, {place: burst}, [], owner.membership)


def partition_of(stage: Stage) -> TopicPartition:
    return TopicPartition(*stage.place)


def position(offset: int, metadata: str = "") -> OffsetAndMetadata:
    return OffsetAndMetadata(offset, metadata)


def incompressible(num_bytes: int) -> bytes:
    return b"".join(uuid.uuid4().bytes for _ in range(num_bytes // 16))


# By version: where the error code stands in an answer about one partition, from the end.
CODE_AT = {TXN_OFFSET_COMMIT: {0: 2, 3: 5, 5: 5}, PRODUCE: {5: 30, 7: 30, 8: 36, 12: 35}}


def refused(key: int, code: int) -> Answer:
    """The broker's answer, with this error code in it."""

    def altered(version: int, frame: bytes) -> bytes:
        at = len(frame) - CODE_AT[key][version]
        return frame[:at] + struct.pack(">h", code) + frame[at + 2 :]

    return altered


async def advance(stage: Stage) -> None:
    """The group has committed `COMMITTED`, of a log of so many records, and often."""
    owner = await stage.owner("a", proxied=False)
    records = [Outgoing(topic=stage.topic, key=None, value=b"x", partition=0)] * COMMITTED
    await transact(owner.broker, records, {stage.place: Position(COMMITTED)}, owner.membership)
    await owner.broker.commit()
    await owner.broker.stop()
    consumer = await patiently_started(AIOKafkaConsumer, stage)
    consumer.assign([partition_of(stage)])
    for _ in range(COMMITS):
        await consumer.commit({partition_of(stage): position(COMMITTED, "m" * METADATA_MAX)})
    await consumer.stop()


async def positions_after_restart(cluster: Cluster, stage: Stage) -> tuple[int, int]:
    """Where a stock consumer and ours begin that are there as soon as the broker is."""
    await asyncio.to_thread(cluster.kill)
    async with asyncio.timeout(RESTART_S), asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.to_thread(cluster.start))
        stocks = tasks.create_task(position_found(AIOKafkaConsumer, stage))
        ours = tasks.create_task(position_found(StableConsumer, stage))
    return stocks.result(), ours.result()


async def position_found(consumer_type: type[AIOKafkaConsumer], stage: Stage) -> int:
    """Where a consumer begins that is there as soon as the broker is."""
    consumer, partition = await patiently_started(consumer_type, stage), partition_of(stage)
    try:
        consumer.assign([partition])
        if isinstance(consumer, StableConsumer):
            return (await consumer.stable_positions([partition], nothing))[partition].offset
        return int(await consumer.position(partition))
    finally:
        await consumer.stop()


async def patiently_started(consumer_type: type[AIOKafkaConsumer], stage: Stage) -> Any:
    while True:
        consumer = consumer_type(
            bootstrap_servers=stage.direct.brokers,
            group_id=stage.direct.group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            retry_backoff_ms=20,
            request_timeout_ms=2000,  # a request that comes while the broker starts may never be answered
        )
        with suppress(errors.KafkaError):
            await consumer.start()
            return consumer
        await consumer.stop()
        await asyncio.sleep(0.02)


async def nothing() -> None:
    """No transaction is in the way."""
