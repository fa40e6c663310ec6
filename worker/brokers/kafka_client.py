"""Kafka for everyone but the worker: topics, plain sending, and reading without a group.

Owns what commands and checks need of the client, so that nothing outside `brokers/` imports aiokafka. Takes part in no
group and no transaction; readers see only what is committed.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, NamedTuple, Self

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition, errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.conn import create_conn
from msgspec import Struct

from worker.brokers.base import Outgoing, Place, Record
from worker.brokers.kafka_errors import TopicRight, of_client, right_missing, topic_missing
from worker.brokers.kafka_settings import KafkaSettings, milliseconds
from worker.errors import Misconfigured, TokenmillError, Unavailable

TOPIC_KNOWN_S = 2.0  # a topic that was created a moment ago reaches every broker within this; usually 0.05 s
TOPIC_RETRY_S = 0.25
TAIL_POLL_MS = 200  # how late a reader notices that it is to stop
BROKERS_DEFAULT = -1  # replicas: as the cluster is set up

_NO_ERROR, _TOPIC_EXISTS, _TOPIC_DENIED, _CLUSTER_DENIED = 0, 36, 29, 31  # error codes of CreateTopics


class TopicSpec(Struct, frozen=True, kw_only=True):
    """A topic as it is to be made."""

    name: str
    partitions: int
    replicas: int = BROKERS_DEFAULT
    config: Mapping[str, str] = {}  # as in Kafka's topic settings, for example retention.ms


class TopicsMade(Struct, frozen=True):
    """Which topics are new, and which were there before; the latter are as they were."""

    created: tuple[str, ...]
    existing: tuple[str, ...]


async def create_topics(settings: KafkaSettings, topics: Sequence[TopicSpec]) -> TopicsMade:
    """All the topics exist. Raises Unavailable, or Misconfigured when the brokers refuse one."""
    try:
        response = await _requested(settings, topics)
    except (errors.KafkaError, OSError) as error:
        raise await _judged(error, settings) from error
    answers = {name: (code, text) for name, code, text in response.topic_errors}
    for name, (code, text) in answers.items():
        if code in (_TOPIC_DENIED, _CLUSTER_DENIED):
            raise right_missing("CREATE", f"topic {name!r}")
        if code not in (_NO_ERROR, _TOPIC_EXISTS):
            raise Misconfigured(f"the brokers refuse topic {name!r}: {text or errors.for_code(code).__name__}")
    return TopicsMade(
        created=tuple(topic.name for topic in topics if answers[topic.name][0] == _NO_ERROR),
        existing=tuple(topic.name for topic in topics if answers[topic.name][0] == _TOPIC_EXISTS),
    )


async def require_topics(settings: KafkaSettings, topics: Sequence[str], right: TopicRight = "READ") -> None:
    """The topics exist and we may see them. Raises Misconfigured, which names the one that is missing.

    Topics that we may not see are those for which we have no right at all: `right` is the one that we shall need.
    """
    async with _reader(settings) as consumer:
        await _known_partitions(consumer, topics, right)


async def count_partitions(settings: KafkaSettings, topics: Sequence[str]) -> dict[str, int]:
    """How many partitions each topic has; 0 where it does not exist, or is not ours to see."""
    async with _reader(settings) as consumer:
        cluster = await consumer._client.fetch_all_metadata()
        return {topic: len(cluster.partitions_for_topic(topic) or ()) for topic in topics}


class Kept(NamedTuple):
    """Where a sent record is."""

    place: Place
    offset: int


class Sender:
    """Sends records outside transactions, each once and in order. Used with `async with`."""

    def __init__(self, settings: KafkaSettings) -> None:
        self._settings = settings

    async def send(self, record: Outgoing) -> Awaitable[Kept]:
        """Hands the record over; the awaitable returned tells where it is kept. Raises Misconfigured or Unavailable."""
        try:
            sent = await self._producer.send(
                record.topic, record.value, key_of(record), record.partition, headers=list(record.headers)
            )
        except errors.UnknownTopicOrPartitionError as error:  # also where no broker has told in time
            if not await self._producer.client.force_metadata_update():
                raise of_client(error, self._settings, "WRITE") from error
            raise topic_missing(record.topic) from error
        except errors.KafkaError as error:
            raise of_client(error, self._settings, "WRITE") from error
        return asyncio.create_task(self._kept(sent))

    async def _kept(self, sent: Awaitable[Any]) -> Kept:
        try:
            metadata = await sent
        except errors.KafkaError as error:
            raise of_client(error, self._settings, "WRITE") from error
        return Kept(Place(metadata.topic, metadata.partition), metadata.offset)

    async def __aenter__(self) -> Self:
        self._producer = AIOKafkaProducer(
            enable_idempotence=True,
            compression_type="lz4",
            max_request_size=self._settings.record_bytes_max,
            **self._settings.client_options(),
        )
        try:
            await self._producer.start()
        except (errors.KafkaError, OSError) as error:
            await self._producer.stop()
            raise await _judged(error, self._settings) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._producer.stop()  # after everything handed over has been sent


@asynccontextmanager
async def tail(
    settings: KafkaSettings, topics: Sequence[str], *, from_start: bool
) -> AsyncIterator[AsyncIterator[Record]]:
    """Within, an endless iterator over what is committed: from the start of the topics, or from the moment of entering.

    Records of one partition come in order. Raises Unavailable or Misconfigured.
    """
    async with _reader(settings) as consumer:
        partitions = await _known_partitions(consumer, topics)
        consumer.assign(partitions)
        await (consumer.seek_to_beginning if from_start else consumer.seek_to_end)(*partitions)
        yield _endless(consumer)


async def read_all(settings: KafkaSettings, topics: Sequence[str]) -> list[Record]:
    """Every record that was committed when it was called, in order within each partition."""
    async with _reader(settings) as consumer:
        partitions = await _known_partitions(consumer, topics)
        ends = await consumer.end_offsets(partitions)
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        records: list[Record] = []
        progress_s = time.monotonic()
        while [partition for partition in partitions if await consumer.position(partition) < ends[partition]]:
            fetched = await consumer.getmany(timeout_ms=TAIL_POLL_MS)
            if fetched:
                progress_s = time.monotonic()
            elif time.monotonic() - progress_s > settings.request_timeout_s:
                raise Unavailable(f"Kafka at {settings.brokers} stopped answering while {', '.join(topics)} were read")
            records += (
                record_of(raw) for partition, raws in fetched.items() for raw in raws if raw.offset < ends[partition]
            )
        return records


def key_of(record: Outgoing) -> bytes | None:
    """The key to send the record with: Kafka takes one with neither key nor value, aiokafka does not."""
    return b"" if record.key is None and record.value is None else record.key


def record_of(raw: Any) -> Record:
    """An aiokafka ConsumerRecord as ours."""
    return Record(
        place=Place(raw.topic, raw.partition),
        offset=raw.offset,
        key=raw.key,
        value=raw.value,
        headers=tuple(raw.headers),
        timestamp_ms=raw.timestamp,
    )


@asynccontextmanager
async def _reader(settings: KafkaSettings) -> AsyncIterator[AIOKafkaConsumer]:
    """A started consumer of no group; what aiokafka raises within is translated."""
    consumer = AIOKafkaConsumer(
        isolation_level="read_committed",
        auto_offset_reset="earliest",  # what expired while it was read is skipped
        fetch_max_wait_ms=settings.fetch_max_wait_ms,
        **settings.client_options(),
    )
    try:
        await consumer.start()
        yield consumer
    except (errors.KafkaError, OSError) as error:
        raise await _judged(error, settings) from error
    finally:
        await close(consumer)


async def close(consumer: AIOKafkaConsumer) -> None:
    """The consumer is closed.

    aiokafka cancels its fetches one by one and passes the cancellation on to us of one that waits to be tried again.
    """
    try:
        await consumer.stop()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task and task.cancelling():  # it is we who are cancelled
            raise
        await consumer._client.close()


async def _judged(error: Exception, settings: KafkaSettings) -> TokenmillError:
    """What the error means. aiokafka only logs why it can connect to no broker: then we try each of them ourselves."""
    if isinstance(error, errors.KafkaConnectionError):
        refusals = await asyncio.gather(*(_refusal(settings, address) for address in settings.addresses))
        meanings = [of_client(refusal, settings) for refusal in refusals if refusal]
        if mistakes := [meaning for meaning in meanings if isinstance(meaning, Misconfigured)]:
            return mistakes[0]
    return of_client(error, settings)


async def _refusal(settings: KafkaSettings, address: str) -> Exception | None:
    """What keeps us from connecting and logging in at the address."""
    host, _, port = address.rpartition(":")
    try:
        connection = await create_conn(host.strip("[]"), int(port), **settings.connection_options())
    except (errors.KafkaError, OSError) as error:
        return error
    connection.close()
    return None


async def _known_partitions(
    consumer: AIOKafkaConsumer, topics: Sequence[str], right: TopicRight = "READ"
) -> list[TopicPartition]:
    """Every partition of the topics. Raises Misconfigured for a topic that stays unknown."""
    deadline_s = time.monotonic() + TOPIC_KNOWN_S
    client = consumer._client
    while True:
        await client.set_topics(topics)
        told = await client.force_metadata_update()
        if denied := client.cluster.unauthorized_topics & set(topics):
            raise right_missing(right, f"topic {min(denied)!r}")
        numbers = {topic: client.cluster.partitions_for_topic(topic) for topic in topics}
        if all(numbers.values()):
            return [TopicPartition(topic, number) for topic in topics for number in sorted(numbers[topic])]
        if time.monotonic() > deadline_s:
            if not told:
                raise errors.KafkaConnectionError("no broker has told which topics there are")
            raise topic_missing(next(topic for topic in topics if not numbers[topic]))
        await asyncio.sleep(TOPIC_RETRY_S)


async def _endless(consumer: AIOKafkaConsumer) -> AsyncIterator[Record]:
    while True:
        for raws in (await consumer.getmany(timeout_ms=TAIL_POLL_MS)).values():
            for raw in raws:
                yield record_of(raw)


async def _requested(settings: KafkaSettings, topics: Sequence[TopicSpec]) -> Any:
    admin = AIOKafkaAdminClient(**settings.client_options())
    try:
        await admin.start()
        return await admin.create_topics(
            [_new_topic(topic) for topic in topics], timeout_ms=milliseconds(settings.request_timeout_s)
        )
    finally:
        await admin.close()


def _new_topic(topic: TopicSpec) -> NewTopic:
    # aiokafka takes the brokers' default of -1 only beside an assignment, which may be empty.
    assignments: dict[int, list[int]] | None = {} if topic.replicas == BROKERS_DEFAULT else None
    return NewTopic(topic.name, topic.partitions, topic.replicas, assignments, dict(topic.config))
