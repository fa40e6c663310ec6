"""`tokenmill worker`: one worker process.

Settles what must be settled before the service runs: the worker's name, which no other running worker may have.
"""

import fcntl
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from worker.config import Settings
from worker.drain import end_process
from worker.errors import Misconfigured
from worker.folders import model_folder

SLOTS_MAX = 1024  # workers on one host

app = App(name="worker")


@app.default
async def worker(*, settings: Annotated[Settings, Parameter(name="*")] = Settings()) -> None:
    """Answer requests until told to stop. SIGTERM finishes what runs within drain_s and hands over the rest.

    Beside the brokers' address it needs the name of a model:

        tokenmill worker --model smollm2-moe --brokers kafka:9092

    The state of its work is in Kafka alone: kill it at any moment, and start as many as there are partitions.
    """
    model_folder(settings.model)  # before the imports below, which take seconds
    with own_name(settings.worker) as name:
        from worker.start import run

        end_process(await run(replace(settings, worker=name)))


@contextmanager
def own_name(given: str) -> Iterator[str]:
    """A name that is this process's alone on this host while the body runs.

    The name makes the transactional id. Brokers remember each id for a week, so names come from a bounded set: the
    lowest number that no running process of this host has locked. A lock ends with its process, however that ends, and
    the next worker takes the number, and with it ends the transaction that the dead one may have left open.
    """
    if given:
        yield given
        return
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:200]  # as Kafka allows it in a client's name
    folder = _lock_folder()
    for slot in range(1, SLOTS_MAX + 1):
        with (folder / f"{slot}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield f"{host}-{slot}"
            return
    raise Misconfigured(f"{SLOTS_MAX} workers run on this host: give this one a name of its own with --worker")


def _lock_folder() -> Path:
    """A folder that only this user can write to, gone when the machine restarts."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(runtime or tempfile.gettempdir()) / f"tokenmill-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        mine = folder.stat().st_uid == os.getuid()
    except OSError as error:
        raise Misconfigured(f"cannot lock a name in {folder}: {error.strerror}; give one with --worker") from None
    if not mine:
        raise Misconfigured(f"{folder} is another user's; give this worker a name with --worker")
    return folder
