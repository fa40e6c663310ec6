"""The worker: what it consumes, what the engine brought, and what it commits.

Owns the tasks and everything that is in flight between a record and its committed answer. Decides nothing by itself:
what may be polled is `admission.py`'s, what a record means `intake.py`'s, what is sent `outbound.py`'s, what a flush is
`flush.py`'s, and what is ours the broker's.

Few tasks, one event loop, no lock but one (a rebalance waits for the flush under way). Any failure ends the process:
what was not committed, the next owner does again.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from engine.errors import RequestRefused
from engine.types import EngineStats, Finished, FinishReason, Request, StepResult, Token
from schemas.requests import Tier
from schemas.results import ErrorCode
from worker.admission import NOTHING, REALTIME, Admission
from worker.brokers.base import Broker, Membership, Place, Record
from worker.cost import Account, Meter, WasteReason
from worker.drain import Drain
from worker.errors import Fatal, Fenced, RequestError
from worker.flush import flush
from worker.health import Vitals
from worker.intake import Admitted, Intake, Refused
from worker.outbound import Outbound
from worker.outcome import Answer
from worker.partition import Burst, Outcome, Partition
from worker.stream import Preview
from worker.telemetry import Telemetry

POLL_S = 0.05  # how long a poll waits for records: also how soon freed room is noticed
READING_INTERVAL_S = 5.0  # an idle worker's meter is published that often: what a kill leaves unaccounted at most
SILENCE_S_MAX = 120.0  # the engine reports every second when idle; a step of two minutes is a hang
LEAVING_LOOK_S = 0.02  # how often a drain looks whether it is done
LATE = RequestError(ErrorCode.DEADLINE_EXCEEDED, "the deadline passed before the answer was complete")


class Engine(Protocol):
    """What the worker needs of an engine; `engine/thread.py` is one, and says what each call promises."""

    def submit(self, request: Request) -> None: ...  # noqa: D102
    def cancel(self, request_id: int, choice: int | None = None) -> None: ...  # noqa: D102
    def stats(self) -> EngineStats: ...  # noqa: D102
    def stop(self, timeout_s: float | None = None) -> bool: ...  # noqa: D102
    @property
    def heartbeat_ns(self) -> int: ...  # noqa: D102


@dataclass(eq=False, frozen=True, kw_only=True)
class Running:
    """A request that the engine has, and the partition that waits for its answer."""

    partition: Partition
    admitted: Admitted
    account: Account
    answer: Answer
    preview: Preview | None


class Service:
    """One worker at work. `run` returns once it was asked to leave and has left; anything else it raises."""

    def __init__(
        self,
        *,
        broker: Broker,
        engine: Engine,
        steps: "asyncio.Queue[StepResult | BaseException]",
        intake: Intake,
        outbound: Outbound,
        admission: Admission,
        meter: Meter,
        telemetry: Telemetry,
        drain: Drain,
        tiers: Mapping[str, Tier],
        flush_interval_s: float,
        life: str,
    ) -> None:
        """`steps` is where the engine's results arrive, or what it failed of.

        `tiers` names each topic's tier; `life` is the name of this run of this worker, unlike any other's.
        """
        self._broker = broker
        self._engine = engine
        self._steps = steps
        self._intake = intake
        self._outbound = outbound
        self._admission = admission
        self._meter = meter
        self._telemetry = telemetry
        self._drain = drain
        self._tiers = tiers
        self._flush_interval_s = flush_interval_s
        self._life = life

        self._ids = count(1)  # of engine requests
        self._running: dict[int, Running] = {}
        self._partitions: dict[Place, Partition] = {}  # replaced, never changed: whoever holds the old one can tell
        self._membership: Membership | None = None  # None: no commit may start
        self._flushing = asyncio.Lock()
        self._has_outcomes = asyncio.Event()
        self._heard_s: float | None = None  # from the broker
        self._has_left = False

    async def run(self) -> None:
        """Serves until the drain is asked for and done."""
        await self._broker.start(tuple(self._tiers), self)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._consume())
                collecting = tasks.create_task(self._collect())
                committing = tasks.create_task(self._commit())
                await self._leave()
                collecting.cancel()
                committing.cancel()
        except BaseExceptionGroup as failures:
            first = failures.exceptions[0]  # the other tasks were cancelled for it
            raise first from first.__cause__
        finally:
            await self._broker.stop()

    # ------------------------------------------------------------------------------------------------------- consume

    async def _consume(self) -> None:
        """Takes on as much as there is room for. Never stops polling: that is what keeps the membership alive."""
        while not self._has_left:
            poll = NOTHING if self._drain.is_asked else self._admission.next_poll(_now_s())
            held = self._partitions
            records = await self._broker.poll(self._open(poll.tiers), poll.num_max, POLL_S)
            if records:
                self._heard_s = _now_s()
            if held is not self._partitions:
                # These records were asked for before a rebalance: whose they are cannot be told. Read them again.
                if self._membership:
                    self._seek()
                continue
            num_realtime = sum(self._tiers[record.place.topic] == REALTIME for record in records)
            self._admission.polled(poll, num_realtime, _now_s())
            for topic, num_records in Counter(record.place.topic for record in records).items():
                self._telemetry.polled(topic, num_records)
            for record in records:
                self._take(record)

    def _open(self, tiers: Collection[Tier]) -> list[Place]:
        """The partitions of these tiers that may be read on."""
        held = self._partitions.items()
        return [place for place, partition in held if self._tiers[place.topic] in tiers and not partition.is_full]

    def _take(self, record: Record) -> None:
        """The record is with the engine, or its refusal is in the outbox; unless it was finished before."""
        partition = self._partitions[record.place]
        if not partition.begin(record.offset):
            return
        request = next(self._ids)
        try:
            admitted = self._intake.admit(record, self._tiers[record.place.topic], request)
            self._engine.submit(admitted.request)
        except RequestRefused as error:
            self._refuse(partition, record, Refused(ErrorCode.INVALID_REQUEST, str(error)))
            return
        except Refused as error:
            self._refuse(partition, record, error)
            return
        answer = self._outbound.answer(admitted)  # in time: the engine's events come over this event loop
        self._running[request] = Running(
            partition=partition,
            admitted=admitted,
            account=self._meter.open(request),
            answer=answer,
            preview=Preview(answer) if admitted.generate.body.stream else None,
        )
        self._admission.reserve(admitted.tokens_reserved)
        self._telemetry.admitted(request, record, admitted.generate)

    def _refuse(self, partition: Partition, record: Record, error: Refused) -> None:
        self._telemetry.refused(record, error.code)
        self._finish(partition, record.offset, Outcome(records=self._outbound.refusal(record, error)))

    # ------------------------------------------------------------------------------------------------------- collect

    async def _collect(self) -> None:
        """Turns what the engine brings into text, previews and answers."""
        while True:
            try:
                async with asyncio.timeout(SILENCE_S_MAX):
                    result = await self._steps.get()
            except TimeoutError:
                raise Fatal(f"the engine has not come round for {SILENCE_S_MAX:.0f} s: its device hangs") from None
            if isinstance(result, BaseException):
                raise Fatal(f"the engine failed: {result}") from result
            await self._apply(result)

    async def _apply(self, result: StepResult) -> None:
        self._meter.step(result)
        self._telemetry.step(result, self._engine.stats())
        for token in result.tokens:
            await self._token(token)
        for finished in result.finished:
            await self._finished(finished)
        self._expire()

    async def _token(self, token: Token) -> None:
        running = self._running.get(token.request)
        if running is None:  # let go, or answered before its time; the engine will hear of it
            return
        answer = running.answer
        if not answer.has_begun:
            self._telemetry.first_token(token.request)
        was_stopped = answer.is_stopped(token.choice)
        text = answer.take(token)
        if answer.is_stopped(token.choice) and not was_stopped:
            self._engine.cancel(token.request, token.choice)
        await self._preview(running, token.choice, text)

    async def _finished(self, finished: Finished) -> None:
        running = self._running.get(finished.request)
        if running is None:
            return
        text = running.answer.finish(finished)
        if finished.reason is FinishReason.FAILED:  # the other choices would be generated for nothing
            self._engine.cancel(finished.request)
            self._answer(running)
        elif running.answer.done:
            self._answer(running)  # before the chunk: while that is sent, the partition may go
        await self._preview(running, finished.choice, text)

    async def _preview(self, running: Running, choice: int, text: str) -> None:
        if running.preview and (chunk := running.preview.chunk(choice, text)):
            await self._broker.preview(self._outbound.chunk(chunk, running.admitted.record))

    def _expire(self) -> None:
        """Requests whose deadline has passed are answered so; the engine need not go on with them."""
        now_s = time.time()
        late = [r for r in self._running.values() if r.admitted.deadline is not None and r.admitted.deadline <= now_s]
        for running in late:
            self._engine.cancel(running.admitted.request.id)
            self._answer(running, LATE)

    def _answer(self, running: Running, error: RequestError | None = None) -> None:
        """The request's answer and bill are in the outbox. `error`: it is given up for this reason."""
        self._forget(running)
        self._meter.close(running.account)
        fault = error or running.answer.fault
        records = self._outbound.records(running.answer, running.account, fault)
        self._report(running, fault)
        outcome = Outcome(records=records, account=running.account)
        self._finish(running.partition, running.admitted.record.offset, outcome)

    def _report(self, running: Running, fault: RequestError | None) -> None:
        request, answer = running.admitted.request, running.answer
        if fault:
            self._telemetry.failed(request.id, fault.code)
            return
        reasons = [answer.finish_reason(choice) or "" for choice in range(request.sampling.num_choices)]
        self._telemetry.completed(request.id, answer.owed, reasons)

    def _finish(self, partition: Partition, offset: int, outcome: Outcome) -> None:
        partition.finish(offset, outcome)
        self._has_outcomes.set()

    def _forget(self, running: Running) -> None:
        del self._running[running.admitted.request.id]
        self._admission.release(running.admitted.tokens_reserved)

    # -------------------------------------------------------------------------------------------------------- commit

    async def _commit(self) -> None:
        """Flushes every few tens of milliseconds when there is something to say, and the meter now and then."""
        while True:
            try:
                async with asyncio.timeout(READING_INTERVAL_S):
                    await self._has_outcomes.wait()
            except TimeoutError:
                pass  # nothing to say but the time
            await asyncio.sleep(self._flush_interval_s)
            await self._flush()

    async def _flush(self) -> None:
        """What is in the outboxes is committed, or the partitions turn out to be others'."""
        async with self._flushing:
            membership = self._membership
            if membership is None:
                return  # in the middle of a rebalance: `assigned` will say whose the outcomes are
            self._has_outcomes.clear()
            partitions = self._partitions
            bursts = {place: burst for place, partition in partitions.items() if (burst := partition.burst())}
            started_s = _now_s()
            reading = self._meter.reading(_accounts(bursts.values()))
            try:
                num_attempts = await flush(self._broker, bursts, [self._outbound.meter(reading)], membership)
            except Fenced as error:
                self._telemetry.fenced(len(partitions), str(error))
                if not error.outcome_known:
                    self._telemetry.unknown_outcome()
                await self._hold(tuple(partitions), "lost" if error.outcome_known else "unknown")
                if self._membership:  # else a rebalance waits for us, and seeks by itself
                    self._seek()
                return
            for place, burst in bursts.items():
                partitions[place].settle(burst)
            for account in _accounts(bursts.values()):
                self._meter.charge(account)
            self._heard_s = _now_s()
            num_records = 1 + sum(len(outcome.records) for burst in bursts.values() for outcome in burst.outcomes)
            self._telemetry.flushed(num_records, _now_s() - started_s, num_attempts)
            self._telemetry.metered(reading)
            self._telemetry.lag(await self._broker.lag())

    # ---------------------------------------------------------------------------------------------------- rebalances

    async def revoked(self) -> None:
        """No commit starts any more, and none is under way. What is held stays: it may come back to us."""
        self._membership = None
        async with self._flushing:
            pass

    async def assigned(self, places: Sequence[Place], membership: Membership) -> None:
        """Holds these partitions under this membership, and lets go of all others."""
        await self._hold(places, "lost")
        self._seek()
        self._membership = membership
        self._heard_s = _now_s()
        self._has_outcomes.set()
        self._telemetry.assigned(places, membership.generation)

    async def _hold(self, places: Sequence[Place], reason: WasteReason) -> None:
        """Holds exactly these partitions.

        One that stands where we left it is still ours, with all its requests; one that has moved had another owner
        meanwhile, and is begun anew.
        """
        positions = await self._broker.positions(places)
        before, self._partitions = self._partitions, {}
        for place in places:
            partition = before.get(place)
            if partition is None or partition.committed != positions[place]:
                partition = Partition(place, positions[place], self._life)
            self._partitions[place] = partition
        lost = [partition for place, partition in before.items() if self._partitions.get(place) is not partition]
        self._let_go(lost, reason)

    def _seek(self) -> None:
        for place, partition in self._partitions.items():
            self._broker.seek(place, partition.resume_at)

    def _let_go(self, partitions: Sequence[Partition], reason: WasteReason) -> None:
        """What is in flight for these partitions is somebody else's: stopped, and paid for by nobody."""
        for running in [running for running in self._running.values() if running.partition in partitions]:
            self._engine.cancel(running.admitted.request.id)
            self._forget(running)
            self._meter.waste(running.account, reason)
            self._telemetry.dropped(running.admitted.request.id)
        for partition in partitions:
            for outcome in partition.outbox:
                if outcome.account:
                    self._meter.waste(outcome.account, reason)

    # --------------------------------------------------------------------------------------------------------- leave

    async def _leave(self) -> None:
        """Once asked: finishes what the budget allows, commits it, closes the meter. The rest is the next owner's."""
        await self._drain.asked()
        self._telemetry.draining(self._drain.budget_s)
        # Two conditions and a clock: to look now and then is simplest.
        while (self._running or self._has_outcomes.is_set()) and not self._drain.is_over:  # noqa: ASYNC110
            await asyncio.sleep(LEAVING_LOOK_S)
        await asyncio.to_thread(self._engine.stop, SILENCE_S_MAX)
        await self._flush()
        async with self._flushing:  # nobody commits after the final reading
            self._membership = None
            while not self._steps.empty():
                result = self._steps.get_nowait()
                if isinstance(result, StepResult):
                    self._meter.step(result)
            held, self._partitions = self._partitions, {}
            self._let_go(list(held.values()), "lost")
            await flush(self._broker, {}, [self._outbound.meter(self._meter.reading(final=True))], None)
        self._has_left = True

    def vitals(self) -> Vitals:
        """How the worker is, for the health endpoints."""
        now_s = _now_s()
        return Vitals(
            engine_silence_s=now_s - self._engine.heartbeat_ns / 1e9,
            broker_silence_s=None if self._heard_s is None else now_s - self._heard_s,
            is_assigned=self._membership is not None,
            is_draining=self._drain.is_asked,
        )


def _now_s() -> float:
    """The event loop's clock: monotonic as the engine's, and a simulation's own within a simulation."""
    return asyncio.get_running_loop().time()


def _accounts(bursts: Iterable[Burst]) -> Iterator[Account]:
    return (outcome.account for burst in bursts for outcome in burst.outcomes if outcome.account)
