"""Everything at once, in virtual time: the long run of the simulation (`tests/random_faults.py`) as a fault."""

import asyncio
import logging
from functools import partial
from pathlib import Path

import structlog

from tests import random_faults
from tests.campaign import in_nursery
from tests.chaos.fault import Fault, Finding, Trial
from worker.text import load_tokenizer

SEEDS_PER_TRIAL = 100


async def simulated(trial: Trial) -> Finding:
    """The seeds of this trial, one after the other; `python -m tests.random_faults --first N --seeds 1` replays one."""
    first = trial.seed * SEEDS_PER_TRIAL
    run = partial(violations, range(first, first + trial.size))
    return Finding(violations=await asyncio.to_thread(in_nursery, run, str(trial.stack.model), ["the process broke"]))


def violations(seeds: range, model: str) -> list[str]:
    """What went wrong in the runs of these seeds. In a process of its own: it would hold up all other trials."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    tokenizer = load_tokenizer(Path(model))
    return [f"simulation's seed {seed}: {one}" for seed in seeds for one in random_faults.violations(seed, tokenizer)]


FAULTS = (
    Fault(
        id="F20",
        title="the simulation: crashes, lost answers, slow calls, frozen workers, drains and poison, by the dice",
        unit="seeds",
        pr=500,
        nightly=50_000,
        per_trial=SEEDS_PER_TRIAL,
        percent=100,
        run=simulated,
    ),
)
