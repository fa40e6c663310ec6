"""What the worker costs the engine: the same requests through the engine alone, and through the whole service on Kafka.

    python -m benchmarks.service [--model smollm2-moe] [--rounds 5] [--threads 1] [--json] [--profile]

Both sides use one engine in one process, in turn: alone it is stepped in a loop over the requests' token ids, in the
service it runs on its thread beside the event loop, from records that wait in their topic to the last commit. Each
round has a tenant of its own on each side, so neither finds the other's prefixes in the cache. The client that sends
the requests is done before the clock starts, and nobody reads the results meanwhile; the broker runs on this machine
and takes its share of the processor.

Where the difference goes: a step's time is the engine's own meter (from the end of one to the end of the next, waits
for Python's lock included, idle time not). Processor time is `time.thread_time` of the two threads, and
`time.process_time` for all: what is neither's is the tensor threads'. `--profile` adds the event loop's functions, by
cProfile, from one more run that counts for nothing else.
"""

import argparse
import asyncio
import cProfile
import json
import logging
import pstats
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from engine.build import build
from engine.config import EngineConfig
from engine.core import Core
from engine.thread import EngineThread
from engine.types import Request, StepResult
from worker.brokers.base import Outgoing, Place, Record
from worker.brokers.kafka import KafkaBroker
from worker.brokers.kafka_client import TopicSpec, create_topics
from worker.brokers.kafka_settings import KafkaSettings
from worker.commands.answers import send_all
from worker.config import Health, Kafka, Limits, Settings, Topics
from worker.drain import Drain
from worker.errors import Misconfigured
from worker.exporters import open_exporters
from worker.folders import model_folder
from worker.intake import Intake
from worker.local_broker import Cluster
from worker.logs import configure_logs
from worker.start import assemble
from worker.telemetry import Telemetry
from worker.text import Tokenizer, load_tokenizer

DEMO_MODEL = "smollm2-moe"
PARTITIONS = 4  # as in the demo
CACHE_TOKENS = 8192  # twice what the larger load takes
PROFILE_LINES = 15
PATIENCE_S = 300.0  # of one run


@dataclass(frozen=True)
class Load:
    """Requests of one kind, all there at once."""

    num_requests: int
    tokens_max: int

    def __str__(self) -> str:
        return f"{self.num_requests} x {self.tokens_max} tokens"

    def values(self, tenant: str) -> list[bytes]:
        """The requests as they are sent."""
        return [json.dumps(self._request(number, tenant)).encode() for number in range(self.num_requests)]

    def _request(self, number: int, tenant: str) -> Mapping[str, object]:
        prompt = f"Question {number}: what does a miller do all day?"
        body = {"model": MODEL, "prompt": prompt, "max_tokens": self.tokens_max, "ignore_eos": True, "temperature": 0}
        return {"url": "/v1/completions", "custom_id": f"r{number}", "tenant": tenant, "body": body}


MODEL = "benchmark"  # what the requests call the model, whichever it is
LOADS = (Load(16, 64), Load(64, 8))  # a full batch that decodes; much intake and many answers for little work


@dataclass(frozen=True, kw_only=True)
class Run:
    """One pass of a load. Seconds."""

    num_tokens: int  # of output
    wall_s: float
    steps_s: float  # of it, within steps
    tail_s: float  # of it, after the last step
    engine_cpu_s: float
    loop_cpu_s: float
    other_cpu_s: float

    @property
    def tokens_per_s(self) -> float:
        """The figure that is compared."""
        return self.num_tokens / self.wall_s


@dataclass(frozen=True)
class Clock:
    """All clocks at one moment. `engine_cpu_s` is read by the engine's own thread, at the end of its last step."""

    engine_cpu_s: float
    wall_s: float = field(default_factory=time.perf_counter)
    thread_cpu_s: float = field(default_factory=time.thread_time)
    process_cpu_s: float = field(default_factory=time.process_time)


@dataclass
class Steps:
    """What the engine delivered, with its thread's clocks. Filled by the engine's thread, read when it rests."""

    results: list[tuple[StepResult, float, float]] = field(default_factory=list)

    def add(self, result: StepResult) -> None:
        """To be called on the engine's thread."""
        self.results.append((result, time.perf_counter(), time.thread_time()))

    @property
    def cpu_s(self) -> float:
        """The engine thread's processor time up to its last step."""
        return self.results[-1][2] if self.results else 0.0

    def run(self, began: Clock, ended: Clock, *, has_loop: bool) -> Run:
        """The figures between two moments, all steps with work being within."""
        worked = [(result, at_s) for result, at_s, _ in self.results if result.charges]
        engine_cpu_s = ended.engine_cpu_s - began.engine_cpu_s
        loop_cpu_s = ended.thread_cpu_s - began.thread_cpu_s if has_loop else 0.0
        process_cpu_s = ended.process_cpu_s - began.process_cpu_s
        return Run(
            num_tokens=sum(len(result.tokens) for result, _ in worked),
            wall_s=ended.wall_s - began.wall_s,
            steps_s=sum(charge.device_ns for result, _ in worked for charge in result.charges) / 1e9,
            tail_s=ended.wall_s - worked[-1][1],
            engine_cpu_s=engine_cpu_s,
            loop_cpu_s=loop_cpu_s,
            other_cpu_s=process_cpu_s - engine_cpu_s - loop_cpu_s,
        )


# ----------------------------------------------------------------------------------------------------------- the engine


def alone(core: Core, requests: Sequence[Request]) -> Run:
    """The requests through the engine and nothing else, on the calling thread."""
    steps = Steps()
    began = Clock(time.thread_time())
    core.meter.start()
    for request in requests:
        core.submit(request)
    while core.has_work:
        steps.add(core.step())
    return steps.run(began, Clock(time.thread_time()), has_loop=False)


def admitted(values: Sequence[bytes], core: Core, tokenizer: Tokenizer) -> list[Request]:
    """What the service would ask the engine."""
    intake = Intake(
        models=[MODEL], tokenizer=tokenizer, capacity=core.capacity, limits=Limits(), price_ceiling=lambda *_: 0
    )
    records = [
        Record(place=Place("", 0), offset=offset, key=None, value=value, headers=(), timestamp_ms=0)
        for offset, value in enumerate(values)
    ]
    return [intake.admit(record, "realtime", record.offset).request for record in records]


# ---------------------------------------------------------------------------------------------------------- the service


class Watched(KafkaBroker):
    """The broker's port; notes when the first record came, and when the last answer was committed."""

    def __init__(self, client: KafkaSettings, topics: Topics, num_answers: int, steps: Steps) -> None:
        super().__init__(client, topics.transacted)
        self.began: Clock | None = None
        self.ended: asyncio.Future[Clock] = asyncio.get_running_loop().create_future()
        self._answers = topics.completions
        self._num_left = num_answers
        self._steps = steps

    async def poll(self, places: Collection[Place], num_max: int, timeout_s: float) -> list[Record]:
        """As the port's; the clock starts with the first record."""
        records = await super().poll(places, num_max, timeout_s)
        if records and self.began is None:
            self.began = Clock(self._steps.cpu_s)
        return records

    async def send(self, record: Outgoing) -> Awaitable[None]:
        """As the port's; answers are counted."""
        self._num_left -= record.topic == self._answers
        return await super().send(record)

    async def commit(self) -> None:
        """As the port's; the clock stops with the last answer."""
        await super().commit()
        if self._num_left == 0 and not self.ended.done():
            self.ended.set_result(Clock(self._steps.cpu_s))


async def served(
    core: Core, settings: Settings, tokenizer: Tokenizer, values: Sequence[bytes], profile: cProfile.Profile | None
) -> Run:
    """The same through a worker, on topics of its own where the requests wait."""
    client = settings.kafka.client(worker=settings.worker, group=settings.group)
    topics = settings.topics
    await create_topics(client, [TopicSpec(name=name, partitions=PARTITIONS) for name in topics.by_setting.values()])
    await send_all(
        client, [Outgoing(topic=topics.requests, key=b"%d" % key, value=value) for key, value in enumerate(values)]
    )
    loop, queue, steps = asyncio.get_running_loop(), asyncio.Queue[StepResult | BaseException](), Steps()

    def hand_over(result: StepResult | BaseException) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, result)

    def deliver(result: StepResult) -> None:
        steps.add(result)
        hand_over(result)

    engine = EngineThread(core, deliver, hand_over)
    broker, drain = Watched(client, topics, len(values), steps), Drain(budget_s=10.0)
    with open_exporters(settings.worker) as exporters:
        telemetry = Telemetry(exporters.meters, exporters.tracers, worker=settings.worker, group=settings.group)
        service = assemble(settings, broker, engine, queue, tokenizer, telemetry, drain, time.monotonic_ns())
        engine.start()
        if profile:
            profile.enable()
        running = asyncio.create_task(service.run())
        await asyncio.wait((running, broker.ended), return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_S)
        if profile:
            profile.disable()
        drain.ask()
        await running
    assert broker.began
    return steps.run(broker.began, broker.ended.result(), has_loop=True)


# ----------------------------------------------------------------------------------------------------------- the report


class Bench:
    """One engine and one broker, and the two ways through them."""

    def __init__(self, folder: Path, brokers: str, threads: int) -> None:
        # Without drafts: both ways take the same steps.
        config = EngineConfig(device="cpu", threads=threads, cache_tokens=CACHE_TOKENS, drafts_max=0)
        self.core = build(config, folder)
        self.tokenizer = load_tokenizer(folder)
        self._folder = folder
        self._kafka = Kafka(brokers=brokers)

    def rounds(self, load: Load, num: int) -> Iterator[tuple[Run, Run]]:
        """The engine alone and the service, in turn, after one of each to warm up."""
        for number in range(num + 1):
            pair = self.alone(load), self.served(load)
            if pair[0].num_tokens != pair[1].num_tokens:
                raise SystemExit(f"{pair[0].num_tokens} tokens alone, {pair[1].num_tokens} in the service")
            if number:
                yield pair

    def alone(self, load: Load) -> Run:
        """A run of the load without the service."""
        requests = admitted(load.values(uuid.uuid4().hex), self.core, self.tokenizer)
        # Torch keeps tensor threads for each thread that calls it, and where they outnumber the cores they no longer
        # wait by spinning: 5 % slower. So that both sides have the same, a thread of its own, as in the service.
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(alone, self.core, requests).result()

    def served(self, load: Load, profile: cProfile.Profile | None = None) -> Run:
        """A run of the load with it."""
        name = f"bench_{uuid.uuid4().hex[:12]}"
        settings = Settings(
            kafka=self._kafka,
            topics=Topics(prefix=name),
            group=name,
            model=str(self._folder),
            worker=name,
            health=Health(port=0),
        )
        return asyncio.run(served(self.core, settings, self.tokenizer, load.values(name), profile))


def report(load: Load, rounds: Sequence[tuple[Run, Run]]) -> dict[str, object]:
    """Medians over the rounds; the ratio is taken within each round, since machines drift."""
    ratios = [with_service.tokens_per_s / engine.tokens_per_s for engine, with_service in rounds]
    return {
        "load": str(load),
        "ratio": median(ratios),
        "ratios": ratios,
        "alone_tokens_per_s": median(engine.tokens_per_s for engine, _ in rounds),
        "service_tokens_per_s": median(with_service.tokens_per_s for _, with_service in rounds),
        "us_per_token": {
            "alone": _us_per_token([engine for engine, _ in rounds]),
            "service": _us_per_token([with_service for _, with_service in rounds]),
        },
        "runs": [[asdict(run) for run in pair] for pair in rounds],
    }


def _us_per_token(runs: Sequence[Run]) -> dict[str, float]:
    figures = ("wall_s", "steps_s", "tail_s", "engine_cpu_s", "loop_cpu_s", "other_cpu_s")
    return {name[:-2]: median(getattr(run, name) * 1e6 / run.num_tokens for run in runs) for name in figures}


def show(figures: Mapping[str, object]) -> None:
    """The report as lines."""
    per_token = figures["us_per_token"]
    assert isinstance(per_token, dict)
    alone, service = per_token["alone"], per_token["service"]
    print(f"{figures['load']}: {figures['ratio']:.3f} of the engine's tokens/s", end="")
    print(f" ({figures['service_tokens_per_s']:.0f} of {figures['alone_tokens_per_s']:.0f})", end="; by round ")
    print(*(f"{ratio:.3f}" for ratio in figures["ratios"]))  # type: ignore[attr-defined]
    print(f"  {'us per output token':34} {'alone':>8} {'service':>8}")
    for name, what in _LINES.items():
        print(f"  {what:34} {alone[name]:8.0f} {service[name]:8.0f}")
    sys.stdout.flush()


_LINES = {
    "wall": "wall clock",
    "steps": "  within steps",
    "tail": "  after the last step",
    "engine_cpu": "processor: the engine's thread",
    "loop_cpu": "processor: the event loop",
    "other_cpu": "processor: all other threads",
}


def main() -> None:
    """Measures all loads and prints what came out."""
    parser = argparse.ArgumentParser(description="Measure the service's overhead over the engine alone.")
    parser.add_argument("--model", help="a fetched model's name or a folder; default: the demo's, else a tiny one")
    parser.add_argument("--brokers", help="a Kafka that runs; default: one of our own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of tensor work; 0: all cores")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--profile", action="store_true", help="also list where the event loop spends its time")
    given = parser.parse_args()
    configure_logs("error", "text")
    logging.disable(logging.ERROR)  # of the client, to which topics made a moment ago are news
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tokenmill-bench-")))
        folder = _linked(_folder(given.model, scratch), scratch)
        brokers = given.brokers or stack.enter_context(Cluster(scratch / "kafka")).brokers
        bench = Bench(folder, brokers, given.threads)
        reports = []
        for load in LOADS:
            reports.append(report(load, list(bench.rounds(load, given.rounds))))
            if not given.json:
                show(reports[-1])
            if given.profile:
                profile = cProfile.Profile()
                bench.served(load, profile)
                pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(PROFILE_LINES)
    if given.json:
        print(json.dumps({"model": given.model or DEMO_MODEL, "threads": given.threads, "loads": reports}))


def _folder(model: str | None, scratch: Path) -> Path:
    if model:
        return model_folder(model)
    try:
        return model_folder(DEMO_MODEL)
    except Misconfigured:
        from tests.tiny_models import tiny_served  # brings transformers

        return tiny_served(scratch)


def _linked(folder: Path, scratch: Path) -> Path:
    """The same folder under the name that the requests use."""
    link = scratch / MODEL
    link.symlink_to(folder)
    return link


if __name__ == "__main__":
    main()
