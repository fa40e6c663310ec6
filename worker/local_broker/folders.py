"""Where the local broker keeps things, and how two commands keep out of each other's way there."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from worker.folders import cache_folder, state_folder

LOCK_FILE = "command.lock"


def jar_folder(kafka_version: str) -> Path:
    """The folder of this Kafka version's jars: safe to delete, they are fetched again."""
    return cache_folder() / f"kafka-{kafka_version}"


def data_folder() -> Path:
    """The folder of the cluster that `tokenmill broker` runs: its topics live there until `down --purge`."""
    return state_folder() / "broker"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The body is the only one of its kind at work in this folder: a second command waits for the first."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go by the system when this process ends, however it ends
        yield


def write_whole(path: Path, text: str) -> None:
    """The file holds the text, or what it held before: never half of it, even if this process dies here."""
    arriving = path.with_name(path.name + ".new")
    arriving.write_text(text)
    arriving.replace(path)
