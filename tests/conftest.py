"""Fixtures shared by the whole suite: a real Kafka, one for the session. Triton's kernels are interpreted."""

import os
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import hypothesis
import pytest

from tests.kafka_stage import Stage, staged
from worker.local_broker import Cluster

# Read when a kernel is defined, so before anything imports triton: a GPU is not needed and, if there is one, not used.
os.environ["TRITON_INTERPRET"] = "1"

# A run that a script has started in the background ignores Ctrl-C, and so would all that it starts: tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says more about the machine than about the code; each test has its own timeout.
hypothesis.settings.register_profile("tokenmill", deadline=None)
hypothesis.settings.load_profile("tokenmill")


@dataclass(frozen=True)
class Kafka:
    """A Kafka that runs."""

    brokers: str  # host:port


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """One running node for the whole session, or the user's own Kafka where TOKENMILL_BROKERS names it.

    Topics, groups and transactional ids are shared by all tests: each names its own.
    """
    if brokers := os.environ.get("TOKENMILL_BROKERS"):
        yield Kafka(brokers)
        return
    with Cluster(tmp_path_factory.mktemp("kafka")) as cluster:
        yield Kafka(cluster.brokers)


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Triton's kernels run in its interpreter, made honest, and whoever writes beside a tensor fails."""
    import torch  # as what follows for these tests alone, and after TRITON_INTERPRET is set

    from tests import triton_interpreter
    from tests.triton_memory import guarded

    triton_interpreter.install()
    torch.manual_seed(0)
    with guarded():
        yield


@pytest.fixture
async def stage(kafka: Kafka, request: pytest.FixtureRequest) -> AsyncIterator[Stage]:
    """A stage on it, in the mode that the test asks for."""
    async with staged(kafka.brokers, getattr(request, "param", {})) as stage:
        yield stage
