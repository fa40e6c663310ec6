"""Records that have killed other servers, and records made to kill this one.

Used by the intake's tests, and by whatever feeds a running worker: every record here has one answer, and no worker ends
because of one. `MODEL` must be the name of a model that is served.
"""

import json
import random
from collections.abc import Iterator
from typing import Any

import msgspec

from schemas.results import ErrorCode
from worker.brokers.base import Place, Record

MODEL = "tiny"
JSON = (("content-type", b"application/json"),)
MSGPACK = (("content-type", b"application/msgpack"),)
EVENT = (("content-type", b"application/cloudevents+json; charset=utf-8"),)


def record(value: bytes | None, headers: Any = (), key: bytes | None = b"key", offset: int = 0) -> Record:
    """The record as consumed. `headers` may be what the types forbid and brokers deliver: null values."""
    return Record(
        place=Place("tokenmill.requests", 3),
        offset=offset,
        key=key,
        value=value,
        headers=tuple(headers),
        timestamp_ms=1_700_000_000_000,
    )


def chat(body: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A valid chat, with these fields of its body and of itself in place of its own."""
    own = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    return {"custom_id": "mine", "url": "/v1/chat/completions", "body": own | (body or {}), **fields}


def text(body: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A valid text completion, likewise."""
    own = {"model": MODEL, "prompt": "hello", "max_tokens": 8}
    return {"custom_id": "mine", "url": "/v1/completions", "body": own | (body or {}), **fields}


def line(request: dict[str, Any]) -> bytes:
    """The request as a line of an OpenAI batch file."""
    return json.dumps(request).encode()


def raw(json_of_value: str, field: str = "seed") -> bytes:
    """A chat with this text, JSON or not, as a field's value."""
    return line(chat({field: "HERE"})).replace(b'"HERE"', json_of_value.encode(errors="surrogatepass"))


def nested(opening: bytes, depth: int, closing: bytes = b"") -> bytes:
    """Objects or arrays in one another."""
    return opening * depth + closing * depth


def a_chat(body: dict[str, Any] | None = None, **fields: Any) -> Record:
    """A record with such a chat."""
    return record(line(chat(body, **fields)))


def a_text(body: dict[str, Any] | None = None, **fields: Any) -> Record:
    """A record with such a text completion."""
    return record(line(text(body, **fields)))


def a_format(**response_format: Any) -> Record:
    """A record with a chat whose answer must be of this format."""
    return a_chat({"response_format": response_format})


def schema_format(schema: Any) -> dict[str, Any]:
    """The format of answers by this schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def a_schema(schema: Any) -> Record:
    """A record with a chat whose answer must be of this schema."""
    return a_format(**schema_format(schema))


def raw_schema(json_of_schema: bytes) -> bytes:
    """A chat with this text, JSON or not, as the schema of its answer."""
    return line(chat({"response_format": schema_format("HERE")})).replace(b'"HERE"', json_of_schema)


def packed(request: dict[str, Any]) -> bytes:
    """The request in MessagePack."""
    return msgspec.msgpack.encode(request)


BAD, MODEL_UNKNOWN, TOO_LONG = ErrorCode.INVALID_REQUEST, ErrorCode.MODEL_NOT_FOUND, ErrorCode.CONTEXT_EXCEEDED

# What each is refused with, by what it is.
REFUSED: dict[str, tuple[str, Record]] = {
    # what has killed inference servers
    "n of a million": (BAD, a_chat({"n": 10**6})),
    "n above the worker's limit": (BAD, a_chat({"n": 100})),
    "n of zero": (BAD, a_chat({"n": 0})),
    "best_of": (BAD, a_text({"best_of": 10**9})),
    "best_of more than n": (BAD, a_text({"best_of": 4, "n": 2})),
    "empty prompt": (BAD, a_text({"prompt": ""})),
    "empty list of tokens": (BAD, a_text({"prompt": []})),
    "several prompts": (BAD, a_text({"prompt": ["a", "b"]})),
    "no messages": (BAD, a_chat({"messages": []})),
    "prompt_logprobs": (BAD, a_text({"prompt_logprobs": -1})),
    "echo of a chat": (BAD, a_chat({"echo": True})),
    "prompt token beyond the vocabulary": (BAD, a_text({"prompt": [5, 2**31 - 1]})),
    "negative prompt token": (BAD, a_text({"prompt": [-1]})),
    "prompt token of 200 digits": (BAD, a_text({"prompt": [10**200]})),
    "stop token beyond the vocabulary": (BAD, a_chat({"stop_token_ids": [10**6]})),
    "biased token beyond the vocabulary": (BAD, a_chat({"logit_bias": {"99999999": 100}})),
    "biased token that is no number": (BAD, a_chat({"logit_bias": {"hello": 100}})),
    "negative biased token": (BAD, a_chat({"logit_bias": {"-1": 100}})),
    "biased token written as 05": (BAD, a_chat({"logit_bias": {"05": 100}})),
    "bias beyond 100": (BAD, a_chat({"logit_bias": {"5": 100.5}})),
    "bias of NaN in MessagePack": (BAD, record(packed(chat({"logit_bias": {5: float("nan")}})), MSGPACK)),
    "too many biases": (BAD, a_chat({"logit_bias": {str(token): 1 for token in range(301)}})),
    "biased token twice in MessagePack": (
        BAD,
        record(packed(chat({"logit_bias": {0: 1, 1: 2}})).replace(b"\x01\x02", b"\x00\x02"), MSGPACK),
    ),
    "frequency_penalty beyond 2": (BAD, a_chat({"frequency_penalty": 2.5})),
    "presence_penalty of Infinity": (BAD, record(raw("Infinity", "presence_penalty"))),
    "repetition_penalty of zero": (BAD, a_chat({"repetition_penalty": 0})),
    "max_tokens of zero": (BAD, a_chat({"max_tokens": 0})),
    "negative max_tokens": (BAD, a_chat({"max_tokens": -5})),
    "max_tokens of 2**63": (BAD, a_chat({"max_tokens": 2**63})),
    "max_tokens beyond the context": (TOO_LONG, a_chat({"max_tokens": 1_048_576})),
    "min_tokens above max_tokens": (BAD, a_chat({"min_tokens": 9})),
    "two different limits": (BAD, a_chat({"max_completion_tokens": 9})),
    "n_discard": (BAD, a_chat({"n_discard": -1})),
    "another server's regex": (BAD, a_chat({"guided_regex": "(a+)+$"})),
    "another server's grammar": (BAD, a_chat({"guided_grammar": "root ::= " + "a" * 100_000})),
    "unknown format": (BAD, a_format(type="grammar", grammar="root ::= x")),
    "schema without a name": (BAD, a_format(type="json_schema", json_schema={"schema": {}})),
    "schema that is no object": (BAD, a_schema(7)),
    "schema of 100,000 characters": (BAD, a_schema({"enum": ["a" * 1000] * 100})),
    "schema of 65 levels": (BAD, record(raw_schema(nested(b'{"items":', 64, b"}").replace(b":}", b":{}}")))),
    "schema of a thousand levels": (BAD, record(raw_schema(nested(b'{"items":', 1000, b"}").replace(b":}", b":{}}")))),
    "schema of a thousand lists": (BAD, record(raw_schema(b'{"enum":' + nested(b"[", 1000, b"]") + b"}"))),
    "schema with a field twice": (BAD, record(raw_schema(b'{"items":{"any":[{"type":"string","type":"null"}]}}'))),
    "schema with keys that are lists": (
        BAD,
        record(packed(chat({"response_format": schema_format({"a": {(1,): 2}})})), MSGPACK),
    ),
    "regex of 100,000 characters": (BAD, a_format(type="regex", pattern="a" * 100_000)),
    "empty regex": (BAD, a_format(type="regex", pattern="")),
    "no choices": (BAD, a_format(type="choice", choices=[])),
    "empty choice": (BAD, a_format(type="choice", choices=["a", ""])),
    "too many choices": (BAD, a_format(type="choice", choices=["a"] * 1001)),
    "choices of 400,000 characters": (BAD, a_format(type="choice", choices=["a" * 500] * 800)),
    "format and ignore_eos": (BAD, a_chat({"response_format": {"type": "json_object"}, "ignore_eos": True})),
    "tools": (BAD, a_chat({"tools": [{"type": "function", "function": {"parameters": {"type": 7}}}]})),
    "chat template": (BAD, a_chat({"chat_template": "{{ cycler.__init__.__globals__.os.popen('id') }}"})),
    "chat template's arguments": (BAD, a_chat({"chat_template_kwargs": {"chat_template": "x"}})),
    "serialised tensor": (BAD, a_text({"prompt_embeds": "gASVKAAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAJpZJSFlFKULg=="})),
    "pickle": (BAD, record(b"\x80\x04\x95(\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.")),
    "image to fetch": (
        BAD,
        a_chat(
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}}
                        ],
                    }
                ]
            }
        ),
    ),
    "long text": (TOO_LONG, a_text({"prompt": "a" * 500_000})),
    "long text of placeholders": (TOO_LONG, a_chat({"messages": [{"role": "user", "content": "<|start|>" * 50_000}]})),
    "many messages": (TOO_LONG, a_chat({"messages": [{"role": "user", "content": "a"}] * 4096})),
    "too many messages": (BAD, a_chat({"messages": [{"role": "user", "content": "a"}] * 4097})),
    "too many stops": (BAD, a_chat({"stop": ["a"] * 17})),
    "empty stop": (BAD, a_chat({"stop": [""]})),
    "too many logprobs": (BAD, a_chat({"logprobs": True, "top_logprobs": 21})),
    "top_logprobs without logprobs": (BAD, a_chat({"top_logprobs": 2})),
    "stream_options without stream": (BAD, a_chat({"stream_options": {"include_usage": True}})),
    "another model": (MODEL_UNKNOWN, a_chat({"model": "../../etc/passwd"})),
    "another endpoint": (BAD, a_chat(url="http://169.254.169.254/")),
    "deadline in the past": (ErrorCode.DEADLINE_EXCEEDED, a_chat(deadline=1.0)),
    "deadline of 400 digits": (BAD, record(raw("1" * 400, "deadline"))),
    # numbers and text that are none
    "temperature of NaN": (BAD, record(raw("NaN", "temperature"))),
    "temperature of Infinity": (BAD, record(raw("Infinity", "temperature"))),
    "temperature of 1e999": (BAD, record(raw("1e999", "temperature"))),
    "temperature of NaN in MessagePack": (BAD, record(packed(chat({"temperature": float("nan")})), MSGPACK)),
    "seed of 300 digits": (BAD, record(raw("7" * 300))),
    "number of a million digits": (BAD, record(raw("7" * 1_000_000))),
    "boolean for a number": (BAD, a_chat({"n": True})),
    "lone surrogate": (BAD, record(raw('"\\ud800"', "user"))),
    "surrogate in bytes": (BAD, record(raw('"\ud800"', "user"))),
    "bad UTF-8": (BAD, record(raw('"x"', "user").replace(b'"x"', b'"\xff\xfe"'))),
    "bad UTF-8 in MessagePack": (BAD, record(packed(chat()).replace(b"hello", b"\xff" * 5), MSGPACK)),
    "UTF-16": (BAD, record(json.dumps(chat()).encode("utf-16"))),
    "byte order mark": (BAD, record(b"\xef\xbb\xbf" + line(chat()))),
    "line break after a name": (BAD, a_chat(tenant="acme\n")),
    "line break after an amount": (BAD, a_chat(max_cost="1.00\n")),
    "amount finer than a picodollar": (BAD, a_chat(max_cost="0.0000000000001")),
    "terminal escape in an id": (BAD, a_chat(custom_id="\x1b[2J")),
    "NUL in a tenant": (BAD, a_chat(tenant="a\0b")),
    "id of a megabyte": (BAD, a_chat(custom_id="i" * 900_000)),
    # structure
    "tombstone": (BAD, record(None)),
    "tombstone without a key": (BAD, record(None, key=None)),
    "no bytes": (BAD, record(b"")),
    "white space": (BAD, record(b"   ")),
    "a number": (BAD, record(b"7")),
    "null": (BAD, record(b"null")),
    "an array of requests": (BAD, record(b"[" + line(chat()) + b"]")),
    "two requests": (BAD, record(line(chat()) + b"\n" + line(chat()))),
    "cut short": (BAD, record(line(chat())[:-1])),
    "duplicate tenant": (
        BAD,
        record(line(chat()).replace(b'"custom_id"', b'"tenant":"a","tenant":"b","custom_id"', 1)),
    ),
    "duplicate content": (BAD, record(line(chat()).replace(b'"content"', b'"content":"a","content"', 1))),
    "duplicate in MessagePack": (BAD, record(b"\x84\xa9custom_id\xa1x" + packed(chat())[1:], MSGPACK)),
    "deep objects": (BAD, record(raw(nested(b'{"a":', 100_000).decode(), "user"))),
    "deep arrays": (BAD, record(raw(nested(b"[", 100_000, b"]").decode(), "user"))),
    "deep arrays as the whole value": (BAD, record(nested(b"[", 500_000))),
    "deep MessagePack": (BAD, record(nested(b"\x91", 500_000), MSGPACK)),
    "deep MessagePack map": (BAD, record(nested(b"\x81\xa1a", 200_000), MSGPACK)),
    "array of four billion in MessagePack": (BAD, record(b"\xdd\xff\xff\xff\xff", MSGPACK)),
    "map of four billion in MessagePack": (BAD, record(b"\xdf\xff\xff\xff\xff", MSGPACK)),
    "text of four billion in MessagePack": (BAD, record(b"\x81\xdb\xff\xff\xff\xff", MSGPACK)),
    "extension type in MessagePack": (BAD, record(packed({**chat(), "tenant": msgspec.msgpack.Ext(5, b"x")}), MSGPACK)),
    "event without data": (BAD, record(line({"specversion": "1.0", "id": "1", "type": "t", "source": "s"}), EVENT)),
    "event with deep data": (BAD, record(b'{"data":' + nested(b"[", 100_000), EVENT)),
    "event twice with data": (BAD, record(b'{"data":' + line(chat()) + b',"data":' + line(chat()) + b"}", EVENT)),
    "schema prefix alone": (BAD, record(b"\0\0\0\0\1")),
    "ten megabytes": (BAD, record(b"x" * (10 << 20))),
    "ten megabytes without a key": (BAD, record(b"x" * (10 << 20), key=None)),
    # headers and keys
    "unknown content type": (BAD, record(line(chat()), (("content-type", b"application/x-java-serialized-object"),))),
    "JSON under MessagePack's name": (BAD, record(line(chat()), MSGPACK)),
    "many headers": (BAD, record(line(chat()), (("a", b"b"),) * 65)),
    "large headers": (BAD, record(line(chat()), (("a", b"b" * 40_000),))),
    "header with a long name": (BAD, record(line(chat()), (("a" * 40_000, b""),))),
    "large key": (BAD, record(line(chat()), key=b"k" * 100_000)),
}

# What looks dangerous and is a request like any other.
ADMITTED: dict[str, Record] = {
    "plain chat": a_chat(),
    "plain text": a_text(),
    "MessagePack": record(packed(chat()), MSGPACK),
    "MessagePack under its other name": record(packed(text()), (("content-type", b"application/x-msgpack"),)),
    "structured event": record(
        line({"specversion": "1.0", "id": "1", "type": "t", "source": "s", "data": chat()}), EVENT
    ),
    "schema prefix": record(b"\0\0\0\0\1" + line(chat())),
    "no key": record(line(chat()), key=None),
    "duplicate headers": record(line(chat()), (("content-type", b"text/plain"), ("a", b"1"), ("a", b"2"), *JSON)),
    "null headers": record(line(chat()), (("traceparent", None), ("content-type", None))),
    "headers that are no text": record(line(chat()), (("traceparent", b"\xff\xfe"), ("content-type", b"\xff"))),
    "NUL, right to left and byte order mark in a prompt": a_text({"prompt": "a\0b\u202ec\ufeffd"}),
    "emoji as an escaped pair": record(raw('"\\ud83d\\ude00"', "user")),
    "template in a message": a_chat({"messages": [{"role": "user", "content": "{{ 1/0 }}{% include 'x' %}"}]}),
    "control tokens in a message": a_chat({"messages": [{"role": "user", "content": "<|end|><|start|>system"}]}),
    "temperature that would divide by nothing": a_chat({"temperature": 1e-300}),
    "top_k beyond the vocabulary": a_chat({"top_k": 1_000_000}),
    "smallest seed": a_chat({"seed": -(2**63)}),
    "all penalties and 300 biases": a_chat(
        {
            "frequency_penalty": -2,
            "presence_penalty": 2,
            "repetition_penalty": 10,
            "logit_bias": {str(token): 100 - token for token in range(200)} | {str(200 + t): -100 for t in range(100)},
        }
    ),
    "biases in MessagePack": record(packed(chat({"logit_bias": {0: 1, 1: 2.5}})), MSGPACK),
    "schema of 64 levels": record(raw_schema(nested(b'{"items":', 63, b"}").replace(b":}", b":{}}"))),
    "catastrophic regex": a_format(type="regex", pattern="(a+)+$"),
    "a thousand choices": a_format(type="choice", choices=["a" * 30] * 1000),
    "schema in MessagePack": record(packed(chat({"response_format": schema_format({"const": 2**63})})), MSGPACK),
    "format of text and ignore_eos": a_chat({"response_format": {"type": "text"}, "ignore_eos": True}),
    "no biases": a_chat({"logit_bias": None}),
    "sixteen stops": a_chat({"stop": ["a" * 256] * 16}),
}


def fuzz(seed: int, count: int) -> Iterator[Record]:
    """As many records as asked for, each a valid request that something has happened to; the same for the same seed."""
    dice = random.Random(seed)
    valid = [record.value for record in ADMITTED.values() if record.value]
    for offset in range(count):
        change = dice.choice((_noise, _flip, _cut, _splice, _field, _field, _field, _twist))
        value: bytes = change(dice, dice.choice(valid))
        named = MSGPACK if value[:1] == b"\x83" and dice.random() < 0.8 else ()  # mostly what it begins like
        yield record(value, (*_headers(dice), *named), dice.choice((b"key", b"", None)), offset)


def _noise(dice: random.Random, _valid: bytes) -> bytes:
    return dice.randbytes(dice.randrange(200))


def _flip(dice: random.Random, value: bytes) -> bytes:
    changed = bytearray(value)
    for _ in range(dice.randrange(1, 6)):
        changed[dice.randrange(len(changed))] = dice.randrange(256)
    return bytes(changed)


def _cut(dice: random.Random, value: bytes) -> bytes:
    start, end = sorted((dice.randrange(len(value) + 1), dice.randrange(len(value) + 1)))
    return dice.choice((value[:end], value[start:], value[:start] + value[end:]))


def _splice(dice: random.Random, value: bytes) -> bytes:
    piece = dice.choice(
        (b'"', b"\\", b"{", b"}", b"[", b"\0", b"\xff", b"\\ud800", b"1e999", b"NaN", b"null", b",", b'":')
    )
    at = dice.randrange(len(value) + 1)
    return value[:at] + piece * dice.choice((1, 1, 2, 1000)) + value[at:]


BODY_FIELDS = (
    "model", "messages", "prompt", "max_tokens", "min_tokens", "n", "seed", "stop", "temperature", "top_p", "top_k",
    "min_p", "stop_token_ids", "logprobs", "top_logprobs", "stream", "stream_options", "metadata", "user", "ignore_eos",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias",
    "response_format", "unheard_of",
)  # fmt: skip
OUTER_FIELDS = ("custom_id", "tenant", "tier", "deadline", "max_cost", "url", "method", "body")


def _field(dice: random.Random, _valid: bytes) -> bytes:
    """A request with some of its fields' values exchanged for odd ones, now and then where they do not belong."""
    request = dice.choice((chat, text))()
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        name = dice.choice(BODY_FIELDS + OUTER_FIELDS)
        inside = isinstance(request["body"], dict) and (name in BODY_FIELDS) == (dice.random() < 0.9)
        (request["body"] if inside else request)[name] = _odd(dice)
    encoded = dice.choice((msgspec.json.encode, packed))
    return encoded(request)


def _odd(dice: random.Random, depth: int = 0) -> Any:
    plain: tuple[Any, ...] = (
        None, True, False, 0, -1, 1, 7, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 1.5, -0.0, 1e308, 5e-324, "", "a", "\0",
        "\u202e\ufeff", "😀" * 50, "a" * 10_000, "1.00", "1.00\n", "realtime", MODEL, b"bytes", [], {}, [1, 2, 3],
        ["a"], [{"role": "user", "content": "hi"}], {"role": "user"}, {"include_usage": True}, [[[]]], [0] * 2_000,
        {"type": "json_object"}, {"type": "regex", "pattern": "(a"}, schema_format({"type": "x"}),
    )  # fmt: skip
    if depth < 3 and dice.random() < 0.2:
        return [_odd(dice, depth + 1)] if dice.random() < 0.5 else {"a": _odd(dice, depth + 1)}
    return dice.choice(plain)


def _twist(dice: random.Random, value: bytes) -> bytes:
    return dice.choice(
        (value + value, b"\0\0\0\0\1" + value, value[::-1], value.upper(), value.decode("latin-1").encode())
    )


def _headers(dice: random.Random) -> Any:
    pool = (
        *JSON,
        *MSGPACK,
        *EVENT,
        ("content-type", None),
        ("content-type", b"\xff"),
        ("traceparent", b"00-0-0-0"),
        ("traceparent", None),
        ("tracestate", b"\xff"),
        ("correlation_id", b"x" * 600),
        ("", b""),
        ("ce_id", b"1"),
    )
    return [dice.choice(pool) for _ in range(dice.choice((0, 0, 1, 1, 2, 5)))]
