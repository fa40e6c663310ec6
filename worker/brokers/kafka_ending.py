"""Ending transactions whose owners did not see them end: a worker died, or got no answer.

`InitProducerId` has the coordinator end what is open. That is not enough: a coordinator that comes back together with
the partitions' leaders may take a transaction for ended and write no marker anywhere (docs/log.md, 2026-11-26). What
the transaction wrote then stays open in the partitions, in the name of its producer, and the producer's next commit is
its commit too. So the end is written again: the same producer ends an empty transaction in the same way, in every
partition that a worker ever writes to. Where the markers are, one more changes nothing.

Decides nothing: how a transaction ended is the coordinator's to say.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

from aiokafka import errors
from aiokafka.client import AIOKafkaClient, ConnectionGroup, CoordinationType
from aiokafka.protocol.transaction import (
    AddOffsetsToTxnRequest,
    AddPartitionsToTxnRequest,
    AddPartitionsToTxnResponse_v0,
    EndTxnRequest,
    InitProducerIdRequest,
)

from worker.brokers import kafka_wire as wire
from worker.brokers.kafka_errors import (
    CONCURRENT_TRANSACTIONS,
    COORDINATOR_MOVED,
    INVALID_PRODUCER_EPOCH,
    OPERATION_NOT_ATTEMPTED,
    PRODUCER_FENCED,
    TRANSACTIONAL_ID_NOT_FOUND,
    TRY_AGAIN,
)

OPEN_TOO_LONG_S = 1.0  # a burst takes 10 to 50 ms: whoever holds a transaction this long is dead, or as good as
ANSWERED_S = 60.0  # a broker that was killed is back in 6 to 45 s; then its coordinators load
RETRY_S = 0.02  # about one burst

# The coordinator's states that tell whether a transaction is committed. One that is open will be aborted: the next
# InitProducerId does it.
COMMITTED = {
    "Ongoing": False,
    "PrepareAbort": False,
    "CompleteAbort": False,
    "PrepareCommit": True,
    "CompleteCommit": True,
}


class Reach(NamedTuple):
    """Where the workers of a group write in transactions: to these topics, and the group's positions."""

    group: str
    topics: Sequence[str]


class Producer(NamedTuple):
    """One of those that have had a transactional id, one after the other."""

    id: int
    epoch: int


async def end_transaction(options: Mapping[str, Any], transactional_id: str, reach: Reach, timeout_ms: int) -> None:
    """The last transaction of this id is over, in every partition; its producer is fenced. `options`: of the client.

    Raises KafkaError when the brokers refuse, or have given no answer for `ANSWERED_S`. On brokers older than 3.0,
    which do not tell how it ended, nothing happens.
    """
    async with _connected(options) as client:
        await _end(client, transactional_id, reach, timeout_ms)


async def end_open_transactions(
    options: Mapping[str, Any], prefix: str, reach: Reach, timeout_ms: int
) -> Sequence[str]:
    """As `end_transaction`, for the ids with this prefix whose transaction is open for `OPEN_TOO_LONG_S`: their ids.

    Their owners, should they live, start again; nothing is lost. On brokers older than 3.8, which do not tell for how
    long, nothing happens, and readers wait for the transaction's own timeout.
    """
    async with _connected(options) as client:
        ours = sorted(each for each in await _open_transactions(client) if each.startswith(prefix))
        for transactional_id in ours:
            await _end(client, transactional_id, reach, timeout_ms)
    return ours


@asynccontextmanager
async def _connected(options: Mapping[str, Any]) -> AsyncIterator[AIOKafkaClient]:
    client = AIOKafkaClient(**options)
    try:
        await client.bootstrap()
        yield client
    finally:
        await client.close()


async def _open_transactions(client: AIOKafkaClient) -> list[str]:
    request = wire.ListTransactionsRequest(["Ongoing"], [], round(OPEN_TOO_LONG_S * 1000), wire.NO_TAGS)
    found: list[str] = []
    for broker in client.cluster.brokers():
        try:
            response = await client.send(broker.nodeId, wire.Exactly(request))
        except errors.IncompatibleBrokerVersion:
            return []
        found += [transactional_id for transactional_id, *_ in response.transactions]
    return found


async def _end(client: AIOKafkaClient, transactional_id: str, reach: Reach, timeout_ms: int) -> None:
    coordinator = _Coordinator(client, transactional_id)
    with suppress(errors.ProducerFenced):  # by another who ends it, and is left to it
        is_committed = await coordinator.is_committed()
        if is_committed is not None:
            producer = await coordinator.producer(timeout_ms)
            await coordinator.begin(producer, reach.group, await _partitions(client, reach.topics))
            await coordinator.end(producer, commit=is_committed)


async def _partitions(client: AIOKafkaClient, topics: Sequence[str]) -> list[tuple[str, list[int]]]:
    """All of each topic's; a topic that does not exist is left out."""
    await client.set_topics(topics)
    return [(topic, sorted(numbers)) for topic in topics if (numbers := client.cluster.partitions_for_topic(topic))]


class _Coordinator:
    """Of one transactional id. Each call is repeated until it is answered, which is safe: once more changes nothing.

    All raise ProducerFenced when another has asked for a producer since.
    """

    def __init__(self, client: AIOKafkaClient, transactional_id: str) -> None:
        self._client = client
        self._transactional_id = transactional_id
        self._deadline_s = time.monotonic() + ANSWERED_S

    async def is_committed(self) -> bool | None:
        """Whether the last transaction is. None if there is none to speak of, or no telling."""
        try:
            response = await self._answered(
                wire.Exactly(wire.DescribeTransactionsRequest([self._transactional_id], wire.NO_TAGS))
            )
        except errors.IncompatibleBrokerVersion:
            return None
        _, _, state, *_ = response.transactions[0]  # empty where the id is unknown
        return COMMITTED.get(state)

    async def producer(self, timeout_ms: int) -> Producer:
        """The newest, once no transaction of the id is open."""
        response = await self._answered(InitProducerIdRequest(self._transactional_id, timeout_ms))
        return Producer(response.producer_id, response.producer_epoch)

    async def begin(self, producer: Producer, group: str, partitions: list[tuple[str, list[int]]]) -> None:
        """A transaction is open in these partitions, and in the group's positions."""
        if partitions:
            await self._answered(AddPartitionsToTxnRequest(self._transactional_id, *producer, partitions))
        await self._answered(AddOffsetsToTxnRequest(self._transactional_id, *producer, group))

    async def end(self, producer: Producer, *, commit: bool) -> None:
        """It is over; the markers are being written."""
        await self._answered(EndTxnRequest(self._transactional_id, *producer, commit))

    async def _answered(self, request: Any) -> Any:
        while True:
            try:
                node = await self._client.coordinator_lookup(CoordinationType.TRANSACTION, self._transactional_id)
                response = await self._client.send(node, request, group=ConnectionGroup.COORDINATION)
                for code, resource in _codes(response):
                    _raise(code, resource)
            except errors.KafkaError as error:
                if not error.retriable or time.monotonic() > self._deadline_s:
                    raise
                await asyncio.sleep(RETRY_S)
            else:
                return response


class _NotYet(errors.KafkaError):
    """The coordinator is elsewhere, or busy."""

    retriable = True


def _codes(response: Any) -> Iterable[tuple[int, str | None]]:
    """The error codes of a response, and the topic that each is about."""
    match response:
        case wire.DescribeTransactionsResponse():
            return [(code, None) for code, *_ in response.transactions if code != TRANSACTIONAL_ID_NOT_FOUND]
        case AddPartitionsToTxnResponse_v0():
            codes = [(code, topic) for topic, rows in response.errors for _, code in rows]
            return sorted(codes, key=lambda each: each[0] == OPERATION_NOT_ATTEMPTED)  # the cause comes first
    return [(response.error_code, None)]


def _raise(code: int, topic: str | None) -> None:
    if code in (INVALID_PRODUCER_EPOCH, PRODUCER_FENCED):
        raise errors.ProducerFenced
    if code in COORDINATOR_MOVED | TRY_AGAIN | {CONCURRENT_TRANSACTIONS}:
        raise _NotYet(f"error code {code}")
    if code:
        raise errors.for_code(code)(*([{topic}] if topic else []))
