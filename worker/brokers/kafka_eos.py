"""The thin extension of aiokafka 0.14 that exactly-once rests on.

Owns three things that stock aiokafka lacks, and without which it loses and repeats work:

KIP-447   the positions of a transaction carry generation and member, so that a worker that slept through a rebalance is
          refused; positions are read only when no transaction on them is open, and never mistaken for absent while a
          restarted broker still loads them.
KIP-890   an epoch for each transaction, where the cluster's finalized `transaction.version` is 2: whatever arrives late
          is refused, and retries are recognised. Two round trips less, too.
strict    where it is not: all transactions of a producer look alike, so a late request would act on the next one. A
          request that moves a transaction is then never sent twice; a lost answer is an error, and the producer is
          dropped.

It never decides what to commit. Used by `kafka.py` alone; its tests run against real brokers through a proxy.

The private names of aiokafka that it leans on (so the version is pinned, and moves only together with the tests):

AIOKafkaProducer._sender                            replaced: the sender is where requests are made
  ._txn_manager ._message_accumulator ._request_timeout_ms                  handed to the new sender
Sender._acks ._retry_backoff ._request_timeout_ms                           likewise
  ._do_txn_offset_commit ._do_txn_commit ._send_produce_req                 overridden: other handlers
  ._maybe_do_transactional_request                                          overridden: nothing to announce (KIP-890)
  ._find_coordinator ._coordinator_dead ._in_flight ._muted_partitions      used as the originals use them
BaseHandler.do ._default_backoff; TxnOffsetCommitHandler, EndTxnHandler, SendProduceReqHandler: .create_request
  .handle_response ._can_retry                                              overridden: other versions, other errors
TransactionManager._pid_and_epoch ._sequence_numbers                        moved on by EndTxn v5
  ._pending_txn_offsets                             failed without leaving the state from which abort really aborts
AIOKafkaConsumer._coordinator                       made stable; asked for positions, generation, a new join
GroupCoordinator._do_fetch_commit_offsets           overridden: OffsetFetch v7
  ._send_req .coordinator_dead .request_rejoin      used as the originals use them
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition, errors
from aiokafka.client import AIOKafkaClient, CoordinationType
from aiokafka.consumer.group_coordinator import UNKNOWN_OFFSET, GroupCoordinator
from aiokafka.producer.sender import EndTxnHandler, Sender, SendProduceReqHandler, TxnOffsetCommitHandler
from aiokafka.producer.transaction_manager import PidAndEpoch, TransactionResult
from aiokafka.structs import OffsetAndMetadata

from worker.brokers import kafka_wire as wire
from worker.brokers.base import Membership
from worker.brokers.kafka_errors import AnswerLost, StaleGroupMember

TRANSACTION_VERSION = "transaction.version"
EPOCH_PER_TRANSACTION = 2  # the level of the feature that means KIP-890

# Error codes that aiokafka has no class for, or not under this name.
ILLEGAL_GENERATION, UNKNOWN_MEMBER_ID, REBALANCE_IN_PROGRESS, FENCED_INSTANCE_ID = 22, 25, 27, 82
OFFSET_METADATA_TOO_LARGE, GROUP_AUTHORIZATION_FAILED = 12, 30
UNKNOWN_TOPIC, NETWORK_EXCEPTION, LOAD_IN_PROGRESS, UNSTABLE_OFFSET_COMMIT = 3, 13, 14, 88
REQUEST_TIMED_OUT, COORDINATOR_NOT_AVAILABLE, NOT_COORDINATOR = 7, 15, 16
INVALID_PRODUCER_EPOCH, PRODUCER_FENCED, CONCURRENT_TRANSACTIONS = 47, 90, 51

STALE = {ILLEGAL_GENERATION, UNKNOWN_MEMBER_ID, REBALANCE_IN_PROGRESS, FENCED_INSTANCE_ID}
COORDINATOR_MOVED = {COORDINATOR_NOT_AVAILABLE, NOT_COORDINATOR, REQUEST_TIMED_OUT}
TRY_AGAIN = {LOAD_IN_PROGRESS, UNKNOWN_TOPIC, NETWORK_EXCEPTION, UNSTABLE_OFFSET_COMMIT}

STILL_COMPLETING_S = 0.003  # the markers of the transaction before are written within 1 to 5 ms
UNSTABLE_RETRY_S = 0.02  # about one burst
OPEN_TOO_LONG_S = 1.0  # a burst takes 10 to 50 ms: whoever holds a transaction this long is dead, or as good as


class ExactlyOnceProducer(AIOKafkaProducer):
    """A transactional producer whose commits hold; send positions with a `GroupMembership` in place of the group id.

    `transaction_version` None: the cluster is asked at the start. A producer that has raised must not be used again.
    """

    def __init__(self, *, transaction_version: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._sender: Sender
        self.transaction_version = transaction_version

    async def start(self) -> None:
        """Any earlier producer of the same transactional id is fenced and its transaction over."""
        await self.client.bootstrap()
        if self.transaction_version is None:
            self.transaction_version = await _finalized_transaction_version(self.client)
        epochs = self.transaction_version >= EPOCH_PER_TRANSACTION
        self._sender = (_EpochSender if epochs else _StrictSender)(
            self.client,
            acks=self._sender._acks,
            txn_manager=self._txn_manager,
            message_accumulator=self._message_accumulator,
            retry_backoff_ms=self._sender._retry_backoff * 1000,
            request_timeout_ms=self._request_timeout_ms,
        )
        await self._sender.start()


class GroupMembership(str):
    """A membership in the place of a group id: aiokafka passes it on unread."""

    __slots__ = ("membership",)
    membership: Membership

    @classmethod
    def of(cls, membership: Membership) -> "GroupMembership":
        """The group id that carries the membership."""
        group = cls(membership.group)
        group.membership = membership
        return group


class StableConsumer(AIOKafkaConsumer):
    """A consumer that reads positions only when they cannot change any more. Subscribe after `start`.

    `stable` False, for tests: it reads them as stock aiokafka does.
    """

    def __init__(self, *, stable: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self._stable = stable

    async def start(self) -> None:
        """The consumer is connected; it has not joined its group yet."""
        await super().start()
        if self._stable:
            self._coordinator.__class__ = _StableCoordinator  # it is made in there, and has done nothing yet

    def membership(self) -> Membership:
        """The present one; belongs to the present assignment only until anything is awaited."""
        coordinator = self._coordinator
        return Membership(group=self._group_id, generation=coordinator.generation, member=coordinator.member_id)

    def rejoin(self) -> None:
        """The group will deal out its partitions anew."""
        self._coordinator.request_rejoin()

    async def stable_positions(
        self, partitions: Collection[TopicPartition], end_open_transactions: Callable[[], Awaitable[object]]
    ) -> Mapping[TopicPartition, OffsetAndMetadata]:
        """What is committed, once no transaction on it is open; partitions without a commit are left out.

        Whenever a transaction has been in the way for `OPEN_TOO_LONG_S`, `end_open_transactions` is awaited.
        """
        coordinator, waiting_since = self._coordinator, time.monotonic()
        while partitions:
            await coordinator.ensure_coordinator_known()
            try:
                return dict(await coordinator._do_fetch_commit_offsets(partitions))
            except errors.KafkaError as error:
                if not error.retriable:
                    raise
                if isinstance(error, UnstableOffsetCommit) and time.monotonic() - waiting_since > OPEN_TOO_LONG_S:
                    await end_open_transactions()
                    waiting_since = time.monotonic()
            await asyncio.sleep(UNSTABLE_RETRY_S)
        return {}


class UnstableOffsetCommit(errors.KafkaError):
    """A transaction that will move the position is open."""

    retriable = True


async def end_open_transactions(options: Mapping[str, Any], prefix: str, transaction_timeout_ms: int) -> Sequence[str]:
    """The transactions of ids with this prefix that were open for `OPEN_TOO_LONG_S` are aborted; returns their ids.

    Their owners, should they live, are fenced: they start again, nothing is lost. On brokers older than 3.8, which
    cannot tell for how long, nothing happens, and readers wait for the transaction's own timeout.
    """
    client = AIOKafkaClient(**options)
    await client.bootstrap()
    try:
        listed = await _open_transactions(client)
    finally:
        await client.close()
    ours = sorted(transactional_id for transactional_id in listed if transactional_id.startswith(prefix))
    for transactional_id in ours:
        heir = AIOKafkaProducer(
            transactional_id=transactional_id, transaction_timeout_ms=transaction_timeout_ms, **options
        )
        try:
            await heir.start()  # InitProducerId: answered when the transaction is over
        finally:
            await heir.stop()
    return ours


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


async def _finalized_transaction_version(client: AIOKafkaClient) -> int:
    request = wire.ApiVersionsRequest("tokenmill", "1", wire.NO_TAGS)
    response = await client.send(client.get_random_node(), wire.Exactly(request))
    return int(response.finalized_level(TRANSACTION_VERSION))


class _StableCoordinator(GroupCoordinator):
    async def _do_fetch_commit_offsets(
        self, partitions: Collection[TopicPartition]
    ) -> dict[TopicPartition, OffsetAndMetadata]:
        topics = [(topic, numbers, wire.NO_TAGS) for topic, numbers in _by_topic(partitions).items()]
        request = wire.OffsetFetchRequest(self.group_id, topics, True, wire.NO_TAGS)
        response = await self._send_req(wire.Exactly(request))
        self._check(response.error_code)
        found = {
            TopicPartition(topic, number): (offset, metadata, code)
            for topic, rows, _ in response.topics
            for number, offset, _, metadata, code, _ in rows
        }
        for _, _, code in found.values():
            self._check(code)
        if missing := set(partitions) - found.keys():
            raise errors.GroupCoordinatorNotAvailableError(f"no positions for {missing}")
        return {
            partition: OffsetAndMetadata(offset, metadata or "")
            for partition, (offset, metadata, _) in found.items()
            if offset != UNKNOWN_OFFSET
        }

    def _check(self, code: int) -> None:
        if code in COORDINATOR_MOVED:
            self.coordinator_dead()
        if code == UNSTABLE_OFFSET_COMMIT:
            raise UnstableOffsetCommit
        if code:
            raise errors.for_code(code)


class _OffsetsHandler(TxnOffsetCommitHandler):
    """TxnOffsetCommit with generation and member."""

    request_struct: type[wire.TxnOffsetCommitRequest | wire.EpochTxnOffsetCommitRequest] = wire.TxnOffsetCommitRequest

    def create_request(self) -> wire.Exactly:
        topics: dict[str, list[tuple[int, int, int, str, dict[int, bytes]]]] = defaultdict(list)
        for partition, position in sorted(self._offsets.items()):
            topics[partition.topic].append(
                (partition.partition, position.offset, -1, position.metadata, wire.NO_TAGS)  # -1: no leader epoch
            )
        transaction, membership = self._sender._txn_manager, self._group_id.membership
        return wire.Exactly(
            self.request_struct(
                transaction.transactional_id,
                membership.group,
                transaction.producer_id,
                transaction.producer_epoch,
                membership.generation,
                membership.member,
                None,  # no static membership
                [(topic, rows, wire.NO_TAGS) for topic, rows in topics.items()],
                wire.NO_TAGS,
            )
        )

    def handle_response(self, response: Any) -> float | None:
        codes = {TopicPartition(topic, number): code for topic, rows, _ in response.topics for number, code, _ in rows}
        failures = set(codes.values()) - {0}
        if failures & {INVALID_PRODUCER_EPOCH, PRODUCER_FENCED}:
            raise errors.ProducerFenced
        if failures & STALE:
            self._refuse(StaleGroupMember(f"error codes {sorted(failures)}"))
            return None
        if refused := failures & {OFFSET_METADATA_TOO_LARGE, GROUP_AUTHORIZATION_FAILED}:
            self._refuse(errors.for_code(refused.pop())())
            return None
        if failures & COORDINATOR_MOVED:
            self._sender._coordinator_dead(CoordinationType.GROUP)
            return float(self._default_backoff)
        if CONCURRENT_TRANSACTIONS in failures:
            return STILL_COMPLETING_S
        if failures & TRY_AGAIN:
            return float(self._default_backoff)
        if failures:
            raise errors.for_code(failures.pop())
        for partition in codes:
            offset = self._offsets[partition].offset
            self._sender._txn_manager.offset_committed(partition, offset, self._group_id)
        return None

    def _refuse(self, error: errors.KafkaError) -> None:
        """Fails the call and leaves the transaction open, so that an abort really reaches the broker."""
        _, _, waiter = self._sender._txn_manager._pending_txn_offsets.popleft()
        if not waiter.done():
            waiter.set_exception(error)


class _SentOnce:
    """Mixed into a handler: the request leaves once, or its outcome is unknown."""

    async def do(self, node_id: int) -> bool:
        handler: Any = self
        try:
            response = await handler._sender.client.send(node_id, handler.create_request(), group=handler.group)
        except errors.NodeNotReadyError:  # no connection: nothing has left
            await asyncio.sleep(handler.handle_error())
            return False
        except (errors.RequestTimedOutError, errors.KafkaConnectionError) as error:
            raise AnswerLost(type(self).__name__) from error
        backoff_s = handler.handle_response(response)
        if backoff_s is not None:
            await asyncio.sleep(backoff_s)
        return backoff_s is None


class _StrictOffsetsHandler(_SentOnce, _OffsetsHandler):
    pass


class _StrictEndTxnHandler(_SentOnce, EndTxnHandler):
    pass


class _EpochOffsetsHandler(_OffsetsHandler):
    request_struct = wire.EpochTxnOffsetCommitRequest


class _EpochEndTxnHandler(EndTxnHandler):
    def create_request(self) -> wire.Exactly:
        transaction = self._sender._txn_manager
        return wire.Exactly(
            wire.EpochEndTxnRequest(
                transaction.transactional_id,
                transaction.producer_id,
                transaction.producer_epoch,
                self._commit_result == TransactionResult.COMMIT,
                wire.NO_TAGS,
            )
        )

    def handle_response(self, response: Any) -> float | None:
        if response.error_code == PRODUCER_FENCED:
            raise errors.ProducerFenced
        if response.error_code == CONCURRENT_TRANSACTIONS:
            return STILL_COMPLETING_S
        if not response.error_code:
            transaction = self._sender._txn_manager
            # The next epoch; a new producer id when the epochs are used up, every 32,766 transactions.
            transaction._pid_and_epoch = PidAndEpoch(response.producer_id, response.producer_epoch)
            transaction._sequence_numbers.clear()  # each epoch counts from 0
        backoff_s: float | None = super().handle_response(response)
        return backoff_s


class _EpochProduceHandler(SendProduceReqHandler):
    def create_request(self) -> wire.Exactly:
        topics: dict[str, list[tuple[int, bytes, dict[int, bytes]]]] = defaultdict(list)
        for partition, batch in self._batches.items():
            topics[partition.topic].append((partition.partition, bytes(batch.get_data_buffer()), wire.NO_TAGS))
        return wire.Exactly(
            wire.EpochProduceRequest(
                self._sender._txn_manager.transactional_id,
                self._sender._acks,
                self._sender._request_timeout_ms,
                [(topic, rows, wire.NO_TAGS) for topic, rows in topics.items()],
                wire.NO_TAGS,
            )
        )

    def handle_response(self, response: Any) -> None:
        # Without its tags a v12 response looks like v8 to aiokafka, the newest that it can read.
        rows = [(topic, [row[:-1] for row in partitions]) for topic, partitions, _ in response.topics]
        super().handle_response(SimpleNamespace(API_VERSION=8, topics=rows))

    def _can_retry(self, error: Any, batch: Any) -> bool:
        return getattr(error, "errno", 0) == CONCURRENT_TRANSACTIONS or bool(super()._can_retry(error, batch))


class _StrictSender(Sender):
    """KIP-447; requests that move a transaction are sent once."""

    offsets_handler: type[_OffsetsHandler] = _StrictOffsetsHandler
    end_handler: type[EndTxnHandler] = _StrictEndTxnHandler

    async def _do_txn_offset_commit(
        self, offsets: Mapping[TopicPartition, OffsetAndMetadata], group: GroupMembership
    ) -> None:
        if offsets:
            node_id = await self._find_coordinator(CoordinationType.GROUP, str(group))
            await self.offsets_handler(self, offsets, group).do(node_id)

    async def _do_txn_commit(self, result: TransactionResult) -> None:
        await self._message_accumulator.flush_for_commit()
        transaction = self._txn_manager
        if transaction.is_empty_transaction():
            transaction.complete_transaction()
            return
        node_id = await self._find_coordinator(CoordinationType.TRANSACTION, transaction.transactional_id)
        await self.end_handler(self, result).do(node_id)


class _EpochSender(_StrictSender):
    """KIP-447 and KIP-890; requests are retried, for the broker recognises them by their epoch."""

    offsets_handler = _EpochOffsetsHandler
    end_handler = _EpochEndTxnHandler

    def _maybe_do_transactional_request(self) -> Any:
        # Produce v12 and TxnOffsetCommit v5 announce the partition and the group by themselves.
        transaction = self._txn_manager
        for partition in list(transaction.partitions_to_add()):
            transaction.partition_added(partition)
        if (group := transaction.consumer_group_to_add()) is not None:
            transaction.consumer_group_added(group)
        return super()._maybe_do_transactional_request()

    async def _send_produce_req(self, node_id: int, batches: Mapping[TopicPartition, Any]) -> None:
        await _EpochProduceHandler(self, batches).do(node_id)
        self._in_flight.remove(node_id)
        for partition in batches:
            self._muted_partitions.remove(partition)


def _by_topic(partitions: Collection[TopicPartition]) -> dict[str, list[int]]:
    topics: dict[str, list[int]] = defaultdict(list)
    for partition in partitions:
        topics[partition.topic].append(partition.partition)
    return topics
