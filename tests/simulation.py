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
from schemas.codec import decode_handoff, decode_result, place_id
from schemas.cost import CostEvent, MeterReading, picodollars
from schemas.handoff import Handoff
from schemas.results import Completion, Input, TextResult
from tests.hostile import MODEL
from tests.invariants import violations
from worker.admission import LANES, Admission, Lane
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
CAPACITY = Capacity(cache_tokens=4096, context_max=512, vocab_size=400, eos_token_ids=())
PATIENCE_S = 300.0  # of virtual time: many times what any run takes
PARTITIONS = 2
ATTEMPTS_MAX = 4
FLUSH_S = 0.03
POISON = 255
PRICES = load_price_book()
ALL_TOPICS = tuple(TOPICS.by_setting.values())
HANDOVER_TOKENS_MIN = 2


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
        self._is_stopped = False
        self._requests: dict[tuple[int, int], Request] = {}
        self._outputs: dict[tuple[int, int], int] = {}

    def submit(self, request: Request) -> None:
        if request.prompt[0] == POISON:
            self._die()
        for choice in range(request.sampling.num_choices):
            if request.progress and request.progress[choice].is_over:
                continue
            self._requests[request.id, choice] = request
            self._outputs[request.id, choice] = len(request.progress[choice].tokens) if request.progress else 0

    def cancel(self, request_id: int, choice: int | None = None) -> None:
        for key in [key for key in self._requests if key[0] == request_id and choice in (None, key[1])]:
            del self._requests[key]

    def stats(self) -> EngineStats:
        return EngineStats()

    def stop(self, timeout_s: float | None = None) -> bool:
        finished = [self._end(key, FinishReason.INTERRUPTED) for key in list(self._requests)]
        self._is_stopped = True
        self._steps.put_nowait(StepResult(idle_ns=0, tokens=[], finished=finished, charges=[]))
        return True

    async def run(self) -> None:
        """Steps until it is stopped, faster or slower."""
        while not self._is_stopped:
            await asyncio.sleep(self._dice.uniform(0.001, 0.02) if self._requests else 0.03)
            if not self._is_stopped:
                self._steps.put_nowait(self._step())

    def _step(self) -> StepResult:
        tokens, finished, charges = [], [], []
        for (request_id, choice), request in list(self._requests.items()):
            index = self._outputs[request_id, choice]
            self._outputs[request_id, choice] = index + 1
            if index == 0:
                charges.append(self._charge(request_id, choice, Work.PROMPT, len(request.prompt), None))
            elif request.progress and index == len(request.progress[choice].tokens):
                charges.append(self._charge(request_id, choice, Work.RECOMPUTED, len(request.prompt) + index - 1, None))
            charges.append(self._charge(request_id, choice, Work.OUTPUT, 1, index))
            tokens.append(
                Token(request=request_id, choice=choice, index=index, token=token_at(request.prompt, choice, index))
            )
            if index + 1 == request.sampling.tokens_max:
                finished.append(self._end((request_id, choice), FinishReason.LENGTH))
        return StepResult(idle_ns=self._dice.randrange(10**6), tokens=tokens, finished=finished, charges=charges)

    def _end(self, key: tuple[int, int], reason: FinishReason) -> Finished:
        request = self._requests.pop(key)
        usage = Usage(num_prompt=len(request.prompt), num_cached=0, num_output=self._outputs[key])
        return Finished(request=key[0], choice=key[1], reason=reason, usage=usage)

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


def token_at(prompt: tuple[int, ...], choice: int, index: int) -> int:
    """What a choice says there, whoever makes it."""
    return crc32(bytes(str((prompt, choice, index)), "ascii")) % CAPACITY.vocab_size


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
    lanes: dict[str, Lane] = dict(zip(TOPICS.consumed, LANES, strict=True))
    admission = Admission(tokens_max=tokens_max, ageing_s=5.0)
    outbound = Outbound(
        envelope=Envelope(TOPICS, GROUP, name, clock=lambda: 0.0),
        tokenizer=tokenizer,
        prices=PRICES,
        granularity=granularity,
        worker=name,
        life=life,
        clock=lambda: 0.0,
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
        lanes=lanes,
        preview=broker.preview,
        compile=compile or compiles_at_once(tokenizer),
        handover_tokens_min=HANDOVER_TOKENS_MIN,
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
        lanes=lanes,
        flush_interval_s=FLUSH_S,
        life=life,
    )


class SimulatedWorker:
    """One life of one worker. `died` is set however it ends."""

    def __init__(
        self,
        cluster: MemoryCluster,
        name: str,
        life: str,
        tokenizer: Tokenizer,
        fault: Fault | None,
        granularity: Granularity,
        budget_s: float,
    ) -> None:
        self.broker = MemoryBroker(cluster, GROUP, name, fault)
        self.name = name
        self.failure: BaseException | None = None
        self.died = asyncio.Event()
        steps: asyncio.Queue[StepResult | BaseException] = asyncio.Queue()
        self._engine = SimulatedEngine(steps, random.Random(life), self.broker.die)
        self.drain = Drain(budget_s, clock=asyncio.get_running_loop().time)
        self._service = service(self.broker, self._engine, steps, self.drain, tokenizer, life, granularity=granularity)
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

    def __init__(
        self,
        seed: int,
        tokenizer: Tokenizer,
        num_requests: int = 4,
        num_poisons: int = 0,
        *,
        tokens_max: int = 8,
        granularity: Granularity = "request",
    ) -> None:
        """By default cost events are whole requests': fewer records, and each is a place to die at."""
        self.dice = random.Random(seed)
        self.cluster = MemoryCluster(dict.fromkeys(ALL_TOPICS, PARTITIONS))
        self.workers: list[SimulatedWorker] = []
        self._tokenizer = tokenizer
        self._tokens_max = tokens_max
        self._granularity: Granularity = granularity
        self._says: dict[str, list[str]] = {}  # what each choice of each request must say
        poisons = self.dice.sample(range(num_requests), num_poisons)
        self._asked = [self._ask(number, is_poison=number in poisons) for number in range(num_requests)]

    def hire(self, name: str, fault: Fault | None = None, budget_s: float = 5.0) -> SimulatedWorker:
        """A worker joins; a name that is taken makes the one before a zombie. `budget_s`: of its leaving."""
        life = f"{name}#{len(self.workers)}"
        worker = SimulatedWorker(self.cluster, name, life, self._tokenizer, fault, self._granularity, budget_s)
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

    def handoffs(self) -> list[Handoff]:
        return [decode_handoff(record.value, record.headers) for record in self.cluster.committed(TOPICS.handoff)]

    def violations(self) -> Sequence[str]:
        """Everything that is wrong now, a worker's own failure included."""
        costs: list[CostEvent] = []
        readings: list[MeterReading] = []
        for record in self.cluster.committed(TOPICS.costs):
            if dict(record.headers)["ce_type"] == b"tokenmill.meter.v1":
                readings.append(decode_result(MeterReading, value(record)))
            else:
                costs.append(decode_result(CostEvent, value(record)))
        found = violations(self._asked, self.completions(), costs, readings, self.handoffs())
        wrong = (one for one in self.completions() if one.response and texts_of(one) != self._says[one.id])
        return [
            *found,
            *(f"{one.id} says {texts_of(one)}, and not {self._says[one.id]}" for one in wrong),
            *(f"{worker.name} failed: {worker.failure!r}" for worker in self.workers if worker.failure),
        ]

    def _ask(self, number: int, *, is_poison: bool) -> Input:
        tokens, n, first = (
            self.dice.randint(1, self._tokens_max),
            self.dice.choice([1, 1, 1, 2]),
            POISON if is_poison else 1,
        )
        body = f'{{"model":"{MODEL}","prompt":[{first},{number}],"max_tokens":{tokens},"n":{n},"ignore_eos":true}}'
        text = f'{{"url":"/v1/completions","custom_id":"r{number}","body":{body}}}'
        if self.dice.random() < 0.1 and not is_poison:
            text = text[:-9]  # a record that cannot be read has an answer too
        record = self.cluster.produce(TOPICS.requests, text.encode(), partition=number % PARTITIONS)
        asked = Input(topic=record.place.topic, partition=record.place.partition, offset=record.offset)
        prompt = (first, number)
        self._says[place_id(asked)] = [
            self._tokenizer.decode([token_at(prompt, choice, index) for index in range(tokens)]) for choice in range(n)
        ]
        return asked


def texts_of(completion: Completion) -> list[str]:
    assert completion.response
    assert isinstance(completion.response.body, TextResult)
    return [choice.text for choice in completion.response.body.choices]


def value(record: Record) -> bytes:
    assert record.value is not None
    return record.value
