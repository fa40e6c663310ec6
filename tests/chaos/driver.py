"""Runs the trials of all faults side by side, as many as the processors have room for.

Most of a trial is waiting: for sessions to time out, for answers, for a line to come back. So each fault says how much
of a processor its trials keep busy, and trials start in order, whenever there is room for the first in line or one
behind it. Brokers are shared by all that leave them whole.
"""

import asyncio
import shutil
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from tests.campaign import scripted_model
from tests.chaos.fault import Control, Fault, Finding, Stack, Trial, own_brokers
from tests.chaos.report import Run

CONTROLS_MAX = 5
BROKER_LOG = "broker.log"  # of the shared broker, kept where something is wrong


class Room:
    """What the processors can do at once, in percent of one, lent to trials."""

    def __init__(self, percent: int) -> None:
        self._all = self._free = percent
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def of(self, percent: int) -> AsyncIterator[None]:
        """So much is ours; all, for whom all is too little."""
        wanted = min(percent, self._all)
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= wanted)  # who has waited longest looks first
            self._free -= wanted
        try:
            yield
        finally:
            async with self._changed:
                self._free += wanted
                self._changed.notify_all()


async def drive(runs: Sequence[Run], folder: Path, percent: int, report: Callable[[Run], None]) -> None:
    """All trials of the runs are over, and each run was reported as soon as it was.

    What failing trials leave behind is in the folder. `percent` of a processor may be kept busy: 200 are two.
    """
    with tempfile.TemporaryDirectory(prefix="tokenmill-chaos-") as scratch:
        async with own_brokers(Path(scratch) / "kafka") as cluster:
            stack = Stack(brokers=cluster.brokers, model=scripted_model(Path(scratch)))
            room = Room(percent)
            async with asyncio.TaskGroup() as tasks:
                for run in runs:
                    tasks.create_task(complete(run, stack, room, folder, report))
            if any(run.problems for run in runs):
                shutil.copy(cluster.nodes[0].log, folder / BROKER_LOG)


async def complete(run: Run, stack: Stack, room: Room, folder: Path, report: Callable[[Run], None]) -> None:
    """All trials of the run, and its control, are over."""
    fault = run.fault
    trials = [
        Trial(seed=seed, size=size, folder=folder / f"{fault.id}-{seed}", stack=stack)
        for seed, size in enumerate(run.sizes, start=run.first_seed)
    ]
    async with asyncio.TaskGroup() as tasks:
        for trial in trials:
            tasks.create_task(one(run, trial, room))
        if fault.control:
            tasks.create_task(control(run, fault.control, trials, room))
    report(run)


async def one(run: Run, trial: Trial, room: Room) -> None:
    """The trial's finding is in the run."""
    async with room.of(run.fault.percent):
        begun_s = run.begin()
        finding = await attempt(run.fault, trial)
        run.end(trial.seed, finding)
    if finding.violations:
        (trial.folder / "violations.txt").write_text("\n".join(finding.violations) + "\n")
    else:
        shutil.rmtree(trial.folder, ignore_errors=True)
    wrong = f"{len(finding.violations)} VIOLATIONS, see {trial.folder}" if finding.violations else "right"
    times = ", ".join(f"{recovery_s:.1f}" for recovery_s in finding.recoveries_s)
    print(
        f"{time.strftime('%H:%M:%S')}  {run.fault.id}, seed {trial.seed} ({len(run.findings)} of {len(run.sizes)}): "
        f"{wrong}; {time.monotonic() - begun_s:.1f} s{f', recovered in {times} s' if times else ''}, "
        f"{finding.tokens_repeated} tokens repeated",
        flush=True,
    )


async def control(run: Run, control: Control, trials: Sequence[Trial], room: Room) -> None:
    """Whether the worker without the protection fails is in the run."""
    async with room.of(run.fault.percent):
        folder = trials[0].folder.with_name(f"{run.fault.id}-control")
        run.control = await controlled(run.fault, control, trials, folder)
    print(f"{time.strftime('%H:%M:%S')}  {run.fault.id}, control: {'fails' if run.control_fails else 'DOES NOT FAIL'}")


async def controlled(fault: Fault, control: Control, trials: Sequence[Trial], folder: Path) -> Finding:
    """A trial without the protection; the next one, as far as there are some, if chance has spared it."""
    for trial in trials[:CONTROLS_MAX]:
        finding = await attempt(fault, replace(trial, folder=folder, job=control.job))
        if any(control.shows in one for one in finding.violations):
            shutil.rmtree(folder)
            break
    return finding


async def attempt(fault: Fault, trial: Trial) -> Finding:
    """What the trial showed; a trial that breaks off, or is not over in time, is a violation of its own."""
    shutil.rmtree(trial.folder, ignore_errors=True)
    trial.folder.mkdir(parents=True)
    try:
        async with asyncio.timeout(fault.trial_s_max):
            if not fault.nodes:
                return await fault.run(trial)
            async with own_brokers(trial.folder.absolute() / "kafka", fault.nodes) as cluster:
                stack = replace(trial.stack, brokers=cluster.brokers, own_cluster=cluster)
                return await fault.run(replace(trial, stack=stack))
    except Exception as error:  # noqa: BLE001  # the other trials go on
        (trial.folder / "traceback.txt").write_text(traceback.format_exc())
        return Finding(violations=[f"the trial broke off: {error!r}"])
