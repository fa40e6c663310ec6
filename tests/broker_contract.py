"""What any broker must do to stand behind the port: subclass `BrokerContract` and give it a `world`.

The tests speak the port alone, so they read as its specification.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Protocol

import pytest

from worker.brokers.base import Broker, Headers, Membership, Outgoing, Place, Position, Record
from worker.errors import Fenced, Misconfigured

PATIENCE_S = 20.0  # of every wait: three rebalances on a busy machine


class World(Protocol):
    """A cluster with one group, and a way to look at it from outside."""

    async def topic(self, partitions: int = 1) -> str:
        """A new topic."""

    def broker(self, worker: str) -> Broker:
        """A worker of the group, not started."""

    async def produce(self, topic: str, *values: bytes, partition: int = 0, headers: Headers = ()) -> None:
        """Records of a client without transactions."""

    async def committed(self, topic: str) -> list[Record]:
        """What a read_committed reader sees."""


class Owner:
    """A listener that takes up where the group was, as the worker does."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.places: Sequence[Place] = ()
        self.membership: Membership | None = None
        self.positions: Mapping[Place, Position] = {}
        self.history: list[str] = []
        self.is_stuck = False

    async def revoked(self) -> None:
        if self.is_stuck:
            await asyncio.Event().wait()
        self.history.append("revoked")
        self.places = ()

    async def assigned(self, places: Sequence[Place], membership: Membership) -> None:
        self.positions = await self.broker.positions(places)
        for place, position in self.positions.items():
            self.broker.seek(place, position.offset)
        self.places, self.membership = tuple(places), membership
        self.history.append("assigned")


class LostOwner(Owner):
    """A listener that cannot take up where the group was."""

    async def assigned(self, places: Sequence[Place], membership: Membership) -> None:
        raise Misconfigured("metadata of another program")


class Crew:
    """Started brokers with their owners; stopped at the end."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.owners: list[Owner] = []

    async def hire(self, worker: str, topic: str) -> Owner:
        """A started worker; wait for its partitions with `until`."""
        owner = Owner(self._world.broker(worker))
        await owner.broker.start([topic], owner)
        self.owners.append(owner)
        return owner

    async def alone(self, topic: str, partitions: int = 1, worker: str = "a") -> Owner:
        """A worker that holds all partitions of the topic."""
        owner = await self.hire(worker, topic)
        await self.until(lambda: len(owner.places) == partitions)
        return owner

    async def until(self, condition: Callable[[], bool]) -> None:
        """Everyone polls, reading nothing, until the condition holds."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline_s, [owner.history for owner in self.owners]
            for owner in self.owners:
                await owner.broker.poll((), 1, 0.02)

    async def dismiss(self, owner: Owner) -> None:
        """The worker leaves."""
        self.owners.remove(owner)
        await owner.broker.stop()

    async def close(self) -> None:
        for owner in list(self.owners):
            await self.dismiss(owner)


async def read(broker: Broker, places: Collection[Place], count: int, num_max: int = 100) -> list[Record]:
    """Polls until `count` records have come."""
    records: list[Record] = []
    deadline_s = time.monotonic() + PATIENCE_S
    while len(records) < count:
        assert time.monotonic() < deadline_s, f"{len(records)} of {count} records came"
        records += await broker.poll(places, num_max, 0.05)
    return records


async def transact(
    broker: Broker, outgoing: Sequence[Outgoing], positions: Mapping[Place, Position], membership: Membership | None
) -> None:
    """One burst, up to the commit."""
    assert membership
    await broker.begin()
    sent: list[Awaitable[None]] = [await broker.send(record) for record in outgoing]
    await asyncio.gather(*sent)
    if positions:
        await broker.send_positions(positions, membership)


class BrokerContract:
    """The port's promises, one test each."""

    @pytest.fixture
    async def crew(self, world):
        crew = Crew(world)
        yield crew
        await crew.close()

    async def test_a_record_arrives_as_it_was_sent(self, world, crew):
        topic, out = await world.topic(), await world.topic(2)
        a = await crew.alone(topic)
        headers = (("ce_id", b"1"), ("ce_id", b"again"), ("empty", b""), ("null", None))
        outgoing = Outgoing(topic=out, key=b"key", value=b"value", headers=headers, partition=1)
        await transact(a.broker, [outgoing], {}, a.membership)
        await a.broker.commit()
        (record,) = await world.committed(out)
        assert (record.place, record.offset) == (Place(out, 1), 0)
        assert (record.key, record.value, record.headers) == (b"key", b"value", headers)

    async def test_a_record_without_a_value_and_one_without_a_key_arrive(self, world, crew):
        topic, out = await world.topic(), await world.topic()
        a = await crew.alone(topic)
        outgoing = [Outgoing(topic=out, key=b"key", value=None), Outgoing(topic=out, key=None, value=b"")]
        await transact(a.broker, outgoing, {}, a.membership)
        await a.broker.commit()
        assert [(record.key, record.value) for record in await world.committed(out)] == [(b"key", None), (None, b"")]

    async def test_a_record_with_neither_key_nor_value_arrives(self, world, crew):
        topic, out = await world.topic(), await world.topic()
        a = await crew.alone(topic)
        await transact(a.broker, [Outgoing(topic=out, key=None, value=None)], {}, a.membership)
        await a.broker.commit()
        (record,) = await world.committed(out)
        assert not record.key  # an empty one may stand for none
        assert record.value is None

    async def test_records_of_one_key_keep_their_order(self, world, crew):
        topic, out = await world.topic(), await world.topic(3)
        a = await crew.alone(topic)
        values = [str(number).encode() for number in range(50)]
        await transact(a.broker, [Outgoing(topic=out, key=b"k", value=v) for v in values], {}, a.membership)
        await a.broker.commit()
        assert [record.value for record in await world.committed(out)] == values

    async def test_records_and_positions_become_true_together(self, world, crew):
        topic, out = await world.topic(), await world.topic()
        a = await crew.alone(topic)
        place = Place(topic, 0)
        before = await a.broker.positions([place])
        await transact(a.broker, [Outgoing(topic=out, key=None, value=b"1")], {place: Position(7, "m")}, a.membership)
        assert await world.committed(out) == []
        await a.broker.commit()
        assert before == {place: Position(0)}
        assert await a.broker.positions([place]) == {place: Position(7, "m")}
        assert [record.value for record in await world.committed(out)] == [b"1"]

    async def test_positions_carry_metadata_of_4096_characters_and_no_more(self, world, crew):
        topic = await world.topic()
        a = await crew.alone(topic)
        place, longest = Place(topic, 0), Position(1, "é" * 4096)
        with pytest.raises(ValueError, match="4096"):
            Position(1, "é" * 4097)
        await transact(a.broker, [], {place: longest}, a.membership)
        await a.broker.commit()
        assert await a.broker.positions([place]) == {place: longest}

    async def test_an_aborted_transaction_leaves_nothing(self, world, crew):
        topic, out = await world.topic(), await world.topic()
        a = await crew.alone(topic)
        place = Place(topic, 0)
        await transact(a.broker, [Outgoing(topic=out, key=None, value=b"no")], {place: Position(7)}, a.membership)
        await a.broker.abort()
        await transact(a.broker, [Outgoing(topic=out, key=None, value=b"yes")], {place: Position(1)}, a.membership)
        await a.broker.commit()
        assert [record.value for record in await world.committed(out)] == [b"yes"]
        assert await a.broker.positions([place]) == {place: Position(1)}

    async def test_the_input_is_read_committed(self, world, crew):
        topic = await world.topic()
        a = await crew.alone(topic)
        for value, end in ((b"no", a.broker.abort), (b"yes", a.broker.commit)):
            await transact(a.broker, [Outgoing(topic=topic, key=None, value=value)], {}, a.membership)
            await end()
        assert [record.value for record in await read(a.broker, a.places, 1)] == [b"yes"]

    async def test_a_membership_that_the_group_has_left_behind_is_fenced(self, world, crew):
        topic, out = await world.topic(2), await world.topic()
        a = await crew.alone(topic, partitions=2)
        old = a.membership
        b = await crew.hire("b", topic)
        await crew.until(lambda: len(a.places) == len(b.places) == 1)
        outgoing = [Outgoing(topic=out, key=None, value=b"late")]
        with pytest.raises(Fenced):
            await transact(a.broker, outgoing, {Place(topic, 0): Position(9)}, old)
        await a.broker.abort()
        assert await world.committed(out) == []
        assert await b.broker.positions([Place(topic, 0)]) == {Place(topic, 0): Position(0)}

    async def test_after_being_fenced_a_worker_is_given_partitions_anew(self, world, crew):
        topic = await world.topic()
        a = await crew.alone(topic)
        stale = Membership(group=a.membership.group, generation=a.membership.generation - 1, member=a.membership.member)
        with pytest.raises(Fenced):
            await transact(a.broker, [], {Place(topic, 0): Position(9)}, stale)
        await a.broker.renew()
        await crew.until(lambda: a.history == ["assigned", "revoked", "assigned"])

    async def test_a_producer_whose_place_was_taken_is_fenced(self, world, crew):
        topic, out = await world.topic(), await world.topic()
        a = await crew.alone(topic, worker="same")
        await transact(a.broker, [Outgoing(topic=out, key=None, value=b"1")], {}, a.membership)
        await crew.hire("same", topic)
        with pytest.raises(Fenced):
            await a.broker.commit()
        assert await world.committed(out) == []

    async def test_renew_ends_the_open_transaction(self, world, crew):
        topic, out = await world.topic(), await world.topic()
        a = await crew.alone(topic)
        place = Place(topic, 0)
        await transact(a.broker, [Outgoing(topic=out, key=None, value=b"no")], {place: Position(7)}, a.membership)
        await a.broker.renew()
        assert await a.broker.positions([place]) == {place: Position(0)}
        await transact(a.broker, [Outgoing(topic=out, key=None, value=b"yes")], {place: Position(1)}, a.membership)
        await a.broker.commit()
        assert [record.value for record in await world.committed(out)] == [b"yes"]

    async def test_positions_wait_for_the_transaction_that_moves_them(self, world, crew):
        topic = await world.topic()
        a = await crew.alone(topic)
        place = Place(topic, 0)
        await transact(a.broker, [], {place: Position(7)}, a.membership)
        asked = asyncio.create_task(a.broker.positions([place]))
        await asyncio.sleep(0.2)
        assert not asked.done()
        await a.broker.commit()
        assert await asked == {place: Position(7)}

    async def test_poll_reads_the_places_asked_for_and_no_others(self, world, crew):
        topic = await world.topic(2)
        await world.produce(topic, b"0a", b"0b", partition=0)
        await world.produce(topic, b"1a", partition=1)
        a = await crew.alone(topic, partitions=2)
        assert [record.value for record in await read(a.broker, [Place(topic, 1)], 1)] == [b"1a"]
        assert await a.broker.poll([Place(topic, 1)], 100, 0.1) == []
        assert [record.value for record in await read(a.broker, [Place(topic, 0)], 2)] == [b"0a", b"0b"]

    async def test_poll_returns_no_more_records_than_asked_for(self, world, crew):
        topic = await world.topic()
        await world.produce(topic, b"0", b"1", b"2")
        a = await crew.alone(topic)
        polls = [await read(a.broker, a.places, 1, num_max=1) for _ in range(3)]
        assert [[record.value for record in records] for records in polls] == [[b"0"], [b"1"], [b"2"]]

    async def test_seek_decides_what_is_polled_next(self, world, crew):
        topic = await world.topic()
        await world.produce(topic, b"0", b"1", b"2")
        a = await crew.alone(topic)
        await read(a.broker, a.places, 3)
        a.broker.seek(Place(topic, 0), 1)
        assert [record.offset for record in await read(a.broker, a.places, 2)] == [1, 2]

    async def test_lag_counts_what_is_left_to_read(self, world, crew):
        topic = await world.topic()
        await world.produce(topic, b"0", b"1", b"2")
        a = await crew.alone(topic)
        await read(a.broker, a.places, 1, num_max=1)
        assert await a.broker.lag() == {Place(topic, 0): 2}

    async def test_the_end_lies_behind_what_can_be_polled(self, world, crew):
        topic = await world.topic(2)
        await world.produce(topic, b"0", b"1", b"2")
        a = await crew.alone(topic, partitions=2)
        assert await a.broker.ends(a.places) == {Place(topic, 0): 3, Place(topic, 1): 0}

    async def test_a_new_group_starts_at_the_start_of_the_log(self, world, crew):
        topic = await world.topic()
        await world.produce(topic, b"before")
        a = await crew.alone(topic)
        assert a.positions == {Place(topic, 0): Position(0)}
        assert [record.value for record in await read(a.broker, a.places, 1)] == [b"before"]

    async def test_members_share_the_partitions_and_take_over_what_is_committed(self, world, crew):
        topic = await world.topic(4)
        a = await crew.alone(topic, partitions=4)
        b = await crew.hire("b", topic)
        await crew.until(lambda: len(a.places) == len(b.places) == 2)
        assert set(a.places) | set(b.places) == {Place(topic, number) for number in range(4)}
        theirs = {place: Position(5, "half") for place in b.places}
        await transact(b.broker, [], theirs, b.membership)
        await b.broker.commit()
        await crew.dismiss(b)
        await crew.until(lambda: len(a.places) == 4)
        assert {place: a.positions[place] for place in theirs} == theirs

    async def test_every_assignment_but_the_first_follows_a_revocation(self, world, crew):
        topic = await world.topic(2)
        a = await crew.alone(topic, partitions=2)
        b = await crew.hire("b", topic)
        await crew.until(lambda: len(a.places) == len(b.places) == 1)
        assert a.history[:3] == ["assigned", "revoked", "assigned"]
        assert b.history[0] == "assigned"

    async def test_a_listener_that_fails_ends_the_next_poll(self, world, crew):
        topic = await world.topic()
        owner = LostOwner(world.broker("a"))
        await owner.broker.start([topic], owner)
        crew.owners.append(owner)
        with pytest.raises(Misconfigured, match="another program"):
            await crew.until(lambda: False)

    async def test_a_missing_topic_is_named(self, world):
        broker = world.broker("a")
        with pytest.raises(Misconfigured, match=r"'no\.such\.topic'.*tokenmill topics create"):
            await broker.start(["no.such.topic"], Owner(broker))

    async def test_previews_are_seen_at_once_and_stand_outside_transactions(self, world, crew):
        topic, live = await world.topic(), await world.topic()
        a = await crew.alone(topic)
        await a.broker.begin()
        for value in (b"a", b"b", b"c"):
            await a.broker.preview(Outgoing(topic=live, key=b"k", value=value))
        deadline_s = time.monotonic() + PATIENCE_S
        while [record.value for record in await world.committed(live)] != [b"a", b"b", b"c"]:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.02)
        await a.broker.abort()

    async def test_a_preview_to_a_missing_topic_is_dropped_without_a_word(self, world, crew):
        a = await crew.alone(await world.topic())
        await a.broker.preview(Outgoing(topic="no.such.topic", key=b"k", value=b"v"))
