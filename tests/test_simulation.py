"""Whatever dies, wherever: each request is answered once and billed once, to the picodollar."""

import asyncio
import logging
from collections.abc import Callable

import pytest
import structlog

from schemas.results import ErrorCode
from tests import virtual_time
from tests.simulation import ALL_TOPICS, ATTEMPTS_MAX, Simulation
from tests.tiny_tokenizer import save_byte_level
from worker.brokers.memory import Crash, FaultAt
from worker.errors import OutcomeUnknown
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

    async def __call__(self, call, moment):
        if call in ("begin", "send", "send_positions", "commit"):
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
    assert sweep(seed, tokenizer, lambda number: UnknownAt(number, OutcomeUnknown())) > 20


class Freeze:
    """The worker stops in the middle of its n-th call, and goes on when it is thawed."""

    def __init__(self, number: int) -> None:
        self._left = number
        self.frozen, self.thawed = asyncio.Event(), asyncio.Event()

    async def __call__(self, _call, _moment):
        self._left -= 1
        if self._left <= 0 and not self.thawed.is_set():
            self.frozen.set()
            await self.thawed.wait()


@pytest.mark.parametrize("seed", range(200))
def test_a_zombie_changes_nothing(tokenizer, seed):
    """Frozen at any call, given up by the group, thawed when others have taken over: in the middle or at the end."""

    async def main():
        simulation = Simulation(seed, tokenizer)
        freeze = Freeze(simulation.dice.randint(4, 60))
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
        assert simulation.violations() == []

    virtual_time.run(main())


async def supervise(simulation: Simulation, name: str) -> None:
    """A worker of this name lives; when it dies, the group gives it up and the next one begins."""
    while True:
        worker = simulation.hire(name)
        await worker.died.wait()
        await asyncio.sleep(simulation.dice.uniform(0, 0.3))
        await simulation.cluster.expire(worker.broker)


@pytest.mark.parametrize("seed", range(50))
def test_a_request_that_kills_its_workers_is_given_up_and_the_others_are_answered(tokenizer, seed):
    num_poisons = 1 + seed % 2

    async def main():
        simulation = Simulation(seed, tokenizer, num_requests=12, num_poisons=num_poisons)
        names = ("a", "b")
        supervisors = [asyncio.create_task(supervise(simulation, name)) for name in names]
        await simulation.until_answered()
        for supervisor in supervisors:
            supervisor.cancel()
        await simulation.dismiss()
        assert simulation.violations() == []
        codes = [completion.error.code for completion in simulation.completions() if completion.error]
        assert codes.count(ErrorCode.POISONED) == num_poisons
        num_deaths = len(simulation.workers) - len(names)
        assert ATTEMPTS_MAX - 1 <= num_deaths <= num_poisons * ATTEMPTS_MAX

    virtual_time.run(main())
