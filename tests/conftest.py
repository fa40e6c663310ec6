"""Fixtures shared by the whole suite: a real Kafka broker, one for the session."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from worker.local_broker import Cluster


class Kafka(Protocol):
    """What tests know of the broker: where it answers."""

    @property
    def brokers(self) -> str: ...  # host:port


class _UsersOwn:
    def __init__(self, brokers: str) -> None:
        self.brokers = brokers


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """One running broker for the whole session, the user's own where TOKENMILL_BROKERS names it.

    Its topics, groups and transactional ids are shared: a test names its own.
    """
    if brokers := os.environ.get("TOKENMILL_BROKERS"):
        yield _UsersOwn(brokers)
        return
    folder: Path = tmp_path_factory.mktemp("kafka")
    with Cluster(folder) as cluster:
        yield cluster
