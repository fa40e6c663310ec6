"""A worker as a process of its own, with settings that `tokenmill worker` does not offer.

Short sessions make takeovers quick; stock commits are the negative control; and it can freeze itself where that hurts
most. `python -m tests.worker_process JSON`.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import msgspec
from msgspec import Struct

from engine.core import Core
from engine.types import Request
from worker.brokers.base import Outgoing
from worker.brokers.kafka import KafkaBroker
from worker.brokers.kafka_settings import KafkaSettings
from worker.config import Bill, Engine, Health, Kafka, Notice, Settings, Topics
from worker.errors import Fatal
from worker.start import run


class Job(Struct, frozen=True, kw_only=True):
    """What the process is to be."""

    brokers: str
    name: str
    group: str
    prefix: str
    model: str
    stock_commits: bool = False
    session_timeout_s: float = 6.0  # Kafka's smallest by default
    events: Literal["token", "request"] = "token"
    attempts_max: int = 4
    silence_s_max: float = 120.0  # of the engine
    drain_s: float = 12.0
    notices: str = ""  # the folder in which a file of its name tells it to leave
    drafts_max: int = 0
    freezes_at: int = 0  # the burst of answers at which it stops itself; 0: none


DEADLY_SEED = 13  # of a request that kills whatever process begins it
HANGING_SEED = 14  # of a request whose step never ends


class MortalCore(Core):
    """The engine, but for the request that it dies of."""

    def submit(self, request: Request) -> None:
        if request.sampling.seed == DEADLY_SEED:
            os.kill(os.getpid(), signal.SIGKILL)
        if request.sampling.seed == HANGING_SEED:
            time.sleep(3600)
        super().submit(request)


class SelfFreezing(KafkaBroker):
    """Stops its process when a burst of answers is decided on and nothing of it sent: no open transaction tells."""

    def __init__(self, settings: KafkaSettings, at: int) -> None:
        super().__init__(settings)
        self._bursts_left = at
        self._is_begun = False

    async def begin(self) -> None:
        await super().begin()  # asks nobody
        self._is_begun = True

    async def send(self, record: Outgoing) -> Awaitable[None]:
        if self._is_begun and dict(record.headers)["ce_type"] == b"tokenmill.completion.v1":
            self._bursts_left -= 1
            if self._bursts_left == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
        self._is_begun = False
        return await super().send(record)


def main() -> int:
    job = msgspec.json.decode(sys.argv[1], type=Job)
    kafka = Kafka(brokers=job.brokers)
    client = replace(
        kafka.client(worker=job.name, group=job.group),
        session_timeout_s=job.session_timeout_s,
        heartbeat_s=job.session_timeout_s / 6,
        transaction_timeout_s=5.0,
        request_timeout_s=4.0,
        stock_commits=job.stock_commits,
    )
    settings = Settings(
        kafka=kafka,
        topics=Topics(prefix=job.prefix),
        group=job.group,
        model=job.model,
        worker=job.name,
        engine=Engine(
            device="cpu",
            threads=1,
            cache_tokens=4096,
            sequences_max=16,
            tokens_per_step_max=128,
            drafts_max=job.drafts_max,
        ),
        bill=Bill(events=job.events),
        attempts_max=job.attempts_max,
        drain_s=job.drain_s,
        notice=Notice(file=Path(job.notices) / job.name if job.notices else None, interval_s=0.1),
        health=Health(port=0),
    )
    with (
        patch("worker.start.KafkaBroker", lambda client: SelfFreezing(client, job.freezes_at)),
        patch("engine.build.Core", MortalCore),
        patch("worker.service.SILENCE_S_MAX", job.silence_s_max),
    ):
        try:
            return asyncio.run(run(settings, client))
        except Fatal as error:  # as the command does it
            print(error, file=sys.stderr)
            return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
