"""Telemetry: the agreed names, spans that join the caller's trace, and never a word of a prompt."""

import io
import json
import logging
import time
from collections.abc import Iterator

import pytest
import structlog
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from structlog.testing import capture_logs

from engine.types import Charge, EngineStats, StepResult, Usage, Work
from schemas.requests import Chat, ChatBody, Message
from worker.brokers.base import Place, Record
from worker.cost import Meter
from worker.errors import Fatal
from worker.exporters import COLLECTOR, PUSH_TIMEOUT_S, open_exporters
from worker.logs import VALUE_CHARS_MAX, WITHHELD, configure_logs
from worker.telemetry import STEP_SPAN_INTERVAL_S, Telemetry

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "the prompt that nobody may see"
PLACE = Place("tokenmill.requests", 3)


def record(offset: int = 812, traceparent: str | bytes | None = f"00-{TRACE}-{PARENT}-01") -> Record:
    value = traceparent.encode() if isinstance(traceparent, str) else traceparent
    headers = () if value is None else (("traceparent", value),)
    return Record(
        place=PLACE, offset=offset, key=SECRET.encode(), value=SECRET.encode(), headers=headers, timestamp_ms=0
    )


GENERATE = Chat(
    custom_id="order-17",
    tenant="acme",
    body=ChatBody(
        model="smollm2-moe",
        messages=[Message(role="user", content=SECRET)],
        temperature=0.5,
        seed=7,
        stop=[SECRET],
        metadata={"note": SECRET},
    ),
)
USAGE = Usage(num_prompt=10, num_cached=4, num_output=5)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Recorder:
    """A Telemetry, and everything that it has put out."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.reader = InMemoryMetricReader()
        self.spans = InMemorySpanExporter()
        self.log = io.StringIO()
        configure_logs("debug", "json", self.log)
        tracers = TracerProvider(shutdown_on_exit=False)
        tracers.add_span_processor(SimpleSpanProcessor(self.spans))
        meters = MeterProvider([self.reader], shutdown_on_exit=False)
        self.telemetry = Telemetry(meters, tracers, worker="w-1", group="g", clock=self.clock)

    def serve(self, request: int = 1, offset: int = 812) -> None:
        """One request of 5 tokens: the first after 0.5 s, one more every 0.1 s."""
        self.telemetry.admitted(request, record(offset), GENERATE)
        self.clock.now_s += 0.5
        self.telemetry.first_token(request)
        self.clock.now_s += 0.4
        self.telemetry.completed(request, [USAGE], ["stop"])

    def metrics(self) -> dict[str, list]:
        data = self.reader.get_metrics_data()
        assert data is not None
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
        return {metric.name: list(metric.data.data_points) for scope in scopes for metric in scope.metrics}

    def span(self, name: str) -> ReadableSpan:
        (span,) = [span for span in self.spans.get_finished_spans() if span.name == name]
        return span

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    yield Recorder()
    structlog.reset_defaults()
    logging.basicConfig(handlers=handlers, level=level, force=True)


# ------------------------------------------------------------------------------------------------------------ metrics


def test_durations_are_measured_from_admission_with_the_conventions_buckets(recorder: Recorder):
    recorder.serve()
    metrics = recorder.metrics()
    for name, value, first, last in (
        ("gen_ai.server.request.duration", 0.9, 0.01, 81.92),
        ("gen_ai.server.time_to_first_token", 0.5, 0.001, 10.0),
        ("gen_ai.server.time_per_output_token", 0.1, 0.01, 2.5),
    ):
        (point,) = metrics[name]
        assert point.sum == pytest.approx(value)
        assert (point.explicit_bounds[0], point.explicit_bounds[-1]) == (first, last)
        assert point.attributes["gen_ai.operation.name"] == "chat"
        assert point.attributes["gen_ai.request.model"] == "smollm2-moe"


def test_usage_counters_report_what_is_billed(recorder: Recorder):
    recorder.serve()
    recorder.serve(request=2)
    metrics = recorder.metrics()
    values = {
        kind: metrics[f"gen_ai.client.inference.usage.{kind}"][0].value for kind in ("input_tokens", "output_tokens")
    }
    assert values == {"input_tokens": 20, "output_tokens": 10}
    assert metrics["gen_ai.client.inference.usage.cache_read.input_tokens"][0].value == 8


def test_a_failure_is_a_duration_with_an_error_type(recorder: Recorder):
    recorder.telemetry.refused(record(), "INVALID_REQUEST")
    recorder.telemetry.admitted(1, record(), GENERATE)
    recorder.telemetry.failed(1, "DEADLINE_EXCEEDED")
    recorder.telemetry.admitted(2, record(), GENERATE)
    recorder.telemetry.dropped(2)
    errors = [point.attributes["error.type"] for point in recorder.metrics()["messaging.process.duration"]]
    assert errors == ["INVALID_REQUEST", "DEADLINE_EXCEEDED", "fenced"]


def test_the_engine_the_meter_and_the_lag_are_looked_up_when_somebody_looks(recorder: Recorder):
    stats = EngineStats(num_running=3, num_waiting=2, blocks_used=1, blocks_total=4, num_drafted=9, num_accepted=6)
    recorder.telemetry.step(StepResult(idle_ns=0, tokens=[], finished=[], charges=[]), stats)
    recorder.telemetry.lag({PLACE: 17})
    recorder.telemetry.assigned([PLACE], generation=1)
    meter = Meter(worker="w-1", life="l", rate=3600 * 10**9)
    meter.idle(5, "loading")
    recorder.telemetry.metered(meter.reading())
    metrics = recorder.metrics()
    assert metrics["tokenmill.requests.running"][0].value == 3
    assert metrics["tokenmill.kv_cache.usage.ratio"][0].value == 0.25
    assert metrics["tokenmill.spec.accepted_tokens"][0].value == 6
    assert metrics["tokenmill.lag"][0].value == 17
    assert metrics["tokenmill.partitions.held"][0].value == 1
    costs = {tuple(point.attributes.values()): point.value for point in metrics["tokenmill.cost"]}
    assert costs["idle", "loading"] == 5
    assert costs["charged",] == 0


def test_flushes_fences_and_unknown_outcomes_are_counted(recorder: Recorder):
    recorder.telemetry.polled(PLACE.topic, 5)
    recorder.telemetry.flushed(num_records=40, duration_s=0.02, num_attempts=3)
    recorder.telemetry.unknown_outcome()
    recorder.telemetry.fenced(4, "why")
    metrics = recorder.metrics()
    assert metrics["messaging.client.consumed.messages"][0].value == 5
    assert metrics["messaging.client.sent.messages"][0].value == 40
    assert metrics["messaging.client.operation.duration"][0].sum == 0.02
    assert metrics["tokenmill.flush.records"][0].sum == 40
    assert metrics["tokenmill.flush.retries"][0].value == 2
    assert metrics["tokenmill.flush.unknown_outcomes"][0].value == 1
    assert metrics["tokenmill.partitions.fenced"][0].value == 4


# -------------------------------------------------------------------------------------------------------------- spans


def test_a_requests_span_is_a_child_of_the_traceparent_that_came_with_it(recorder: Recorder):
    recorder.serve()
    span = recorder.span("process tokenmill.requests")
    assert span.kind is SpanKind.CONSUMER
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert span.attributes is not None
    assert span.attributes["messaging.destination.partition.id"] == "3"
    assert span.attributes["messaging.kafka.offset"] == 812
    assert span.attributes["messaging.message.id"] == "order-17"


def test_the_generation_is_an_internal_span_inside_it(recorder: Recorder):
    recorder.serve()
    outer, inner = recorder.span("process tokenmill.requests"), recorder.span("chat smollm2-moe")
    assert inner.kind is SpanKind.INTERNAL
    assert inner.parent is not None
    assert inner.parent.span_id == outer.context.span_id
    assert inner.attributes is not None
    assert inner.attributes["gen_ai.request.temperature"] == 0.5
    assert inner.attributes["gen_ai.request.seed"] == 7
    assert inner.attributes["gen_ai.usage.output_tokens"] == 5
    assert inner.attributes["gen_ai.response.finish_reasons"] == ("stop",)


def test_a_flush_and_a_step_link_to_the_requests_that_they_served_and_have_no_parent(recorder: Recorder):
    for request in (1, 2):
        recorder.telemetry.admitted(request, record(request), GENERATE)
    charges = [
        Charge(request=request, choice=0, work=Work.PROMPT, num_tokens=8, device_ns=10**6) for request in (1, 2, 9)
    ]
    recorder.telemetry.step(StepResult(idle_ns=0, tokens=[], finished=[], charges=charges), EngineStats())
    for request in (1, 2):
        recorder.telemetry.completed(request, [USAGE], ["stop"])
    recorder.telemetry.flushed(num_records=20, duration_s=0.01)
    for name, linked in (("step", "chat smollm2-moe"), ("flush", "process tokenmill.requests")):
        span = recorder.span(name)
        assert span.parent is None
        served = {other.context.span_id for other in recorder.spans.get_finished_spans() if other.name == linked}
        assert {link.context.span_id for link in span.links} == served
        assert len(served) == 2
    step = recorder.span("step")
    assert step.start_time is not None
    assert step.end_time is not None
    assert step.end_time - step.start_time == pytest.approx(3e6, abs=1e3)


def test_steps_have_at_most_one_span_in_an_interval(recorder: Recorder):
    recorder.telemetry.admitted(1, record(), GENERATE)
    charge = Charge(request=1, choice=0, work=Work.OUTPUT, num_tokens=1, device_ns=1, index=0)
    for _ in range(20):
        recorder.telemetry.step(StepResult(idle_ns=0, tokens=[], finished=[], charges=[charge]), EngineStats())
        recorder.clock.now_s += STEP_SPAN_INTERVAL_S / 8
    assert [span.name for span in recorder.spans.get_finished_spans()].count("step") == 3


def test_a_trace_that_its_caller_does_not_keep_makes_no_spans(recorder: Recorder):
    recorder.telemetry.admitted(1, record(traceparent=f"00-{TRACE}-{PARENT}-00"), GENERATE)
    recorder.telemetry.completed(1, [USAGE], ["stop"])
    recorder.telemetry.flushed(num_records=20, duration_s=0.01)
    assert recorder.spans.get_finished_spans() == ()


@pytest.mark.parametrize("header", [b"\xff\xfe", b"00-xyz", b"0" * 10_000, b"", None])
def test_a_header_that_is_no_trace_context_starts_a_trace_of_its_own(recorder: Recorder, header: bytes | None):
    recorder.telemetry.refused(record(traceparent=header), "INVALID_REQUEST")
    span = recorder.span("process tokenmill.requests")
    assert span.parent is None
    assert span.status.status_code is StatusCode.ERROR
    assert "WARNING" not in recorder.log.getvalue().upper()


# ----------------------------------------------------------------------------------------------------- no prompt text


def test_no_span_metric_or_log_line_has_a_word_of_the_prompt(recorder: Recorder):
    recorder.serve()
    recorder.telemetry.refused(record(), "INVALID_REQUEST")
    recorder.telemetry.admitted(3, record(), GENERATE)
    recorder.telemetry.failed(3, "INFERENCE_ERROR")
    recorder.telemetry.flushed(num_records=3, duration_s=0.1)
    spans = "".join(span.to_json() for span in recorder.spans.get_finished_spans())
    metrics = recorder.reader.get_metrics_data()
    assert metrics is not None
    for output in (spans, metrics.to_json(), recorder.log.getvalue()):
        assert output
        assert SECRET not in output


def test_a_log_line_withholds_content_by_key_by_kind_and_by_length(recorder: Recorder):
    log = structlog.get_logger()
    log.info(
        "careless", prompt=SECRET, messages=[SECRET], raw=SECRET.encode(), detail="x" * (VALUE_CHARS_MAX + 1), offset=7
    )
    (line,) = recorder.lines()
    assert line["prompt"] == line["messages"] == line["raw"] == WITHHELD
    assert line["detail"].endswith(f"x... {WITHHELD}")
    assert line["offset"] == 7


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_traceback_shows_no_local_variables(recorder: Recorder, form):
    configure_logs("info", form, recorder.log)

    def fails(prompt: str) -> None:
        raise RuntimeError(len(prompt))

    try:
        fails(SECRET)
    except RuntimeError:
        structlog.get_logger().exception("failed")
    text = recorder.log.getvalue()
    assert "RuntimeError: 30" in text
    assert SECRET not in text


# --------------------------------------------------------------------------------------------------------------- logs


def test_lines_name_the_record_that_they_are_about(recorder: Recorder):
    recorder.telemetry.admitted(1, record(), GENERATE)
    (line,) = recorder.lines()
    fields = {key: line[key] for key in ("event", "level", "worker", "request", "topic", "partition", "offset")}
    assert fields == {
        "event": "request admitted",
        "level": "debug",
        "worker": "w-1",
        "request": 1,
        "topic": "tokenmill.requests",
        "partition": 3,
        "offset": 812,
    }


def test_libraries_are_heard_from_warnings_on_in_the_same_shape(recorder: Recorder):
    library = logging.getLogger("a.library")
    library.info("chatter")
    library.warning("Heartbeat failed for group %s", "g")
    (line,) = recorder.lines()
    assert (line["event"], line["level"], line["logger"]) == ("Heartbeat failed for group g", "warning", "a.library")


def test_a_stream_that_is_no_terminal_gets_json(recorder: Recorder):
    configure_logs("info", "auto", recorder.log)
    structlog.get_logger().info("hello")
    assert recorder.lines()[0]["event"] == "hello"


# ----------------------------------------------------------------------------------------------------------- exporters

PROMETHEUS_NAMES = """
gen_ai_client_inference_usage_cache_read_input_tokens_total
gen_ai_client_inference_usage_input_tokens_total
gen_ai_client_inference_usage_output_tokens_total
gen_ai_server_request_duration_seconds
gen_ai_server_time_per_output_token_seconds
gen_ai_server_time_to_first_token_seconds
messaging_client_consumed_messages_total
messaging_client_operation_duration_seconds
messaging_client_sent_messages_total
messaging_process_duration_seconds
target_info
tokenmill_cost_held_picodollars
tokenmill_cost_picodollars_total
tokenmill_flush_records
tokenmill_flush_retries_total
tokenmill_flush_unknown_outcomes_total
tokenmill_kv_cache_usage_ratio
tokenmill_lag
tokenmill_partitions_fenced_total
tokenmill_partitions_held
tokenmill_preemptions_total
tokenmill_prompt_cached_tokens_total
tokenmill_prompt_tokens_total
tokenmill_requests_handed_over_total
tokenmill_requests_resumed_total
tokenmill_requests_running
tokenmill_requests_waiting
tokenmill_spec_accepted_tokens_total
tokenmill_spec_draft_tokens_total
tokenmill_steps_total
"""


def test_prometheus_scrapes_every_metric_under_a_name_without_colons(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(COLLECTOR, raising=False)
    with open_exporters("w-1") as exporters:
        telemetry = Telemetry(exporters.meters, exporters.tracers, worker="w-1", group="g")
        telemetry.polled(PLACE.topic, 1)
        telemetry.admitted(1, record(), GENERATE)
        telemetry.first_token(1)
        telemetry.completed(1, [USAGE], ["stop"])
        telemetry.flushed(num_records=3, duration_s=0.1, num_attempts=2)
        telemetry.unknown_outcome()
        telemetry.fenced(1, "why")
        telemetry.lag({PLACE: 1})
        telemetry.metered(Meter(worker="w-1", life="l", rate=1).reading())
        page = exporters.exposition().decode()
    names = [line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")]
    assert sorted(names) == PROMETHEUS_NAMES.split()
    assert 'service_instance_id="w-1"' in page
    assert SECRET not in page


def test_a_failure_is_logged_with_the_exit_code_that_it_ends_the_worker_with(recorder):
    with capture_logs() as logs, pytest.raises(Fatal), recorder.telemetry.life(model="m"):
        raise Fatal("the engine failed: device lost")
    stopped = {"event": "worker stopped", "exit_code": 70, "reason": "the engine failed: device lost"}
    assert logs[-1].items() >= stopped.items()


def test_a_collector_that_is_not_there_does_not_hold_a_leaving_worker(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(COLLECTOR, "http://127.0.0.1:9")  # the discard port: nobody listens
    with open_exporters("w-1") as exporters:
        telemetry = Telemetry(exporters.meters, exporters.tracers, worker="w-1", group="g")
        telemetry.admitted(1, record(), GENERATE)
        telemetry.completed(1, [USAGE], ["stop"])
        leaves_s = time.monotonic()
    assert time.monotonic() - leaves_s < 2 * PUSH_TIMEOUT_S + 1  # a second for a busy machine
