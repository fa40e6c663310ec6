"""The report: one line a fault, as a table to read and as JSON, with what it takes to run a trial again.

A campaign may be run in parts: the report has the last run of each fault, with the command that made it.
"""

import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import msgspec
from msgspec import Struct

from tests.chaos.fault import SESSION_S, Fault, Finding

COLUMNS = (
    "fault", "what", "trials", "violations", "recovery, median", "p99", "tokens repeated", "control", "took",
    "run again",
)  # fmt: skip
RULE_OF_THREE = 3  # no failure in N trials: with 95 % confidence less than 3/N of all fail (1 - 0.95**(1/N) < 3/N)


@dataclass(kw_only=True)
class Run:
    """All trials of one fault, as they come in."""

    fault: Fault
    first_seed: int
    sizes: Sequence[int]  # of each trial
    findings: dict[int, Finding] = field(default_factory=dict)  # by seed
    control: Finding | None = None
    _begun_s: float | None = None
    duration_s: float = 0.0  # from the first trial's beginning to the last one's end

    def begin(self) -> float:
        """A trial begins: when."""
        now_s = time.monotonic()
        self._begun_s = now_s if self._begun_s is None else self._begun_s
        return now_s

    def end(self, seed: int, finding: Finding) -> None:
        """A trial is over, and has shown this."""
        assert self._begun_s is not None
        self.findings[seed] = finding
        self.duration_s = time.monotonic() - self._begun_s

    @property
    def control_fails(self) -> bool:
        """Whether the worker without the protection did what it must."""
        assert self.fault.control
        return bool(self.control and any(self.fault.control.shows in one for one in self.control.violations))

    @property
    def problems(self) -> list[str]:
        """What is wrong with the fault as a whole, its trials' violations included."""
        found = [f"seed {seed}: {one}" for seed, finding in sorted(self.findings.items()) for one in finding.violations]
        limit_s, times_s = self.fault.recovery_max_s, [one for f in self.findings.values() for one in f.recoveries_s]
        if limit_s is not None and times_s and p99(times_s) > limit_s:
            found.append(f"recovery takes {p99(times_s):.1f} s at p99, more than {limit_s:.1f} s")
        if self.control and not self.control_fails:
            found.append("the control shows nothing wrong: these trials prove nothing")
        return found


class Line(Struct, frozen=True, kw_only=True):
    """A run as the report keeps it."""

    id: str
    title: str
    unit: str
    num_strikes: int
    first_seed: int
    failed_seeds: list[int]
    num_violations: int
    recoveries_s: list[float]
    tokens_repeated: int
    control_fails: bool | None
    duration_s: float
    notes: list[str]
    problems: list[str]
    command: str
    command_s: float  # how long that took, with all else that it ran


def line_of(run: Run, command: str, command_s: float) -> Line:
    """The run, once it is over. `command` made it, and has taken so long by now."""
    findings = [finding for _, finding in sorted(run.findings.items())]
    return Line(
        id=run.fault.id,
        title=run.fault.title,
        unit=run.fault.unit,
        num_strikes=sum(run.sizes),
        first_seed=run.first_seed,
        failed_seeds=sorted(seed for seed, finding in run.findings.items() if finding.violations),
        num_violations=sum(len(finding.violations) for finding in findings),
        recoveries_s=sorted(one for finding in findings for one in finding.recoveries_s),
        tokens_repeated=sum(finding.tokens_repeated for finding in findings),
        control_fails=run.control_fails if run.control else None,
        duration_s=run.duration_s,
        notes=list(dict.fromkeys(note for finding in findings for note in finding.notes)),
        problems=run.problems,
        command=command,
        command_s=command_s,
    )


def p99(times_s: Sequence[float]) -> float:
    """The 99th percentile; of fewer than a hundred values the largest."""
    return quantiles(times_s, n=100, method="inclusive")[-1] if len(times_s) >= 100 else max(times_s)


def update(file: Path, lines: Iterable[Line]) -> list[Line]:
    """The report in this file has these lines, in the place of earlier ones of the same faults. All that it has now."""
    kept = msgspec.json.decode(file.read_bytes(), type=list[Line]) if file.exists() else []
    found = {line.id: line for line in (*kept, *lines)}
    together = sorted(found.values(), key=lambda line: int(line.id[1:]))
    file.write_bytes(msgspec.json.format(msgspec.json.encode(together)))
    return together


def markdown(lines: Sequence[Line]) -> str:
    """The report to read."""
    return "\n".join(
        [
            f"{machine()}; sessions of {SESSION_S:.0f} s where nothing else is said.",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|---" * len(COLUMNS) + "|",
            *(_row(line) for line in lines),
            "",
            *_how_strong(lines),
            *(f"- {line.id}: {note}" for line in lines for note in line.notes),
            *(f"- **{line.id}**: {problem}" for line in lines for problem in line.problems),
            "",
            *(
                f"`{command}`: {', '.join(line.id for line in made)}, in {max(line.command_s for line in made):.0f} s"
                for command, made in _by_command(lines).items()
            ),
        ]
    )


def _row(line: Line) -> str:
    times_s = line.recoveries_s
    seed = (line.failed_seeds or [line.first_seed])[0]
    cells = (
        line.id,
        line.title,
        f"{line.num_strikes:,} {line.unit}",
        str(line.num_violations),
        f"{median(times_s):.1f} s" if times_s else "",
        f"{p99(times_s):.1f} s" if times_s else "",
        f"{line.tokens_repeated:,}",
        {True: "fails", False: "**does not fail**", None: ""}[line.control_fails],
        f"{line.duration_s:.0f} s",
        f"`--faults {line.id} --seed {seed} --trials 1`",
    )
    return f"| {' | '.join(cells)} |"


def _how_strong(lines: Sequence[Line]) -> list[str]:
    """What no violation in so many kills says, if there was none."""
    kills = [line for line in lines if line.unit == "kills"]
    num_kills = sum(line.num_strikes for line in kills)
    if not num_kills or any(line.num_violations for line in kills):
        return []
    share = RULE_OF_THREE / num_kills
    return [f"No violation in {num_kills} kills: with 95 % confidence fewer than {share:.1%} of kills do harm.", ""]


def _by_command(lines: Sequence[Line]) -> Mapping[str, list[Line]]:
    commands: dict[str, list[Line]] = {}
    for line in lines:
        commands.setdefault(line.command, []).append(line)
    return commands


def machine() -> str:
    """What it ran on, without names."""
    model = next(
        (row.partition(":")[2].strip() for row in _lines(Path("/proc/cpuinfo")) if row.startswith("model name")),
        platform.machine(),
    )
    return f"{os.cpu_count()} cores ({model}), Python {platform.python_version()}"


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []
