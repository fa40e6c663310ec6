"""What happened, as metrics, spans and log events: the only file that knows their names (`worker/instruments.py` beside
it has the metrics').

Owns the names and what hangs on them: the service says what happened, never how that is called. Names follow
OpenTelemetry's conventions for generative AI and for messaging where they have one, and begin with `tokenmill.` where
they have none. Of a request only its numbers and its place are read: no text of a prompt or an answer comes in here.

A request has two spans. "process <topic>" (CONSUMER) is the record's, a child of the `traceparent` that came with it;
inside it "<operation> <model>" (INTERNAL: the model runs in this process) is the generation's. What serves many
requests at once, a flush or a step of the engine, is a span with links to theirs: it has many causes, so no parent.

Where it all goes is `worker/exporters.py`'s to know. One owner, the event loop.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import structlog
from opentelemetry import metrics, trace
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from engine.types import EngineStats, StepResult, Usage
from schemas.cost import MeterReading
from schemas.requests import AnyGenerate, Chat
from worker.brokers.base import Headers, Place, Record
from worker.errors import Fatal
from worker.instruments import Instruments

SCOPE = "tokenmill"
SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"  # of the messaging names; 1.45 renames some of them

STEP_SPAN_INTERVAL_S = 1.0  # shows who runs with whom; a span for each step would cost more than it tells
LINKS_MAX = 128  # a span of the SDK keeps no more
TRACE_HEADER_BYTES_MAX = 512  # the W3C's limit for tracestate; a traceparent has 55

_PROPAGATOR = TraceContextTextMapPropagator()


@dataclass(kw_only=True)
class _Running:
    """A request between its admission and its end."""

    record: Span
    generation: Span
    attributes: dict[str, str]
    place: Place
    admitted_s: float
    first_token_s: float | None = None


class Telemetry:
    """Turns what the service did into metrics, spans and log lines. Requests go by the engine's ids."""

    def __init__(
        self,
        meters: metrics.MeterProvider,
        tracers: trace.TracerProvider,
        *,
        worker: str,
        group: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tracer = tracers.get_tracer(SCOPE, schema_url=SCHEMA_URL)
        self._log: structlog.typing.FilteringBoundLogger = structlog.get_logger().bind(worker=worker)
        self._group = group
        self._clock = clock
        self._running: dict[int, _Running] = {}
        self._unflushed: list[Span] = []
        self._step_span_due_s = clock()
        self._metrics = Instruments(meters.get_meter(SCOPE, schema_url=SCHEMA_URL))

    # ---------------------------------------------------------------------------------------------------- one request

    def polled(self, topic: str, num_records: int) -> None:
        """Records came from a topic."""
        self._metrics.consumed.add(num_records, self._messaging("poll", "receive", topic))

    def refused(self, record: Record, code: str) -> None:
        """A record is answered with a failure and never becomes a request."""
        span = self._record_span(record)
        self._end(span, code)
        self._await_flush(span)
        self._metrics.process_duration.record(0.0, self._processing(record.place.topic, code))
        self._log.debug("request refused", code=code, **_where(record))

    def admitted(self, request: int, record: Record, generate: AnyGenerate, *, is_resumed: bool = False) -> None:
        """A record has become a request of the engine. `is_resumed`: which goes on where another worker left off."""
        self._metrics.resumed.add(is_resumed)
        attributes = {
            "gen_ai.operation.name": "chat" if isinstance(generate, Chat) else "text_completion",
            "gen_ai.provider.name": SCOPE,
            "gen_ai.request.model": generate.body.model,
        }
        span = self._record_span(record)
        generation = self._generation_span(span, attributes, generate)
        self._running[request] = _Running(
            record=span,
            generation=generation,
            attributes=attributes,
            place=record.place,
            admitted_s=self._clock(),
        )
        self._log.debug("request admitted", request=request, **_where(record))

    def first_token(self, request: int) -> None:
        """The request's first output token is there."""
        running = self._running[request]
        running.first_token_s = self._clock()
        self._metrics.time_to_first_token.record(running.first_token_s - running.admitted_s, running.attributes)
        running.generation.add_event("first token")

    def completed(self, request: int, usages: Sequence[Usage], finish_reasons: Sequence[str]) -> None:
        """The request is answered. The usages, one a choice, are what is billed for."""
        running = self._running.pop(request)
        num_output = sum(usage.num_output for usage in usages)
        usage = {
            "gen_ai.usage.input_tokens": usages[0].num_prompt,
            "gen_ai.usage.cache_read.input_tokens": usages[0].num_cached,
            "gen_ai.usage.output_tokens": num_output,
        }
        of_text = {**running.attributes, "gen_ai.token.modality": "text"}
        for counter, num_tokens in zip(self._metrics.usage, usage.values(), strict=True):
            counter.add(num_tokens, of_text)
        num_later = max(usage.num_output for usage in usages) - 1
        if running.first_token_s is not None and num_later > 0:
            self._metrics.time_per_output_token.record(
                (self._clock() - running.first_token_s) / num_later, running.attributes
            )
        running.generation.set_attributes({**usage, "gen_ai.response.finish_reasons": list(finish_reasons)})
        self._finish(running)
        self._log.debug("request completed", request=request, num_output=num_output)

    def failed(self, request: int, code: str) -> None:
        """The request is answered with a failure."""
        self._finish(self._running.pop(request), code)
        self._log.debug("request failed", request=request, code=code)

    def handed_over(self, request: int) -> None:
        """The rest of the request is a record for another worker to go on with."""
        self._metrics.handed_over.add(1)
        self._finish(self._running.pop(request))
        self._log.debug("request handed over", request=request)

    def dropped(self, request: int) -> None:
        """The request is let go without an answer: its partition has another owner."""
        self._finish(self._running.pop(request), "fenced")
        self._log.debug("request dropped", request=request)

    # -------------------------------------------------------------------------------------------------- many requests

    def step(self, result: StepResult, stats: EngineStats) -> None:
        """The engine has done a step, and looks like this after it."""
        self._metrics.stats = stats
        now_s = self._clock()
        if now_s < self._step_span_due_s:
            return
        self._step_span_due_s = now_s + STEP_SPAN_INTERVAL_S
        requests = dict.fromkeys(charge.request for charge in result.charges)
        spans = [self._running[request].generation for request in requests if request in self._running]
        duration_s = sum(charge.device_ns for charge in result.charges) / 1e9
        num_tokens = sum(charge.num_tokens for charge in result.charges)
        self._shared_span("step", SpanKind.INTERNAL, spans, duration_s, {"tokenmill.step.tokens": num_tokens})

    def flushed(self, num_records: int, duration_s: float, num_attempts: int = 1) -> None:
        """All that was finished before is committed."""
        attributes = self._messaging("flush", "settle")
        self._metrics.operation_duration.record(duration_s, attributes)
        self._metrics.sent.add(num_records, self._messaging("flush", "send"))
        self._metrics.flush_records.record(num_records)
        if num_attempts > 1:
            self._metrics.flush_retries.add(num_attempts - 1)
            self._log.warning("flush repeated", num_attempts=num_attempts, num_records=num_records)
        spans, self._unflushed = self._unflushed, []
        attributes["messaging.batch.message_count"] = num_records
        self._shared_span("flush", SpanKind.CLIENT, spans, duration_s, attributes)

    def unknown_outcome(self) -> None:
        """A flush was lost sight of: whether it was committed cannot be told from here."""
        self._metrics.unknown_outcomes.add(1)
        self._log.warning("flush outcome unknown")

    def fenced(self, num_partitions: int, reason: str) -> None:
        """These partitions are another worker's now; what we held of them is dropped."""
        self._metrics.fenced.add(num_partitions)
        self._log.warning("fenced", num_partitions=num_partitions, reason=reason)

    def assigned(self, places: Sequence[Place], generation: int) -> None:
        """These are all the partitions that we hold."""
        self._metrics.num_partitions = len(places)
        names = [f"{place.topic}/{place.partition}" for place in places]
        self._log.info("partitions assigned", partitions=names, generation=generation)

    def lag(self, lag: Mapping[Place, int]) -> None:
        """So many records of each partition lie ahead of us."""
        self._metrics.lag = lag

    def metered(self, reading: MeterReading) -> None:
        """The meter's reading is committed."""
        self._metrics.reading = reading

    # --------------------------------------------------------------------------------------------------- the worker

    @contextmanager
    def life(self, **facts: str | float) -> Iterator[None]:
        """From the moment when the worker has its settings until it leaves, on purpose or for a failure."""
        self._log.info("worker starting", **facts)
        try:
            yield
        except Fatal as error:
            self._log.error("worker stopped", exit_code=error.exit_code, reason=str(error))
            raise
        self._log.info("worker stopped", exit_code=0)

    def ready(self, **facts: str | float) -> None:
        """The model is loaded and the group joined."""
        self._log.info("worker ready", **facts)

    def noticed(self, notice: str) -> None:
        """The machine's owner says that it is to go."""
        self._log.warning("notice to leave", notice=notice)

    def notice_unreadable(self, reason: str) -> None:
        """Whoever would give notice does not answer as expected."""
        self._log.warning("cannot look for a notice to leave", reason=reason)

    def draining(self, budget_s: float) -> None:
        """The worker was asked to leave."""
        self._log.info("worker draining", budget_s=budget_s, num_running=len(self._running))

    # ----------------------------------------------------------------------------------------------------- the spans

    def _record_span(self, record: Record) -> Span:
        topic, partition = record.place
        return self._tracer.start_span(
            f"process {topic}",
            context=_PROPAGATOR.extract(_trace_carrier(record.headers)),
            kind=SpanKind.CONSUMER,
            attributes={
                **self._messaging("process", "process", topic),
                "messaging.destination.partition.id": str(partition),
                "messaging.kafka.offset": record.offset,
                "messaging.message.body.size": len(record.value or b""),
            },
        )

    def _generation_span(self, parent: Span, attributes: Mapping[str, str], generate: AnyGenerate) -> Span:
        name = f"{attributes['gen_ai.operation.name']} {attributes['gen_ai.request.model']}"
        span = self._tracer.start_span(name, context=trace.set_span_in_context(parent), attributes=attributes)
        if span.is_recording():
            span.set_attributes(_sampling(generate))
            parent.set_attribute("messaging.message.id", generate.custom_id)
            parent.set_attribute("tokenmill.tenant", generate.tenant)
        return span

    def _finish(self, running: _Running, error: str | None = None) -> None:
        duration_s = self._clock() - running.admitted_s
        outcome = {"error.type": error} if error else {}
        self._metrics.request_duration.record(duration_s, {**running.attributes, **outcome})
        self._metrics.process_duration.record(duration_s, self._processing(running.place.topic, error))
        self._end(running.generation, error)
        self._end(running.record, error)
        self._await_flush(running.record)

    def _end(self, span: Span, error: str | None) -> None:
        if error:
            span.set_attribute("error.type", error)
            span.set_status(Status(StatusCode.ERROR))  # without a description: texts may quote what was asked
        span.end()

    def _await_flush(self, span: Span) -> None:
        """The next flush's span links to this one."""
        if span.get_span_context().trace_flags.sampled and len(self._unflushed) < LINKS_MAX:
            self._unflushed.append(span)

    def _shared_span(
        self, name: str, kind: SpanKind, spans: Sequence[Span], duration_s: float, attributes: Mapping[str, Any]
    ) -> None:
        """One span for work that is over and was done for all of these, if any of them is kept."""
        contexts = [span.get_span_context() for span in spans]
        links = [Link(context) for context in contexts if context.trace_flags.sampled][:LINKS_MAX]
        if not links:
            return
        ended_ns = time.time_ns()
        started_ns = ended_ns - int(duration_s * 1e9)
        root = trace.set_span_in_context(trace.INVALID_SPAN)
        self._tracer.start_span(name, root, kind, attributes, links, started_ns).end(ended_ns)

    # ---------------------------------------------------------------------------------------------------- attributes

    def _messaging(self, operation: str, kind: str, topic: str | None = None) -> dict[str, Any]:
        attributes = {
            "messaging.system": "kafka",
            "messaging.operation.name": operation,
            "messaging.operation.type": kind,
            "messaging.consumer.group.name": self._group,
        }
        return attributes if topic is None else {**attributes, "messaging.destination.name": topic}

    def _processing(self, topic: str, error: str | None) -> dict[str, Any]:
        attributes = self._messaging("process", "process", topic)
        return {**attributes, "error.type": error} if error else attributes


def _sampling(generate: AnyGenerate) -> dict[str, Any]:
    body = generate.body
    named = {
        "gen_ai.request.max_tokens": getattr(body, "max_completion_tokens", None) or body.max_tokens,
        "gen_ai.request.temperature": body.temperature,
        "gen_ai.request.top_p": body.top_p,
        "gen_ai.request.top_k": body.top_k or None,
        "gen_ai.request.seed": body.seed,
        "gen_ai.request.choice.count": body.n if body.n > 1 else None,
        "gen_ai.request.stream": body.stream or None,
    }
    return {name: value for name, value in named.items() if value is not None}


def _trace_carrier(headers: Headers) -> dict[str, str]:
    """The W3C's headers, as far as they are ones: what is too long or no ASCII is as good as absent."""
    return {
        name: value.decode("ascii", "ignore")
        for name, value in headers
        if name in ("traceparent", "tracestate") and value and len(value) <= TRACE_HEADER_BYTES_MAX
    }


def _where(record: Record) -> dict[str, str | int]:
    return {"topic": record.place.topic, "partition": record.place.partition, "offset": record.offset}
