"""Everything at once, in virtual time: the long run of the simulation (`tests/random_faults.py`) as a fault."""

import asyncio
import logging

import structlog

from tests import random_faults
from tests.chaos.fault import Fault, Finding, Trial
from worker.text import load_tokenizer


async def simulated(trial: Trial) -> Finding:
    """The seeds of this trial, one after the other; `python -m tests.random_faults --first N --seeds 1` replays one."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    tokenizer = load_tokenizer(trial.stack.model)
    first = trial.seed * SEEDS_PER_TRIAL
    finding = Finding()
    for seed in range(first, first + trial.size):
        found = await asyncio.to_thread(random_faults.violations, seed, tokenizer)
        finding.violations += [f"simulation's seed {seed}: {one}" for one in found]
    return finding


SEEDS_PER_TRIAL = 100

FAULTS = (
    Fault(
        id="F20",
        title="the simulation: crashes, lost answers, slow calls, frozen workers, drains and poison, by the dice",
        unit="seeds",
        pr=500,
        nightly=50_000,
        per_trial=SEEDS_PER_TRIAL,
        run=simulated,
    ),
)
