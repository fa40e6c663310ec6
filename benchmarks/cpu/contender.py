"""One engine under test, as a process: loads in by name, figures out, one line each.

Owns the protocol between `contest.py` and the scripts `run_*.py`, each of which runs in its engine's own Python and
imports, beside its engine, this module and `loads.py` alone. The first line out says which versions run; from then on
each line in is the name of a load, and each line out what it took. What an engine prints itself goes to stderr.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.cpu.loads import LOADS, WARM_UP, Load


@dataclass
class Run:
    """One pass of a load, filled in by the engine's script. Seconds since its beginning."""

    num_tokens: int = 0
    first_token_s: float | None = None
    began_s: float = field(default_factory=time.perf_counter)

    def first_token(self) -> None:
        """A token has come; the first one counts."""
        if self.first_token_s is None:
            self.first_token_s = time.perf_counter() - self.began_s


Play = Callable[[Load, Run], None]


def serve(start: Callable[[], tuple[str, Play]]) -> None:
    """Plays the loads that stdin names until it ends.

    `start` makes the engine and tells its version, and how it generates a load's tokens and fills the run.
    """
    out = _own_stdout()
    version, play = start()
    play(WARM_UP, Run())
    _say(out, {"version": version})
    for line in sys.stdin:
        load = LOADS[line.strip()]
        run = Run()
        play(load, run)
        wall_s = time.perf_counter() - run.began_s
        expected = sum(num_tokens for _, num_tokens in load)
        if run.num_tokens != expected:
            raise SystemExit(f"{run.num_tokens} tokens came, and {expected} were asked for")
        _say(out, {"num_tokens": run.num_tokens, "wall_s": wall_s, "first_token_s": run.first_token_s})


def _own_stdout() -> int:
    """The descriptor of stdout, which from then on is stderr for everybody else, native code included."""
    out = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return out


def _say(out: int, line: dict[str, object]) -> None:
    os.write(out, json.dumps(line).encode() + b"\n")
