"""`make chaos` and `make chaos-long`: drives the faults, keeps what failing trials leave behind, writes the report.

Trial n of a fault has the seed `--seed` + n, which decides everything in it, so `--faults F2 --seed 17 --trials 1` is
that trial again. The report is `build/chaos/report.md` and `report.json`, with the last run of each fault; a failing
trial's logs and topics are in `build/chaos/F2-17/`. Exit code 0 if nothing is wrong, 1 otherwise.
"""

import argparse
import asyncio
import logging
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.campaign import scripted_model
from tests.chaos.fault import Control, Fault, Finding, Stack, Trial
from tests.chaos.faults import FAULTS
from tests.chaos.report import Run, line_of, markdown, update
from worker.local_broker import Cluster

FOLDER = Path("build/chaos")
CONTROLS_MAX = 5


def main() -> int:
    given = arguments()
    logging.disable(logging.CRITICAL)  # of the client, to which brokers that go away are news
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = f"python -m tests.chaos {shlex.join(sys.argv[1:])}".strip()
    problems: list[str] = []
    sized = [(FAULTS[name], trials_of(FAULTS[name], given.size, given.trials)) for name in given.faults]
    for number, (fault, sizes) in enumerate(sized, start=1):
        print(f"[{number}/{len(sized)}] {fault.id}: {fault.title}", flush=True)
        if not sizes:
            print("    at night only")
            continue
        made = asyncio.run(run(fault, given.seed, sizes))
        problems += made.problems
        lines = update(FOLDER / "report.json", [line_of(made, command)])  # after each: a long run may be cut short
        (FOLDER / "report.md").write_text(markdown(lines) + "\n")
    print((FOLDER / "report.md").read_text())
    return int(bool(problems))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=names, default=list(FAULTS), help="such as F1,F4 (default: all)")
    parser.add_argument("--size", choices=("pr", "nightly"), default="pr", help="how many of each (default pr)")
    parser.add_argument("--trials", type=int, help="so many trials of each instead")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial of each (default 0)")
    return parser.parse_args()


def names(text: str) -> list[str]:
    """Raises ArgumentTypeError for what is no fault."""
    found = text.split(",")
    if unknown := set(found) - FAULTS.keys():
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: there are {', '.join(FAULTS)}")
    return found


def trials_of(fault: Fault, size: str, num_trials: int | None) -> list[int]:
    """The size of each trial."""
    if num_trials is not None:
        return [fault.per_trial] * num_trials
    total = fault.pr if size == "pr" else fault.nightly
    return [min(fault.per_trial, total - start) for start in range(0, total, fault.per_trial)]


async def run(fault: Fault, seed: int, sizes: Sequence[int]) -> Run:
    """All trials of the fault, on brokers of its own, and its control."""
    made = Run(fault=fault, first_seed=seed, num_strikes=sum(sizes))
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tokenmill-chaos-") as scratch:
        folder = Path(scratch)
        with Cluster(folder / "kafka", nodes=fault.nodes) as cluster:
            stack = Stack(brokers=cluster.brokers, model=scripted_model(folder), own_cluster=cluster)
            trials = [
                Trial(seed=seed + number, size=size, folder=FOLDER / f"{fault.id}-{seed + number}", stack=stack)
                for number, size in enumerate(sizes)
            ]
            gate = asyncio.Semaphore(fault.at_once)
            async with asyncio.TaskGroup() as tasks:
                for trial in trials:
                    tasks.create_task(one(fault, trial, gate, made))
            if fault.control and trials:
                made.control = await controlled(fault, fault.control, trials, FOLDER / f"{fault.id}-control")
    made.duration_s = time.monotonic() - begun_s
    return made


async def controlled(fault: Fault, control: Control, trials: Sequence[Trial], folder: Path) -> Finding:
    """A trial without the protection; the next one, as far as there are some, if chance has spared it."""
    for trial in trials[:CONTROLS_MAX]:
        finding = await attempt(fault, replace(trial, folder=folder, job=control.job))
        if any(control.shows in one for one in finding.violations):
            shutil.rmtree(folder)
            break
    return finding


async def one(fault: Fault, trial: Trial, gate: asyncio.Semaphore, made: Run) -> None:
    """The trial's finding is in the run."""
    async with gate:
        begun_s = time.monotonic()
        finding = made.findings[trial.seed] = await attempt(fault, trial)
        if finding.violations:
            (trial.folder / "violations.txt").write_text("\n".join(finding.violations) + "\n")
        else:
            shutil.rmtree(trial.folder, ignore_errors=True)
        wrong = f"{len(finding.violations)} VIOLATIONS, see {trial.folder}" if finding.violations else "right"
        times = ", ".join(f"{recovery_s:.1f}" for recovery_s in finding.recoveries_s)
        print(
            f"    seed {trial.seed} ({len(made.findings)} done): {wrong}; {time.monotonic() - begun_s:.1f} s"
            f"{f', recovered in {times} s' if times else ''}, {finding.tokens_repeated} tokens repeated",
            flush=True,
        )


async def attempt(fault: Fault, trial: Trial) -> Finding:
    """What the trial showed; a trial that breaks off is a violation of its own."""
    shutil.rmtree(trial.folder, ignore_errors=True)
    trial.folder.mkdir(parents=True)
    try:
        return await fault.run(trial)
    except Exception as error:  # noqa: BLE001  # the other trials go on
        (trial.folder / "traceback.txt").write_text(traceback.format_exc())
        return Finding(violations=[f"the trial broke off: {error!r}"])


if __name__ == "__main__":
    sys.exit(main())
