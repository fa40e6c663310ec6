"""Anything at any time: crashes, lost answers, slow calls, frozen workers, hand-overs, poisoned requests, by the dice.

The long run of the simulation. `python -m tests.random_faults --seeds 50000` says how it goes, names each seed that
went wrong, and ends with 1 if one did; `--first N --seeds 1` replays seed N.
"""

import argparse
import asyncio
import logging
import random
import sys
import tempfile
import time
from pathlib import Path

import structlog

from tests import virtual_time
from tests.simulation import SimulatedWorker, Simulation
from tests.tiny_tokenizer import save_byte_level
from worker.brokers.memory import Crash, Moment
from worker.errors import OutcomeUnknown
from worker.text import Tokenizer, load_tokenizer

FAULTS_S = 10.0  # of virtual time; then the weather clears, so that every run comes to an end
SESSION_S = 1.0  # whoever is frozen for longer is given up by the group
TRANSACTION = ("begin", "send", "send_positions", "commit")

# At each moment before or after a call of a worker: some dozens of calls to one fault.
CRASH, UNKNOWN, SLOW, FREEZE = 0.004, 0.003, 0.02, 0.004
STAY_S = (0.5, 8.0)  # from a worker's start to when it is asked to leave, if it is
BUDGETS_S = (0.0, 0.1, 5.0)  # of its leaving: from handing over all that it has, to finishing all

# In some runs answers take more than a second and no worker stays for one: they are handed over again and again.
RESTLESS = 0.3
RESTLESS_STAY_S = (0.1, 0.8)
TOKENS_MAX, RESTLESS_TOKENS_MAX = 8, 150


class Weather:
    """The faults of one worker's life."""

    def __init__(self, dice: random.Random, simulation: Simulation) -> None:
        self._dice = dice
        self._simulation = simulation
        self.worker: SimulatedWorker | None = None

    async def __call__(self, call: str, _moment: Moment) -> None:
        """Nothing, in most cases."""
        loop, dice = asyncio.get_running_loop(), self._dice
        if loop.time() > FAULTS_S:
            return
        if dice.random() < CRASH:
            raise Crash
        if call in TRANSACTION and dice.random() < UNKNOWN:
            raise OutcomeUnknown
        if dice.random() < SLOW:
            await asyncio.sleep(dice.expovariate(10))
        if self.worker and dice.random() < FREEZE:
            await asyncio.sleep(SESSION_S)
            # On a task of its own: the group does not wait for whom it gives up, and that one sleeps on.
            self._given_up = asyncio.create_task(self._simulation.cluster.expire(self.worker.broker))
            await asyncio.sleep(dice.expovariate(1))


async def supervise(simulation: Simulation, name: str, stay_s: tuple[float, float]) -> None:
    """A worker of this name lives and may be asked to leave; when it ends, for whatever reason, the next one begins."""
    dice = random.Random(simulation.dice.random())
    while True:
        weather = Weather(dice, simulation)
        weather.worker = simulation.hire(name, weather, dice.choice(BUDGETS_S))
        if dice.random() < 0.5:
            asyncio.get_running_loop().call_later(dice.uniform(*stay_s), weather.worker.drain.ask)
        await weather.worker.died.wait()
        await asyncio.sleep(dice.uniform(0, 0.5))
        await simulation.cluster.expire(weather.worker.broker)


def violations(seed: int, tokenizer: Tokenizer) -> list[str]:
    """What went wrong in the run of this seed."""

    async def main() -> list[str]:
        dice = random.Random(seed)
        is_restless = dice.random() < RESTLESS
        simulation = Simulation(
            seed,
            tokenizer,
            num_requests=dice.randint(1, 12),
            num_poisons=dice.choice([0, 0, 0, 1]),
            tokens_max=RESTLESS_TOKENS_MAX if is_restless else TOKENS_MAX,
            granularity="token" if is_restless else "request",
        )
        stay_s = RESTLESS_STAY_S if is_restless else STAY_S
        names = [f"w{number}" for number in range(dice.randint(1, 4))]
        supervisors = [asyncio.create_task(supervise(simulation, name, stay_s)) for name in names]
        await simulation.until_answered()
        for supervisor in supervisors:
            supervisor.cancel()
        await simulation.dismiss()
        return list(simulation.violations())

    return virtual_time.run(main())


def main() -> int:
    """Runs the seeds one after the other."""
    arguments = argparse.ArgumentParser(prog="python -m tests.random_faults", description=__doc__)
    arguments.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    arguments.add_argument("--seeds", type=int, default=50_000, help="how many (default 50000, about an hour)")
    given = arguments.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(save_byte_level(Path(folder)))
    num_wrong, said_s = 0, time.monotonic()
    for seed in range(given.first, given.first + given.seeds):
        if found := violations(seed, tokenizer):
            num_wrong += 1
            print(f"seed {seed}: {'; '.join(found)}", flush=True)
        if time.monotonic() > said_s + 10:
            said_s = time.monotonic()
            print(f"{seed + 1 - given.first} of {given.seeds} seeds, {num_wrong} of them wrong", file=sys.stderr)
    print(f"{given.seeds} seeds from {given.first}: {num_wrong} went wrong")
    return min(num_wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
