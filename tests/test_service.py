"""The service between a broker in memory and an engine that says what the test says, in virtual time."""

import asyncio
import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from msgspec import structs

from engine.constraint import Constraint, Matcher
from engine.types import (
    Charge,
    EngineStats,
    Finished,
    FinishReason,
    Logprob,
    Request,
    Scored,
    StepResult,
    Token,
    Usage,
    Work,
)
from schemas.codec import decode_handoff, decode_result, encode
from schemas.cost import CostEvent, MeterReading, picodollars
from schemas.handoff import Handoff
from schemas.results import Chunk, Completion, ErrorCode, TextResult
from tests.hostile import ADMITTED, MODEL, REFUSED, fuzz
from tests.invariants import violations
from tests.simulation import ALL_TOPICS, ATTEMPTS_MAX, FLUSH_S, GROUP, TOPICS, Compile, service, value
from tests.tiny_tokenizer import save_byte_level
from tests.virtual_time import virtually
from worker.admission import POLL_RECORDS_MAX
from worker.brokers.base import Headers, Place, Record
from worker.brokers.memory import Crash, Fault, MemoryBroker
from worker.brokers.memory_cluster import MemoryCluster
from worker.drain import Drain
from worker.errors import Fatal, RequestError
from worker.intake import input_of
from worker.offsets import OffsetLedger
from worker.service import READING_INTERVAL_S, SILENCE_S_MAX
from worker.text import Tokenizer, load_tokenizer

PROMPT = [1, 2, 3]
WORK_NS = 10**6  # of each token that the played engine makes
SOON_S = 2.0  # many flushes, and less than a reading's interval
DRAIN_S = 30.0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_byte_level(tmp_path_factory.mktemp("tokenizer")))


class PlayedEngine:
    """Keeps what it was told, and says only what the test says."""

    def __init__(self, steps: "asyncio.Queue[StepResult | BaseException]", tokenizer: Tokenizer) -> None:
        self.heartbeat_ns = 0
        self.submitted: list[Request] = []
        self.cancelled: list[tuple[int, int | None]] = []
        self.is_stopped = False
        self._running: dict[tuple[int, int], Request] = {}
        self._steps = steps
        self._tokenizer = tokenizer
        self._num_output: Counter[tuple[int, int]] = Counter()

    def submit(self, request: Request) -> None:
        self.submitted.append(request)
        for choice in range(request.sampling.num_choices):
            if not request.progress:
                self._running[request.id, choice] = request
            elif not request.progress[choice].is_over:
                self._running[request.id, choice] = request
                self._num_output[request.id, choice] = len(request.progress[choice].tokens)

    def cancel(self, request_id: int, choice: int | None = None) -> None:
        self.cancelled.append((request_id, choice))

    def stats(self) -> EngineStats:
        return EngineStats()

    def stop(self, timeout_s: float | None = None) -> bool:
        self.is_stopped = True
        for (_, choice), request in list(self._running.items()):
            self.ends(request, choice, FinishReason.INTERRUPTED)
        return True

    def scores(self, request: Request) -> None:
        """The prompt's logprobs are there: -1, -2 and so on."""
        lines: list[tuple[Logprob, tuple[Logprob, ...]]]
        lines = [(Logprob(token, -1.0 - index), ()) for index, token in enumerate(request.prompt[1:])]
        scored = Scored(request=request.id, logprobs=lines)
        self._steps.put_nowait(StepResult(idle_ns=0, tokens=[], finished=[], charges=[], scored=[scored]))

    def says(self, request: Request, text: str, choice: int = 0) -> None:
        """A step for each token of the text."""
        for token in self._tokenizer.encode(text, 100):
            index = self._num_output[request.id, choice]
            self._num_output[request.id, choice] += 1
            logprob = None if request.sampling.num_logprobs is None else Logprob(token, -index / 8)
            made = Token(request=request.id, choice=choice, index=index, token=token, logprob=logprob)
            spent = Charge(
                request=request.id, choice=choice, work=Work.OUTPUT, num_tokens=1, device_ns=WORK_NS, index=index
            )
            self._steps.put_nowait(StepResult(idle_ns=0, tokens=[made], finished=[], charges=[spent]))

    def ends(self, request: Request, choice: int = 0, reason: FinishReason = FinishReason.LENGTH) -> None:
        """The choice is over."""
        del self._running[request.id, choice]
        num_output = self._num_output[request.id, choice]
        usage = Usage(num_prompt=len(request.prompt), num_cached=0, num_output=num_output)
        error = "its logits are no numbers" if reason is FinishReason.FAILED else ""
        over = Finished(request=request.id, choice=choice, reason=reason, usage=usage, error=error)
        self._steps.put_nowait(StepResult(idle_ns=0, tokens=[], finished=[over], charges=[]))

    def answers(self, request: Request, text: str = "hello") -> None:
        """All choices say the text and are over."""
        for choice in [choice for number, choice in self._running if number == request.id]:
            self.says(request, text, choice)
            self.ends(request, choice)

    def waits(self) -> None:
        """A step with nothing to do, as an idle engine reports every second."""
        self._steps.put_nowait(StepResult(idle_ns=WORK_NS, tokens=[], finished=[], charges=[]))

    def fails(self, error: Exception) -> None:
        """The engine's thread is over."""
        self._steps.put_nowait(error)


class Worker:
    """One worker at work. `over` is its run."""

    def __init__(
        self,
        cluster: MemoryCluster,
        name: str,
        tokenizer: Tokenizer,
        tokens_max: int,
        fault: Fault | None,
        compile: Compile | None,
    ):
        steps: asyncio.Queue[StepResult | BaseException] = asyncio.Queue()
        self.broker = MemoryBroker(cluster, GROUP, name, fault)
        self.engine = PlayedEngine(steps, tokenizer)
        self.drain = Drain(DRAIN_S, clock=asyncio.get_running_loop().time)
        work = service(
            self.broker, self.engine, steps, self.drain, tokenizer, f"{name}#0", tokens_max=tokens_max, compile=compile
        )
        self.over = asyncio.create_task(work.run())

    async def requests(self, num: int) -> list[Request]:
        """What the engine was asked, once it was asked that often."""
        await until(lambda: len(self.engine.submitted) >= num)
        return self.engine.submitted

    async def request(self) -> Request:
        """The first of them."""
        return (await self.requests(1))[0]


class Stage:
    """A cluster of one partition a topic, unless told otherwise, and what its readers see."""

    def __init__(self, tokenizer: Tokenizer, partitions: int = 1) -> None:
        self.cluster = MemoryCluster(dict.fromkeys(ALL_TOPICS, partitions))
        self._tokenizer = tokenizer
        self._asked: list[Record] = []

    def hire(
        self,
        name: str = "worker",
        tokens_max: int = 8192,
        fault: Fault | None = None,
        compile: Compile | None = None,
    ) -> Worker:
        return Worker(self.cluster, name, self._tokenizer, tokens_max, fault, compile)

    def ask(
        self, topic: str = TOPICS.requests, partition: int = 0, *, deadline: float | None = None, **body: Any
    ) -> None:
        own = {"model": MODEL, "prompt": PROMPT, "max_tokens": 16, **body}
        request = {"url": "/v1/completions", "custom_id": f"r{len(self._asked)}", "body": own, "deadline": deadline}
        self.put(json.dumps(request).encode(), topic, partition)

    def put(
        self,
        written: bytes | None,
        topic: str = TOPICS.requests,
        partition: int = 0,
        *,
        key: bytes | None = b"key",
        headers: Headers = (),
    ) -> Record:
        self._asked.append(self.cluster.produce(topic, written, partition=partition, key=key, headers=headers))
        return self._asked[-1]

    @property
    def num_asked(self) -> int:
        return len(self._asked)

    @property
    def completions(self) -> list[Completion]:
        return [decode_result(Completion, value(record)) for record in self.cluster.committed(TOPICS.completions)]

    async def answers(self, num: int = 1) -> list[Completion]:
        """The completions, once there are as many."""
        await until(lambda: len(self.completions) >= num)
        return self.completions

    @property
    def chunks(self) -> list[Chunk]:
        return [decode_result(Chunk, value(record)) for record in self.cluster.committed(TOPICS.chunks)]

    @property
    def costs(self) -> list[CostEvent]:
        return [decode_result(CostEvent, value(record)) for record in self._of_costs(b"tokenmill.cost.v1")]

    @property
    def readings(self) -> list[MeterReading]:
        return [decode_result(MeterReading, value(record)) for record in self._of_costs(b"tokenmill.meter.v1")]

    @property
    def handoffs(self) -> list[Handoff]:
        return [decode_handoff(record.value, record.headers) for record in self.cluster.committed(TOPICS.handoff)]

    def rewrite_handoff(self, other: Handoff) -> None:
        """The log has this in the place of its one handoff."""
        (place,) = [place for place, log in self.cluster.logs.items() if place.topic == TOPICS.handoff and log.entries]
        entries = self.cluster.logs[place].entries
        written = entries[0].record
        assert written
        entries[0] = dataclasses.replace(entries[0], record=structs.replace(written, value=encode(other)))

    def violations(self) -> list[str]:
        asked = [input_of(record) for record in self._asked]
        return violations(asked, self.completions, self.costs, self.readings, self.handoffs)

    def _of_costs(self, kind: bytes) -> list[Record]:
        return [one for one in self.cluster.committed(TOPICS.costs) if dict(one.headers)["ce_type"] == kind]


async def until(holds: Callable[[], bool]) -> None:
    """Waits until it holds; a test in which it never does fails."""
    async with asyncio.timeout(SOON_S):
        while not holds():
            await asyncio.sleep(0.01)


def text_of(completion: Completion, choice: int = 0) -> str:
    assert completion.response is not None
    assert isinstance(completion.response.body, TextResult)
    return completion.response.body.choices[choice].text


def error_of(completion: Completion) -> str:
    assert completion.error is not None
    return completion.error.code


# --------------------------------------------------------------------------------------------------- answers and bills


@virtually
async def test_a_request_is_answered_and_billed(tokenizer):
    stage = Stage(tokenizer)
    worker = stage.hire()
    stage.ask()
    worker.engine.answers(await worker.request(), "hello world")
    (completion,) = await stage.answers()
    assert text_of(completion) == "hello world"
    assert stage.violations() == []


@virtually
async def test_a_request_past_its_deadline_is_answered_so_and_the_engine_is_told_to_cancel(tokenizer):
    stage = Stage(tokenizer)
    worker = stage.hire()
    stage.ask(deadline=1.0)  # admitted in 1970, and run today
    request = await worker.request()
    worker.engine.says(request, "hello")
    (completion,) = await stage.answers()
    assert error_of(completion) == ErrorCode.DEADLINE_EXCEEDED
    assert worker.engine.cancelled == [(request.id, None)]
    assert {event.kind for event in stage.costs} == {"discarded"}
    assert stage.violations() == []


@virtually
async def test_what_the_engine_spends_on_a_request_after_its_deadline_is_wasted(tokenizer):
    stage = Stage(tokenizer)
    worker = stage.hire()
    stage.ask(deadline=1.0)
    request = await worker.request()
    worker.engine.waits()
    await stage.answers()
    worker.engine.says(request, "hello")  # it had not heard of the cancel yet
    worker.engine.ends(request, reason=FinishReason.STOP)
    await asyncio.sleep(READING_INTERVAL_S + SOON_S)
    assert picodollars(stage.readings[-1].wasted["cancelled"]) > 0
    assert len(stage.completions) == 1
    assert stage.violations() == []


@virtually
async def test_a_stop_string_ends_one_choice_and_the_other_goes_on(tokenizer):
    stage = Stage(tokenizer)
    worker = stage.hire()
    stage.ask(n=2, stop="!")
    request = await worker.request()
    worker.engine.says(request, "stop! past it", choice=0)
    await until(lambda: bool(worker.engine.cancelled))
    worker.engine.ends(request, choice=0, reason=FinishReason.STOP)
    worker.engine.says(request, "on and on", choice=1)
    worker.engine.ends(request, choice=1)
    (completion,) = await stage.answers()
    assert worker.engine.cancelled == [(request.id, 0)]
    assert [text_of(completion, choice) for choice in (0, 1)] == ["stop", "on and on"]
    past = [event for event in stage.costs if event.kind == "discarded"]
    assert sum(event.tokens for event in past) == len(tokenizer.encode(" past it", 100))
    assert {(event.choice, picodollars(event.price)) for event in past} == {(0, 0)}
    assert all(picodollars(event.cost) > 0 for event in past)
    assert stage.violations() == []


@virtually
async def test_a_request_of_two_choices_fails_alone_when_the_engine_fails_on_one(tokenizer):
    stage = Stage(tokenizer)
    worker = stage.hire()
    stage.ask(n=2)
    stage.ask()
    failing, other = await worker.requests(2)
    worker.engine.says(failing, "hello")
    worker.engine.ends(failing, reason=FinishReason.FAILED)
    worker.engine.says(failing, "hello", choice=1)  # of the step that was under way
    (failed,) = await stage.answers()
    assert error_of(failed) == ErrorCode.INFERENCE_ERROR
    assert worker.engine.cancelled == [(failing.id, None)]
    worker.engine.answers(other)
    _, completed = await stage.answers(2)
    assert text_of(completed) == "hello"
    assert stage.violations() == []


@virtually
async def test_a_malformed_record_is_answered_and_dead_lettered_in_one_transaction(tokenizer):
    stage = Stage(tokenizer)
    stage.hire()
    malformed = stage.put(b'{"custom_id":"mine","body":\xff')
    (completion,) = await stage.answers()
    assert error_of(completion) == ErrorCode.INVALID_REQUEST
    (letter,) = stage.cluster.committed(TOPICS.dead_letters)
    assert (letter.key, letter.value) == (malformed.key, malformed.value)
    assert set(malformed.headers) <= set(letter.headers)
    wrote = [stage.cluster.logs[Place(topic, 0)].entries[0] for topic in (TOPICS.completions, TOPICS.dead_letters)]
    assert wrote[0].transaction is wrote[1].transaction is not None
    assert stage.violations() == []


@virtually
async def test_no_hostile_record_ends_the_worker_or_goes_without_an_answer(tokenizer):
    stage = Stage(tokenizer)
    worker = stage.hire()
    for record in (*(record for _, record in REFUSED.values()), *ADMITTED.values(), *fuzz(1, 500)):
        stage.put(record.value, headers=record.headers, key=record.key)
    num_answered = 0
    while not worker.over.done() and len(stage.completions) < stage.num_asked:
        for request in worker.engine.submitted[num_answered:]:
            worker.engine.answers(request)
        num_answered = len(worker.engine.submitted)
        await asyncio.sleep(0.1)
    assert not worker.over.done()
    assert num_answered > len(ADMITTED)
    assert stage.violations() == []


# -------------------------------------------------------------------------------------------------------------- formats


class AnyAnswer:
    """A grammar that nobody follows here."""

    def start(self) -> Matcher:
        raise NotImplementedError


class Compiler:
    """Has a grammar ready when the test says so."""

    def __init__(self) -> None:
        self.grammar = AnyAnswer()
        self.sources: list[str] = []
        self._results: asyncio.Queue[Constraint | RequestError] = asyncio.Queue()

    async def __call__(self, source: str) -> Constraint:
        self.sources.append(source)
        result = await self._results.get()
        if isinstance(result, RequestError):
            raise result
        return result

    def brings(self, result: Constraint | RequestError) -> None:
        self._results.put_nowait(result)


JSON = {"type": "json_object"}


@virtually
async def test_a_request_waits_for_its_grammar_and_the_others_do_not(tokenizer):
    stage, compiler = Stage(tokenizer), Compiler()
    worker = stage.hire(compile=compiler)
    stage.ask(response_format=JSON)
    stage.ask()
    worker.engine.answers(await worker.request(), "at once")
    (first,) = await stage.answers()
    assert text_of(first) == "at once"
    assert len(compiler.sources) == 1
    compiler.brings(compiler.grammar)
    _, constrained = await worker.requests(2)
    assert constrained.constraint is compiler.grammar
    worker.engine.answers(constrained, "in the end")
    assert sorted(map(text_of, await stage.answers(2))) == ["at once", "in the end"]
    assert stage.violations() == []


@virtually
async def test_a_format_that_cannot_be_compiled_is_answered_so_and_owes_nothing(tokenizer):
    stage = Stage(tokenizer)
    worker = stage.hire()
    stage.ask(response_format={"type": "regex", "pattern": "(a"})
    (completion,) = await stage.answers()
    assert error_of(completion) == ErrorCode.INVALID_REQUEST
    assert completion.bill is not None
    assert picodollars(completion.bill.price) == picodollars(completion.bill.cost) == 0
    assert worker.engine.submitted == []
    assert stage.violations() == []


@virtually
async def test_whose_deadline_passes_before_its_grammar_is_there_never_reaches_the_engine(tokenizer):
    stage, compiler = Stage(tokenizer), Compiler()
    worker = stage.hire(compile=compiler)
    stage.ask(response_format=JSON, deadline=1.0)  # admitted in 1970, and run today
    await until(lambda: bool(compiler.sources))
    worker.engine.waits()
    (completion,) = await stage.answers()
    assert error_of(completion) == ErrorCode.DEADLINE_EXCEEDED
    compiler.brings(compiler.grammar)
    await asyncio.sleep(SOON_S)
    assert worker.engine.submitted == []
    assert stage.violations() == []


@virtually
@pytest.mark.parametrize("late", ["grammar", "refusal"])
async def test_a_partition_may_go_while_a_grammar_of_it_is_made(tokenizer, late):
    stage, compiler = Stage(tokenizer, partitions=2), Compiler()
    first = stage.hire("first", compile=compiler)
    stage.ask(partition=1, response_format=JSON)
    stage.ask(partition=1, response_format=JSON)  # waits behind it
    await until(lambda: bool(compiler.sources))
    second = stage.hire("second")
    for request in await second.requests(2):
        second.engine.answers(request, "answered")
    assert len(await stage.answers(2)) == 2
    compiler.brings(compiler.grammar if late == "grammar" else RequestError(ErrorCode.INVALID_REQUEST, "too late"))
    await asyncio.sleep(READING_INTERVAL_S + SOON_S)
    assert first.engine.submitted == []
    assert len(compiler.sources) == 1
    assert len(stage.completions) == 2
    assert not first.over.done()
    assert stage.violations() == []


@virtually
async def test_a_drain_waits_for_a_grammar_as_for_an_answer(tokenizer):
    stage, compiler = Stage(tokenizer), Compiler()
    worker = stage.hire(compile=compiler)
    stage.ask(response_format=JSON)
    await until(lambda: bool(compiler.sources))
    worker.drain.ask()
    await asyncio.sleep(SOON_S)
    compiler.brings(compiler.grammar)
    worker.engine.answers(await worker.request(), "in time")
    (completion,) = await stage.answers()
    await asyncio.wait_for(worker.over, DRAIN_S)
    assert text_of(completion) == "in time"


# ------------------------------------------------------------------------------------------------------------- previews


@virtually
async def test_chunks_of_a_streamed_request_add_up_to_its_completion(tokenizer):
    stage = Stage(tokenizer)
    worker = stage.hire()
    stage.ask(stream=True, n=2, stop="!")
    request = await worker.request()
    for choice, text in enumerate(("hello über 😀", "the quick brown fox! jumps")):
        worker.engine.says(request, text, choice)
        worker.engine.ends(request, choice)
    (completion,) = await stage.answers()
    for choice in (0, 1):
        chunks = [chunk for chunk in stage.chunks if chunk.choice == choice]
        assert len(chunks) > 2
        assert "".join(chunk.text for chunk in chunks) == text_of(completion, choice)
        assert [chunk.sequence for chunk in chunks] == list(range(len(chunks)))
        assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [["length", "stop"][choice]]


@virtually
async def test_other_requests_send_no_chunks(tokenizer):
    stage = Stage(tokenizer)
    worker = stage.hire()
    stage.ask()
    worker.engine.answers(await worker.request())
    await stage.answers()
    assert stage.chunks == []


# --------------------------------------------------------------------------------------------------------------- intake


@virtually
async def test_a_full_worker_polls_nothing_until_a_request_is_answered(tokenizer):
    stage = Stage(tokenizer)
    worker = stage.hire(tokens_max=len(PROMPT) + 16)  # one request
    stage.ask()
    first = await worker.request()
    stage.ask()
    await asyncio.sleep(SOON_S)
    assert len(worker.engine.submitted) == 1
    worker.engine.answers(first)
    await worker.requests(2)


@virtually
async def test_realtime_goes_before_batch(tokenizer):
    """Both wait; batch is polled once realtime has nothing left, and has the lower priority in the engine."""
    stage = Stage(tokenizer)
    num_realtime = POLL_RECORDS_MAX + 1
    stage.ask(TOPICS.batch)
    for _ in range(num_realtime):
        stage.ask()
    worker = stage.hire()
    requests = await worker.requests(num_realtime + 1)
    assert [request.priority for request in requests] == [0] * num_realtime + [1]


@virtually
async def test_the_last_quarter_of_the_room_is_kept_for_realtime(tokenizer):
    stage = Stage(tokenizer)
    for _ in range(3):
        stage.ask(TOPICS.batch)
    worker = stage.hire(tokens_max=4 * (len(PROMPT) + 16))
    await worker.requests(3)
    stage.ask(TOPICS.batch)
    await asyncio.sleep(SOON_S)
    assert len(worker.engine.submitted) == 3
    stage.ask()
    requests = await worker.requests(4)
    assert requests[3].priority == 0


# ---------------------------------------------------------------------------------------------------------- containment


@virtually
async def test_only_what_waited_for_the_worker_waits_for_its_attempt_to_be_on_record(tokenizer):
    stage = Stage(tokenizer)
    stage.ask()
    worker = stage.hire()
    (waited,) = await worker.requests(1)
    recorded = stage.cluster.positions(GROUP)[Place(TOPICS.requests, 0)]
    assert OffsetLedger(recorded, "heir").attempts(0) == 1
    asked_s = asyncio.get_running_loop().time()
    stage.ask()
    _, fresh = await worker.requests(2)
    assert asyncio.get_running_loop().time() - asked_s < FLUSH_S
    for request in (waited, fresh):
        worker.engine.answers(request)
    await stage.answers(2)
    assert stage.violations() == []


@virtually
async def test_a_request_that_three_workers_died_of_is_answered_poisoned_and_kept_as_it_came(tokenizer):
    stage = Stage(tokenizer)
    stage.ask()
    for life in range(ATTEMPTS_MAX - 1):
        worker = stage.hire(f"worker{life}")
        await worker.request()
        worker.broker.die()
        with pytest.raises(Crash):
            await worker.over
        await stage.cluster.expire(worker.broker)
    survivor = stage.hire("survivor")
    (answer,) = await stage.answers()
    assert error_of(answer) == ErrorCode.POISONED
    assert (answer.custom_id, survivor.engine.submitted) == ("r0", [])
    (letter,) = stage.cluster.committed(TOPICS.dead_letters)
    (asked,) = stage.cluster.committed(TOPICS.requests)
    assert (letter.key, letter.value) == (asked.key, asked.value)
    assert stage.violations() == []


@virtually
async def test_whoever_leaves_on_purpose_with_a_request_under_way_is_not_counted_as_dead(tokenizer):
    stage = Stage(tokenizer)
    stage.ask()
    leaving = stage.hire()
    await leaving.request()
    leaving.drain.ask()
    await leaving.over
    recorded = stage.cluster.positions(GROUP)[Place(TOPICS.requests, 0)]
    assert OffsetLedger(recorded, "heir").attempts(0) == 0


# ----------------------------------------------------------------------------------------------------------- rebalances


@virtually
async def test_a_partition_that_stays_keeps_its_requests_and_one_that_goes_is_wasted(tokenizer):
    stage = Stage(tokenizer, partitions=2)
    first = stage.hire("first")
    stage.ask(partition=0)
    stage.ask(partition=1)
    staying, going = await first.requests(2)
    first.engine.says(staying, "stays")
    first.engine.says(going, "goes")
    await asyncio.sleep(SOON_S)

    second = stage.hire("second")  # the second partition is dealt to it
    again = await second.request()
    assert first.engine.cancelled == [(going.id, None)]
    first.engine.says(going, " on")  # the engine has not heard of it
    first.engine.ends(going)
    first.engine.ends(staying)
    second.engine.answers(again, "goes again")
    completions = await stage.answers(2)
    assert sorted(map(text_of, completions)) == ["goes again", "stays"]
    assert len(first.engine.submitted) == 2
    await asyncio.sleep(READING_INTERVAL_S + SOON_S)
    last = next(reading for reading in reversed(stage.readings) if reading.worker == "first")
    assert picodollars(last.wasted["lost"]) > 0
    assert picodollars(last.held) == 0
    assert stage.violations() == []


@virtually
async def test_what_is_too_much_for_one_transaction_is_committed_in_several(tokenizer, monkeypatch):
    monkeypatch.setattr("worker.flush.BURST_BYTES_MAX", 1)
    commits: list[int] = []

    async def count(call, moment):
        if (call, moment) == ("commit", "after"):
            commits.append(len(stage.completions))

    stage = Stage(tokenizer, partitions=3)
    worker = stage.hire(fault=count)
    for partition in range(3):
        stage.ask(partition=partition)
    for request in await worker.requests(3):
        worker.engine.answers(request)
    await stage.answers(3)
    assert {1, 2, 3} <= set(commits)
    assert stage.violations() == []


@virtually
async def test_a_partition_may_go_while_its_last_chunk_is_sent_and_takes_no_finished_answer_with_it(tokenizer):
    sending, sent = asyncio.Event(), asyncio.Event()

    async def hold_up_chunks(call, _moment):
        if call == "preview":
            sending.set()
            await sent.wait()

    stage = Stage(tokenizer, partitions=2)
    first = stage.hire("first", fault=hold_up_chunks)
    stage.ask(partition=1, stream=True)
    first.engine.ends(await first.request())
    await asyncio.wait_for(sending.wait(), SOON_S)
    second = stage.hire("second")
    (answer,) = await stage.answers()
    assert answer.worker == "first"
    sent.set()
    await asyncio.sleep(READING_INTERVAL_S + SOON_S)
    assert second.engine.submitted == []
    assert not first.over.done()
    assert stage.violations() == []


# -------------------------------------------------------------------------------------------------------------- the end


@virtually
async def test_a_drain_answers_what_fits_and_leaves_the_rest_to_the_next_owner(tokenizer):
    stage = Stage(tokenizer)
    worker = stage.hire()
    stage.ask()
    stage.ask()
    long, short = await worker.requests(2)
    worker.engine.says(long, "n")  # too little to be handed over
    worker.drain.ask()
    await asyncio.sleep(SOON_S)
    stage.ask()  # too late for this worker
    await asyncio.sleep(SOON_S)
    worker.engine.answers(short, "in time")
    (completion,) = await stage.answers()
    await asyncio.wait_for(worker.over, DRAIN_S)
    assert text_of(completion) == "in time"
    assert len(worker.engine.submitted) == 2
    assert worker.engine.is_stopped
    assert (stage.readings[-1].final, picodollars(stage.readings[-1].held)) == (True, 0)
    assert picodollars(stage.readings[-1].wasted["lost"]) > 0

    heir = stage.hire("heir")
    for request in await heir.requests(2):
        heir.engine.answers(request, "inherited")
    assert sorted(map(text_of, await stage.answers(3))) == ["in time", "inherited", "inherited"]
    assert stage.violations() == []


@virtually
async def test_a_drain_with_nothing_to_do_ends_at_once(tokenizer):
    stage = Stage(tokenizer)
    worker = stage.hire()
    await asyncio.sleep(SOON_S)
    worker.drain.ask()
    await asyncio.wait_for(worker.over, SOON_S)
    assert stage.readings[-1].final


@virtually
async def test_a_failure_of_the_engine_ends_the_worker(tokenizer):
    stage = Stage(tokenizer)
    worker = stage.hire()
    stage.ask()
    await worker.request()
    worker.engine.fails(RuntimeError("device lost"))
    with pytest.raises(Fatal, match="device lost"):
        await worker.over
    assert stage.completions == []


@virtually
async def test_an_engine_that_is_silent_for_too_long_ends_the_worker(tokenizer):
    worker = Stage(tokenizer).hire()
    for _ in range(3):  # as long as it reports it may be idle
        await asyncio.sleep(SILENCE_S_MAX - 1)
        assert not worker.over.done()
        worker.engine.waits()
    with pytest.raises(Fatal, match="has not come round"):
        await asyncio.wait_for(worker.over, SILENCE_S_MAX + 1)
