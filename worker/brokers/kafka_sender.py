"""The senders of `ExactlyOnceProducer`: which requests move a transaction, and how their answers are read.

Owns the difference between the two ways, strict and with epochs, that `kafka_eos.py` explains; the private names of
aiokafka used here are listed there. Never decides what is sent.
"""

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from aiokafka import TopicPartition, errors
from aiokafka.client import CoordinationType
from aiokafka.producer.sender import EndTxnHandler, Sender, SendProduceReqHandler, TxnOffsetCommitHandler
from aiokafka.producer.transaction_manager import PidAndEpoch, TransactionResult
from aiokafka.structs import OffsetAndMetadata

from worker.brokers import kafka_wire as wire
from worker.brokers.base import Membership
from worker.brokers.kafka_errors import (
    CONCURRENT_TRANSACTIONS,
    COORDINATOR_MOVED,
    GROUP_AUTHORIZATION_FAILED,
    INVALID_PRODUCER_EPOCH,
    OFFSET_METADATA_TOO_LARGE,
    PRODUCER_FENCED,
    STALE,
    TRY_AGAIN,
    AnswerLost,
    StaleGroupMember,
)

STILL_COMPLETING_S = 0.003  # the markers of the transaction before are written within 1 to 5 ms


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


class StrictSender(Sender):
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


class EpochSender(StrictSender):
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
