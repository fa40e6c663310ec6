"""One worker's life: load the model, join the group, serve, leave.

Owns how the pieces are put together, and nothing that happens between them: that is `service.py`. The only file of the
worker that knows which engine and which broker it runs on.
"""

import asyncio
import time
import uuid
from pathlib import Path

from engine.build import build
from engine.config import EngineConfig
from engine.core import Core
from engine.errors import EngineMisconfigured, ModelError, RankLost
from engine.thread import EngineThread
from engine.types import StepResult
from schemas.cost import picodollars
from worker.admission import LANES, Admission, Lane
from worker.brokers.kafka import KafkaBroker
from worker.brokers.kafka_client import require_topics
from worker.brokers.kafka_settings import KafkaSettings
from worker.config import Engine, Settings
from worker.containment import Gate
from worker.cost import Meter
from worker.drain import Drain
from worker.envelope import Envelope
from worker.errors import Fatal, Misconfigured
from worker.exporters import open_exporters
from worker.folders import model_folder
from worker.generations import Generations
from worker.grammar import Grammars
from worker.health import Vitals, serve_health
from worker.intake import Intake
from worker.logs import configure_logs
from worker.notice import watching
from worker.outbound import Outbound
from worker.price_book import DEFAULT_BOOK, load_price_book
from worker.service import Service
from worker.telemetry import Telemetry
from worker.text import Tokenizer, load_tokenizer

# Taken on at once, as a multiple of the cache: what runs, and as much again to go on with when sequences end before
# their limit. More would only keep work from other workers.
INTAKE_CACHES = 2

# Torch aborts a process that ends while a thread is in it, and the exit code with it. The engine looks up after each
# step, and one takes a second at the most; if it hangs, it has the abort that is left to it.
ENGINE_STOP_S = 10.0


async def run(settings: Settings, client: KafkaSettings | None = None) -> int:
    """Serves until told to leave; returns the exit code. `client` replaces what the settings say of the brokers."""
    born_ns = time.monotonic_ns()
    configure_logs(settings.log.level, settings.log.format)
    drain = Drain(settings.drain_s)
    drain.listen()
    probe = _Probe()
    health = settings.health
    with open_exporters(settings.worker) as exporters:
        telemetry = Telemetry(exporters.meters, exporters.tracers, worker=settings.worker, group=settings.group)
        with telemetry.life(model=settings.model, brokers=settings.kafka.brokers):
            async with (
                serve_health(probe, exporters.exposition, host=health.host, port=health.port) as port,
                watching(settings.notice, drain, telemetry),
            ):
                folder = model_folder(settings.model)
                tokenizer = load_tokenizer(folder)
                if settings.engine.draft_model:
                    tokenizer.check_same(load_tokenizer(model_folder(settings.engine.draft_model)), "the draft model")
                core = await asyncio.to_thread(_build, settings.engine, folder)
                steps: asyncio.Queue[StepResult | BaseException] = asyncio.Queue()
                engine = _engine(core, steps)
                client = client or settings.kafka.client(worker=settings.worker, group=settings.group)
                await require_topics(client, settings.topics.written, "WRITE")  # the others the broker looks for
                broker = KafkaBroker(client, settings.topics.transacted)
                service = assemble(settings, broker, engine, steps, tokenizer, telemetry, drain, born_ns)
                engine.start()
                probe.service = service
                telemetry.ready(health_port=port, cache_tokens=core.capacity.cache_tokens)
                try:
                    await service.run()
                finally:
                    engine.stop(ENGINE_STOP_S)
    return 0


class _Probe:
    """What the health endpoints look at: nothing yet while the model loads, the service from then on."""

    service: Service | None = None

    def vitals(self) -> Vitals:
        if self.service:
            return self.service.vitals()
        return Vitals(engine_silence_s=None, broker_silence_s=None, is_assigned=False, is_draining=False)


def _build(settings: Engine, folder: Path) -> Core:
    try:
        return build(
            EngineConfig(
                device=settings.device,
                weights=settings.weights,
                cache=settings.cache,
                threads=settings.threads,
                ranks=settings.ranks,
                experts=settings.experts,
                block_size=settings.block_size,
                cache_tokens=settings.cache_tokens,
                cache_memory_share=settings.cache_memory_share,
                context_max=settings.context_max,
                tokens_per_step_max=settings.tokens_per_step_max,
                sequences_max=settings.sequences_max,
                drafts_max=settings.drafts_max,
                overlap=settings.overlap,
                graphs=settings.graphs,
                draft_experts=settings.draft_experts,
                draft_heads=settings.draft_heads,
                draft_model=model_folder(settings.draft_model) if settings.draft_model else None,
                draft_weights=settings.draft_weights,
            ),
            folder,
        )
    except (ModelError, EngineMisconfigured) as error:
        raise Misconfigured(str(error)) from error
    except RankLost as error:
        raise Fatal(str(error)) from error


def _engine(core: Core, steps: "asyncio.Queue[StepResult | BaseException]") -> EngineThread:
    """The engine on its thread, with `steps` on this event loop's side of it."""
    loop = asyncio.get_running_loop()

    def hand_over(result: StepResult | BaseException) -> None:
        loop.call_soon_threadsafe(steps.put_nowait, result)

    return EngineThread(core, hand_over, hand_over)


def assemble(
    settings: Settings,
    broker: KafkaBroker,
    engine: EngineThread,
    steps: "asyncio.Queue[StepResult | BaseException]",
    tokenizer: Tokenizer,
    telemetry: Telemetry,
    drain: Drain,
    born_ns: int,
) -> Service:
    """The service between this broker and this engine; `born_ns` is when the worker's time began to be metered."""
    prices = load_price_book(settings.bill.price_book or DEFAULT_BOOK)
    worker, life = settings.worker, uuid.uuid4().hex
    meter = Meter(worker=worker, life=life, rate=picodollars(settings.bill.device_rate))
    meter.idle(time.monotonic_ns() - born_ns, "loading")
    lanes: dict[str, Lane] = dict(zip(settings.topics.consumed, LANES, strict=True))
    admission = Admission(INTAKE_CACHES * engine.capacity.cache_tokens, settings.ageing_s)
    outbound = Outbound(
        envelope=Envelope(settings.topics, settings.group, worker),
        tokenizer=tokenizer,
        prices=prices,
        granularity=settings.bill.events,
        worker=worker,
        life=life,
    )
    intake = Intake(
        models=[model_folder(settings.model).name],
        tokenizer=tokenizer,
        capacity=engine.capacity,
        limits=settings.limits,
        price_ceiling=prices.ceiling,
    )
    generations = Generations(
        engine=engine,
        intake=intake,
        outbound=outbound,
        admission=admission,
        meter=meter,
        telemetry=telemetry,
        lanes=lanes,
        preview=broker.preview,
        compile=Grammars(tokenizer, engine.capacity.vocab_size, intake.eos_token_ids).compile,
        handover_tokens_min=settings.handover_tokens_min,
    )
    return Service(
        broker=broker,
        engine=engine,
        steps=steps,
        generations=generations,
        gate=Gate(settings.attempts_max),
        outbound=outbound,
        admission=admission,
        meter=meter,
        telemetry=telemetry,
        drain=drain,
        lanes=lanes,
        flush_interval_s=settings.flush_interval_ms / 1000,
        life=life,
    )
