"""Where the local broker keeps things: jars in the user's cache, data in the user's state (XDG base directories)."""

import os
from pathlib import Path


def jar_folder(kafka_version: str) -> Path:
    """The folder of this Kafka version's jars: safe to delete, they are fetched again."""
    return _xdg("XDG_CACHE_HOME", ".cache") / "tokenmill" / f"kafka-{kafka_version}"


def data_folder() -> Path:
    """The folder of the cluster that `tokenmill broker` runs: its topics live there until `down --purge`."""
    return _xdg("XDG_STATE_HOME", ".local/state") / "tokenmill" / "broker"


def _xdg(variable: str, below_home: str) -> Path:
    configured = Path(os.environ.get(variable, ""))
    return configured if configured.is_absolute() else Path.home() / below_home  # relative values are to be ignored
