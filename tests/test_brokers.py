"""The contract, held by both brokers; and what is the in-memory broker's own: its faults."""

import asyncio
import itertools
import uuid
from dataclasses import replace

import pytest

from tests.broker_contract import PATIENCE_S, BrokerContract, Crew, Owner, transact
from tests.kafka_proxy import FETCH, METADATA
from worker.brokers.base import Headers, Outgoing, Place, Position, Record
from worker.brokers.kafka import KafkaBroker
from worker.brokers.kafka_client import Sender, TopicSpec, create_topics, read_all
from worker.brokers.kafka_settings import KafkaSettings
from worker.brokers.memory import Crash, Fault, FaultAt, MemoryBroker, Moment
from worker.brokers.memory_cluster import MemoryCluster
from worker.errors import Fenced, OutcomeUnknown, Unavailable


class MemoryWorld:
    def __init__(self) -> None:
        self.cluster = MemoryCluster({})
        self._numbers = itertools.count()

    async def topic(self, partitions: int = 1) -> str:
        name = f"topic-{next(self._numbers)}"
        self.cluster.create_topic(name, partitions)
        return name

    def broker(self, worker: str) -> MemoryBroker:
        return MemoryBroker(self.cluster, "group", worker)

    async def produce(self, topic: str, *values: bytes, partition: int = 0, headers: Headers = ()) -> None:
        for value in values:
            self.cluster.produce(topic, value, partition=partition, headers=headers)

    async def committed(self, topic: str) -> list[Record]:
        return self.cluster.committed(topic)


# A commit is answered before its markers are written: 1.5 ms later at the median, 13 at most on an idle machine.
MARKERS_S = 0.25


class KafkaWorld:
    def __init__(self, brokers: str) -> None:
        self.settings = KafkaSettings(
            brokers=brokers,
            group=unique("group"),
            session_timeout_s=6,  # the least that brokers allow
            heartbeat_s=0.2,  # how soon a rebalance is noticed
        )

    async def topic(self, partitions: int = 1) -> str:
        name = unique("topic")
        await create_topics(self.settings, [TopicSpec(name=name, partitions=partitions)])
        return name

    def broker(self, worker: str) -> KafkaBroker:
        return KafkaBroker(replace(self.settings, worker=worker), outputs=())

    async def produce(self, topic: str, *values: bytes, partition: int = 0, headers: Headers = ()) -> None:
        async with Sender(self.settings) as sender:
            for value in values:
                record = Outgoing(topic=topic, key=None, value=value, partition=partition, headers=headers)
                await (await sender.send(record))

    async def committed(self, topic: str) -> list[Record]:
        await asyncio.sleep(MARKERS_S)
        return await read_all(self.settings, [topic])


class MemoryOwner(Owner):
    """An owner whose broker can be expired."""

    broker: MemoryBroker


class TestMemory(BrokerContract):
    @pytest.fixture
    def world(self):
        return MemoryWorld()


class TestKafka(BrokerContract):
    @pytest.fixture
    def world(self, kafka):
        return KafkaWorld(kafka.brokers)

    async def test_whoever_stays_keeps_its_partitions_when_others_come_and_go(self, world, crew):
        topic = await world.topic(6)
        a = await crew.alone(topic, partitions=6)
        b = await crew.hire("b", topic)
        await crew.until(lambda: len(a.places) == len(b.places) == 3)
        before = {owner: set(owner.places) for owner in (a, b)}
        c = await crew.hire("c", topic)
        await crew.until(lambda: all(len(owner.places) == 2 for owner in (a, b, c)))
        assert all(set(owner.places) < before[owner] for owner in (a, b))
        before = {owner: set(owner.places) for owner in (b, c)}
        await crew.dismiss(a)
        await crew.until(lambda: len(b.places) == len(c.places) == 3)
        assert all(before[owner] < set(owner.places) for owner in (b, c))


class TestMemoryFaults:
    """What the simulation of crashes stands on."""

    @pytest.fixture
    def world(self):
        return MemoryWorld()

    @pytest.fixture
    async def crew(self, world):
        return Crew(world)

    async def started(self, world: MemoryWorld, topic: str, worker: str, fault: Fault | None = None) -> MemoryOwner:
        owner = MemoryOwner(MemoryBroker(world.cluster, "group", worker, fault))
        await owner.broker.start([topic], owner)
        return owner

    async def test_a_crashed_worker_does_nothing_any_more(self, world):
        topic = await world.topic()
        a = await self.started(world, topic, "a", At("begin", "before", Crash()))
        for call in (a.broker.begin, a.broker.renew, a.broker.stop):
            with pytest.raises(Crash):
                await call()

    @pytest.mark.parametrize(("moment", "committed"), [("before", []), ("after", [b"1"])])
    async def test_an_unknown_outcome_happened_or_not_as_the_fault_says(self, world, moment, committed):
        topic, out = await world.topic(), await world.topic()
        a = await self.started(world, topic, "a", At("commit", moment, OutcomeUnknown("no answer")))
        place = Place(topic, 0)
        await transact(a.broker, [Outgoing(topic=out, key=None, value=b"1")], {place: Position(3)}, a.membership)
        with pytest.raises(OutcomeUnknown):
            await a.broker.commit()
        await a.broker.renew()
        assert [record.value for record in world.cluster.committed(out)] == committed
        assert await a.broker.positions([place]) == {place: Position(3 if committed else 0)}

    async def test_only_renew_may_follow_an_unknown_outcome(self, world):
        a = await self.started(world, await world.topic(), "a", At("begin", "after", OutcomeUnknown("no answer")))
        with pytest.raises(OutcomeUnknown):
            await a.broker.begin()
        with pytest.raises(AssertionError, match="renew"):
            await a.broker.commit()

    async def test_a_successor_ends_the_transaction_of_the_dead(self, world):
        topic, out = await world.topic(), await world.topic()
        a = await self.started(world, topic, "a", At("commit", "before", Crash()))
        place = Place(topic, 0)
        await transact(a.broker, [Outgoing(topic=out, key=None, value=b"1")], {place: Position(3)}, a.membership)
        with pytest.raises(Crash):
            await a.broker.commit()
        b = await self.started(world, topic, "b")
        assert b.positions == {place: Position(0)}
        assert world.cluster.committed(out) == []

    async def test_a_frozen_worker_wakes_up_fenced_and_joins_again(self, world):
        topic, out = await world.topic(), await world.topic()
        thaw = asyncio.Event()
        a = await self.started(world, topic, "a", FrozenBefore("commit", thaw))
        b = await self.started(world, topic, "b")
        await world.cluster.expire(b.broker)  # a holds it all
        await transact(a.broker, [Outgoing(topic=out, key=None, value=b"1")], {}, a.membership)
        zombie = asyncio.create_task(a.broker.commit())
        await asyncio.sleep(0.01)
        await world.cluster.expire(a.broker)
        b = await self.started(world, topic, "c")
        thaw.set()
        with pytest.raises(Fenced):
            await zombie
        assert world.cluster.committed(out) == []
        await a.broker.renew()
        await a.broker.poll((), 1, 0.0)
        assert a.history[-2:] == ["revoked", "assigned"]

    async def test_a_rebalance_does_not_wait_for_a_member_that_was_given_up(self, world):
        topic = await world.topic()
        a = await self.started(world, topic, "a")

        a.is_stuck = True
        joining = asyncio.create_task(self.started(world, topic, "b"))
        await asyncio.sleep(0.01)
        assert not joining.done()
        await world.cluster.expire(a.broker)
        assert (await joining).places == (Place(topic, 0),)

    async def test_markers_take_offsets(self, world):
        topic, out = await world.topic(), await world.topic()
        a = await self.started(world, topic, "a")
        for value in (b"1", b"2"):
            await transact(a.broker, [Outgoing(topic=out, key=None, value=value)], {}, a.membership)
            await a.broker.commit()
        assert [record.offset for record in world.cluster.committed(out)] == [0, 2]

    async def test_every_point_of_a_run_can_be_reached(self, world):
        points = []
        for number in itertools.count(1):
            fault = FaultAt(number, Crash())
            try:
                a = await self.started(world, await world.topic(), f"worker-{number}", fault)
                await transact(a.broker, [], {a.places[0]: Position(1)}, a.membership)
                await a.broker.commit()
            except Crash:
                points.append(number)
            if not fault.reached:
                break
        changing, reading = ("start", "begin", "send_positions", "commit"), ("positions",)
        assert len(points) == 2 * len(changing) + len(reading)


class At:
    """A fault at one call."""

    def __init__(self, call: str, moment: Moment, error: BaseException) -> None:
        self.call, self.moment, self.error = call, moment, error

    async def __call__(self, call: str, moment: Moment) -> None:
        if (call, moment) == (self.call, self.moment):
            raise self.error


class FrozenBefore:
    """A worker that stops before a call, in every task, until it is thawed."""

    def __init__(self, call: str, thaw: asyncio.Event) -> None:
        self.call, self.thaw, self.is_frozen = call, thaw, False

    async def __call__(self, call: str, moment: Moment) -> None:
        self.is_frozen |= (call, moment) == (self.call, "before")
        if self.is_frozen:
            await self.thaw.wait()


def unique(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex[:12]}"


async def test_a_topic_that_no_broker_tells_of_in_time_is_not_called_missing(stage):
    async with Sender(replace(stage.direct, brokers=stage.proxy.brokers)) as sender:
        stage.proxy.lose_requests(METADATA)
        with pytest.raises(Unavailable):
            await sender.send(Outgoing(topic=unique("unheard-of"), key=None, value=b"1"))


async def test_a_fetch_that_waits_to_be_tried_again_does_not_disturb_the_end(stage):
    """aiokafka passes its cancellation on: a worker without brokers ended with a traceback."""
    a = await stage.owner("a")
    a.broker._consumer._fetcher._retry_backoff = 60
    stage.proxy.lose_requests(FETCH)
    async with asyncio.timeout(PATIENCE_S):
        while not any(waits_to_fetch(task) for task in asyncio.all_tasks()):
            await a.broker.poll(a.places, 1, 0.05)
    await a.broker.stop()


def waits_to_fetch(task: asyncio.Task[object]) -> bool:
    inner = getattr(task.get_coro(), "cr_await", None)
    return "_proc_fetch_request" in repr(task.get_coro()) and getattr(inner, "__name__", "") == "sleep"
