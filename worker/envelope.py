"""Around each message what Kafka needs: topic, key and headers.

Owns which topic a message goes to and what a dead letter looks like. Pure: it makes records and sends none. What is in
the messages is made by `worker/outcome.py`, `worker/cost.py` and `worker/stream.py`.
"""

import time
from collections.abc import Callable, Sequence
from urllib.parse import quote

from schemas.codec import carried_headers, encode, event_headers, event_id, id_header, shared_headers
from schemas.cost import CostEvent, MeterReading
from schemas.handoff import Handoff
from schemas.results import Chunk, Completion, ErrorCode
from worker.brokers.base import Headers, Outgoing, Record
from worker.config import Topics
from worker.errors import RequestError
from worker.intake import KEY_BYTES_MAX, RECORD_BYTES_MAX

# Failures that somebody must look at. The others are limits that the caller has set, and is told of.
DEAD_LETTERED = frozenset(
    {ErrorCode.INVALID_REQUEST, ErrorCode.MODEL_NOT_FOUND, ErrorCode.INFERENCE_ERROR, ErrorCode.POISONED}
)


class Envelope:
    """Makes the records that one worker sends. `clock`: the seconds since 1970 that they bear."""

    def __init__(self, topics: Topics, group: str, worker: str, clock: Callable[[], float] = time.time) -> None:
        self._topics = topics
        self._group = group
        self._worker = worker
        self._source = f"/tokenmill/{quote(group, safe='')}/{quote(worker, safe='')}"
        self.clock = clock

    def completion(self, message: Completion, request: Record) -> Outgoing:
        """For whoever waits for the answer."""
        return self._answers(self._topics.completions, [message], request)[0]

    def costs(self, messages: Sequence[CostEvent], request: Record) -> list[Outgoing]:
        """One answer's, for the ledger."""
        return self._answers(self._topics.costs, messages, request)

    def chunk(self, message: Chunk, request: Record) -> Outgoing:
        """For whoever watches the answer come."""
        return self._answers(self._topics.chunks, [message], request)[0]

    def meter(self, message: MeterReading) -> Outgoing:
        """For the ledger. The key keeps one life's readings in order, in one partition."""
        headers = event_headers(message, source=self._source, subject=message.worker, time_s=self.clock())
        return Outgoing(topic=self._topics.costs, key=message.life.encode(), value=encode(message), headers=headers)

    def handoff(self, message: Handoff, request: Record, custom_id: str) -> Outgoing | None:
        """For whichever worker goes on; None where it would be too large. The key spreads them over all workers."""
        headers = event_headers(
            message,
            source=self._source,
            subject=custom_id,
            time_s=self.clock(),
            carried=carried_headers(request.headers),
        )
        key, value = event_id(message).encode(), encode(message)
        if _size(key, value, headers) > RECORD_BYTES_MAX:
            return None
        return Outgoing(topic=self._topics.handoff, key=key, value=value, headers=headers)

    def dead_letter(self, request: Record, error: RequestError) -> Outgoing:
        """The record as it came, byte for byte, with headers that say what is wrong with it.

        What would make it too large to be sent is left out, the value first, and named in a header: the record itself
        is still where `tokenmill.error.topic`, `.partition` and `.offset` say.
        """
        headers, value, left_out = request.headers, request.value, []
        if _size(request.key, value, headers) > RECORD_BYTES_MAX:
            value, left_out = None, ["value"]
        if _size(request.key, value, headers) > RECORD_BYTES_MAX:
            headers, left_out = (), ["value", "headers"]
        key = _key(request)
        if key != request.key:
            left_out.append("key")
        reasons = self._reasons(request, error) | ({"left_out": ",".join(left_out)} if left_out else {})
        named = tuple((f"tokenmill.error.{name}", text.encode()) for name, text in reasons.items())
        return Outgoing(topic=self._topics.dead_letters, key=key, value=value, headers=(*headers, *named))

    def _answers(
        self, topic: str, messages: Sequence[Completion | CostEvent | Chunk], request: Record
    ) -> list[Outgoing]:
        """All of one kind. A bill may have an event for each token: what they share is made once."""
        if not messages:
            return []
        key = _key(request)
        shared = shared_headers(
            type(messages[0]),
            source=self._source,
            subject=messages[0].custom_id,
            time_s=self.clock(),
            carried=carried_headers(request.headers),
        )
        return [
            Outgoing(topic=topic, key=key, value=encode(message), headers=(*shared, id_header(message)))
            for message in messages
        ]

    def _reasons(self, request: Record, error: RequestError) -> dict[str, str]:
        return {
            "code": error.code,
            "message": error.message,
            "topic": request.place.topic,
            "partition": str(request.place.partition),
            "offset": str(request.offset),
            "timestamp": str(request.timestamp_ms),
            "group": self._group,
            "worker": self._worker,
        }


def _key(request: Record) -> bytes | None:
    """The request's key, so that its results keep its order; none in place of one that is too long to repeat."""
    return request.key if request.key is None or len(request.key) <= KEY_BYTES_MAX else None


def _size(key: bytes | None, value: bytes | None, headers: Headers) -> int:
    return sum(len(part or b"") for part in (key, value)) + sum(
        len(name) * 4 + len(text or b"") for name, text in headers
    )
