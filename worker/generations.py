"""What is with the engine: from a record that may be worked on to its answer in the partition's outbox.

Owns the requests that run. What a record means is `intake.py`'s, what is sent `outbound.py`'s, when it is committed
`service.py`'s.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from msgspec import structs

from engine.constraint import Constraint
from engine.errors import RequestRefused
from engine.types import EngineStats, Finished, FinishReason, Request, StepResult, Token
from schemas.handoff import Handoff
from schemas.results import ErrorCode
from worker.admission import HANDOFF, Admission, Lane
from worker.brokers.base import Outgoing, Record
from worker.cost import Account, Meter, WasteReason
from worker.errors import RequestError
from worker.handoff import origin
from worker.intake import Admitted, Intake, Refused
from worker.outbound import Outbound
from worker.outcome import Answer
from worker.partition import Outcome, Partition
from worker.stream import Preview
from worker.telemetry import Telemetry

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
    offset: int  # of the record that is finished with it: the request's own, or its handoff's
    admitted: Admitted
    account: Account
    answer: Answer
    preview: Preview | None

    @property
    def num_chunks(self) -> Sequence[int]:
        """Previews sent of each choice."""
        return self.preview.num_sent if self.preview else [0] * self.admitted.request.sampling.num_choices


class Generations:
    """All requests that the engine has, each with what has come of it so far."""

    def __init__(
        self,
        *,
        engine: Engine,
        intake: Intake,
        outbound: Outbound,
        admission: Admission,
        meter: Meter,
        telemetry: Telemetry,
        lanes: Mapping[str, Lane],
        preview: Callable[[Outgoing], Awaitable[None]],
        compile: Callable[[str], Awaitable[Constraint]],
        handover_tokens_min: int,
    ) -> None:
        """`lanes` names each topic's lane; `preview` sends a chunk, best effort; `compile` makes a grammar of text.

        `handover_tokens_min`: tokens of an answer below which it is cheaper to compute them again than to hand it over.
        """
        self._engine = engine
        self._intake = intake
        self._outbound = outbound
        self._admission = admission
        self._meter = meter
        self._telemetry = telemetry
        self._lanes = lanes
        self._send_preview = preview
        self._compile = compile
        self._handover_tokens_min = handover_tokens_min
        self._ids = count(1)  # of engine requests
        self._uncompiled: asyncio.Queue[Running] = asyncio.Queue()  # held, and not with the engine yet
        self._running: dict[int, Running] = {}

    def __len__(self) -> int:
        return len(self._running)

    def begin(self, partition: Partition, record: Record) -> None:
        """The record's request is with the engine, or its refusal is in the outbox; with a grammar it waits for it."""
        request, handoff = next(self._ids), None
        try:
            handoff = self._handoff(record)
            admitted = self._admit(record, handoff, request)
            if admitted.grammar is None:
                self._engine.submit(admitted.request)
        except RequestRefused as error:
            self._refuse(partition, record, Refused(ErrorCode.INVALID_REQUEST, str(error)), handoff)
            return
        except Refused as error:
            self._refuse(partition, record, error, handoff)
            return
        answer = self._outbound.answer(admitted)  # in time: the engine's events come over this event loop
        self._running[request] = running = Running(
            partition=partition,
            offset=record.offset,
            admitted=admitted,
            account=self._meter.open(request),
            answer=answer,
            preview=Preview(answer) if admitted.generate.body.stream else None,
        )
        self._admission.reserve(admitted.tokens_reserved)
        self._telemetry.admitted(request, record, admitted.generate, is_resumed=bool(admitted.carried))
        if admitted.grammar is not None:
            self._uncompiled.put_nowait(running)

    async def compile(self) -> None:
        """The next request that needs a grammar has it and is with the engine, or its failure is in the outbox.

        One after the other: a tenant's many or large grammars take one processor, and the engine keeps the rest.
        """
        running = await self._uncompiled.get()
        request = running.admitted.request
        if running.admitted.grammar is None or self._running.get(request.id) is not running:
            return  # let go, or answered as late
        try:
            constraint, error = await self._compile(running.admitted.grammar), None
        except RequestError as refused:
            constraint, error = None, refused
        if self._running.get(request.id) is not running:
            return
        if error:
            self._answer(running, error)
        else:
            self._engine.submit(structs.replace(request, constraint=constraint))

    def poison(self, partition: Partition, record: Record) -> None:
        """The record's refusal is in the outbox: it has had all its attempts."""
        try:
            handoff = self._handoff(record)
        except Refused as error:
            self._refuse(partition, record, error)
            return
        asked = origin(handoff) if handoff else record
        self._refuse(partition, record, self._intake.poisoned(asked, partition.attempts(record.offset)), handoff)

    def _handoff(self, record: Record) -> Handoff | None:
        """What is left of the request, if another worker has begun it. Raises Refused where that cannot be read."""
        return self._intake.handoff(record) if self._lanes[record.place.topic] == HANDOFF else None

    def _admit(self, record: Record, handoff: Handoff | None, request: int) -> Admitted:
        if handoff:
            return self._intake.resume(handoff, request)
        lane = self._lanes[record.place.topic]
        assert lane != HANDOFF
        return self._intake.admit(record, lane, request)

    def _refuse(self, partition: Partition, record: Record, error: Refused, handoff: Handoff | None = None) -> None:
        asked = origin(handoff) if handoff else record
        self._telemetry.refused(record, error.code)
        partition.finish(record.offset, Outcome(records=self._outbound.refusal(asked, error, handoff)))

    async def apply(self, result: StepResult) -> None:
        """A step of the engine becomes text, previews and answers. Whose deadline has passed by then is given up."""
        self._meter.step(result)
        self._telemetry.step(result, self._engine.stats())
        for scored in result.scored:
            if running := self._running.get(scored.request):
                running.answer.score(scored)
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
            await self._send_preview(self._outbound.chunk(chunk, running.admitted.record))

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
        running.partition.finish(running.offset, outcome)

    def hand_over(self) -> None:
        """What the engine was interrupted at is in the outbox, for another worker to go on with.

        What is not worth that, or too large for a record, stays here until it is let go: its next owner begins anew.
        """
        for running in list(self._running.values()):
            answer = running.answer
            if not answer.can_be_handed_over or answer.num_new < self._handover_tokens_min:
                continue
            records = self._outbound.handoff(answer, running.account, running.num_chunks)
            if not records:
                continue
            self._forget(running)
            self._meter.close(running.account)
            self._telemetry.handed_over(running.admitted.request.id)
            running.partition.finish(running.offset, Outcome(records=records, account=running.account))

    def _report(self, running: Running, fault: RequestError | None) -> None:
        request, answer = running.admitted.request, running.answer
        if fault:
            self._telemetry.failed(request.id, fault.code)
            return
        reasons = [answer.finish_reason(choice) or "" for choice in range(request.sampling.num_choices)]
        self._telemetry.completed(request.id, answer.owed, reasons)

    def _forget(self, running: Running) -> None:
        del self._running[running.admitted.request.id]
        self._admission.release(running.admitted.tokens_reserved)

    def let_go(self, partitions: Collection[Partition], reason: WasteReason) -> None:
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
