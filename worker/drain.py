"""Leaving on purpose: SIGTERM, SIGINT or a notice (`notice.py`) starts a drain with a budget; a second signal ends the
process at once.

Owns the wish to leave and the time left for it. What leaving means (poll nothing new, answer what fits the budget, hand
over the rest, flush, leave the group) is the service's. Nothing is lost either way: what is not committed is the next
owner's.
"""

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

IMPATIENT_EXIT_CODE = 130  # what a shell reports for a process ended by SIGINT


def end_process(exit_code: int) -> NoReturn:
    """The process is gone, without Python's own end.

    All is committed and closed by now. What is left would be to take apart torch's thousands of objects: 0.8 s of a
    processor, and several seconds on a busy machine, of those that a spot machine has left.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


class Drain:
    """Asked for once, counted from then on."""

    def __init__(self, budget_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget_s = budget_s
        self._clock = clock
        self._asked = asyncio.Event()
        self._ends_s = float("inf")

    def listen(self) -> None:
        """From now on SIGTERM and SIGINT ask. Must be called on the event loop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)

    def ask(self) -> None:
        """Starts the drain; asking again changes nothing."""
        if not self._asked.is_set():
            self._ends_s = self._clock() + self.budget_s
            self._asked.set()

    @property
    def is_asked(self) -> bool:
        """True from the first `ask` on."""
        return self._asked.is_set()

    async def asked(self) -> None:
        """Waits for `ask`."""
        await self._asked.wait()

    @property
    def is_over(self) -> bool:
        """The budget is spent: what is not finished is for another worker."""
        return self._clock() >= self._ends_s

    def _signalled(self) -> None:
        if self.is_asked:
            os._exit(IMPATIENT_EXIT_CODE)
        self.ask()
