"""Our engine and its peers on the CPU, in turn, on the same weights: `make bench-cpu`, or

    python -m benchmarks.cpu [--models mixtral-0.5b,...] [--loads A,B,C] [--only "tokenmill int8,..."] [--rounds 3]

Installs each peer the first time (vLLM 6 GB; llama.cpp compiles for some minutes), makes the checkpoints, starts every
contender, then plays all loads on all of them in turn, round by round. What cannot be installed is named. Writes
`cpu-MODEL.json`, `.md` and `.svg` to the folder, after every round anew.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cpu import checkpoints
from benchmarks.cpu.contest import Started
from benchmarks.cpu.loads import LOADS
from benchmarks.cpu.peers import CONTENDERS, NotInstalled
from benchmarks.cpu.report import Report

_began_s = time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What is played, and where things lie."""

    home: Path  # peers and checkpoints
    folder: Path  # results
    contenders: Sequence[str]
    loads: Sequence[str]
    rounds: int

    def play(self, model: str) -> Report:
        """All rounds on one checkpoint."""
        checkpoint = checkpoints.make(self.home / "models", model)
        report = Report(machine=_machine(), checkpoint=model)
        with ExitStack() as stack:
            running = [one for name in self.contenders if (one := self._start(name, checkpoint, report, stack))]
            for number in range(1, self.rounds + 1):
                for load in self.loads:
                    for one in running:
                        result = one.play(load, number)
                        report.results.append(result)
                        _say(
                            f"round {number} {load} {result.contender}: {result.tokens_per_s:.1f} tokens/s"
                            f", others took {result.foreign_cores:.2f} cores"
                        )
                self._write(report)
        return report

    def _start(self, name: str, checkpoint: Path, report: Report, stack: ExitStack) -> Started | None:
        contender = CONTENDERS[name]
        log = self.folder / f"{name.replace(' ', '-')}.log"
        try:
            _say(f"install {contender.engine}, unless it is there")
            contender.install(self.home)
            _say(f"start {name}")
            one = stack.enter_context(Started(contender, self.home, checkpoint, log))
        except NotInstalled as error:
            _say(f"{name} cannot take part: {error}")
            report.missing[name] = str(error)
            return None
        report.versions[name] = one.version
        return one

    def _write(self, report: Report) -> None:
        made = {"json": json.dumps(report.as_json(), indent=1), "md": report.table() + "\n", "svg": report.picture()}
        for kind, text in made.items():
            (self.folder / f"cpu-{report.checkpoint}.{kind}").write_text(text)


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {models[0] if models else 'an unnamed processor'}"


def _say(text: str) -> None:
    print(f"{time.monotonic() - _began_s:6.0f} s  {text}", file=sys.stderr, flush=True)


def _chosen(known: Sequence[str]) -> "argparse._ActionType":
    def names(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",")]
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}; choose of: {', '.join(known)}")
        return chosen

    return names


def main() -> None:
    """Prints each checkpoint's table at its end."""
    models, contenders, loads = list(checkpoints.SHAPES), list(CONTENDERS), list(LOADS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=_chosen(models), default=models)
    parser.add_argument("--loads", type=_chosen(loads), default=loads)
    parser.add_argument("--only", type=_chosen(contenders), default=contenders, help=", ".join(contenders))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--home", type=Path, default=checkpoints.HOME, help="of peers and checkpoints")
    parser.add_argument("--folder", type=Path, default=Path("build/cpu"), help="of the results")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    contest = Contest(
        home=asked.home, folder=asked.folder, contenders=asked.only, loads=asked.loads, rounds=asked.rounds
    )
    for model in asked.models:
        print(contest.play(model).table(), flush=True)


if __name__ == "__main__":
    main()
