"""What aiokafka raises, as our error tree.

Owns the judgement: fenced, unknown, or fatal with what to do about it. Raises nothing and catches nothing itself.
"""

from collections.abc import Iterator

from aiokafka import errors

from worker.brokers.kafka_settings import KafkaSettings
from worker.errors import Fenced, Misconfigured, OutcomeUnknown, TokenmillError, Unavailable

# Kafka's error codes, for the requests that aiokafka does not have.
ILLEGAL_GENERATION, UNKNOWN_MEMBER_ID, REBALANCE_IN_PROGRESS, FENCED_INSTANCE_ID = 22, 25, 27, 82
OFFSET_METADATA_TOO_LARGE, GROUP_AUTHORIZATION_FAILED = 12, 30
UNKNOWN_TOPIC, NETWORK_EXCEPTION, LOAD_IN_PROGRESS, UNSTABLE_OFFSET_COMMIT = 3, 13, 14, 88
REQUEST_TIMED_OUT, COORDINATOR_NOT_AVAILABLE, NOT_COORDINATOR = 7, 15, 16
INVALID_PRODUCER_EPOCH, PRODUCER_FENCED, CONCURRENT_TRANSACTIONS = 47, 90, 51

STALE = {ILLEGAL_GENERATION, UNKNOWN_MEMBER_ID, REBALANCE_IN_PROGRESS, FENCED_INSTANCE_ID}
COORDINATOR_MOVED = {COORDINATOR_NOT_AVAILABLE, NOT_COORDINATOR, REQUEST_TIMED_OUT}
TRY_AGAIN = {LOAD_IN_PROGRESS, UNKNOWN_TOPIC, NETWORK_EXCEPTION, UNSTABLE_OFFSET_COMMIT}


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
    return _mistake(error, settings) or OutcomeUnknown(f"the transaction broke off: {error!r}")


def of_client(error: BaseException, settings: KafkaSettings) -> TokenmillError:
    """For an error of anything else: without an answer there is no going on."""
    return _mistake(error, settings) or unavailable(error, settings)


def unavailable(error: BaseException, settings: KafkaSettings) -> Unavailable:
    """For a cluster that cannot be reached."""
    hint = "is it running? `tokenmill broker up` starts one here; --brokers or TOKENMILL_BROKERS name another"
    if settings.uses_sasl:
        hint = "is it running, and are the SASL user name and password right? Kafka does not tell the two apart"
    return Unavailable(f"no usable answer from Kafka at {settings.brokers}: {error!r}; {hint}")


def topic_missing(topic: str) -> Misconfigured:
    """For a topic that does not exist: we never create one in passing."""
    return Misconfigured(f"topic {topic!r} does not exist; create it with `tokenmill topics create`")


def right_missing(operation: str, resource: str) -> Misconfigured:
    """For an ACL that our user lacks."""
    return Misconfigured(f"our Kafka user lacks the right to {operation} {resource}; have an ACL added for it")


def _mistake(error: BaseException, settings: KafkaSettings) -> Misconfigured | None:
    """The settings or the cluster's set-up behind an error, where it tells."""
    for cause in _causes(error):
        match cause:
            case errors.TopicAuthorizationFailedError():
                return right_missing("READ or WRITE", f"topic {_named(cause)}")
            case errors.GroupAuthorizationFailedError():
                return right_missing("READ", f"group {settings.group!r}")
            case errors.TransactionalIdAuthorizationFailed():
                return right_missing("WRITE", f"transactional ids that begin with {settings.transactional_id_prefix!r}")
            case errors.MessageSizeTooLargeError() | errors.RecordListTooLargeError():
                return Misconfigured(
                    f"a record is larger than its topic takes ({cause}); raise the topic's max.message.bytes"
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
    return ", ".join(sorted(names)) if isinstance(names, set | frozenset) else repr(names)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
