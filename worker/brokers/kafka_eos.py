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

The producer's half is in `kafka_sender.py`. It never decides what to commit. Used by `kafka.py` alone; its tests run
against a real broker through a proxy.

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
  ._transaction_waiter                              asked what broke the transaction
  ._pending_txn_offsets                             failed without leaving the state from which abort really aborts
AIOKafkaConsumer._coordinator                       made stable; asked for positions, generation, a new join
GroupCoordinator._do_fetch_commit_offsets           overridden: OffsetFetch v7
  ._send_req .coordinator_dead .request_rejoin      used as the originals use them
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition, errors
from aiokafka.client import AIOKafkaClient
from aiokafka.consumer.group_coordinator import UNKNOWN_OFFSET, GroupCoordinator
from aiokafka.producer.sender import Sender
from aiokafka.structs import OffsetAndMetadata

from worker.brokers import kafka_wire as wire
from worker.brokers.base import Membership
from worker.brokers.kafka_assignor import KeepingAssignor
from worker.brokers.kafka_ending import OPEN_TOO_LONG_S
from worker.brokers.kafka_errors import COORDINATOR_MOVED, UNSTABLE_OFFSET_COMMIT
from worker.brokers.kafka_sender import EpochSender, StrictSender

TRANSACTION_VERSION = "transaction.version"
EPOCH_PER_TRANSACTION = 2  # the level of the feature that means KIP-890

UNSTABLE_RETRY_S = 0.02  # about one burst


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
        self._sender = (EpochSender if epochs else StrictSender)(
            self.client,
            acks=self._sender._acks,
            txn_manager=self._txn_manager,
            message_accumulator=self._message_accumulator,
            retry_backoff_ms=self._sender._retry_backoff * 1000,
            request_timeout_ms=self._request_timeout_ms,
        )
        await self._sender.start()


def broken_by(producer: AIOKafkaProducer) -> BaseException | None:
    """What broke the producer's transaction first. aiokafka keeps it, and raises others for whatever comes after."""
    ended = producer._txn_manager._transaction_waiter  # None before the first transaction
    return ended.exception() if ended and ended.done() and not ended.cancelled() else None


class StableConsumer(AIOKafkaConsumer):
    """A consumer that reads positions only when they cannot change any more. Subscribe after `start`.

    `stable` False, for tests: it reads them as stock aiokafka does.
    """

    def __init__(self, *, stable: bool = True, **options: Any) -> None:
        assignor = KeepingAssignor(lambda: self._coordinator.generation)
        super().__init__(partition_assignment_strategy=(assignor,), **options)
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


def _by_topic(partitions: Collection[TopicPartition]) -> dict[str, list[int]]:
    topics: dict[str, list[int]] = defaultdict(list)
    for partition in partitions:
        topics[partition.topic].append(partition.partition)
    return topics
