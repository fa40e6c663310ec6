"""Workers of one group as processes that can be killed, frozen and replaced, requests for them, and two readers.

What the readers saw goes to `tests/invariants.py`. Used by the tests against a real broker.
"""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from schemas.codec import decode_result
from schemas.cost import CostEvent, MeterReading
from schemas.handoff import Handoff
from schemas.results import Completion, Input
from tests.invariants import violations
from tests.tiny_models import tiny_mixtral
from tests.tiny_tokenizer import save_byte_level
from tests.worker_process import Job
from worker.brokers.base import Outgoing, Record
from worker.brokers.kafka_client import TopicSpec, create_topics, read_all, tail
from worker.commands.answers import send_all
from worker.config import Kafka, Topics

ROOT = Path(__file__).parents[1]
VOCAB_SIZE = 400  # of the tiny tokenizer
RECORD_BYTES_MAX = 16 << 20  # of one record asked with: brokers weigh what is compressed, so it may be far above a MiB
PATIENCE_S = 120.0  # for the last answer: several takeovers on a busy machine


def tiny_model(folder: Path) -> Path:
    """A random Mixtral with a tokenizer and a chat template: a model folder like any other, but for sense."""
    path = tiny_mixtral(folder, vocab_size=VOCAB_SIZE, max_position_embeddings=1024)
    return save_byte_level(path)


class Reader:
    """Everything that a read_committed reader saw, in the order in which it came."""

    def __init__(self) -> None:
        self.completions: list[Completion] = []
        self.costs: list[CostEvent] = []
        self.readings: list[MeterReading] = []
        self.handoffs: list[Handoff] = []

    def take(self, record: Record) -> None:
        kinds: dict[bytes, tuple[type[Any], list[Any]]] = {
            b"tokenmill.completion.v1": (Completion, self.completions),
            b"tokenmill.cost.v1": (CostEvent, self.costs),
            b"tokenmill.meter.v1": (MeterReading, self.readings),
            b"tokenmill.handoff.v1": (Handoff, self.handoffs),
        }
        kind, found = kinds[dict(record.headers)["ce_type"] or b""]
        assert record.value is not None
        found.append(decode_result(kind, record.value))

    @property
    def num_records(self) -> int:
        return len(self.completions) + len(self.costs) + len(self.readings) + len(self.handoffs)


class Campaign:
    """One group on topics of its own. `job`: what else its workers are to be, as `Job` has it."""

    def __init__(self, kafka: Kafka, name: str, model: Path, **job: Any) -> None:
        self.topics = Topics(prefix=name)
        self.model = model
        self.asked: list[Input] = []
        self.live = Reader()
        self.deaths: list[int] = []  # exit codes of workers that ended by themselves
        self._kafka = kafka
        self._job = Job(
            brokers=kafka.brokers,
            name="",
            group=name,
            prefix=name,
            model=str(model),
            **job,
        )
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self._lives_before: dict[str, set[str]] = {}  # of each name, when its present process was hired
        self._log = (model.parent / f"{name}.log").open("ab")

    @asynccontextmanager
    async def opened(self, partitions: int = 12) -> AsyncIterator["Campaign"]:
        """The topics exist and are read while the body runs; afterwards no worker is left."""
        client = self._kafka.client()
        names = self.topics.by_setting.values()
        await create_topics(client, [TopicSpec(name=name, partitions=partitions) for name in names])
        reading = asyncio.create_task(self._read_live())
        try:
            yield self
        finally:
            reading.cancel()
            with suppress(asyncio.CancelledError):
                await reading
            for process in self._workers.values():
                process.kill()
                process.wait()
            self._log.close()

    def hire(self, name: str, *, freezes_at: int = 0) -> None:
        """A worker process of this name runs. `freezes_at`: the burst of answers at which it stops itself."""
        job = msgspec.json.encode(msgspec.structs.replace(self._job, name=name, freezes_at=freezes_at)).decode()
        command = [sys.executable, "-m", "tests.worker_process", job]
        self._lives_before[name] = self._lives(name)
        self._workers[name] = subprocess.Popen(command, cwd=ROOT, stdout=self._log, stderr=self._log)

    def pid(self, name: str) -> int:
        """The process that has this name now."""
        return self._workers[name].pid

    def signal(self, name: str, number: signal.Signals) -> None:
        """The worker process gets the signal."""
        os.kill(self._workers[name].pid, number)

    def replace(self, name: str) -> None:
        """The worker is dead, and another of its name runs."""
        self.signal(name, signal.SIGKILL)
        self._workers[name].wait()
        self.hire(name)

    async def until_frozen(self, name: str) -> None:
        """The worker process has stopped itself. Raises TimeoutError when patience ends."""
        async with asyncio.timeout(PATIENCE_S):
            look = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
            while not os.waitid(os.P_PID, self.pid(name), look):  # noqa: ASYNC222  # WNOHANG: it does not wait
                await asyncio.sleep(0.1)

    async def until_ended(self, name: str) -> int:
        """The exit code of the worker process, once it has ended by itself. Raises TimeoutError when patience ends."""
        async with asyncio.timeout(PATIENCE_S):
            while (code := self._workers[name].poll()) is None:
                await asyncio.sleep(0.1)
            return code

    async def until_serving(self, name: str) -> None:
        """The worker process has committed something. Raises TimeoutError when patience ends."""
        async with asyncio.timeout(PATIENCE_S):
            while self._lives(name) == self._lives_before[name]:
                await asyncio.sleep(0.05)

    def _lives(self, name: str) -> set[str]:
        return {reading.life for reading in self.live.readings if reading.worker == name}

    async def gone(self, name: str, notice: Path | None = None) -> tuple[int, float]:
        """The worker was told to leave, by SIGTERM or by this file, and has: its exit code, and the seconds it took."""
        asked_s = time.monotonic()
        if notice:
            await asyncio.to_thread(notice.touch)
        else:
            self.signal(name, signal.SIGTERM)
        code = await asyncio.to_thread(self._workers[name].wait, PATIENCE_S)
        if notice:
            await asyncio.to_thread(notice.unlink)
        return code, time.monotonic() - asked_s

    def revive(self) -> None:
        """Workers that ended by themselves run again, as under any supervisor."""
        ended = [(name, code) for name, process in self._workers.items() if (code := process.poll()) is not None]
        for name, code in ended:
            self.deaths.append(code)
            self.hire(name)

    async def dismiss(self) -> list[int]:
        """All workers leave on purpose; their exit codes."""
        for name in self._workers:
            self.signal(name, signal.SIGTERM)
        return [await asyncio.to_thread(process.wait, 30) for process in self._workers.values()]

    async def ask(self, values: Sequence[bytes]) -> None:
        """These requests are in the log, spread over the partitions."""
        topic = self.topics.requests
        await self.put(
            [Outgoing(topic=topic, key=str(number).encode(), value=value) for number, value in enumerate(values)]
        )

    async def put(self, records: Sequence[Outgoing]) -> list[Input]:
        """These records are in the log and wait for an answer; where each is."""
        asked = await send_all(replace(self._kafka.client(), record_bytes_max=RECORD_BYTES_MAX), records)
        self.asked += asked
        return asked

    async def until_answered(self, share: float = 1.0) -> bool:
        """Whether that share of the requests has an answer, before patience ends."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while len({completion.id for completion in self.live.completions}) < share * len(self.asked):
                    self.revive()
                    await asyncio.sleep(0.1)
                return True
        return False

    async def late(self) -> Reader:
        """What a reader sees who comes now."""
        reader = Reader()
        for record in await read_all(self._kafka.client(), self._results):
            reader.take(record)
        return reader

    async def caught_up(self, late: Reader) -> None:
        """The concurrent reader has seen as much as the late one, or patience ends."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while self.live.num_records < late.num_records:
                    await asyncio.sleep(0.1)

    def violations(self, reader: Reader) -> list[str]:
        """Everything that is wrong with what this reader saw."""
        return violations(self.asked, reader.completions, reader.costs, reader.readings, reader.handoffs)

    @property
    def session_timeout_s(self) -> float:
        """How long a silent worker stays in the group."""
        return self._job.session_timeout_s

    @property
    def _results(self) -> tuple[str, ...]:
        return (self.topics.completions, self.topics.costs, self.topics.handoff)

    async def _read_live(self) -> None:
        async with tail(self._kafka.client(), self._results, from_start=True) as records:
            async for record in records:
                self.live.take(record)


def some_requests(dice: random.Random, model: Path, count: int, tokens_max: int = 60) -> list[bytes]:
    """Chats and texts of mixed length, some with several choices, some sampled."""
    return [_request(dice, model.name, number, tokens_max) for number in range(count)]


def _request(dice: random.Random, model: str, number: int, tokens_max: int) -> bytes:
    body = {
        "model": model,
        "max_tokens": dice.randint(1, tokens_max),
        "n": dice.choice([1] * 9 + [2]),
        "temperature": dice.choice([0, 0, 1]),
        "ignore_eos": True,
    }
    text = "the quick brown fox " * dice.randint(1, 8)
    if dice.random() < 0.5:
        body["messages"] = [{"role": "user", "content": text}]
        url = "/v1/chat/completions"
    else:
        body["prompt"] = text
        url = "/v1/completions"
    return msgspec.json.encode({"url": url, "custom_id": f"r{number}", "tenant": f"t{number % 3}", "body": body})
