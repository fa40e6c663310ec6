"""The wire, described for other languages: JSON Schema files and an AsyncAPI document.

Everything is generated from the structs: nothing here says what a field is. The topics' names come in as an argument,
because they are the worker's settings.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from schemas.codec import JSON_TYPE, KINDS, MSGPACK_TYPES, REQUEST_KIND
from schemas.cost import CostEvent, MeterReading
from schemas.handoff import Handoff
from schemas.requests import AnyGenerate
from schemas.results import Chunk, Completion

DIALECT = "https://json-schema.org/draft/2020-12/schema"
ASYNCAPI_VERSION = "3.0.0"  # the oldest document of the third version: every tool for it reads this
DOCUMENT_VERSION = "1.0.0"

_TYPES: dict[str, Any] = {REQUEST_KIND: AnyGenerate, **{kind: message for message, kind in KINDS.items()}}

# Which messages each topic carries; the keys are the names of the topic settings. A dead letter is whatever came in.
_CARRIES: dict[str, tuple[str, ...]] = {
    "requests": (REQUEST_KIND,),
    "batch": (REQUEST_KIND,),
    "completions": (KINDS[Completion],),
    "costs": (KINDS[CostEvent], KINDS[MeterReading]),
    "chunks": (KINDS[Chunk],),
    "handoff": (KINDS[Handoff],),
    "dead_letters": (),
}
_REFERENCE = "#/components/schemas/{name}"
_RECEIVED = ("requests", "batch", "handoff")
_SENT = ("completions", "costs", "chunks", "handoff", "dead_letters")


def json_schemas() -> dict[str, dict[str, Any]]:
    """A JSON Schema of each message, by the CloudEvents type that it travels under."""
    return {
        kind: {
            "$schema": DIALECT,
            "$id": f"urn:{kind.replace('.', ':')}",
            "title": kind,
            **msgspec.json.schema(message),
        }
        for kind, message in _TYPES.items()
    }


def asyncapi(topics: Mapping[str, str]) -> dict[str, Any]:
    """An AsyncAPI document of a worker that uses these topics.

    `topics` names each by the setting's name: requests, batch, completions, costs, chunks, handoff, dead_letters.
    """
    _, components = msgspec.json.schema_components(_TYPES.values(), ref_template=_REFERENCE)
    return {
        "asyncapi": ASYNCAPI_VERSION,
        "info": {
            "title": "Tokenmill",
            "version": DOCUMENT_VERSION,
            "description": "LLM requests in, completions and their bill out, exactly once.",
        },
        "defaultContentType": JSON_TYPE,
        "channels": {name: _channel(topics[name], kinds) for name, kinds in _CARRIES.items()},
        "operations": {
            **{f"receive_{name}": _operation("receive", name) for name in _RECEIVED},
            **{f"send_{name}": _operation("send", name) for name in _SENT},
        },
        "components": {"messages": {kind: _message(kind) for kind in _TYPES}, "schemas": _plain(components)},
    }


def _channel(topic: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    return {
        "address": topic,
        "messages": {kind: {"$ref": f"#/components/messages/{kind}"} for kind in kinds},
        "bindings": {"kafka": {"topic": topic}},
    }


def _operation(action: str, channel: str) -> dict[str, Any]:
    return {"action": action, "channel": {"$ref": f"#/channels/{channel}"}}


def _message(kind: str) -> dict[str, Any]:
    message: dict[str, Any] = {
        "name": kind,
        "contentType": JSON_TYPE,
        "headers": {
            "type": "object",
            "properties": {"ce_type": {"const": kind}, "ce_id": {"type": "string"}, "traceparent": {"type": "string"}},
        },
        "payload": _payload(kind),
    }
    if kind == REQUEST_KIND:
        message["description"] = f"Also taken as MessagePack: content-type {', '.join(sorted(MSGPACK_TYPES))}."
    return message


def _payload(kind: str) -> Any:
    (schema,), _ = msgspec.json.schema_components([_TYPES[kind]], ref_template=_REFERENCE)
    return _plain(schema)


def _plain(schema: Any) -> Any:
    """The schema without `discriminator`: OpenAPI's is an object, AsyncAPI's a string, and `enum` says it already."""
    match schema:
        case dict():
            return {key: _plain(part) for key, part in schema.items() if key != "discriminator"}
        case list():
            return [_plain(part) for part in schema]
        case _:
            return schema
