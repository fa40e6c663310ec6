"""The report: one line a fault, as a table to read and as JSON, with what it takes to run a trial again."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import msgspec

from tests.chaos.fault import SESSION_S, Fault, Finding

COLUMNS = (
    "fault", "what", "trials", "violations", "recovery, median", "p99", "tokens repeated", "control", "took",
    "run again",
)  # fmt: skip
RULE_OF_THREE = 3  # no failure in N trials: with 95 % confidence less than 3/N of all fail (1 - 0.95**(1/N) < 3/N)


@dataclass(kw_only=True)
class Line:
    """All trials of one fault."""

    fault: Fault
    first_seed: int
    num_strikes: int = 0
    duration_s: float = 0.0
    findings: dict[int, Finding] = field(default_factory=dict)  # by seed
    control: Finding | None = None

    @property
    def failed(self) -> list[int]:
        """The seeds of the trials with violations."""
        return [seed for seed, finding in sorted(self.findings.items()) if finding.violations]

    @property
    def recoveries_s(self) -> list[float]:
        """All of them, sorted."""
        return sorted(one for finding in self.findings.values() for one in finding.recoveries_s)

    @property
    def problems(self) -> list[str]:
        """What is wrong with the fault as a whole, its trials' violations included."""
        found = [f"seed {seed}: {one}" for seed in self.failed for one in self.findings[seed].violations]
        limit_s, times_s = self.fault.recovery_max_s, self.recoveries_s
        if limit_s is not None and times_s and p99(times_s) > limit_s:
            found.append(f"recovery takes {p99(times_s):.1f} s at p99, more than {limit_s:.1f} s")
        if self.control and not self.control_fails:
            found.append("the control shows nothing wrong: these trials prove nothing")
        return found

    @property
    def control_fails(self) -> bool:
        """Whether the worker without the protection did what it must."""
        assert self.fault.control
        return bool(self.control and any(self.fault.control.shows in one for one in self.control.violations))


def p99(times_s: Sequence[float]) -> float:
    """The 99th percentile; of fewer than a hundred values the largest."""
    return quantiles(times_s, n=100, method="inclusive")[-1] if len(times_s) >= 100 else max(times_s)


def markdown(lines: Sequence[Line], command: str) -> str:
    """The report to read."""
    return "\n".join(
        [
            f"`{command}`, {machine()}; sessions of {SESSION_S:.0f} s.",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|---" * len(COLUMNS) + "|",
            *(_row(line) for line in lines),
            "",
            *_how_strong(lines),
            *(f"- {line.fault.id}: {note}" for line in lines for note in _notes(line)),
            *(f"- **{line.fault.id}**: {problem}" for line in lines for problem in line.problems),
        ]
    )


def _row(line: Line) -> str:
    fault, times_s = line.fault, line.recoveries_s
    num_violations = sum(len(finding.violations) for finding in line.findings.values())
    cells = (
        fault.id,
        fault.title,
        f"{line.num_strikes} {fault.unit}",
        str(num_violations),
        f"{median(times_s):.1f} s" if times_s else "",
        f"{p99(times_s):.1f} s" if times_s else "",
        str(sum(finding.tokens_repeated for finding in line.findings.values())),
        {True: "fails", False: "**does not fail**"}[line.control_fails] if line.control else "",
        f"{line.duration_s:.0f} s",
        f"`--faults {fault.id} --seed {(line.failed or [line.first_seed])[0]} --trials 1`",
    )
    return f"| {' | '.join(cells)} |"


def _how_strong(lines: Sequence[Line]) -> list[str]:
    """What no violation in so many kills says, if there was none."""
    kills = [line for line in lines if line.fault.unit == "kills"]
    num_kills = sum(line.num_strikes for line in kills)
    if not num_kills or any(line.failed for line in kills):
        return []
    share = RULE_OF_THREE / num_kills
    return [f"No violation in {num_kills} kills: with 95 % confidence fewer than {share:.1%} of kills do harm.", ""]


def _notes(line: Line) -> list[str]:
    return list(dict.fromkeys(note for _, finding in sorted(line.findings.items()) for note in finding.notes))


def as_json(lines: Sequence[Line], command: str) -> bytes:
    """The report for programs."""
    return msgspec.json.format(msgspec.json.encode({"command": command, "faults": [_plain(line) for line in lines]}))


def _plain(line: Line) -> Mapping[str, Any]:
    return {
        "id": line.fault.id,
        "title": line.fault.title,
        "unit": line.fault.unit,
        "num_strikes": line.num_strikes,
        "duration_s": round(line.duration_s, 1),
        "problems": line.problems,
        "trials": {seed: asdict(finding) for seed, finding in sorted(line.findings.items())},
        "control": asdict(line.control) if line.control else None,
    }


def machine() -> str:
    """What it ran on, without names."""
    model = next(
        (row.partition(":")[2].strip() for row in _lines(Path("/proc/cpuinfo")) if row.startswith("model name")),
        platform.machine(),
    )
    return f"{os.cpu_count()} cores ({model}), Python {platform.python_version()}"


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []
