"""Bytes to messages and back: the one place that knows encodings and headers.

Owns the decoders (made once), the limits checked before decoding, the CloudEvents headers of all that we send, and what
an error may say: it names the field and never quotes the payload, because errors are published and logged.

Accepts, on input: JSON, MessagePack by content type, a CloudEvent in binary or structured mode, and the five bytes that
Confluent's serialisers put before the value. Sends JSON in CloudEvents' binary mode. What a request asks of a model is
`worker/intake.py`'s business.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
from msgspec import Raw, Struct

from schemas.cost import CostEvent, MeterReading
from schemas.handoff import Handoff
from schemas.requests import SCHEMA_LEVELS_MAX, AnyGenerate, Name
from schemas.results import Chunk, Completion, Input

Headers = Sequence[tuple[str, bytes | None]]  # Kafka allows a key twice and a value of null
AnyResult = Completion | CostEvent | MeterReading | Chunk | Handoff
Result = TypeVar("Result", bound=AnyResult)

JSON_TYPE = "application/json"
EVENT_TYPE = "application/cloudevents+json"
MSGPACK_TYPES = frozenset({"application/msgpack", "application/x-msgpack", "application/vnd.msgpack"})

# The CloudEvents type of each message. The number changes when a reader of the old form would misread the new one.
REQUEST_KIND = "tokenmill.request.v1"
KINDS: dict[type[AnyResult], str] = {
    Completion: "tokenmill.completion.v1",
    CostEvent: "tokenmill.cost.v1",
    MeterReading: "tokenmill.meter.v1",
    Chunk: "tokenmill.chunk.v1",
    Handoff: "tokenmill.handoff.v1",
}

_CARRIED = ("traceparent", "tracestate", "correlation_id")
CARRIED_CHARS_MAX = 512  # W3C's own minimum for a whole tracestate; a correlation id is a tenth of it
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

CONFLUENT_PREFIX_BYTES = 5  # a zero byte, then the schema's number; neither JSON nor a MessagePack map starts with zero


class WireLimits(Struct, frozen=True, kw_only=True):
    """How large a request's record may be: checked before a byte of it is read."""

    value_bytes_max: int = 1 << 20  # Kafka's own default for a record
    headers_max: int = 64  # CloudEvents, tracing and a mesh's own come to about 20
    header_bytes_max: int = 32 << 10  # names and values; HTTP servers stop at 8 to 64 KiB


DEFAULT_LIMITS = WireLimits()


class Malformed(ValueError):
    """The record is not what its topic is for. Its text names the field at fault; `custom_id` is there if it could be
    read.
    """

    def __init__(self, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.custom_id = custom_id


def decode_request(value: bytes | None, headers: Headers = (), limits: WireLimits = DEFAULT_LIMITS) -> AnyGenerate:
    """The request in this record. Raises Malformed, and nothing else, whatever the bytes are."""
    _check_size(value, headers, limits)
    if not value:
        raise Malformed("the record has no value: requests are not deleted by tombstones")
    if value[0] == 0:
        value = value[CONFLUENT_PREFIX_BYTES:]
    content_type = _content_type(headers)
    form = _form(content_type)
    try:
        data = _EVENTS.decode(value).data if content_type == EVENT_TYPE else value
        request = form.requests.decode(data)
        twice = _duplicate(form, value)
    except (ValueError, RecursionError) as error:  # msgspec's own errors and UnicodeDecodeError are both ValueErrors
        raise Malformed(_explain(error), _salvage(form, value, content_type)) from None
    if twice is not None:
        raise Malformed(
            "a field is there twice in one object: readers would differ on which counts",
            None if twice == "custom_id" else request.custom_id,
        )
    return request


def decode_handoff(value: bytes | None, headers: Headers = ()) -> Handoff:
    """The handoff in this record of our own topic. Raises Malformed, and nothing else, whatever the bytes are."""
    _check_size(value, headers, DEFAULT_LIMITS)
    if header_text(headers, "ce_type") != KINDS[Handoff]:
        raise Malformed(f"the record is no {KINDS[Handoff]}: workers alone write here")
    try:
        return decode_result(Handoff, value or b"")
    except (ValueError, RecursionError) as error:
        raise Malformed(_explain(error)) from None


def decode_result(kind: type[Result], value: bytes) -> Result:
    """A message of this kind, as we sent it. Fields that a newer writer added are passed over."""
    message: Result = _RESULTS[kind].decode(value)
    return message


def encode(message: AnyResult | AnyGenerate) -> bytes:
    """The message as JSON."""
    return _ENCODER.encode(message)


def place_id(place: Input) -> str:
    """The one name of a request's answer: any attempt of any worker at the same record makes the same."""
    return f"{place.topic}-{place.partition}-{place.offset}"


def event_id(message: AnyResult) -> str:
    """The CloudEvents id, the same for every attempt at a result: readers may drop what they have seen."""
    match message:
        case MeterReading():
            return f"{message.life}/{message.sequence}"
        case Chunk():
            return f"{message.id}/{message.choice}/{message.sequence}"
        case Handoff():
            return f"{place_id(message.input)}/{message.handovers}"
        case _:
            return message.id


def event_headers(
    message: AnyResult, *, source: str, subject: str | None, time_s: float, carried: Headers = ()
) -> tuple[tuple[str, bytes], ...]:
    """Headers that make this record a CloudEvent in binary mode, after those to pass on (see `carried_headers`).

    `source` is a URI reference that names the worker, `subject` what the event is about, `time_s` seconds since 1970.
    """
    shared = shared_headers(type(message), source=source, subject=subject, time_s=time_s, carried=carried)
    return (*shared, id_header(message))


def shared_headers(
    kind: type[AnyResult], *, source: str, subject: str | None, time_s: float, carried: Headers = ()
) -> tuple[tuple[str, bytes], ...]:
    """What `event_headers` are for all messages of a kind about one thing, but for the id: there may be thousands."""
    attributes = {
        "ce_specversion": "1.0",
        "ce_source": source,
        "ce_type": KINDS[kind],
        "ce_time": datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "content-type": JSON_TYPE,
    }
    if subject is not None:
        attributes["ce_subject"] = subject
    passed_on = ((name, value) for name, value in carried if value is not None)
    return (*passed_on, *((name, text.encode()) for name, text in attributes.items()))


def id_header(message: AnyResult) -> tuple[str, bytes]:
    """The header that no two messages share."""
    return "ce_id", event_id(message).encode()


def carried_headers(headers: Headers) -> tuple[tuple[str, bytes], ...]:
    """The headers that a request passes on to its results: W3C trace context and a correlation id.

    A trace context that is not W3C's form is dropped, as its specification asks.
    """
    names = {name for name, _ in headers if name in _CARRIED}  # of most records: none
    texts = {
        name: text for name in sorted(names) if (text := header_text(headers, name)) and len(text) <= CARRIED_CHARS_MAX
    }
    if not _TRACEPARENT.fullmatch(texts.get("traceparent", "")):
        texts.pop("traceparent", None)
        texts.pop("tracestate", None)
    return tuple((name, text.encode()) for name, text in texts.items())


def header_text(headers: Headers, name: str) -> str | None:
    """The header's last value as text, as Kafka's own `lastHeader`; None if it is missing, null or not UTF-8."""
    values = [value for key, value in headers if key == name]
    try:
        return values[-1].decode() if values and values[-1] is not None else None
    except UnicodeDecodeError:
        return None


class _Key:
    """A field's name that equals nothing but itself: both of two like-named fields survive in a dict.

    It may be a number: MessagePack writes the tokens of `logit_bias` so.
    """

    __slots__ = ("name",)

    def __init__(self, name: str | int) -> None:
        self.name = name


class _Event(Struct):
    """As much of a structured CloudEvent as we read: its other attributes are not ours to judge."""

    data: Raw


class _Named(Struct):
    """What can be read of a request that is otherwise wrong."""

    custom_id: Name


def _key(_kind: type, name: str | int) -> _Key:
    return _Key(name)


class _Form:
    """One encoding: its decoders, and the first bytes of its objects and arrays."""

    def __init__(self, module: Any, objects: Iterable[int], arrays: Iterable[int]) -> None:
        self.requests: msgspec.json.Decoder[AnyGenerate] = module.Decoder(AnyGenerate)
        self.named: msgspec.json.Decoder[_Named] = module.Decoder(_Named)
        self.fields: msgspec.json.Decoder[dict[_Key, Raw]] = module.Decoder(dict[_Key, Raw], dec_hook=_key)
        self.items: msgspec.json.Decoder[list[Raw]] = module.Decoder(list[Raw])
        self.object_starts = frozenset(objects)
        self.nest_starts = self.object_starts.union(arrays)


_JSON = _Form(msgspec.json, b"{", b"[")
_MSGPACK = _Form(msgspec.msgpack, (*range(0x80, 0x90), 0xDE, 0xDF), (*range(0x90, 0xA0), 0xDC, 0xDD))
_EVENTS = msgspec.json.Decoder(_Event)
_RESULTS: dict[type, msgspec.json.Decoder[Any]] = {kind: msgspec.json.Decoder(kind) for kind in KINDS}
_ENCODER = msgspec.json.Encoder()


def _check_size(value: bytes | None, headers: Headers, limits: WireLimits) -> None:
    if len(headers) > limits.headers_max:
        raise Malformed(f"the record has {len(headers)} headers; at most {limits.headers_max} are read")
    header_bytes = sum(len(name.encode(errors="replace")) + len(content or b"") for name, content in headers)
    if header_bytes > limits.header_bytes_max:
        raise Malformed(f"the record's headers take {header_bytes} bytes; at most {limits.header_bytes_max} are read")
    if value is not None and len(value) > limits.value_bytes_max:
        raise Malformed(f"the record's value takes {len(value)} bytes; at most {limits.value_bytes_max} are read")


def _content_type(headers: Headers) -> str:
    """The media type without its parameters; JSON where none is named, as console producers name none."""
    text = header_text(headers, "content-type") or JSON_TYPE
    return text.partition(";")[0].strip().lower()


def _form(content_type: str) -> _Form:
    if content_type in MSGPACK_TYPES:
        return _MSGPACK
    if content_type in (JSON_TYPE, EVENT_TYPE):
        return _JSON
    raise Malformed(f"content-type is none of {', '.join((JSON_TYPE, EVENT_TYPE, *sorted(MSGPACK_TYPES)))}")


# Fields with objects in them.
_NESTS = frozenset(
    {"data", "body", "messages", "content", "metadata", "stream_options", "logit_bias"}
    | {"response_format", "json_schema", "schema"}
)


def _duplicate(form: _Form, value: bytes | Raw, levels: int | None = None) -> str | int | None:
    """The name of a field that an object has twice, anywhere in a request that has been decoded before.

    Decoders silently take the last of two. A gateway that read the first would have checked another tenant's right.
    Within a schema, whose names are not ours, every field is looked into, `levels` deep: each level is read once more.
    Raises RecursionError where it is deeper.
    """
    names = set()
    for key, content in form.fields.decode(value).items():
        if key.name in names:
            return key.name
        names.add(key.name)
        within = SCHEMA_LEVELS_MAX if levels is None and key.name == "schema" else levels
        looks = levels is not None or key.name in _NESTS
        if looks and (twice := _duplicate_within(form, content, within)) is not None:
            return twice
    return None


def _duplicate_within(form: _Form, content: Raw, levels: int | None) -> str | int | None:
    first = memoryview(content)[0]
    if first not in form.nest_starts:
        return None
    if levels is not None:
        if not levels:
            raise RecursionError
        levels -= 1
    if first in form.object_starts:
        return _duplicate(form, content, levels)
    found = (_duplicate_within(form, item, levels) for item in form.items.decode(content))
    return next((twice for twice in found if twice is not None), None)


def _salvage(form: _Form, value: bytes, content_type: str) -> str | None:
    """The request's `custom_id`, if the value can be read that far: its failure can then name it."""
    try:
        data = _EVENTS.decode(value).data if content_type == EVENT_TYPE else value
        return form.named.decode(data).custom_id
    except (ValueError, RecursionError):
        return None


_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `([A-Za-z0-9_.-]{1,64})`( - at `\$[\w.\[\]]*`)?")
_PATH = re.compile(r" - at `\$[\w.\[\]]*`$")  # holds names of our own fields and indices only
# What msgspec says without quoting what it read.
_UNQUOTED = ("Expected ", "Object missing ", "Number out of range", "Input data was truncated", "JSON is malformed",
             "MessagePack data is malformed")  # fmt: skip


def _explain(error: Exception) -> str:
    """The decoder's reason, without anything that it read."""
    if isinstance(error, UnicodeDecodeError):
        return "the value holds text that is not UTF-8"
    if isinstance(error, RecursionError):
        return "the value is nested too deeply"
    text = str(error)
    if text.startswith(_UNQUOTED) or _UNKNOWN_FIELD.fullmatch(text):
        return text
    if text.startswith("Invalid "):  # "Invalid enum value 'what was read' - at `$.url`"
        path = _PATH.search(text)
        return f"a value that is none of those allowed{path[0] if path else ''}"
    return "an unknown field"
