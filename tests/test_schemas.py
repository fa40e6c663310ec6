"""The wire: golden bytes for every message, every trap of the decoders, and what other readers make of it.

`python -m tests.test_schemas` records new golden bytes; read the difference before committing it: it is what consumers
will see.
"""

import json
from pathlib import Path
from typing import Any, get_args

import jsonschema
import msgspec
import pytest
from cloudevents.core.bindings.kafka import KafkaMessage, from_binary
from cloudevents.core.formats.json import JSONFormat

from schemas import codec, export
from schemas.codec import (
    Malformed,
    WireLimits,
    carried_headers,
    decode_handoff,
    decode_request,
    decode_result,
    encode,
    event_headers,
    event_id,
)
from schemas.cost import CostEvent, MeterReading, dollars, picodollars
from schemas.handoff import CarriedChoice, CarriedLogprob, CarriedUsage, Handoff
from schemas.requests import AnyGenerate, Chat, ChatBody, Complete, Message, StreamOptions, TextBody, TextPart
from schemas.results import (
    AssistantMessage,
    Bill,
    ChatChoice,
    ChatLogprobs,
    ChatResult,
    Chunk,
    Completion,
    CompletionTokensDetails,
    Failed,
    Input,
    PromptTokensDetails,
    Response,
    TextChoice,
    TextLogprobs,
    TextResult,
    Timing,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from tests.hostile import EVENT, JSON, MSGPACK, chat, line, text

GOLDEN = Path(__file__).parent / "golden"
PLACE = Input(topic="tokenmill.requests", partition=3, offset=812)
USAGE = Usage(
    prompt_tokens=12,
    completion_tokens=2,
    total_tokens=14,
    prompt_tokens_details=PromptTokensDetails(cached_tokens=8),
    completion_tokens_details=CompletionTokensDetails(accepted_prediction_tokens=1, rejected_prediction_tokens=3),
)
CARRIED = CarriedUsage(num_prompt=12, num_cached=8, num_drafted=4, num_accepted=1, num_recomputed=3, num_preemptions=1)
LOGPROB = TokenLogprob(
    token="Grüß",
    logprob=-0.25,
    bytes=list("Grüß".encode()),
    top_logprobs=[TopLogprob(token="Grüß", logprob=-0.25, bytes=list("Grüß".encode()))],
)


def completion(body: ChatResult | TextResult) -> Completion:
    return Completion(
        id="tokenmill.requests-3-812",
        custom_id="order-7",
        tenant="acme",
        response=Response(status_code=200, request_id="tokenmill.requests-3-812", body=body),
        error=None,
        input=PLACE,
        worker="gpu-1",
        bill=Bill(price="0.000000480000", cost="0.000000123456", price_book="2026-11"),
        timing=Timing(queue_time_ms=4.5, time_to_first_token_ms=21.125, generation_time_ms=480.0),
    )


MESSAGES: dict[str, codec.AnyResult | AnyGenerate] = {
    "request.chat": Chat(
        custom_id="order-7",
        tenant="acme",
        tier="batch",
        deadline=1_800_000_000.5,
        max_cost="0.01",
        body=ChatBody(
            model="smollm2-moe",
            messages=[
                Message(role="system", content="Be brief."),
                Message(role="user", content=[TextPart(text="Grüß dich 😀")], name="ada"),
            ],
            max_completion_tokens=64,
            temperature=0.7,
            n=2,
            frequency_penalty=0.5,
            presence_penalty=-0.25,
            repetition_penalty=1.1,
            logit_bias={7: -100.0, 50256: 2.5},
            seed=-1,
            stop=["\n\n"],
            logprobs=True,
            top_logprobs=1,
            stream=True,
            stream_options=StreamOptions(include_usage=True),
            metadata={"order": "7"},
        ),
    ),
    "request.text": Complete(custom_id="order-8", body=TextBody(model="smollm2-moe", prompt=[1, 2, 3], logprobs=0)),
    "completion.chat": completion(
        ChatResult(
            id="chatcmpl-tokenmill.requests-3-812",
            created=1_800_000_000,
            model="smollm2-moe",
            choices=[
                ChatChoice(
                    index=0,
                    message=AssistantMessage(content="Grüß dich 😀\n"),
                    finish_reason="stop",
                    logprobs=ChatLogprobs(content=[LOGPROB]),
                )
            ],
            usage=USAGE,
            service_tier="batch",
        )
    ),
    "completion.text": completion(
        TextResult(
            id="cmpl-tokenmill.requests-3-812",
            created=1_800_000_000,
            model="smollm2-moe",
            choices=[
                TextChoice(
                    index=0,
                    text=" four",
                    finish_reason="length",
                    logprobs=TextLogprobs(
                        tokens=[" four"], token_logprobs=[-0.5], top_logprobs=[{" four": -0.5}], text_offset=[0]
                    ),
                )
            ],
            usage=USAGE,
            service_tier="realtime",
        )
    ),
    "completion.failure": Completion(
        id="tokenmill.requests-3-812",
        custom_id=None,
        tenant=None,
        response=None,
        error=Failed(code="INVALID_REQUEST", message="the value holds text that is not UTF-8"),
        input=PLACE,
        worker="gpu-1",
    ),
    "cost": CostEvent(
        id="tokenmill.requests-3-812/0/output/1",
        request_id="tokenmill.requests-3-812",
        custom_id="order-7",
        tenant="acme",
        model="smollm2-moe",
        tier="batch",
        choice=0,
        kind="output",
        index=1,
        tokens=1,
        price="0.000000200000",
        cost="0.000000061728",
        device_ns=2_000_000,
        price_book="2026-11",
        worker="gpu-1",
        life="01J9",
        input=PLACE,
    ),
    "meter": MeterReading(
        worker="gpu-1",
        life="01J9",
        sequence=4,
        wall_ns=60_000_000_000,
        device_rate="0.10",
        charged="0.001000000000",
        wasted={"lost": "0.000100000000"},
        idle={"loading": "0.000200000000", "waiting": "0.000300000000"},
        held="0.000066666667",
        final=False,
    ),
    "chunk": Chunk(
        id="tokenmill.requests-3-812",
        custom_id="order-7",
        choice=0,
        sequence=5,
        text=" dich",
        finish_reason="stop",
        input=PLACE,
        worker="gpu-1",
        usage=USAGE,
    ),
    "handoff": Handoff(
        input=PLACE,
        key=b"ada",
        value=b'{"custom_id":"order-7"}',
        headers=[("traceparent", b"00-1"), ("empty", None)],
        timestamp_ms=1_800_000_000_000,
        tier="batch",
        admitted_s=1_800_000_000.5,
        first_token_s=1_800_000_000.75,
        handovers=1,
        spent="0.000000123456",
        worker="gpu-1",
        choices=[
            CarriedChoice(
                tokens=[17, 4],
                logprobs=[CarriedLogprob(-0.25, [(17, -0.25), (3, -1.5)]), CarriedLogprob(-0.5, [])],
                usage=CARRIED,
                finish_reason=None,
                num_chunks=2,
            ),
            CarriedChoice(tokens=[2], logprobs=None, usage=CARRIED, finish_reason="stop", num_chunks=0),
        ],
        prompt_logprobs=[CarriedLogprob(-1.5, [(3, -0.25)])],
    ),
}
OF_HANDOFFS = [("ce_type", b"tokenmill.handoff.v1")]


def refused(value: bytes | None, headers: codec.Headers = (), limits: WireLimits = codec.DEFAULT_LIMITS) -> Malformed:
    with pytest.raises(Malformed) as error:
        decode_request(value, headers, limits)
    return error.value


# ------------------------------------------------------------------------------------------------------- golden bytes


@pytest.mark.parametrize("name", MESSAGES)
def test_the_bytes_of_a_message_are_those_on_record(name):
    path = GOLDEN / f"{name}.json"
    assert path.exists(), f"no bytes on record: look at them, then run python -m {__name__}"
    assert encode(MESSAGES[name]) == path.read_bytes().rstrip(b"\n")


@pytest.mark.parametrize("name", MESSAGES)
def test_the_bytes_on_record_are_read_as_the_message(name):
    message = MESSAGES[name]
    recorded = (GOLDEN / f"{name}.json").read_bytes()
    if isinstance(message, Chat | Complete):
        assert decode_request(recorded) == message
    else:
        assert decode_result(type(message), recorded) == message


def test_every_kind_of_message_has_bytes_on_record():
    assert {type(message) for message in MESSAGES.values()} == {*get_args(codec.AnyResult), *get_args(AnyGenerate)}
    assert {path.stem for path in GOLDEN.glob("*.json")} == MESSAGES.keys()


def test_a_field_that_a_newer_writer_added_is_passed_over_in_results():
    newer = json.loads(encode(MESSAGES["cost"])) | {"added_later": {"a": 1}}
    assert decode_result(CostEvent, line(newer)) == MESSAGES["cost"]


# ----------------------------------------------------------------------------------------------------- ways of writing


@pytest.mark.parametrize("request_", [chat(), text()])
def test_a_request_reads_the_same_in_every_way_of_writing_it(request_):
    expected = decode_request(line(request_))
    event = {"specversion": "1.0", "id": "1", "type": "t", "source": "s", "traceparent": "x", "data": request_}
    assert decode_request(line(request_), JSON) == expected
    assert decode_request(line(request_), [("content-type", b"Application/JSON ; charset=utf-8")]) == expected
    assert decode_request(msgspec.msgpack.encode(request_), MSGPACK) == expected
    assert decode_request(line(event), EVENT) == expected
    assert decode_request(b"\0\0\0\0\7" + line(request_)) == expected
    assert decode_request(b"\0\0\0\0\7" + msgspec.msgpack.encode(request_), MSGPACK) == expected


def test_an_openai_batch_line_is_a_request():
    own = b"""{"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m",
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi!"}],
        "max_tokens": 9}}"""
    assert decode_request(own).custom_id == "request-1"


def test_the_last_of_several_headers_counts():
    headers = [("content-type", b"text/plain"), *JSON]
    assert decode_request(line(chat()), headers).custom_id == "mine"
    assert "content-type" in str(refused(line(chat()), headers[::-1]))


# ----------------------------------------------------------------------------------- limits, and the decoders' traps


def test_sizes_are_checked_before_a_byte_is_decoded(monkeypatch):
    monkeypatch.setattr(codec, "_form", None)  # would raise TypeError if it came to decoding
    limits = WireLimits(value_bytes_max=10, headers_max=2, header_bytes_max=20)
    assert "value takes 11 bytes" in str(refused(b"x" * 11, (), limits))
    assert "3 headers" in str(refused(b"x", [("a", b"")] * 3, limits))
    assert "headers take 22 bytes" in str(refused(b"x", [("name", b"1234567")] * 2, limits))


def test_a_value_of_exactly_the_limit_is_read():
    value = line(chat())
    decode_request(value, (), WireLimits(value_bytes_max=len(value)))
    refused(value, (), WireLimits(value_bytes_max=len(value) - 1))


@pytest.mark.parametrize(("field", "value"), [("max_cost", "1\n"), ("tenant", "acme\n"), ("custom_id", "a\0")])
def test_a_pattern_admits_no_line_break_at_the_end(field, value):
    """`$` in Python's dialect matches before a last line break."""
    assert field in str(refused(line(chat(**{field: value}))))


PARTS = chat(
    {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        "metadata": {"a": "1"},
        "logit_bias": {"0": 1},
    }
)


@pytest.mark.parametrize("field", ["tenant", "model", "role", "text", "a", "0"])
def test_a_field_given_twice_is_refused_wherever_it_is(field):
    """The decoder silently takes the last one."""
    once = line({"tenant": "b", **PARTS})
    decode_request(once)
    value = "2.5" if field == "0" else '"user"'
    twice = once.replace(f'"{field}":'.encode(), f'"{field}":{value},"{field}":'.encode())
    assert "twice" in str(refused(twice))


def test_a_field_given_twice_is_refused_in_messagepack_and_in_events():
    packed = msgspec.msgpack.encode(chat())
    assert packed[:1] == b"\x83"  # a map of three
    assert "twice" in str(refused(b"\x84\xa9custom_id\xa1x" + packed[1:], MSGPACK))
    assert "twice" in str(refused(b'{"data":' + line(chat()) + b',"data":' + line(chat()) + b"}", EVENT))


def test_a_field_given_twice_under_an_escape_is_refused():
    assert "twice" in str(refused(line(chat()).replace(b'"body"', b'"tenant":"a","t\\u0065nant":"b","body"')))


def test_text_that_is_not_utf8_is_refused_though_it_raises_another_error():
    """msgspec lets UnicodeDecodeError through."""
    assert "UTF-8" in str(refused(line(chat()).replace(b"hello", b"\xff\xfe")))


def test_deep_nesting_is_refused_though_it_raises_a_runtime_error():
    """What is passed over is walked recursively: RecursionError is no ValueError."""
    deep = b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b',"data":' + line(chat()) + b"}"
    assert "too deeply" in str(refused(deep, EVENT))


def test_integers_without_end_are_refused():
    """Untyped integers have any number of digits, and turning them to text takes quadratic time."""
    for field in ("seed", "n", "unheard_of"):
        assert field in str(refused(line(chat({field: 10**4000}))))


def test_numbers_that_json_does_not_have_are_refused():
    for number in (b"NaN", b"Infinity", b"1e999", b"0x10", b"01", b"+1", b".5"):
        refused(line(chat({"temperature": 0.5})).replace(b"0.5", number))


def test_a_byte_order_mark_is_refused():
    assert "malformed" in str(refused(b"\xef\xbb\xbf" + line(chat())))


def test_the_id_is_saved_from_a_request_that_is_otherwise_wrong():
    assert refused(line(chat({"n": "x"}))).custom_id == "mine"
    assert refused(line({"data": chat({"n": "x"})}), EVENT).custom_id == "mine"
    assert refused(msgspec.msgpack.encode(chat({"n": "x"})), MSGPACK).custom_id == "mine"
    assert refused(line(chat()).replace(b'"model"', b'"n":1,"n":1,"model"')).custom_id == "mine"


def test_no_id_is_guessed():
    assert refused(line(chat(custom_id=7))).custom_id is None
    assert refused(line(chat(custom_id="a\n"))).custom_id is None
    assert refused(line(chat())[:-1]).custom_id is None
    assert refused(line(chat()).replace(b'"custom_id"', b'"custom_id":"other","custom_id"')).custom_id is None


def test_an_error_names_the_field():
    assert "$.body.n" in str(refused(line(chat({"n": "x"}))))
    assert "`nn`" in str(refused(line(chat({"nn": 1}))))
    assert "$.url" in str(refused(line(chat(url="/v1/embeddings"))))


# ----------------------------------------------------------------------------------------------------------- handoffs


def test_a_handoff_is_read_as_it_was_sent():
    message = MESSAGES["handoff"]
    assert decode_handoff(encode(message), OF_HANDOFFS) == message


def test_a_handoff_carries_every_byte_of_its_request():
    value = bytes(range(256))
    message = msgspec.structs.replace(MESSAGES["handoff"], value=value, key=value, headers=[("h", value)])
    assert decode_handoff(encode(message), OF_HANDOFFS) == message


@pytest.mark.parametrize(
    ("value", "headers", "why"),
    [
        (encode(MESSAGES["handoff"]), (), "no tokenmill.handoff.v1"),
        (encode(MESSAGES["handoff"]), [("ce_type", b"tokenmill.handoff.v2")], "no tokenmill.handoff.v1"),
        (line(chat()), OF_HANDOFFS, "missing required field"),
        (b"", OF_HANDOFFS, "truncated"),
        (None, OF_HANDOFFS, "truncated"),
        (b"\xff", OF_HANDOFFS, "malformed"),
        (encode(MESSAGES["handoff"]).replace(b"[17,4]", b"[17,-4]"), OF_HANDOFFS, "tokens"),
        (encode(MESSAGES["handoff"]).replace(b"[17,4]", b'[17,"secret"]'), OF_HANDOFFS, "tokens"),
        (encode(MESSAGES["handoff"]).replace(b'"handovers":1', b'"handovers":0'), OF_HANDOFFS, "handovers"),
        (encode(MESSAGES["handoff"]).replace(b"YWRh", b"Y?"), OF_HANDOFFS, "key"),
        (b"x" * (2 << 20), OF_HANDOFFS, "bytes"),
    ],
)
def test_what_is_no_handoff_is_malformed_and_not_quoted(value, headers, why):
    with pytest.raises(Malformed, match=why) as error:
        decode_handoff(value, headers)
    assert "secret" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------ headers


@pytest.mark.parametrize("name", [name for name in MESSAGES if not name.startswith("request")])
def test_the_cloudevents_library_reads_what_we_send(name):
    message: Any = MESSAGES[name]
    headers = event_headers(message, source="/tokenmill/g/w%201", subject="Grüße", time_s=1_800_000_000.25)
    event = from_binary(KafkaMessage(headers=dict(headers), key=None, value=encode(message)), JSONFormat())
    assert event.get_id() == event_id(message)
    assert event.get_type() == codec.KINDS[type(message)]
    assert (event.get_source(), event.get_subject()) == ("/tokenmill/g/w%201", "Grüße")
    assert event.get_time().timestamp() == 1_800_000_000.25
    assert event.get_datacontenttype() == "application/json"
    assert event.get_data() == json.loads(encode(message))


TRACEPARENT = ("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
TRACESTATE = ("tracestate", b"vendor=1")
CORRELATION = ("correlation_id", b"42")


@pytest.mark.parametrize(
    ("headers", "carried"),
    [
        ([TRACEPARENT, TRACESTATE, CORRELATION, ("other", b"x")], {TRACEPARENT, TRACESTATE, CORRELATION}),
        ([("traceparent", b"00-" + b"0" * 32 + b"-b7ad6b7169203331-01"), TRACESTATE, CORRELATION], {CORRELATION}),
        ([TRACESTATE, ("correlation_id", b"\xff")], set()),
        ([("traceparent", b"old"), TRACEPARENT, ("correlation_id", b"x" * 600)], {TRACEPARENT}),
        ([("traceparent", None), ("correlation_id", b"")], set()),
    ],
)
def test_a_valid_trace_context_and_a_correlation_id_are_passed_on(headers, carried):
    assert set(carried_headers(headers)) == carried


def test_each_attempt_at_a_result_has_the_same_id_and_each_result_its_own():
    ids = [event_id(message) for message in MESSAGES.values() if not isinstance(message, Chat | Complete)]
    assert ids[0] == ids[1] == ids[2] == codec.place_id(PLACE)  # three answers to one record
    assert len(set(ids)) == 5


# -------------------------------------------------------------------------------------------------------------- money


@pytest.mark.parametrize("amount", [0, 1, -1, 10**12, 123_456_789_012_345, -(10**18)])
def test_amounts_survive_the_wire(amount):
    assert picodollars(dollars(amount)) == amount


@pytest.mark.parametrize(
    "amount", ["", "-", ".5", "1.", "1e3", "1.0000000000001", "٣", "1\n", " 1", "NaN", "--1", "+1"]
)
def test_what_is_no_plain_amount_is_refused(amount):
    with pytest.raises(ValueError, match="not an amount"):
        picodollars(amount)


# ----------------------------------------------------------------------------------------------------------- described


@pytest.mark.parametrize("name", MESSAGES)
def test_every_message_satisfies_its_json_schema(name):
    message = MESSAGES[name]
    kind = codec.REQUEST_KIND if isinstance(message, Chat | Complete) else codec.KINDS[type(message)]
    schema = export.json_schemas()[kind]
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(json.loads(encode(message)))


def test_the_json_schema_refuses_what_the_decoder_refuses():
    validator = jsonschema.Draft202012Validator(export.json_schemas()[codec.REQUEST_KIND])
    assert validator.is_valid(chat())
    for wrong in (
        chat({"n": 0}),
        chat({"nn": 1}),
        chat(custom_id=""),
        chat(url="/v1/embeddings"),
        chat(max_cost="1,0"),
    ):
        assert not validator.is_valid(wrong)


def test_the_asyncapi_document_refers_to_nothing_that_it_lacks():
    names = ("requests", "batch", "completions", "costs", "chunks", "handoff", "dead_letters")
    topics = {name: f"t.{name}" for name in names}
    document = export.asyncapi(topics)
    assert {channel["address"] for channel in document["channels"].values()} == set(topics.values())
    actions = {
        (operation["action"], operation["channel"]["$ref"].removeprefix("#/channels/"))
        for operation in document["operations"].values()
    }
    assert {channel for _, channel in actions} == set(topics)
    assert {action for action, channel in actions if channel == "handoff"} == {"send", "receive"}
    references = list(references_in(document))
    assert len(references) > 20
    for reference in references:
        found: Any = document
        for step in reference.removeprefix("#/").split("/"):
            found = found[step]


def references_in(node: Any) -> Any:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from [value] if key == "$ref" else references_in(value)
    elif isinstance(node, list):
        for item in node:
            yield from references_in(item)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, message in MESSAGES.items():
        (GOLDEN / f"{name}.json").write_bytes(encode(message) + b"\n")
