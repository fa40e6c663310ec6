"""Where the local broker keeps things: jars in the user's cache, data in the user's state (XDG base directories)."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_FILE = "command.lock"


def jar_folder(kafka_version: str) -> Path:
    """The folder of this Kafka version's jars: safe to delete, they are fetched again."""
    return _xdg("XDG_CACHE_HOME", ".cache") / "tokenmill" / f"kafka-{kafka_version}"


def data_folder() -> Path:
    """The folder of the cluster that `tokenmill broker` runs: its topics live there until `down --purge`."""
    return _xdg("XDG_STATE_HOME", ".local/state") / "tokenmill" / "broker"


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


def _xdg(variable: str, below_home: str) -> Path:
    configured = Path(os.environ.get(variable, ""))
    return configured if configured.is_absolute() else Path.home() / below_home  # relative values are to be ignored
