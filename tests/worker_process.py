"""A worker as a process of its own, with settings that `tokenmill worker` does not offer.

Short sessions make takeovers quick; stock commits are the negative control. `python -m tests.worker_process JSON`.
"""

import asyncio
import sys
from dataclasses import replace
from typing import Literal

import msgspec
from msgspec import Struct

from worker.config import Bill, Engine, Health, Kafka, Settings, Topics
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
        engine=Engine(device="cpu", threads=1, cache_tokens=4096, sequences_max=16, tokens_per_step_max=128),
        bill=Bill(events=job.events),
        health=Health(port=0),
    )
    return asyncio.run(run(settings, client))


if __name__ == "__main__":
    sys.exit(main())
