"""`make chaos` and `make chaos-long`: the command line of the campaign, and its report.

Trial n of a fault has the seed `--seed` + n, which decides everything in it, so `--faults F2 --seed 17 --trials 1` is
that trial again. The report is `build/chaos/report.md` and `report.json`, with the last run of each fault; a failing
trial's logs and topics are in `build/chaos/F2-17/`. Exit code 0 if nothing is wrong, 1 otherwise.
"""

import argparse
import asyncio
import logging
import os
import shlex
import sys
import time
from pathlib import Path

from tests.chaos.driver import drive
from tests.chaos.fault import Fault
from tests.chaos.faults import FAULTS
from tests.chaos.report import Run, line_of, markdown, update

FOLDER = Path("build/chaos")


def main() -> int:
    given = arguments()
    logging.disable(logging.CRITICAL)  # of the client, to which brokers that go away are news
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = f"python -m tests.chaos {shlex.join(sys.argv[1:])}".strip()
    begun_s = time.monotonic()
    over: list[Run] = []

    def report(run: Run) -> None:  # after each: a long campaign may be cut short
        over.append(run)
        lines = update(FOLDER / "report.json", [line_of(one, command, time.monotonic() - begun_s) for one in over])
        (FOLDER / "report.md").write_text(markdown(lines) + "\n")

    sized = {name: trials_of(FAULTS[name], given.size, given.trials) for name in given.faults}
    runs = [Run(fault=FAULTS[name], first_seed=given.seed, sizes=sizes) for name, sizes in sized.items() if sizes]
    asyncio.run(drive(runs, FOLDER, given.processors * 100, report))
    print((FOLDER / "report.md").read_text())
    return int(any(run.problems for run in over))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=names, default=list(FAULTS), help="such as F1,F4 (default: all)")
    parser.add_argument("--size", choices=("pr", "nightly"), default="pr", help="how many of each (default pr)")
    parser.add_argument("--trials", type=int, help="so many trials of each instead")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial of each (default 0)")
    parser.add_argument(
        "--processors", type=int, default=os.cpu_count() or 1, help="to be kept busy by trials side by side (all)"
    )
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


if __name__ == "__main__":
    sys.exit(main())
