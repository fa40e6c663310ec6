"""Whatever dies, wherever: each request is answered once and billed once, to the picodollar."""

import asyncio
import logging
from collections.abc import Callable, Collection

import pytest
import structlog

from schemas.results import ErrorCode
from tests import random_faults, virtual_time
from tests.simulation import ALL_TOPICS, ATTEMPTS_MAX, TOPICS, Simulation
from tests.tiny_tokenizer import save_byte_level
from worker.brokers.base import Position
from worker.brokers.memory import Crash, FaultAt, MemoryBroker
from worker.brokers.memory_cluster import Group
from worker.errors import OutcomeUnknown
from worker.flush import _transact
from worker.intake import Intake
from worker.offsets import OffsetLedger, pack
from worker.partition import Partition
from worker.text import Tokenizer, load_tokenizer

SEEDS = range(20)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """Thousands of lives would fill the log, and take most of the time."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_byte_level(tmp_path_factory.mktemp("tokenizer")))


async def survive(simulation: Simulation, fault: FaultAt) -> None:
    """One worker meets the fault, another lives through it; the first comes back if it died."""
    victim = simulation.hire("victim", fault)
    simulation.hire("witness")
    answered = asyncio.create_task(simulation.until_answered())
    died = asyncio.create_task(victim.died.wait())
    await asyncio.wait((answered, died), return_when=asyncio.FIRST_COMPLETED)
    if died.done():
        await asyncio.sleep(simulation.dice.uniform(0, 0.3))
        await simulation.cluster.expire(victim.broker)
        simulation.hire("victim")
    await answered
    died.cancel()
    await simulation.dismiss()


def test_a_run_without_faults_answers_all(tokenizer):
    async def main():
        simulation = Simulation(0, tokenizer)
        await survive(simulation, FaultAt(10**9, Crash()))
        assert simulation.violations() == []

    virtual_time.run(main())


def test_a_seed_replays_exactly(tokenizer):
    """To the byte and to the nanosecond: a failure that was seen once can be looked at as often as one likes."""

    async def main():
        simulation = Simulation(1, tokenizer)
        await survive(simulation, FaultAt(30, Crash()))
        logs = {topic: simulation.cluster.committed(topic) for topic in ALL_TOPICS}
        return logs, asyncio.get_running_loop().time()

    assert virtual_time.run(main()) == virtual_time.run(main())


class UnknownAt(FaultAt):
    """Counts the calls of transactions alone: the others have no outcome that could be unknown."""

    def __init__(self, number: int, calls: Collection[str] = ("begin", "send", "send_positions", "commit")) -> None:
        super().__init__(number, OutcomeUnknown())
        self._calls = calls

    async def __call__(self, call, moment):
        if call in self._calls:
            await super().__call__(call, moment)


def sweep(seed: int, tokenizer: Tokenizer, fault_at: Callable[[int], FaultAt]) -> int:
    """Runs with the fault at call 1, 2, 3, ... until a run ends before its fault; the number of such calls."""
    number, reached = 0, True
    while reached:
        number += 1

        async def main(number=number):
            simulation, fault = Simulation(seed, tokenizer), fault_at(number)
            await survive(simulation, fault)
            assert simulation.violations() == [], f"seed {seed}, fault at call {number}"
            return fault.reached

        reached = virtual_time.run(main())
    return number - 1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_crash_at_any_broker_call_loses_nothing_and_repeats_nothing(tokenizer, seed):
    assert sweep(seed, tokenizer, lambda number: FaultAt(number, Crash())) > 40


@pytest.mark.parametrize("seed", range(5))
def test_an_unknown_outcome_at_any_call_of_a_transaction_is_resolved(tokenizer, seed):
    assert sweep(seed, tokenizer, UnknownAt) > 20


async def take_over(simulation: Simulation, fault: FaultAt) -> None:
    """One worker meets the fault, perhaps while it leaves with all that it has; others go on."""
    victim = simulation.hire("victim", fault, budget_s=0.0)
    asyncio.get_running_loop().call_later(0.15, victim.drain.ask)
    await victim.died.wait()
    await simulation.cluster.expire(victim.broker)
    simulation.hire("heir")
    simulation.hire("victim")
    await simulation.until_answered()
    await simulation.dismiss()


@pytest.mark.parametrize("progress_fits", [True, False])
def test_the_checker_sees_tokens_that_are_computed_again(tokenizer, monkeypatch, progress_fits):
    if not progress_fits:
        monkeypatch.setattr(Intake, "_fits", lambda _self, _begun, _handoff: False)

    async def main():
        simulation = Simulation(0, tokenizer, tokens_max=60, granularity="token")
        await take_over(simulation, FaultAt(10**9, Crash()))
        assert simulation.handoffs()
        return [violation for violation in simulation.violations() if "computed again" in violation]

    assert bool(virtual_time.run(main())) is not progress_fits


@pytest.mark.parametrize("fault_at", [lambda number: FaultAt(number, Crash()), UnknownAt])
@pytest.mark.parametrize("seed", range(4))
def test_a_fault_at_any_call_of_a_worker_that_hands_over_loses_nothing_and_repeats_nothing(tokenizer, seed, fault_at):
    number, reached = 0, True
    while reached:
        number += 1

        async def main(number=number):
            simulation, fault = Simulation(seed, tokenizer, tokens_max=60), fault_at(number)
            await take_over(simulation, fault)
            assert simulation.violations() == [], f"seed {seed}, fault at call {number}"
            return fault.reached, len(simulation.handoffs())

        reached, num_handoffs = virtual_time.run(main())
    assert num_handoffs > 0
    assert number > 20


class Freeze:
    """The worker stops in the middle of its n-th call, of this name if one is given, and goes on when it is thawed."""

    def __init__(self, number: int, call: str = "") -> None:
        self._left = number
        self._call = call
        self.frozen, self.thawed = asyncio.Event(), asyncio.Event()

    async def __call__(self, call, _moment):
        if self._call in ("", call):
            self._left -= 1
        if self._left <= 0 and not self.thawed.is_set():
            self.frozen.set()
            await self.thawed.wait()


async def sleep_through_a_takeover(simulation: Simulation, call: str = "") -> None:
    """A worker is frozen at any call, given up by the group, and thawed when others have taken over, soon or late."""
    freeze = Freeze(simulation.dice.randint(1, 16) if call else simulation.dice.randint(4, 60), call)
    zombie = simulation.hire("zombie", freeze)
    simulation.hire("witness")
    answered = asyncio.create_task(simulation.until_answered())
    frozen = asyncio.create_task(freeze.frozen.wait())
    await asyncio.wait((answered, frozen), return_when=asyncio.FIRST_COMPLETED)
    await simulation.cluster.expire(zombie.broker)
    await asyncio.sleep(simulation.dice.choice([0, 0.02, 0.2, 5.0]))
    freeze.thawed.set()
    await answered
    frozen.cancel()
    await simulation.dismiss()


@pytest.mark.parametrize("seed", range(200))
def test_a_zombie_changes_nothing(tokenizer, seed):
    async def main():
        simulation = Simulation(seed, tokenizer)
        await sleep_through_a_takeover(simulation)
        assert simulation.violations() == []

    virtual_time.run(main())


async def supervise(simulation: Simulation, name: str) -> None:
    """A worker of this name lives; when it dies, the group gives it up and the next one begins."""
    while True:
        worker = simulation.hire(name)
        await worker.died.wait()
        await asyncio.sleep(simulation.dice.uniform(0, 0.3))
        await simulation.cluster.expire(worker.broker)


async def be_poisoned(simulation: Simulation) -> int:
    """Two workers, revived whenever they die; how often they did."""
    supervisors = [asyncio.create_task(supervise(simulation, name)) for name in ("a", "b")]
    await simulation.until_answered()
    for supervisor in supervisors:
        supervisor.cancel()
    await simulation.dismiss()
    return len(simulation.workers) - len(supervisors)


@pytest.mark.parametrize("seed", range(50))
def test_a_request_that_kills_its_workers_is_given_up_and_the_others_are_answered(tokenizer, seed):
    num_poisons = 1 + seed % 2

    async def main():
        simulation = Simulation(seed, tokenizer, num_requests=12, num_poisons=num_poisons)
        num_deaths = await be_poisoned(simulation)
        assert simulation.violations() == []
        codes = [completion.error.code for completion in simulation.completions() if completion.error]
        assert codes.count(ErrorCode.POISONED) == num_poisons
        assert ATTEMPTS_MAX - 1 <= num_deaths <= num_poisons * ATTEMPTS_MAX

    virtual_time.run(main())


@pytest.mark.parametrize("block", range(10))
def test_anything_at_any_time_loses_nothing_and_repeats_nothing(tokenizer, block):
    """500 seeds; `make simulate` runs 50,000."""
    found = {seed: random_faults.violations(seed, tokenizer) for seed in range(50 * block, 50 * (block + 1))}
    assert {seed: wrong for seed, wrong in found.items() if wrong} == {}


# ---------------------------------------------------------------------------------------------------- negative controls
# Without any one of these protections something goes wrong, and the checker sees it.


def without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def position(self, *, released=False):
        first = OffsetLedger_position(self, released=released).offset
        return Position(first, pack(self._owner, first, (), first - 1, {}))

    OffsetLedger_position = OffsetLedger.position
    monkeypatch.setattr(OffsetLedger, "position", position)


def without_generations(monkeypatch: pytest.MonkeyPatch) -> None:
    async def send_positions(self, positions, _membership):
        async with self._port("send_positions", in_transaction=True):
            transaction = self._transaction()
            transaction.group = self.group
            transaction.positions.update(positions)

    monkeypatch.setattr(MemoryBroker, "send_positions", send_positions)


def without_stable_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Group, "is_unstable", lambda _self, _places: False)


def without_asking_what_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    async def flush(broker, bursts, notes, membership):
        while True:
            try:
                await _transact(broker, bursts, notes, membership)
            except OutcomeUnknown:
                await broker.renew()
            else:
                return 1

    monkeypatch.setattr("worker.service.flush", flush)


def without_a_record_of_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Partition, "must_record", lambda _self, _offset: False)
    monkeypatch.setattr("tests.simulation.PATIENCE_S", 10.0)  # dozens of deaths


def without_moving_in_one_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    async def transact(broker, bursts, notes, membership):
        handoffs = [
            record
            for burst in bursts.values()
            for outcome in burst.outcomes
            for record in outcome.records
            if record.topic == TOPICS.handoff
        ]
        for record in handoffs:
            await broker.preview(record)
        for outcome in (outcome for burst in bursts.values() for outcome in burst.outcomes):
            object.__setattr__(outcome, "records", [one for one in outcome.records if one not in handoffs])
        await _transact(broker, bursts, notes, membership)

    monkeypatch.setattr("worker.flush._transact", transact)


async def crash_while_leaving(simulation: Simulation) -> None:
    await take_over(simulation, FaultAt(simulation.dice.randint(20, 60), Crash()))


async def crash_anywhere(simulation: Simulation) -> None:
    await survive(simulation, FaultAt(simulation.dice.randint(20, 60), Crash()))


async def lose_sight_of_a_commit(simulation: Simulation) -> None:
    await survive(simulation, UnknownAt(simulation.dice.randint(1, 16), ["commit"]))


async def sleep_before_a_commit(simulation: Simulation) -> None:
    await sleep_through_a_takeover(simulation, "commit")


@pytest.mark.parametrize(
    ("without", "scenario", "num_poisons"),
    [
        (without_metadata, crash_anywhere, 0),
        (without_generations, sleep_through_a_takeover, 0),
        (without_stable_positions, sleep_before_a_commit, 0),
        (without_asking_what_happened, lose_sight_of_a_commit, 0),
        (without_a_record_of_attempts, be_poisoned, 1),
        (without_moving_in_one_transaction, crash_while_leaving, 0),
    ],
)
def test_every_protection_is_needed(tokenizer, monkeypatch, without, scenario, num_poisons):
    without(monkeypatch)
    patience_seeds = 100

    async def main(seed):
        simulation = Simulation(seed, tokenizer, num_requests=8, num_poisons=num_poisons, tokens_max=40)
        await scenario(simulation)
        return simulation.violations()

    assert any(virtual_time.run(main(seed)) for seed in range(patience_seeds))
