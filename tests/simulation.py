"""The real worker on a cluster in memory and a scripted engine, in virtual time: where it may die at every call.

Everything between the broker and the engine is the code that ships. A run is a function of its seed and its fault.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from zlib import crc32

from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.trace import NoOpTracerProvider

from engine.constraint import Constraint
from engine.types import Capacity, Charge, EngineStats, Finished, FinishReason, Request, StepResult, Token, Usage, Work
from schemas.codec import decode_result
from schemas.cost import CostEvent, MeterReading, picodollars
from schemas.requests import Tier
from schemas.results import Completion, Input
from tests.hostile import MODEL
from tests.invariants import violations
from worker.admission import BATCH, REALTIME, Admission
from worker.brokers.base import Broker, Record
from worker.brokers.memory import Crash, Fault, MemoryBroker
from worker.brokers.memory_cluster import MemoryCluster
from worker.config import Limits, Topics
from worker.containment import Gate
from worker.cost import Granularity, Meter
from worker.drain import Drain
from worker.envelope import Envelope
from worker.generations import Engine, Generations
from worker.grammar import Grammars
from worker.intake import Intake
from worker.outbound import Outbound
from worker.price_book import load_price_book
from worker.service import Service
from worker.telemetry import Telemetry
from worker.text import Tokenizer

TOPICS = Topics()
GROUP = "simulated"
CAPACITY = Capacity(cache_tokens=4096, context_max=512, vocab_size=256, eos_token_ids=())
PATIENCE_S = 300.0  # of virtual time: many times what any run takes
PARTITIONS = 2
ATTEMPTS_MAX = 4
FLUSH_S = 0.03
POISON = 255
PRICES = load_price_book()
ALL_TOPICS = (
    TOPICS.requests,
    TOPICS.batch,
    TOPICS.completions,
    TOPICS.costs,
    TOPICS.chunks,
    TOPICS.dead_letters,
)


class SimulatedEngine:
    """A token for each choice at each step. Tokens follow from the prompt, times from the dice.

    A prompt that begins with POISON is the process's death.
    """

    def __init__(
        self, steps: "asyncio.Queue[StepResult | BaseException]", dice: random.Random, die: Callable[[], None]
    ) -> None:
        self.heartbeat_ns = 0
        self._steps = steps
        self._dice = dice
        self._die = die
        self._requests: dict[tuple[int, int], Request] = {}
        self._outputs: dict[tuple[int, int], int] = {}

    def submit(self, request: Request) -> None:
        if request.prompt[0] == POISON:
            self._die()
        for choice in range(request.sampling.num_choices):
            self._requests[request.id, choice] = request
            self._outputs[request.id, choice] = 0

    def cancel(self, request_id: int, choice: int | None = None) -> None:
        for key in [key for key in self._requests if key[0] == request_id and choice in (None, key[1])]:
            del self._requests[key]

    def stats(self) -> EngineStats:
        return EngineStats()

    def stop(self, timeout_s: float | None = None) -> bool:
        self._requests.clear()
        return True

    async def run(self) -> None:
        """Steps for ever, faster or slower."""
        while True:
            await asyncio.sleep(self._dice.uniform(0.001, 0.02) if self._requests else 0.03)
            self._steps.put_nowait(self._step())

    def _step(self) -> StepResult:
        tokens, finished, charges = [], [], []
        for (request_id, choice), request in list(self._requests.items()):
            index = self._outputs[request_id, choice]
            self._outputs[request_id, choice] = index + 1
            if index == 0:
                charges.append(self._charge(request_id, choice, Work.PROMPT, len(request.prompt), None))
            charges.append(self._charge(request_id, choice, Work.OUTPUT, 1, index))
            token = crc32(bytes(str((request.prompt, choice, index)), "ascii")) % CAPACITY.vocab_size
            tokens.append(Token(request=request_id, choice=choice, index=index, token=token))
            if index + 1 == request.sampling.tokens_max:
                del self._requests[request_id, choice]
                usage = Usage(num_prompt=len(request.prompt), num_cached=0, num_output=index + 1)
                reason = FinishReason.LENGTH
                finished.append(Finished(request=request_id, choice=choice, reason=reason, usage=usage))
        return StepResult(idle_ns=self._dice.randrange(10**6), tokens=tokens, finished=finished, charges=charges)

    def _charge(self, request: int, choice: int, work: Work, num_tokens: int, index: int | None) -> Charge:
        ns = self._dice.randrange(10**7)
        return Charge(request=request, choice=choice, work=work, num_tokens=num_tokens, device_ns=ns, index=index)


Compile = Callable[[str], Awaitable[Constraint]]


def compiles_at_once(tokenizer: Tokenizer) -> Compile:
    """As the worker does, but on the event loop: virtual time would not wait for a thread."""
    grammars = Grammars(tokenizer, CAPACITY.vocab_size, tuple(tokenizer.eos_token_ids))

    async def compiled(source: str) -> Constraint:
        return grammars._compile(source)

    return compiled


def service(
    broker: Broker,
    engine: Engine,
    steps: "asyncio.Queue[StepResult | BaseException]",
    drain: Drain,
    tokenizer: Tokenizer,
    life: str,
    *,
    tokens_max: int = 8192,
    granularity: Granularity = "token",
    compile: Compile | None = None,
) -> Service:
    """The worker as it ships, between this broker and this engine. When it admits, it is 1970.

    `life` begins with the worker's name and a #.
    """
    name = life.partition("#")[0]
    meter = Meter(worker=name, life=life, rate=picodollars("0.10"))
    telemetry = Telemetry(NoOpMeterProvider(), NoOpTracerProvider(), worker=name, group=GROUP)
    tiers: dict[str, Tier] = {TOPICS.requests: REALTIME, TOPICS.batch: BATCH}
    admission = Admission(tokens_max=tokens_max, ageing_s=5.0)
    outbound = Outbound(
        envelope=Envelope(TOPICS, GROUP, name, clock=lambda: 0.0),
        tokenizer=tokenizer,
        prices=PRICES,
        granularity=granularity,
        worker=name,
        life=life,
    )
    generations = Generations(
        engine=engine,
        intake=Intake(
            models=[MODEL],
            tokenizer=tokenizer,
            capacity=CAPACITY,
            limits=Limits(),
            price_ceiling=PRICES.ceiling,
            clock=lambda: 0.0,
        ),
        outbound=outbound,
        admission=admission,
        meter=meter,
        telemetry=telemetry,
        tiers=tiers,
        preview=broker.preview,
        compile=compile or compiles_at_once(tokenizer),
    )
    return Service(
        broker=broker,
        engine=engine,
        steps=steps,
        generations=generations,
        gate=Gate(ATTEMPTS_MAX),
        outbound=outbound,
        admission=admission,
        meter=meter,
        telemetry=telemetry,
        drain=drain,
        tiers=tiers,
        flush_interval_s=FLUSH_S,
        life=life,
    )


class SimulatedWorker:
    """One life of one worker. `died` is set however it ends."""

    def __init__(self, cluster: MemoryCluster, name: str, life: str, tokenizer: Tokenizer, fault: Fault | None) -> None:
        self.broker = MemoryBroker(cluster, GROUP, name, fault)
        self.name = name
        self.failure: BaseException | None = None
        self.died = asyncio.Event()
        steps: asyncio.Queue[StepResult | BaseException] = asyncio.Queue()
        self._engine = SimulatedEngine(steps, random.Random(life), self.broker.die)
        self.drain = Drain(budget_s=5.0, clock=asyncio.get_running_loop().time)
        # Whole requests: fewer records, and each is a place to die at.
        self._service = service(self.broker, self._engine, steps, self.drain, tokenizer, life, granularity="request")
        self._tasks = [asyncio.create_task(self._live()), asyncio.create_task(self._engine.run())]

    async def _live(self) -> None:
        try:
            await self._service.run()
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is a violation
            if not _is_crash(error):
                self.failure = error
        finally:
            self._tasks[1].cancel()
            self.died.set()


def _is_crash(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_is_crash(inner) for inner in error.exceptions)
    return isinstance(error, Crash)


class Simulation:
    """A cluster with requests in it, workers that come and go, and what a reader sees at the end."""

    def __init__(self, seed: int, tokenizer: Tokenizer, num_requests: int = 4, num_poisons: int = 0) -> None:
        self.dice = random.Random(seed)
        self.cluster = MemoryCluster(dict.fromkeys(ALL_TOPICS, PARTITIONS))
        self.workers: list[SimulatedWorker] = []
        self._tokenizer = tokenizer
        poisons = self.dice.sample(range(num_requests), num_poisons)
        self._asked = [self._ask(number, is_poison=number in poisons) for number in range(num_requests)]

    def hire(self, name: str, fault: Fault | None = None) -> SimulatedWorker:
        """A worker joins; a name that is taken makes the one before a zombie."""
        life = f"{name}#{len(self.workers)}"
        worker = SimulatedWorker(self.cluster, name, life, self._tokenizer, fault)
        self.workers.append(worker)
        return worker

    async def until_answered(self) -> None:
        """All requests have an answer, or patience ends."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + PATIENCE_S
        while len(self.completions()) < len(self._asked) and loop.time() < end_s:
            await asyncio.sleep(0.05)

    async def dismiss(self) -> None:
        """All workers that live leave on purpose; what dead ones left open times out."""
        for worker in self.workers:
            worker.drain.ask()
        await asyncio.gather(*(worker.died.wait() for worker in self.workers if not worker.broker.is_dead))
        self.cluster.time_out()

    def completions(self) -> list[Completion]:
        return [decode_result(Completion, value(record)) for record in self.cluster.committed(TOPICS.completions)]

    def violations(self) -> Sequence[str]:
        """Everything that is wrong now, a worker's own failure included."""
        costs: list[CostEvent] = []
        readings: list[MeterReading] = []
        for record in self.cluster.committed(TOPICS.costs):
            if dict(record.headers)["ce_type"] == b"tokenmill.meter.v1":
                readings.append(decode_result(MeterReading, value(record)))
            else:
                costs.append(decode_result(CostEvent, value(record)))
        found = violations(self._asked, self.completions(), costs, readings)
        return [*found, *(f"{worker.name} failed: {worker.failure!r}" for worker in self.workers if worker.failure)]

    def _ask(self, number: int, *, is_poison: bool) -> Input:
        tokens, n, first = self.dice.randint(1, 8), self.dice.choice([1, 1, 1, 2]), POISON if is_poison else 1
        body = f'{{"model":"{MODEL}","prompt":[{first},{number}],"max_tokens":{tokens},"n":{n},"ignore_eos":true}}'
        text = f'{{"url":"/v1/completions","custom_id":"r{number}","body":{body}}}'
        if self.dice.random() < 0.1 and not is_poison:
            text = text[:-9]  # a record that cannot be read has an answer too
        record = self.cluster.produce(TOPICS.requests, text.encode(), partition=number % PARTITIONS)
        return Input(topic=record.place.topic, partition=record.place.partition, offset=record.offset)


def value(record: Record) -> bytes:
    assert record.value is not None
    return record.value
