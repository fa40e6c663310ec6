"""The metrics: their names, units and buckets, and what is read when somebody looks.

Owns nothing but the instruments; `worker/telemetry.py` is their only user. Names follow OpenTelemetry's conventions for
generative AI and for messaging where they have one, and begin with `tokenmill.` where they have none. Prometheus shows
them with underscores, units and `_total`; `tests/test_telemetry.py` has the list. No label names a tenant or a request:
what they used is in their cost events, and a time series for each would never end.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from opentelemetry.metrics import CallbackOptions, Histogram, Meter, Observation

from engine.types import EngineStats
from schemas.cost import MeterReading, picodollars
from worker.brokers.base import Place

# Bucket bounds as the conventions ask for them, in seconds.
REQUEST_S = tuple(0.01 * 2**i for i in range(14))  # 0.01 to 81.92
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
MESSAGING_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
FLUSH_RECORDS = tuple(4.0**i for i in range(9))  # 1 to 65,536: a flush of long answers has an event for each token


class Tally:
    """A counter that is kept here and looked up on demand: the SDK's own takes ten times as long for each addition."""

    def __init__(self, meter: Meter, name: str, unit: str, description: str) -> None:
        self._sums: dict[tuple[tuple[str, str], ...], int] = {}
        meter.create_observable_counter(name, [self._observe], unit, description)

    def add(self, amount: int, attributes: Mapping[str, str] = MappingProxyType({})) -> None:
        """So much more has happened. Few attributes with few values: each combination is kept for good."""
        key = tuple(attributes.items())
        self._sums[key] = self._sums.get(key, 0) + amount

    def _observe(self, _: CallbackOptions) -> Iterable[Observation]:
        for key, amount in list(self._sums.items()):  # a copy: the push to a collector looks from a thread of its own
            yield Observation(amount, dict(key))


class Instruments:
    """What is counted as it happens (the instruments), and what is looked up on demand (the fields)."""

    def __init__(self, meter: Meter) -> None:
        self.stats = EngineStats()
        self.reading: MeterReading | None = None
        self.lag: Mapping[Place, int] = {}
        self.num_partitions = 0
        self._count(meter)
        self._observe(meter)

    def _count(self, meter: Meter) -> None:
        def histogram(name: str, unit: str, bounds: Sequence[float], description: str) -> Histogram:
            return meter.create_histogram(name, unit, description, explicit_bucket_boundaries_advisory=bounds)

        answer, flush = "From admission to the answer", "From begin to the commit's acknowledgement"
        self.request_duration = histogram("gen_ai.server.request.duration", "s", REQUEST_S, answer)
        self.time_to_first_token = histogram("gen_ai.server.time_to_first_token", "s", FIRST_TOKEN_S, "From admission")
        self.time_per_output_token = histogram("gen_ai.server.time_per_output_token", "s", PER_TOKEN_S, "Of later ones")
        self.process_duration = histogram("messaging.process.duration", "s", MESSAGING_S, answer)
        self.operation_duration = histogram("messaging.client.operation.duration", "s", MESSAGING_S, flush)
        self.flush_records = histogram("tokenmill.flush.records", "{record}", FLUSH_RECORDS, "In one flush")
        self.usage = tuple(
            Tally(meter, f"gen_ai.client.inference.usage.{kind}", "{token}", "Billed")
            for kind in ("input_tokens", "cache_read.input_tokens", "output_tokens")
        )
        self.consumed = Tally(meter, "messaging.client.consumed.messages", "{message}", "Records polled")
        self.sent = Tally(meter, "messaging.client.sent.messages", "{message}", "Records committed")
        self.flush_retries = Tally(meter, "tokenmill.flush.retries", "{attempt}", "Attempts after the first")
        self.unknown_outcomes = Tally(meter, "tokenmill.flush.unknown_outcomes", "{flush}", "Lost sight of")
        self.fenced = Tally(meter, "tokenmill.partitions.fenced", "{partition}", "Lost to another worker")
        self.handed_over = Tally(
            meter, "tokenmill.requests.handed_over", "{request}", "Left half done to another worker"
        )
        self.resumed = Tally(meter, "tokenmill.requests.resumed", "{request}", "Gone on with where another worker left")
        for rare in (self.flush_retries, self.unknown_outcomes, self.fenced, self.handed_over, self.resumed):
            rare.add(0)  # there from the start, so that the first one shows as a rise

    def _observe(self, meter: Meter) -> None:
        """What costs nothing until somebody looks."""
        for name, unit, twin, read in _GAUGES:
            meter.create_observable_gauge(name, [self._of_engine(read)], unit, f"vLLM: {twin}")
        for name, unit, twin, read in _COUNTERS:
            meter.create_observable_counter(name, [self._of_engine(read)], unit, f"vLLM: {twin}")
        meter.create_observable_gauge("tokenmill.partitions.held", [self._partitions], "{partition}", "Ours to answer")
        meter.create_observable_gauge("tokenmill.lag", [self._lags], "{record}", "Records ahead of us")
        meter.create_observable_counter("tokenmill.cost", [self._costs], "picodollars", "Of device time, by its fate")
        meter.create_observable_gauge("tokenmill.cost.held", [self._held], "picodollars", "Of what is not yet answered")

    def _of_engine(self, read: Callable[[EngineStats], float]) -> Callable[[CallbackOptions], Iterable[Observation]]:
        return lambda _: (Observation(read(self.stats)),)

    def _partitions(self, _: CallbackOptions) -> Iterable[Observation]:
        yield Observation(self.num_partitions)

    def _lags(self, _: CallbackOptions) -> Iterable[Observation]:
        for (topic, partition), lag in self.lag.items():
            place = {"messaging.destination.name": topic, "messaging.destination.partition.id": str(partition)}
            yield Observation(lag, place)

    def _costs(self, _: CallbackOptions) -> Iterable[Observation]:
        if self.reading is None:
            return
        yield Observation(picodollars(self.reading.charged), {"tokenmill.fate": "charged"})
        for fate, amounts in (("wasted", self.reading.wasted), ("idle", self.reading.idle)):
            for reason, amount in amounts.items():
                yield Observation(picodollars(amount), {"tokenmill.fate": fate, "tokenmill.reason": reason})

    def _held(self, _: CallbackOptions) -> Iterable[Observation]:
        if self.reading is not None:
            yield Observation(picodollars(self.reading.held))


def _share_used(engine: EngineStats) -> float:
    return engine.blocks_used / engine.blocks_total if engine.blocks_total else 0.0


# Name, unit, the twin in vLLM (without `vllm:`, so that its dashboards can be carried over), where it is read.
_Row = tuple[str, str, str, Callable[[EngineStats], float]]
_GAUGES: tuple[_Row, ...] = (
    ("tokenmill.requests.running", "{sequence}", "num_requests_running", lambda engine: engine.num_running),
    ("tokenmill.requests.waiting", "{sequence}", "num_requests_waiting", lambda engine: engine.num_waiting),
    ("tokenmill.kv_cache.usage.ratio", "1", "kv_cache_usage_perc", _share_used),
)
_COUNTERS: tuple[_Row, ...] = (
    ("tokenmill.steps", "{step}", "iteration_tokens_total_count", lambda engine: engine.num_steps),
    ("tokenmill.preemptions", "{preemption}", "num_preemptions_total", lambda engine: engine.num_preemptions),
    ("tokenmill.spec.draft_tokens", "{token}", "spec_decode_num_draft_tokens_total", lambda engine: engine.num_drafted),
    (
        "tokenmill.spec.accepted_tokens",
        "{token}",
        "spec_decode_num_accepted_tokens_total",
        lambda engine: engine.num_accepted,
    ),
    ("tokenmill.prompt.tokens", "{token}", "prefix_cache_queries_total", lambda engine: engine.prompt_tokens),
    ("tokenmill.prompt.cached_tokens", "{token}", "prefix_cache_hits_total", lambda engine: engine.prefix_hit_tokens),
)
