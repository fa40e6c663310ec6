"""The worker: what it consumes, what the engine brought, and what it commits.

Owns the tasks, the partitions that are held, and the right to commit. Decides nothing by itself: what may be polled is
`admission.py`'s, what may be begun `containment.py`'s, what becomes of it `generations.py`'s, what a flush is
`flush.py`'s, and what is ours the broker's.

Few tasks, one event loop, no lock but one (a rebalance waits for the flush under way). Any failure ends the process:
what was not committed, the next owner does again.
"""

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from engine.types import StepResult
from worker.admission import LANES, NOTHING, Admission, Lane
from worker.brokers.base import Broker, Membership, Place, Record
from worker.containment import Gate
from worker.cost import Account, Meter, WasteReason
from worker.drain import Drain
from worker.errors import Fatal, Fenced
from worker.flush import flush, portions
from worker.generations import Engine, Generations
from worker.health import Vitals
from worker.outbound import Outbound
from worker.partition import Burst, Partition
from worker.telemetry import Telemetry

POLL_S = 0.05  # how long a poll waits for records: also how soon freed room is noticed
READING_INTERVAL_S = 5.0  # an idle worker's meter is published that often: what a kill leaves unaccounted at most
SILENCE_S_MAX = 120.0  # the engine reports every second when idle; a step of two minutes is a hang
LEAVING_LOOK_S = 0.02  # how often a drain looks whether it is done
LAST_STEP_S_MAX = 10.0  # a step takes a second, on slow processors a few; one that hangs has nothing to hand over
REBALANCE_S_MAX = 1.0  # a rebalance takes as long as its slowest member's poll: of ours a tenth of a second


class Service:
    """One worker at work. `run` returns once it was asked to leave and has left; anything else it raises."""

    def __init__(
        self,
        *,
        broker: Broker,
        engine: Engine,
        steps: "asyncio.Queue[StepResult | BaseException]",
        generations: Generations,
        gate: Gate,
        outbound: Outbound,
        admission: Admission,
        meter: Meter,
        telemetry: Telemetry,
        drain: Drain,
        lanes: Mapping[str, Lane],
        flush_interval_s: float,
        life: str,
    ) -> None:
        """`steps` is where the engine's results arrive, or what it failed of.

        `lanes` names each topic's lane; `life` is the name of this run of this worker, unlike any other's.
        """
        self._broker = broker
        self._engine = engine
        self._steps = steps
        self._generations = generations
        self._gate = gate
        self._outbound = outbound
        self._admission = admission
        self._meter = meter
        self._telemetry = telemetry
        self._drain = drain
        self._lanes = lanes
        self._flush_interval_s = flush_interval_s
        self._life = life

        self._partitions: dict[Place, Partition] = {}  # replaced, never changed: whoever holds the old one can tell
        self._membership: Membership | None = None  # None: no commit may start
        self._flushing = asyncio.Lock()
        self._has_news = asyncio.Event()
        self._heard_s: float | None = None  # from the broker
        self._has_left = False

    async def run(self) -> None:
        """Serves until the drain is asked for and done."""
        await self._broker.start(tuple(self._lanes), self)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._consume())
                endless = [tasks.create_task(task()) for task in (self._collect, self._commit, self._compile)]
                await self._leave()
                for task in endless:
                    task.cancel()
        except BaseExceptionGroup as failures:
            first = failures.exceptions[0]  # the other tasks were cancelled for it
            raise first from first.__cause__
        finally:
            await self._broker.stop()

    # ------------------------------------------------------------------------------------------------------- consume

    async def _consume(self) -> None:
        """Takes on as much as there is room for. Never stops polling: that is what keeps the membership alive."""
        while not self._has_left:
            is_shut = self._drain.is_asked or self._gate
            poll = NOTHING if is_shut else self._admission.next_poll(_now_s())
            held = self._partitions
            records = await self._broker.poll(self._open(poll.lanes), poll.num_max, POLL_S)
            if records:
                self._heard_s = _now_s()
            if held is not self._partitions:
                # These records were asked for before a rebalance: whose they are cannot be told. Read them again.
                if self._membership:
                    self._seek()
                continue
            records.sort(key=lambda record: LANES.index(self._lanes[record.place.topic]))  # each partition's in order
            self._admission.polled(poll, Counter(self._lanes[record.place.topic] for record in records), _now_s())
            for topic, num_records in Counter(record.place.topic for record in records).items():
                self._telemetry.polled(topic, num_records)
            for record in records:
                self._take(record)
            self._go_on()

    def _open(self, lanes: Collection[Lane]) -> list[Place]:
        """The partitions of these lanes that may be read on."""
        held = self._partitions.items()
        return [place for place, partition in held if self._lanes[place.topic] in lanes and not partition.is_full]

    def _take(self, record: Record) -> None:
        """The record waits at the gate, or its refusal is in the outbox; unless it was finished before."""
        partition = self._partitions[record.place]
        if not partition.begin(record.offset):
            return
        if not self._gate.add(partition, record):
            self._generations.poison(partition, record)

    def _go_on(self) -> None:
        """Whoever may pass the gate now is with the engine; the next flush is due if it has anything to say.

        In the middle of a rebalance nobody may: no attempt is on record then.
        """
        is_open = self._membership and not self._drain.is_asked
        while is_open and (waiting := self._gate.next(len(self._generations))):
            self._generations.begin(waiting.partition, waiting.record)
        if any(partition.has_news for partition in self._partitions.values()):
            self._has_news.set()

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
            await self._generations.apply(result)
            self._steps.task_done()
            self._go_on()

    async def _compile(self) -> None:
        """Makes the grammars that requests wait for."""
        while True:
            await self._generations.compile()
            self._go_on()

    # -------------------------------------------------------------------------------------------------------- commit

    async def _commit(self) -> None:
        """Flushes every few tens of milliseconds when there is something to say, and the meter now and then."""
        while True:
            try:
                async with asyncio.timeout(READING_INTERVAL_S):
                    await self._has_news.wait()
            except TimeoutError:
                pass  # nothing to say but the time
            await asyncio.sleep(self._flush_interval_s)
            await self._flush()

    async def _flush(self, *, is_last: bool = False) -> None:
        """What is in the outboxes is committed, or the partitions turn out to be others'. `is_last`: we let go of them.

        In the middle of a rebalance nothing happens: `assigned` will say whose the outcomes are.
        """
        async with self._flushing:
            if self._membership:
                await self._settle(self._membership, is_last=is_last)

    async def _settle(self, membership: Membership, *, is_last: bool) -> None:
        self._has_news.clear()
        partitions = self._partitions
        taken = ((place, one.last_burst() if is_last else one.burst()) for place, one in partitions.items())
        for bursts in portions({place: burst for place, burst in taken if burst}):
            if not await self._settle_bursts(bursts, partitions, membership):
                return
        self._telemetry.lag(await self._broker.lag())
        self._go_on()

    async def _settle_bursts(
        self, bursts: Mapping[Place, Burst], partitions: Mapping[Place, Partition], membership: Membership
    ) -> bool:
        """Whether these bursts are committed. Otherwise we hold what is still ours of all these partitions."""
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
            return False
        for place, burst in bursts.items():
            partitions[place].settle(burst)
        for account in _accounts(bursts.values()):
            self._meter.charge(account)
        self._heard_s = _now_s()
        num_records = 1 + sum(len(outcome.records) for burst in bursts.values() for outcome in burst.outcomes)
        self._telemetry.flushed(num_records, _now_s() - started_s, num_attempts)
        self._telemetry.metered(reading)
        return True

    # ---------------------------------------------------------------------------------------------------- rebalances

    async def revoked(self) -> None:
        """What is finished is committed; from then on no commit starts. What is held stays: it may come back to us."""
        membership, self._membership = self._membership, None
        async with self._flushing:
            if membership:
                await self._settle(membership, is_last=True)

    async def assigned(self, places: Sequence[Place], membership: Membership) -> None:
        """Holds these partitions under this membership, and lets go of all others."""
        await self._hold(places, "lost")
        for partition in self._partitions.values():
            partition.go_on()
        self._seek()
        self._membership = membership
        self._heard_s = _now_s()
        self._has_news.set()
        self._telemetry.assigned(places, membership.generation)

    async def _hold(self, places: Sequence[Place], reason: WasteReason) -> None:
        """Holds exactly these partitions.

        One that stands where we left it is still ours, with all its requests; one that has moved had another owner
        meanwhile, and is begun anew.
        """
        positions, ends = await self._broker.positions(places), await self._broker.ends(places)
        before, self._partitions = self._partitions, {}
        for place in places:
            partition = before.get(place)
            if partition is None or partition.committed != positions[place]:
                partition = Partition(place, positions[place], self._life, ends[place])
            self._partitions[place] = partition
        lost = [partition for place, partition in before.items() if self._partitions.get(place) is not partition]
        self._let_go(lost, reason)

    def _seek(self) -> None:
        for place, partition in self._partitions.items():
            self._broker.seek(place, partition.resume_at)

    def _let_go(self, partitions: Collection[Partition], reason: WasteReason) -> None:
        self._gate.drop(partitions)
        self._generations.let_go(partitions, reason)

    # --------------------------------------------------------------------------------------------------------- leave

    async def _leave(self) -> None:
        """Once asked: finishes what the budget allows, hands over the rest, commits it, closes the meter."""
        await self._drain.asked()
        self._telemetry.draining(self._drain.budget_s)
        # Two conditions and a clock: to look now and then is simplest.
        while (self._generations or self._has_news.is_set()) and not self._drain.is_over:  # noqa: ASYNC110
            await asyncio.sleep(LEAVING_LOOK_S)
        await asyncio.to_thread(self._engine.stop, LAST_STEP_S_MAX)
        await self._steps.join()  # all that it brought has been applied
        self._generations.hand_over()
        await self._flush_last()
        async with self._flushing:  # nobody commits after the final reading
            self._membership = None
            held, self._partitions = self._partitions, {}
            self._let_go(list(held.values()), "lost")
            try:
                await flush(self._broker, {}, [self._outbound.meter(self._meter.reading(final=True))], None)
            except Fenced as error:  # whoever has taken our place goes on; only the last reading is missing
                self._telemetry.fenced(0, str(error))
        self._has_left = True

    async def _flush_last(self) -> None:
        """What is in the outboxes is committed, and our attempts taken back. In the middle of a rebalance it waits for
        that to end; what it then no longer holds, or has no time left for, is the next owner's.
        """
        ends_s = _now_s() + REBALANCE_S_MAX
        await self._flush(is_last=True)
        while any(partition.outbox for partition in self._partitions.values()) and _now_s() < ends_s:
            await asyncio.sleep(LEAVING_LOOK_S)
            await self._flush(is_last=True)

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
