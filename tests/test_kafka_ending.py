"""Where a coordinator took a transaction for ended and wrote no marker, as a killed broker's once did.

The broker believes whoever produces that the partition is part of the transaction, so that a partition can be kept from
the coordinator: what is written there stays open, however the transaction ends. The controls leave out our own ending:
then a burst is answered twice, or is never seen.
"""

import asyncio
from dataclasses import replace

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.structs import OffsetAndMetadata

from tests.broker_contract import Owner, transact
from tests.kafka_stage import EPOCHS, STRICT, Mode, Stage, staged
from worker.brokers import kafka, kafka_ending
from worker.brokers.base import Position
from worker.errors import Fenced, OutcomeUnknown
from worker.local_broker import Cluster

TIMEOUT_MS = 10_000
BELIEVES = {"transaction.partition.verification.enable": "false"}


@pytest.fixture(scope="module")
def believing(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("kafka"), settings=BELIEVES) as cluster:
        yield cluster


@pytest.fixture(params=[pytest.param(EPOCHS, id="epochs"), pytest.param(STRICT, id="strict")])
async def stage(believing, request):
    mode: Mode = request.param
    async with staged(believing.brokers, mode) as stage:
        yield stage


@pytest.fixture(params=[pytest.param(True, id="ended"), pytest.param(False, id="control")])
def ended(request, monkeypatch):
    """Whether a worker ends what its name has left open."""

    if not request.param:
        monkeypatch.setattr(kafka, "end_transaction", nothing)
    return request.param


async def nothing(*_: object) -> None:
    """In the place of `end_transaction`."""


def transactional_id(stage: Stage) -> str:
    return replace(stage.direct, worker="a").transactional_id


async def leave_open(stage: Stage, value: bytes, *, commit: bool, positions: bool = False) -> None:
    """A burst of worker a's, whose end the coordinator has on record, and that has no marker where it was written."""
    settings = stage.direct
    hidden, seen = TopicPartition(stage.out, 0), TopicPartition(stage.out, 1)
    producer = AIOKafkaProducer(
        transactional_id=transactional_id(stage), transaction_timeout_ms=TIMEOUT_MS, **settings.client_options()
    )
    await producer.start()
    try:
        await producer.begin_transaction()
        producer._txn_manager._txn_partitions.add(hidden)  # added already, it is led to think
        await producer.send_and_wait(hidden.topic, value, partition=hidden.partition)
        if positions:
            producer._txn_manager.consumer_group_added(settings.group)
            offsets = {TopicPartition(*stage.place): OffsetAndMetadata(1, "")}
            await producer.send_offsets_to_transaction(offsets, settings.group)
        await producer.send_and_wait(seen.topic, b"", partition=seen.partition)
        await (producer.commit_transaction() if commit else producer.abort_transaction())
    finally:
        await producer.stop()


async def answers(stage: Stage) -> list[bytes]:
    await asyncio.sleep(0.3)  # the markers are written after a commit is answered
    return [value for value in await stage.committed() if value]


async def answer(owner: Owner, stage: Stage) -> None:
    await transact(owner.broker, [stage.record(b"answer")], {stage.place: Position(1)}, owner.membership)
    await owner.broker.commit()


async def test_a_new_life_does_not_commit_what_the_last_one_aborted(stage, ended):
    await leave_open(stage, b"answer", commit=False)
    await answer(await stage.owner("a"), stage)
    assert await answers(stage) == ([b"answer"] if ended else [b"answer", b"answer"])


async def test_a_new_producer_does_not_commit_what_the_last_one_lost(stage, ended):
    a = await stage.owner("a")
    await answer(a, stage)
    await leave_open(stage, b"lost", commit=False)  # fences the producer, as the coordinator does when time is over
    with pytest.raises((Fenced, OutcomeUnknown)):
        await answer(a, stage)
    await a.broker.renew()
    await answer(a, stage)
    assert await answers(stage) == [b"answer", b"answer"] + ([] if ended else [b"lost"])


async def test_what_was_committed_is_seen_without_another_commit(stage, ended):
    await leave_open(stage, b"answer", commit=True)
    await stage.owner("a")
    assert await answers(stage) == ([b"answer"] if ended else [])


async def test_positions_that_were_committed_are_waited_for_until_they_are_ended(stage):
    await leave_open(stage, b"answer", commit=True, positions=True)
    joining = asyncio.create_task(stage.owner("b"))
    done, _ = await asyncio.wait([joining], timeout=2)
    assert not done
    options, reach = stage.direct.client_options(), kafka_ending.Reach(stage.direct.group, [stage.out])
    await kafka_ending.end_transaction(options, transactional_id(stage), reach, TIMEOUT_MS)
    assert (await joining).positions == {stage.place: Position(1)}
