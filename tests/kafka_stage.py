"""A stage for what exactly-once rests on: one partition of a real broker, workers, and a proxy that they are behind.

Most facts are shown three times: with an epoch for each transaction (`transaction.version` 2), without (strict), and
with stock aiokafka, where the damage must show, so that the tests can fail. `conftest.py` has the fixture.
"""

import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.broker_contract import Owner
from tests.kafka_proxy import KafkaProxy
from worker.brokers.base import Outgoing, Place
from worker.brokers.kafka import KafkaBroker
from worker.brokers.kafka_client import TopicSpec, create_topics, read_all
from worker.brokers.kafka_settings import REQUEST_TIMEOUT_S, KafkaSettings

Mode = Mapping[str, Any]  # settings
EPOCHS: Mode = {"transaction_version": 2}
STRICT: Mode = {"transaction_version": 0}
STOCK: Mode = {"stock_commits": True}


class Stage:
    """A group of its own on the broker, with a proxy that its first worker is behind."""

    def __init__(self, brokers: str, proxy: KafkaProxy, mode: Mode) -> None:
        self.proxy = proxy
        name = uuid.uuid4().hex[:12]
        self.topic, self.out = f"in-{name}", f"out-{name}"
        self.place = Place(self.topic, 0)
        self.direct = KafkaSettings(
            brokers=brokers,
            group=f"group-{name}",
            session_timeout_s=6,  # the least that brokers allow
            heartbeat_s=0.2,
            request_timeout_s=1,  # how long an answer is waited for
            **mode,
        )
        self.patient = replace(self.direct, request_timeout_s=REQUEST_TIMEOUT_S)  # for what is not looked at
        self.owners: list[Owner] = []

    async def owner(self, worker: str, *, proxied: bool = True) -> Owner:
        """A worker that holds the partition."""
        brokers = self.proxy.brokers if proxied else self.direct.brokers
        owner = Owner(KafkaBroker(replace(self.direct, brokers=brokers, worker=worker), [self.out]))
        self.owners.append(owner)
        await owner.broker.start([self.topic], owner)
        while not owner.places:
            await owner.broker.poll((), 1, 0.02)
        return owner

    def record(self, value: bytes, partition: int = 0) -> Outgoing:
        return Outgoing(topic=self.out, key=None, value=value, partition=partition)

    async def committed(self) -> list[bytes]:
        return sorted(record.value or b"" for record in await read_all(self.patient, [self.out]))


@asynccontextmanager
async def staged(brokers: str, mode: Mode) -> AsyncIterator[Stage]:
    """A stage with its topics; its workers are gone afterwards."""
    async with KafkaProxy(brokers) as proxy:
        stage = Stage(brokers, proxy, mode)
        topics = [TopicSpec(name=stage.topic, partitions=1), TopicSpec(name=stage.out, partitions=2)]
        await create_topics(stage.patient, topics)
        yield stage
        for owner in stage.owners:
            await owner.broker.stop()


def modes(*values: tuple[Any, ...]) -> pytest.MarkDecorator:
    names = {id(EPOCHS): "epochs", id(STRICT): "strict", id(STOCK): "stock"}
    params = [pytest.param(mode, *rest, id=names[id(mode)]) for mode, *rest in values]
    arguments = ("stage", "expected")[: len(values[0])]
    return pytest.mark.parametrize(arguments, params, indirect=["stage"])
