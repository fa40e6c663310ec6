"""Contenders as running processes: started one by one, then asked in turn, so that a disturbance meets them all.

Owns the clocks and the looks at the machine. An idle contender takes no processor time, so that all may stay up.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.cpu.peers import ROOT, Contender, NotInstalled

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One contender's pass of one load."""

    contender: str
    load: str
    round: int
    tokens_per_s: float  # of output, prompts' time included
    first_token_s: float | None  # of any request; None where the engine does not tell
    foreign_cores: float  # processor time of others, per second: what disturbed it
    peak_bytes: int  # resident memory of all its processes since their start


class Started:
    """A contender's process, ready to play loads until the block ends. Raises NotInstalled where it does not start."""

    def __init__(self, contender: Contender, home: Path, checkpoint: Path, log: Path) -> None:
        self.contender = contender
        command = contender.command(home, checkpoint)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **contender.environment(home)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            self.version = str(self._answer()["version"])
        except NotInstalled:
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            raise NotInstalled(f"it ended at its start with {''.join(last)!r}: see {log.name}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def play(self, load: str, number: int) -> Result:
        """One pass; what ran beside it is told with it."""
        assert self._process.stdin
        busy, own, began_s = _busy_ticks(), self._own_ticks(), time.perf_counter()
        self._process.stdin.write(f"{load}\n")
        self._process.stdin.flush()
        told = self._answer()
        elapsed_s = time.perf_counter() - began_s
        foreign_ticks = (_busy_ticks() - busy) - (self._own_ticks() - own)
        return Result(
            contender=self.contender.name,
            load=load,
            round=number,
            tokens_per_s=told["num_tokens"] / told["wall_s"],
            first_token_s=told["first_token_s"],
            foreign_cores=max(0.0, foreign_ticks / TICKS_PER_S / elapsed_s),
            peak_bytes=sum(_peak_bytes(process) for process in self._family()),
        )

    def _answer(self) -> Mapping[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise NotInstalled(f"{self.contender.name} ended by itself")
        answer: Mapping[str, Any] = json.loads(line)
        return answer

    def _family(self) -> list[int]:
        """Its process and all below it."""
        parents = dict(_parents())
        family = {self._process.pid}
        while more := {child for child, parent in parents.items() if parent in family} - family:
            family |= more
        return list(family)

    def _own_ticks(self) -> int:
        return sum(sum(map(int, fields[11:13])) for process in self._family() if (fields := _stat(process)))


def _parents() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            yield int(entry.name), int(fields[1])


def _stat(process: int) -> list[str]:
    """What the kernel says of it, from its state on; nothing where it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []


def _busy_ticks() -> int:
    """Of all cores since the machine's start, with what its hypervisor took."""
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return user + nice + system + irq + softirq + steal


def _peak_bytes(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
