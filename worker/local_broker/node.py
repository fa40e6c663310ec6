"""One Kafka node: its folder (data, settings, log, the number of its process) and what is done to that process."""

import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from worker.local_broker.errors import BrokerNotReady
from worker.local_broker.folders import write_whole
from worker.local_broker.ports import HOST
from worker.local_broker.process import Lifeline, Process, find

_POLL_S = 0.02  # how soon an end is noticed
_KILLED_S = 10.0  # a killed process is gone at once unless the disk hangs
_LOG_TAIL_BYTES = 2000  # the last exception with its cause, and no more than a screen


@dataclass
class Node:
    """Node `id` (Kafka's `node.id`, from 1) of a cluster; alive or not, its files are in `folder`."""

    id: int
    folder: Path
    port: int
    _child: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _lifeline: Lifeline | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        """Where clients reach it."""
        return f"{HOST}:{self.port}"

    @property
    def data(self) -> Path:
        """Its `log.dirs`."""
        return self.folder / "data"

    @property
    def properties(self) -> Path:
        """Its `server.properties`."""
        return self.folder / "server.properties"

    @property
    def log(self) -> Path:
        """All it ever printed, runs one after another."""
        return self.folder / "broker.log"

    def process(self) -> Process | None:
        """Its running process, whoever started it; None when it does not run."""
        if self._child:
            self._child.poll()  # a dead child stays a zombie until it is asked for
        try:
            pid, started = self._pid_file.read_text().split(maxsplit=1)
        except FileNotFoundError:
            return None
        process = Process(int(pid), started)
        return process if process.alive else None

    def spawn(self, command: Sequence[str], *, owned: bool) -> None:
        """The command runs as this node's process, in a session of its own; `owned` ties its life to this process's."""
        self._forget()
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        if owned:
            self._lifeline = Lifeline(self._child.pid)
        process = find(self._child.pid)
        if process is None:
            raise BrokerNotReady(self.obituary())
        write_whole(self._pid_file, f"{process.pid} {process.started}")

    def send(self, number: signal.Signals) -> None:
        """The signal was sent to its process, if it runs."""
        if process := self.process():
            process.signal(number)

    def await_end(self, timeout_s: float) -> None:
        """Its process is gone: by itself within `timeout_s`, killed after it."""
        if not self._ends_within(timeout_s):
            self.send(signal.SIGKILL)
            if not self._ends_within(_KILLED_S):
                raise BrokerNotReady(f"node {self.id} does not die; its files are in {self.folder}")
        self._forget()

    def obituary(self) -> str:
        """That it died and, from its log, why."""
        tail = self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
        return f"node {self.id} died. The end of {self.log}:\n{tail}"

    @property
    def _pid_file(self) -> Path:
        return self.folder / "broker.pid"

    def _forget(self) -> None:
        """Nothing here speaks of the process that is gone."""
        if self._lifeline:
            self._lifeline.drop()
            self._lifeline = None
        self._pid_file.unlink(missing_ok=True)

    def _ends_within(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self.process():
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True
