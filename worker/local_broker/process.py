"""One operating-system process known by number and start time, so that a recycled number is never taken for it.

A node outlives the command that started it, so nothing here relies on being its parent.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Reads until its input ends, which is when the process holding the other end is gone however it died; then kills.
_LIFELINE = 'read -r _; kill -KILL "$1" 2>/dev/null'


@dataclass(frozen=True)
class Process:
    """A process that was alive when this was made."""

    pid: int
    started: str  # as the system tells it; only ever compared

    @property
    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        return _started(self.pid) == self.started

    @property
    def memory_bytes(self) -> int:
        """Resident memory; 0 when it is gone."""
        return _memory_bytes(self.pid) if self.alive else 0

    def signal(self, number: int) -> None:
        """The signal was sent, if the process still runs."""
        if self.alive:
            os.kill(self.pid, number)


def find(pid: int) -> Process | None:
    """The process that has this number now, if one does."""
    started = _started(pid)
    return None if started is None else Process(pid, started)


class Lifeline:
    """While the holder lives, so may the process; when the holder is gone, however it went, the process is killed.

    A small shell waits for the end of a pipe that only the holder writes to. Linux's parent-death signal would do
    without it, but it fires when the *thread* that started the child ends. A holder that forks without exec passes the
    pipe on to its child, and so the watch too.
    """

    def __init__(self, pid: int) -> None:
        self._watch = subprocess.Popen(
            ["/bin/sh", "-c", _LIFELINE, "sh", str(pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the holder's terminal must not reach it first
        )

    def drop(self) -> None:
        """The process is no longer watched. For after its death: its number may be given to another."""
        self._watch.kill()
        self._watch.communicate()


if sys.platform == "linux":

    def _started(pid: int) -> str | None:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        fields = stat.rpartition(")")[
            2
        ].split()  # the name before it may hold spaces; state is field 3, start time field 22
        return None if fields[0] in "ZX" else fields[19]

    def _memory_bytes(pid: int) -> int:
        try:
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:  # gone since it was asked for
            return 0

else:  # macOS, the other system that the Java wheel serves

    def _started(pid: int) -> str | None:
        state, _, started = _ps(pid, "stat=,lstart=").partition(" ")
        return None if not state or state.startswith("Z") else started.strip()

    def _memory_bytes(pid: int) -> int:
        return int(_ps(pid, "rss=") or 0) * 1024

    def _ps(pid: int, columns: str) -> str:
        return subprocess.run(
            ["/bin/ps", "-o", columns, "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout.strip()
