"""The port on Apache Kafka: one group member, one transactional producer, one producer for previews.

Owns the clients and their lives, and turns their errors into ours. What makes a commit hold is in `kafka_eos.py`; what
is committed and when is not decided here. Records come from the group's partitions as bytes and leave as bytes.

Rebalances are eager: all partitions are revoked each time. aiokafka calls back on a task of its own and swallows what
the callback raises, so a failure in there is kept and raised by the next `poll`.
"""

import asyncio
from asyncio import Future
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, TypeVar

from aiokafka import AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition, errors
from aiokafka.structs import OffsetAndMetadata

from worker.brokers.base import Membership, Outgoing, Place, Position, RebalanceListener, Record
from worker.brokers.kafka_client import close, key_of, record_of, require_topics
from worker.brokers.kafka_ending import Reach, end_open_transactions, end_transaction
from worker.brokers.kafka_eos import ExactlyOnceProducer, StableConsumer, broken_by
from worker.brokers.kafka_errors import of_client, of_producer
from worker.brokers.kafka_sender import GroupMembership
from worker.brokers.kafka_settings import KafkaSettings, milliseconds
from worker.errors import Fenced, Misconfigured, OutcomeUnknown, TokenmillError

T = TypeVar("T")

BATCH_BYTES_MAX = 128 << 10  # of records for one partition: a whole burst in most cases, well below a topic's 1 MiB
PREVIEWS_MAX = 1000  # about a second of 1000 tokens/s; a preview that is older is of no use to anybody
PREVIEW_RETRY_S = 1.0  # the brokers were there at the start: they are restarting
DISCARD_S = 1.0  # a broken producer may wait for a broker that is gone


class KafkaBroker:
    """A worker's place in the group. See `Broker` for what each call promises."""

    def __init__(self, settings: KafkaSettings, outputs: Sequence[str]) -> None:
        """`outputs`: the topics that the group's workers write in transactions."""
        self._settings = settings
        self._reach = Reach(settings.group, outputs)
        self._timeout_ms = milliseconds(settings.transaction_timeout_s)
        self._options = settings.client_options()
        self._next: dict[Place, int] = {}
        self._previews = _Previews(self._options)
        self._open = AsyncExitStack()  # what `stop` closes, the last opened first

    async def start(self, topics: Sequence[str], listener: RebalanceListener) -> None:
        try:
            await require_topics(self._settings, topics)
            self._producer = await self._new_producer()
            self._open.push_async_callback(lambda: _discard(self._producer))
            await self._end_open_transactions()
            self._consumer = self._new_consumer()
            self._open.push_async_callback(close, self._consumer)
            await self._consumer.start()
        except (errors.KafkaError, OSError) as error:
            await self.stop()
            raise of_client(error, self._settings) from error
        self._open.push_async_callback(self._previews.stop)
        self._listener = _Rebalances(self._consumer, listener, self._next.clear)
        self._consumer.subscribe(list(topics), listener=self._listener)

    async def stop(self) -> None:
        await self._open.aclose()

    async def poll(self, places: Collection[Place], num_max: int, timeout_s: float) -> list[Record]:
        self._listener.raise_failure()
        self._pause_all_but(places if num_max > 0 else ())
        try:
            fetched = await self._consumer.getmany(timeout_ms=milliseconds(timeout_s), max_records=max(num_max, 1))
        except errors.NoOffsetForPartitionError:
            return []  # asked for by the fetcher in the middle of an assignment; the listener is about to seek
        except errors.OffsetOutOfRangeError as error:
            await self._seek_into_log(error.args[0])
            return []
        except errors.KafkaError as error:
            raise of_client(error, self._settings) from error
        self._listener.raise_failure()
        records = [record_of(raw) for batch in fetched.values() for raw in batch]
        self._next.update((record.place, record.offset + 1) for record in records)
        return records

    def seek(self, place: Place, offset: int) -> None:
        self._consumer.seek(TopicPartition(*place), offset)
        self._next[place] = offset

    async def positions(self, places: Collection[Place]) -> Mapping[Place, Position]:
        partitions = [TopicPartition(*place) for place in places]
        try:
            committed = await self._consumer.stable_positions(partitions, self._end_open_transactions)
            fresh = [partition for partition in partitions if partition not in committed]
            starts = await self._consumer.beginning_offsets(fresh) if fresh else {}
        except errors.KafkaError as error:
            raise of_client(error, self._settings) from error
        return {
            Place(*partition): Position(committed[partition].offset, committed[partition].metadata)
            if partition in committed
            else Position(starts[partition])
            for partition in partitions
        }

    async def ends(self, places: Collection[Place]) -> Mapping[Place, int]:
        try:
            found = await self._consumer.end_offsets([TopicPartition(*place) for place in places])
        except errors.KafkaError as error:
            raise of_client(error, self._settings) from error
        return {Place(*partition): offset for partition, offset in found.items()}

    async def begin(self) -> None:
        await self._transact(self._producer.begin_transaction())

    async def send(self, record: Outgoing) -> Awaitable[None]:
        delivery = await self._transact(
            self._producer.send(
                record.topic, record.value, key_of(record), record.partition, headers=list(record.headers)
            )
        )
        sent: Future[None] = asyncio.get_running_loop().create_future()
        delivery.add_done_callback(lambda done: self._settle(sent, done))
        return sent

    async def send_positions(self, positions: Mapping[Place, Position], membership: Membership) -> None:
        group = membership.group if self._settings.stock_commits else GroupMembership.of(membership)
        offsets = {
            TopicPartition(*place): OffsetAndMetadata(position.offset, position.metadata)
            for place, position in positions.items()
        }
        await self._transact(self._producer.send_offsets_to_transaction(offsets, group))

    async def commit(self) -> None:
        await self._transact(self._producer.commit_transaction())

    async def abort(self) -> None:
        await self._transact(self._producer.abort_transaction())

    async def renew(self) -> None:
        await _discard(self._producer)
        self._producer = await self._new_producer()

    async def preview(self, record: Outgoing) -> None:
        self._previews.put(record)

    async def lag(self) -> Mapping[Place, int]:
        held = self._consumer.assignment()
        ends = {Place(*partition): self._consumer.last_stable_offset(partition) for partition in held}
        return {
            place: max(0, end - self._next[place])
            for place, end in ends.items()
            if end is not None and place in self._next
        }

    def _new_consumer(self) -> StableConsumer:
        settings = self._settings
        return StableConsumer(
            stable=not settings.stock_commits,
            group_id=settings.group,
            session_timeout_ms=milliseconds(settings.session_timeout_s),
            heartbeat_interval_ms=milliseconds(settings.heartbeat_s),
            rebalance_timeout_ms=milliseconds(settings.rebalance_timeout_s),
            isolation_level="read_committed",
            auto_offset_reset="none",  # positions come from `positions`, never from a default
            enable_auto_commit=False,
            fetch_max_wait_ms=settings.fetch_max_wait_ms,
            **self._options,
        )

    async def _new_producer(self) -> AIOKafkaProducer:
        settings = self._settings
        strict = {} if settings.stock_commits else {"transaction_version": settings.transaction_version}
        producer = (AIOKafkaProducer if settings.stock_commits else ExactlyOnceProducer)(
            transactional_id=settings.transactional_id,
            transaction_timeout_ms=self._timeout_ms,
            max_batch_size=BATCH_BYTES_MAX,
            max_request_size=settings.record_bytes_max,
            compression_type="lz4",  # cost events shrink to a seventh for 1 us each
            **strict,
            **self._options,
        )
        try:
            if not settings.stock_commits:
                await end_transaction(self._options, settings.transactional_id, self._reach, self._timeout_ms)
            await producer.start()
        except BaseException as error:
            await _discard(producer)
            if isinstance(error, errors.KafkaError | OSError):
                raise of_client(error, settings, "WRITE") from error
            raise
        return producer

    async def _end_open_transactions(self) -> None:
        prefix = self._settings.transactional_id_prefix
        if not self._settings.stock_commits:
            await end_open_transactions(self._options, prefix, self._reach, self._timeout_ms)

    def _pause_all_but(self, places: Collection[Place]) -> None:
        """Only what changes is touched: pausing a partition throws away what was fetched for it."""
        held, paused = self._consumer.assignment(), self._consumer.paused()
        wanted = {TopicPartition(*place) for place in places} & held
        self._consumer.pause(*(held - wanted - paused))
        self._consumer.resume(*(wanted & paused))

    async def _seek_into_log(self, wanted: Mapping[TopicPartition, int]) -> None:
        """What expired before it was read is skipped. Raises Misconfigured for an offset that was never written."""
        starts = await self._consumer.beginning_offsets(list(wanted))
        for partition, offset in wanted.items():
            if offset >= starts[partition]:
                raise Misconfigured(
                    f"group {self._settings.group!r} has come to offset {offset} of {partition.topic}-"
                    f"{partition.partition}, beyond its end: was the topic made anew? use another group"
                )
            self.seek(Place(*partition), starts[partition])

    async def _transact(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except Exception as error:  # aiokafka's producer fails by KafkaError, IllegalOperation and AssertionError
            raise self._judged(error) from error

    def _settle(self, sent: "Future[None]", delivery: "Future[Any]") -> None:
        if sent.done():  # nobody waits any more
            return
        if delivery.cancelled():
            sent.cancel()
        elif error := delivery.exception():
            sent.set_exception(self._judged(error))
        else:
            sent.set_result(None)

    def _judged(self, error: BaseException) -> TokenmillError:
        judged = of_producer(error, self._settings)
        if isinstance(judged, OutcomeUnknown) and (first := broken_by(self._producer)):
            known = of_producer(first, self._settings)
            judged = known if isinstance(known, Misconfigured) else judged
        if isinstance(judged, Fenced):
            self._consumer.rejoin()  # what the worker lets go of must be dealt out anew, to us or to others
        return judged


class _Rebalances(ConsumerRebalanceListener):
    """Between aiokafka's callbacks and our listener: pauses first, snapshots the membership, keeps failures."""

    def __init__(self, consumer: StableConsumer, listener: RebalanceListener, forget: Callable[[], None]) -> None:
        self._consumer = consumer
        self._listener = listener
        self._forget = forget
        self._holding = False
        self._failure: BaseException | None = None

    def raise_failure(self) -> None:
        """Raises what a callback raised, if one did."""
        if self._failure:
            raise self._failure

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:  # noqa: ARG002  # all, always
        if self._holding:
            self._holding = False
            await self._kept(self._listener.revoked())
        self._forget()

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        # Before anything is awaited: no record may come from a position that nobody chose, and the generation is the
        # assignment's own. A later look may find the generation of an assignment that is only being made.
        self._consumer.pause(*assigned)
        membership = self._consumer.membership()
        self._holding = True
        await self._kept(self._listener.assigned([Place(*partition) for partition in sorted(assigned)], membership))

    async def _kept(self, call: Awaitable[None]) -> None:
        try:
            await call
        except Exception as error:  # noqa: BLE001  # aiokafka would log it and go on; `poll` raises it
            self._failure = error


class _Previews:
    """Sends best effort: a bounded queue, a producer opened with the first preview; what is too much is dropped."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._queue: asyncio.Queue[Outgoing] = asyncio.Queue(PREVIEWS_MAX)
        self._task: asyncio.Task[None] | None = None

    def put(self, record: Outgoing) -> None:
        """The record will be sent, unless the queue is full."""
        if self._task is None:
            self._task = asyncio.create_task(self._send_all())
        with suppress(asyncio.QueueFull):
            self._queue.put_nowait(record)

    async def stop(self) -> None:
        """No preview is sent any more."""
        if self._task:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _send_all(self) -> None:
        producer = AIOKafkaProducer(acks=1, compression_type="lz4", max_batch_size=BATCH_BYTES_MAX, **self._options)
        try:
            await _start_patiently(producer)
            while True:
                record = await self._queue.get()
                with suppress(errors.KafkaError):  # a missing topic, an unreachable leader: it was a preview
                    sent = await producer.send(
                        record.topic, record.value, key_of(record), record.partition, headers=list(record.headers)
                    )
                    sent.add_done_callback(_ignored)
        finally:
            await _discard(producer)


async def _start_patiently(producer: AIOKafkaProducer) -> None:
    while True:
        with suppress(errors.KafkaError):
            await producer.start()
            return
        await asyncio.sleep(PREVIEW_RETRY_S)


def _ignored(sent: "Future[Any]") -> None:
    """Takes note of a failure, so that asyncio does not warn of it."""
    if not sent.cancelled():
        sent.exception()


async def _discard(producer: AIOKafkaProducer) -> None:
    """The producer is gone, whatever state it was in. A transaction of its own stays open."""
    with suppress(Exception):  # its sender may have died of anything, which was raised where it mattered
        async with asyncio.timeout(DISCARD_S):
            await producer.stop()
    await producer.client.close()
