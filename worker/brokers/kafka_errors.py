"""What aiokafka raises, as our error tree.

Owns the judgement: fenced, unknown, or fatal with what to do about it. Raises nothing and catches nothing itself.
"""

import ssl
from collections.abc import Iterator
from typing import Literal

from aiokafka import errors

from worker.brokers.kafka_settings import KafkaSettings
from worker.errors import Fenced, Misconfigured, OutcomeUnknown, TokenmillError, Unavailable

# Kafka's error codes, for the requests that aiokafka does not have.
ILLEGAL_GENERATION, UNKNOWN_MEMBER_ID, REBALANCE_IN_PROGRESS, FENCED_INSTANCE_ID = 22, 25, 27, 82
OFFSET_METADATA_TOO_LARGE, GROUP_AUTHORIZATION_FAILED = 12, 30
UNKNOWN_TOPIC, NETWORK_EXCEPTION, LOAD_IN_PROGRESS, UNSTABLE_OFFSET_COMMIT = 3, 13, 14, 88
REQUEST_TIMED_OUT, COORDINATOR_NOT_AVAILABLE, NOT_COORDINATOR = 7, 15, 16
INVALID_PRODUCER_EPOCH, PRODUCER_FENCED, CONCURRENT_TRANSACTIONS = 47, 90, 51
OPERATION_NOT_ATTEMPTED, TRANSACTIONAL_ID_NOT_FOUND = 55, 105

STALE = {ILLEGAL_GENERATION, UNKNOWN_MEMBER_ID, REBALANCE_IN_PROGRESS, FENCED_INSTANCE_ID}
COORDINATOR_MOVED = {COORDINATOR_NOT_AVAILABLE, NOT_COORDINATOR, REQUEST_TIMED_OUT}
TRY_AGAIN = {LOAD_IN_PROGRESS, UNKNOWN_TOPIC, NETWORK_EXCEPTION, UNSTABLE_OFFSET_COMMIT}


TopicRight = Literal["READ", "WRITE"]  # what we want of a topic; brokers only say that we may not


class StaleGroupMember(errors.KafkaError):
    """The group has moved on from the generation or member that a transaction's positions came with."""


class AnswerLost(errors.KafkaError):
    """A request that moves a transaction was sent and no answer came: it may yet arrive."""


def of_producer(error: BaseException, settings: KafkaSettings) -> TokenmillError:
    """For an error of a transaction.

    What is not known to be something else is an unknown outcome: aiokafka's producer breaks in many ways, down to bare
    assertions, and after none of them can it be used again.
    """
    for cause in _causes(error):
        if isinstance(cause, StaleGroupMember | errors.ProducerFenced | errors.InvalidProducerEpoch):
            return Fenced(f"refused by the brokers: {cause!r}")
    return _mistake(error, settings, "WRITE") or OutcomeUnknown(f"the transaction broke off: {error!r}")


def of_client(error: BaseException, settings: KafkaSettings, topic_right: TopicRight = "READ") -> TokenmillError:
    """For an error of anything else: without an answer there is no going on. `topic_right` is what was made use of."""
    return _mistake(error, settings, topic_right) or Unavailable(
        f"no usable answer from Kafka at {settings.brokers}: {error!r}; is it running? "
        "`tokenmill broker up` starts one here; --brokers or TOKENMILL_BROKERS name another"
    )


def topic_missing(topic: str) -> Misconfigured:
    """For a topic that does not exist: we never create one in passing."""
    return Misconfigured(f"topic {topic!r} does not exist; create it with `tokenmill topics create`")


def right_missing(operation: str, resource: str) -> Misconfigured:
    """For an ACL that our user lacks."""
    return Misconfigured(f"our Kafka user lacks the right to {operation} {resource}; have an ACL added for it")


def _mistake(error: BaseException, settings: KafkaSettings, topic_right: TopicRight) -> Misconfigured | None:
    """The settings or the cluster's set-up behind an error, where it tells."""
    for cause in _causes(error):
        if found := _lack(cause, settings, topic_right) or _refusal(cause, settings) or _limit(cause, settings):
            return found
    return None


def _lack(error: BaseException, settings: KafkaSettings, topic_right: TopicRight) -> Misconfigured | None:
    """The right that is missing."""
    match error:
        case errors.TopicAuthorizationFailedError():
            return right_missing(topic_right, f"topic {_named(error)}")
        case errors.GroupAuthorizationFailedError():
            return right_missing("READ", f"group {settings.group!r}")
        case errors.TransactionalIdAuthorizationFailed():
            return right_missing("WRITE", f"transactional ids that begin with {settings.transactional_id_prefix!r}")
        case errors.ClusterAuthorizationFailedError():  # to whoever numbers its records, before any is sent
            return right_missing("WRITE", "any topic at all")
    return None


def _refusal(error: BaseException, settings: KafkaSettings) -> Misconfigured | None:
    """Why we, or they, end the connection before it is of use."""
    match error:
        case ssl.SSLError():
            return Misconfigured(
                f"no TLS connection to Kafka at {settings.brokers}: {error}; check security.ca_file (the authority "
                "behind the brokers' certificates), the brokers' addresses and security.protocol"
            )
        case errors.SaslAuthenticationFailed():
            return Misconfigured(
                f"Kafka at {settings.brokers} refuses the login of {settings.sasl_username!r}: {error}; check "
                "security.username and the password in security.password_file"
            )
        case errors.UnsupportedSaslMechanismError():
            return Misconfigured(
                f"Kafka at {settings.brokers} takes no login by {settings.sasl_mechanism}; set security.mechanism"
            )
    return None


def _limit(error: BaseException, settings: KafkaSettings) -> Misconfigured | None:
    """The limit of the cluster that we are beyond."""
    match error:
        case errors.MessageSizeTooLargeError() | errors.RecordListTooLargeError():
            return Misconfigured(
                f"a record is larger than its topic takes ({error}); raise the topic's max.message.bytes"
            )
        case errors.OffsetMetadataTooLargeError():
            return Misconfigured("the brokers take less commit metadata than 4096; raise offset.metadata.max.bytes")
        case errors.InvalidTransactionTimeout():
            return Misconfigured(
                f"a transaction timeout of {settings.transaction_timeout_s:g} s is more than the brokers allow"
            )
    return None


def _named(error: BaseException) -> str:
    names = error.args[0] if error.args else "(not named by the broker)"
    return ", ".join(map(repr, sorted(names))) if isinstance(names, set | frozenset) else repr(names)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
