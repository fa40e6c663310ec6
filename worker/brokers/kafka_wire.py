"""The Kafka requests that aiokafka 0.14 does not have, as its structs.

Owns the shape of seven requests (KIP-447, KIP-584, KIP-664, KIP-890); `kafka_eos.py` and `kafka_ending.py` give them
meaning. Field order and types are those of the message definitions in Apache Kafka's
`clients/src/main/resources/common/message`.
"""

from io import BytesIO
from typing import Any

from aiokafka.errors import IncompatibleBrokerVersion
from aiokafka.protocol.api import RequestStruct, Response, ResponseHeader_v0
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactBytes,
    CompactString,
    Int16,
    Int32,
    Int64,
    Schema,
    TaggedFields,
    UnsignedVarInt32,
)

_STRING = CompactString("utf-8")
_TAGS = ("tags", TaggedFields)
NO_TAGS: dict[int, bytes] = {}  # ends every struct of a flexible version

FINALIZED_FEATURES_TAG = 2  # of the ApiVersions response


def _by_topic(*fields: tuple[str, Any]) -> tuple[str, CompactArray]:
    """What a request or a response says of partitions: an array of topics, each with an array of these fields."""
    return ("topics", CompactArray(("name", _STRING), ("partitions", CompactArray(*fields, _TAGS)), _TAGS))


class Exactly:
    """A request in this one version, in the place of an aiokafka request that negotiates one."""

    def __init__(self, struct: RequestStruct) -> None:
        self._struct = struct

    def prepare(self, versions: dict[int, tuple[int, int]]) -> RequestStruct:
        """Called by the connection with what its broker speaks. Raises IncompatibleBrokerVersion."""
        lowest, highest = versions.get(self._struct.API_KEY, (0, -1))
        if not lowest <= self._struct.API_VERSION <= highest:
            raise IncompatibleBrokerVersion(
                f"{type(self._struct).__name__} v{self._struct.API_VERSION}: the broker speaks v{lowest} to v{highest}"
            )
        return self._struct

    def __getattr__(self, field: str) -> Any:
        # aiokafka looks into what it sends: a produce request's `required_acks` tells whether to expect an answer.
        return getattr(self._struct, field)


class ApiVersionsResponse(Response):
    API_KEY = 18
    API_VERSION = 3
    SCHEMA = Schema(
        ("error_code", Int16),
        ("api_versions", CompactArray(("api_key", Int16), ("lowest", Int16), ("highest", Int16), _TAGS)),
        ("throttle_time_ms", Int32),
        _TAGS,
    )

    def finalized_level(self, feature: str) -> int:
        """The cluster-wide level of a feature; 0 if the broker has not heard of it."""
        data = BytesIO(self.tags.get(FINALIZED_FEATURES_TAG, b"\x01"))  # an empty compact array
        for _ in range(UnsignedVarInt32.decode(data) - 1):
            name, highest = _STRING.decode(data), Int16.decode(data)
            Int16.decode(data)  # the lowest level
            TaggedFields.decode(data)
            if name == feature:
                return int(highest)
        return 0


class ApiVersionsRequest(RequestStruct):
    API_KEY = 18
    API_VERSION = 3
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = ApiVersionsResponse
    SCHEMA = Schema(("client_software_name", _STRING), ("client_software_version", _STRING), _TAGS)

    def parse_response_header(self, read_buffer: BytesIO | bytes) -> ResponseHeader_v0:
        # The one response whose header stays at v0: its reader cannot know yet what the broker speaks.
        return ResponseHeader_v0.decode(read_buffer)


class OffsetFetchResponse(Response):
    API_KEY = 9
    API_VERSION = 7
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        _by_topic(
            ("partition", Int32),
            ("offset", Int64),
            ("leader_epoch", Int32),
            ("metadata", _STRING),
            ("error_code", Int16),
        ),
        ("error_code", Int16),
        _TAGS,
    )


class OffsetFetchRequest(RequestStruct):
    """v7: waits for open transactions (`require_stable`), and its error for the whole group is read."""

    API_KEY = 9
    API_VERSION = 7
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = OffsetFetchResponse
    SCHEMA = Schema(
        ("group_id", _STRING),
        ("topics", CompactArray(("name", _STRING), ("partitions", CompactArray(Int32)), _TAGS)),
        ("require_stable", Boolean),
        _TAGS,
    )


class TxnOffsetCommitResponse(Response):
    API_KEY = 28
    API_VERSION = 3
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        _by_topic(("partition", Int32), ("error_code", Int16)),
        _TAGS,
    )


class TxnOffsetCommitRequest(RequestStruct):
    """v3: carries the generation and the member, so that the broker refuses one that the group has left behind."""

    API_KEY = 28
    API_VERSION = 3
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = TxnOffsetCommitResponse
    SCHEMA = Schema(
        ("transactional_id", _STRING),
        ("group_id", _STRING),
        ("producer_id", Int64),
        ("producer_epoch", Int16),
        ("generation_id", Int32),
        ("member_id", _STRING),
        ("group_instance_id", _STRING),
        _by_topic(
            ("partition", Int32),
            ("offset", Int64),
            ("leader_epoch", Int32),
            ("metadata", _STRING),
        ),
        _TAGS,
    )


class EpochTxnOffsetCommitRequest(RequestStruct):
    """v5: v3 that also adds the group to the transaction."""

    API_KEY = 28
    API_VERSION = 5
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = TxnOffsetCommitResponse
    SCHEMA = TxnOffsetCommitRequest.SCHEMA


class EpochEndTxnResponse(Response):
    API_KEY = 26
    API_VERSION = 5
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("error_code", Int16),
        ("producer_id", Int64),
        ("producer_epoch", Int16),
        _TAGS,
    )


class EpochEndTxnRequest(RequestStruct):
    """v5: ends the transaction and the epoch; the response carries the next one."""

    API_KEY = 26
    API_VERSION = 5
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = EpochEndTxnResponse
    SCHEMA = Schema(
        ("transactional_id", _STRING),
        ("producer_id", Int64),
        ("producer_epoch", Int16),
        ("committed", Boolean),
        _TAGS,
    )


class EpochProduceResponse(Response):
    API_KEY = 0
    API_VERSION = 12
    SCHEMA = Schema(
        _by_topic(
            ("partition", Int32),
            ("error_code", Int16),
            ("offset", Int64),
            ("timestamp", Int64),
            ("log_start_offset", Int64),
            ("record_errors", CompactArray(("batch_index", Int32), ("message", _STRING), _TAGS)),
            ("error_message", _STRING),
        ),
        ("throttle_time_ms", Int32),
        _TAGS,
    )


class EpochProduceRequest(RequestStruct):
    """v12: adds the partition to the transaction by writing to it."""

    API_KEY = 0
    API_VERSION = 12
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = EpochProduceResponse
    SCHEMA = Schema(
        ("transactional_id", _STRING),
        ("required_acks", Int16),
        ("timeout", Int32),
        _by_topic(("partition", Int32), ("records", CompactBytes)),
        _TAGS,
    )


class ListTransactionsResponse(Response):
    API_KEY = 66
    API_VERSION = 1
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("error_code", Int16),
        ("unknown_states", CompactArray(_STRING)),
        (
            "transactions",
            CompactArray(("transactional_id", _STRING), ("producer_id", Int64), ("state", _STRING), _TAGS),
        ),
        _TAGS,
    )


class ListTransactionsRequest(RequestStruct):
    """v1 (Kafka 3.8): those in one of the states for longer than `duration_ms`."""

    API_KEY = 66
    API_VERSION = 1
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = ListTransactionsResponse
    SCHEMA = Schema(
        ("states", CompactArray(_STRING)),
        ("producer_ids", CompactArray(Int64)),
        ("duration_ms", Int64),
        _TAGS,
    )


class DescribeTransactionsResponse(Response):
    API_KEY = 65
    API_VERSION = 0
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "transactions",
            CompactArray(
                ("error_code", Int16),
                ("transactional_id", _STRING),
                ("state", _STRING),
                ("timeout_ms", Int32),
                ("start_ms", Int64),
                ("producer_id", Int64),
                ("producer_epoch", Int16),
                ("topics", CompactArray(("name", _STRING), ("partitions", CompactArray(Int32)), _TAGS)),
                _TAGS,
            ),
        ),
        _TAGS,
    )


class DescribeTransactionsRequest(RequestStruct):
    """v0 (Kafka 3.0): what their coordinator has on record."""

    API_KEY = 65
    API_VERSION = 0
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = DescribeTransactionsResponse
    SCHEMA = Schema(("transactional_ids", CompactArray(_STRING)), _TAGS)
