"""The engine's own thread: an inbox towards it, one delivery per step back.

Owns the loop and its end. Everything that crosses is plain data (`engine/types.py`), so that a process could take the
thread's place. Never swallows a failure: the loop's exception goes to `failed`, and the thread is over.
"""

import queue
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread

from engine.config import check_request
from engine.core import Core
from engine.types import Capacity, EngineStats, Request, StepResult

IDLE_REPORT_S = 1.0  # an idle engine reports that often, so that the meter moves and idle time is billed as it passes


@dataclass(frozen=True)
class Cancel:
    """The caller wants no more of this request, or of this choice of it."""

    request_id: int
    choice: int | None


@dataclass(frozen=True)
class Stop:
    """The caller wants no more at all."""


class EngineThread:
    """Runs a core. Any thread may call `submit`, `cancel` and `stats`; the callbacks come from the engine's own."""

    def __init__(
        self, core: Core, deliver: Callable[[StepResult], None], failed: Callable[[BaseException], None]
    ) -> None:
        self._core = core
        self._deliver = deliver
        self._failed = failed
        self._inbox: queue.SimpleQueue[Request | Cancel | Stop] = queue.SimpleQueue()
        self._is_stopping = False
        self._stats = core.stats()
        self._heartbeat_ns = time.monotonic_ns()
        self._thread = Thread(target=self._run, name="engine", daemon=True)  # a hung device call must not hold the exit

    @property
    def capacity(self) -> Capacity:
        """What the engine can hold."""
        return self._core.capacity

    @property
    def heartbeat_ns(self) -> int:
        """When the loop last came round, by time.monotonic_ns: older than a step may take means that it hangs."""
        return self._heartbeat_ns

    def start(self) -> None:
        """The engine runs; from now on its time is metered."""
        self._core.followers.on_loss(self._failed)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """The request is in the inbox. Raises RequestRefused, to the caller, if the engine could never run it."""
        check_request(request, self.capacity)
        self._inbox.put(request)

    def cancel(self, request_id: int, choice: int | None = None) -> None:
        """The wish is in the inbox; choices still running then will finish as stopped."""
        self._inbox.put(Cancel(request_id, choice))

    def stats(self) -> EngineStats:
        """As of the last step."""
        return self._stats

    def stop(self, timeout_s: float | None = None) -> bool:
        """The loop has ended: its last result tells of unfinished choices that they are interrupted. False: not yet."""
        self._inbox.put(Stop())
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._core.meter.start()
            while not self._is_stopping:
                self._heartbeat_ns = time.monotonic_ns()
                self._read_inbox()
                self._deliver(self._core.step())
                self._stats = self._core.stats()
        except BaseException as error:  # noqa: BLE001  whatever it is, the worker must know that the engine is gone
            self._failed(error)
        finally:
            self._core.followers.end()

    def _read_inbox(self) -> None:
        """All that came in is done. With nothing else to do, sleep until something comes, or a report is due."""
        with suppress(queue.Empty):
            if not self._core.has_work:
                try:
                    command = self._inbox.get(timeout=IDLE_REPORT_S)
                finally:
                    self._core.meter.wake()
                self._obey(command)
            while True:
                self._obey(self._inbox.get_nowait())

    def _obey(self, command: Request | Cancel | Stop) -> None:
        match command:
            case Request():
                self._core.submit(command)
            case Cancel(request_id, choice):
                self._core.cancel(request_id, choice)
            case Stop():
                self._core.interrupt()
                self._is_stopping = True
