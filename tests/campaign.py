"""Workers of one group as processes that can be killed, frozen and replaced, requests for them, and two readers.

What the readers saw goes to `tests/invariants.py`. Used by the tests against a real broker and by the fault campaign
(`tests/chaos/`).
"""

import asyncio
import base64
import multiprocessing
import os
import random
import signal
import struct
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from schemas.codec import decode_result
from schemas.cost import CostEvent, MeterReading, picodollars
from schemas.handoff import Handoff
from schemas.results import ChatResult, Completion, Input
from tests.hostile import MODEL
from tests.invariants import violations
from tests.tiny_tokenizer import save_byte_level
from tests.worker_process import Job, Stop, serve
from worker.brokers.base import Outgoing, Record
from worker.brokers.kafka_client import TopicSpec, create_topics, read_all, require_topics, tail
from worker.commands.answers import send_all
from worker.config import Kafka, Topics
from worker.errors import Misconfigured
from worker.price_book import load_price_book

RECORD_BYTES_MAX = 65 << 20  # of one record asked with: brokers weigh what is compressed, so it may be far above a MiB
T = TypeVar("T")

PATIENCE_S = 120.0  # for the last answer: several takeovers on a busy machine
SETTLED_S = 60.0  # after the last worker has left: the transactions of the dead time out within 10
LOOK_S = 0.02  # how coarsely times are taken
LEAVE_S = 30.0  # of a worker that was asked to: its budget is 8 s, and the machine may be busy
CALL_S_MAX = 300.0  # of a call in a process of its own: a hundred seeds of the simulation take 20

# Imports once what every worker needs; workers are forked from it.
_NURSERY = multiprocessing.get_context("forkserver")
_NURSERY.set_forkserver_preload(["tests.worker_process"])


def _warm_nursery() -> None:
    """All that workers import is imported: the event loop would wait for it at the first."""
    process = _NURSERY.Process(target=int)
    process.start()
    process.join()


def in_nursery(call: Callable[[str], T], argument: str, failed: T) -> T:
    """What the call returns in a process of its own, or `failed` if that broke or hangs."""
    ours, theirs = _NURSERY.Pipe()
    process = _NURSERY.Process(target=_send_result, args=(call, argument, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(CALL_S_MAX) else failed
    except EOFError:
        return failed
    finally:
        process.kill()
        process.join()


def _send_result(call: Callable[[str], Any], argument: str, pipe: Connection) -> None:
    pipe.send(call(argument))


def scripted_model(folder: Path) -> Path:
    """A model folder without weights: a tokenizer, for workers whose tokens a script dictates."""
    path = save_byte_level(folder / MODEL)
    (path / "config.json").write_text("{}")
    return path


class Reader:
    """Everything that a read_committed reader saw, in the order in which it came."""

    def __init__(self) -> None:
        self.completions: list[Completion] = []
        self.costs: list[CostEvent] = []
        self.readings: list[MeterReading] = []
        self.handoffs: list[Handoff] = []
        self.answered: set[Input] = set()

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
        if kind is Completion:
            self.answered.add(found[-1].input)

    @property
    def num_records(self) -> int:
        return len(self.completions) + len(self.costs) + len(self.readings) + len(self.handoffs)


@dataclass
class Hired:
    """One life of one worker, as seen from outside."""

    name: str
    process: BaseProcess
    tokens_file: Path
    refusals_file: Path
    log: Path

    @property
    def num_tokens(self) -> int:
        """How many tokens it has computed."""
        return int(struct.unpack("<q", self.tokens_file.read_bytes())[0]) if self.tokens_file.exists() else 0

    @property
    def refusals_s(self) -> list[tuple[float, float]]:
        """How long each refusal took, from the poll to the outbox: by the clock, and of the processor."""
        return list(struct.iter_unpack("<2d", self.refusals_file.read_bytes()))

    @property
    def memory_bytes(self) -> int:
        """Its resident memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @property
    def num_files(self) -> int:
        """How many files and connections it has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    @property
    def is_frozen(self) -> bool:
        """Whether its process is stopped."""
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def logged(self) -> Iterator[dict[str, Any]]:
        """What it said, as far as it is JSON: tracebacks are not."""
        for line in self.log.read_text().splitlines():
            with suppress(msgspec.DecodeError):
                yield msgspec.json.decode(line, type=dict)


class Campaign:
    """One group on topics of its own, with its logs in a folder. `job`: what else its workers are to be, as `Job` says.

    `kafka` is where the requests are sent and the answers read; workers may be told another way to the brokers.
    """

    def __init__(self, kafka: Kafka, name: str, model: Path, folder: Path, **job: Any) -> None:
        self.topics = Topics(prefix=name)
        self.model = model
        self.folder = folder
        self.asked: list[Input] = []
        self.live = Reader()
        self.deaths: list[int] = []  # exit codes of workers that ended by themselves
        self.lives: list[Hired] = []
        self._kafka = kafka
        self._job = Job(
            brokers=kafka.brokers,
            name="",
            group=name,
            prefix=name,
            model=str(model),
            tokens_file="",
            refusals_file="",
            log="",
        )
        self._job = msgspec.structs.replace(self._job, **job)
        self._workers: dict[str, Hired] = {}
        self._jobs: dict[str, Job] = {}

    @asynccontextmanager
    async def opened(self, partitions: int = 12, **config: str) -> AsyncIterator["Campaign"]:
        """The topics exist and are read while the body runs; afterwards no worker is left.

        `config`: of the topics, as Kafka's settings have it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(_warm_nursery)
        self._num_partitions = partitions
        names = tuple(self.topics.by_setting.values())
        await create_topics(self.client, [TopicSpec(name=name, partitions=partitions, config=config) for name in names])
        await self._until_known(names)
        reading = asyncio.create_task(self._read_live())
        try:
            yield self
        finally:
            reading.cancel()
            with suppress(asyncio.CancelledError):
                await reading
            for one in self._workers.values():
                one.process.kill()
                one.process.join()

    async def delete_topics(self) -> None:
        """The group's topics are gone, with all that is in them; unless the brokers are too busy for that."""
        admin = AIOKafkaAdminClient(**self.client.client_options())
        try:
            with suppress(KafkaError):
                await admin.start()
                await admin.delete_topics(list(self.topics.by_setting.values()))
        finally:
            await admin.close()

    @asynccontextmanager
    async def replayed(self) -> AsyncIterator["Campaign"]:
        """Another group on the same topics, that has answered nothing yet."""
        again = Campaign(self._kafka, f"{self.topics.prefix}_again", self.model, self.folder / "again")
        again.topics, again.asked = self.topics, self.asked
        again._job = msgspec.structs.replace(self._job, group=f"{self._job.group}_again")
        async with again.opened(self._num_partitions):
            yield again

    # ------------------------------------------------------------------------------------------------------- workers

    def hire(self, name: str, stop: Stop | None = None, **job: Any) -> Hired:
        """A worker process of this name runs. `stop`: where it stops itself; `job`: what it is unlike the others."""
        self._jobs[name] = msgspec.structs.replace(self._job, **job)
        return self._start(name, self._jobs[name], stop)

    def pid(self, name: str) -> int:
        """The process that has this name now."""
        pid = self._workers[name].process.pid
        assert pid
        return pid

    def signal(self, name: str, number: signal.Signals) -> None:
        """The worker process gets the signal."""
        os.kill(self.pid(name), number)

    def replace(self, name: str) -> None:
        """The worker is dead, if it was not before, and another of its name runs."""
        self._workers[name].process.kill()
        self._workers[name].process.join()
        self._start(name, self._jobs[name])

    async def until_frozen(self, name: str) -> None:
        """The worker process has stopped itself. Raises TimeoutError when patience ends."""
        async with asyncio.timeout(PATIENCE_S):
            while not self._workers[name].is_frozen:
                await asyncio.sleep(LOOK_S)

    async def until_ended(self, name: str, patience_s: float = PATIENCE_S) -> int:
        """The exit code of the worker process, once it has ended. Raises TimeoutError when patience ends."""
        async with asyncio.timeout(patience_s):
            while (code := self._workers[name].process.exitcode) is None:
                await asyncio.sleep(LOOK_S)
            return code

    async def until_serving(self, name: str) -> None:
        """The worker process has committed something. Raises TimeoutError when patience ends."""
        async with asyncio.timeout(PATIENCE_S):
            num_before = sum(life.name == name for life in self.lives) - 1
            while len({reading.life for reading in self.live.readings if reading.worker == name}) <= num_before:
                await asyncio.sleep(LOOK_S)

    async def gone(self, name: str, notice: Path | None = None) -> tuple[int, float]:
        """The worker was told to leave, by SIGTERM or by this file, and has: its exit code, and the seconds it took."""
        asked_s = time.monotonic()
        if notice:
            await asyncio.to_thread(notice.touch)
        else:
            self.signal(name, signal.SIGTERM)
        code = await self.until_ended(name)
        if notice:
            await asyncio.to_thread(notice.unlink)
        del self._workers[name]
        return code, time.monotonic() - asked_s

    def revive(self) -> None:
        """Workers that ended by themselves run again, as under any supervisor."""
        for one in list(self._workers.values()):
            if (code := one.process.exitcode) is not None:
                self.deaths.append(code)
                self._start(one.name, self._jobs[one.name])

    async def dismiss(self) -> list[int]:
        """All workers leave on purpose; their exit codes."""
        for name in self._workers:
            self.signal(name, signal.SIGTERM)
        return [await self.until_ended(name, LEAVE_S) for name in self._workers]

    def _start(self, name: str, job: Job, stop: Stop | None = None) -> Hired:
        kept = self.folder / f"{name}-{len(self.lives)}"
        tokens_file, refusals_file, log = (kept.with_suffix(f".{kind}") for kind in ("tokens", "refusals", "log"))
        own = msgspec.structs.replace(
            job, name=name, stop=stop, tokens_file=str(tokens_file), refusals_file=str(refusals_file), log=str(log)
        )
        process = _NURSERY.Process(target=serve, args=(own,), daemon=True)
        process.start()
        self._workers[name] = Hired(name, process, tokens_file, refusals_file, log)
        self.lives.append(self._workers[name])
        return self._workers[name]

    # ------------------------------------------------------------------------------------------------------ requests

    async def ask(self, values: Sequence[bytes]) -> list[Input]:
        """These requests are in the log, spread over the partitions; where each is."""
        topic = self.topics.requests
        return await self.put(
            [Outgoing(topic=topic, key=str(number).encode(), value=value) for number, value in enumerate(values)]
        )

    async def put(self, records: Sequence[Outgoing]) -> list[Input]:
        """These records are in the log and wait for an answer; where each is."""
        asked = await send_all(replace(self.client, record_bytes_max=RECORD_BYTES_MAX), records)
        self.asked += asked
        return asked

    async def until_answered(self, requests: Collection[Input] | None = None, patience_s: float = PATIENCE_S) -> bool:
        """Whether these requests, or all, have answers before patience ends. Workers that end are revived."""
        missing = set(self.asked if requests is None else requests)
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while missing := missing - self.live.answered:
                    self.revive()
                    await asyncio.sleep(LOOK_S)
                return True
        return False

    async def recovery_s(self) -> float:
        """How long it takes until every partition has answered a request that is sent to it now."""
        started_s = time.monotonic()
        topic, value = self.topics.requests, request(self.model.name, "probe", tokens=1)
        asked = await self.put(
            [Outgoing(topic=topic, key=None, value=value, partition=number) for number in range(self._num_partitions)]
        )
        await self.until_answered(asked)
        return time.monotonic() - started_s

    # ------------------------------------------------------------------------------------------------------ judgement

    async def judge(self) -> list[str]:
        """Everything that is wrong, once all workers have left: for who reads now and for who has read all along."""
        late = await self.late()
        await self.caught_up(late)
        early = [f"to the reader from the start: {one}" for one in self.violations(self.live)]
        return [*self.violations(late), *early, *await self._unsettled()]

    async def late(self) -> Reader:
        """What a reader sees who comes now."""
        reader = Reader()
        for record in await read_all(self.client, self._results):
            reader.take(record)
        return reader

    async def caught_up(self, late: Reader) -> None:
        """The concurrent reader has seen as much as the late one, or patience ends."""
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLED_S):
                while self.live.num_records < late.num_records:
                    await asyncio.sleep(LOOK_S)

    def violations(self, reader: Reader) -> list[str]:
        """Everything that is wrong with what this reader saw."""
        return violations(self.asked, reader.completions, reader.costs, reader.readings, reader.handoffs)

    def failures(self) -> Counter[str]:
        """How many requests were answered with a failure, by its code."""
        return Counter(one.error.code for one in self.live.completions if one.error)

    def tokens_repeated(self) -> int:
        """Tokens computed by all lives that are in nobody's bill: they were computed again."""
        return sum(one.num_tokens for one in self.lives) - self.tokens_billed()

    def tokens_billed(self, worker: str | None = None) -> int:
        """Tokens computed, by this worker or by any, that are in a bill, be it at no price."""
        events = (event for event in self.live.costs if worker in (None, event.worker))
        return sum(event.tokens for event in events if event.kind not in ("prompt_cached", "handed_over"))

    async def dump(self) -> None:
        """Every record of the group's topics is in its folder, committed or not, a line each."""
        for topic in self.topics.by_setting.values():
            with (self.folder / f"{topic}.jsonl").open("wb") as file:
                for raw in await self._raw(topic):
                    file.write(msgspec.json.encode(raw) + b"\n")

    @property
    def client(self) -> Any:
        """How the campaign itself reaches the brokers."""
        return self._kafka.client()

    @property
    def group(self) -> str:
        """The name of the workers' group."""
        return self._job.group

    @property
    def session_timeout_s(self) -> float:
        """How long a silent worker stays in the group."""
        return self._job.session_timeout_s

    @property
    def _results(self) -> tuple[str, ...]:
        return (self.topics.completions, self.topics.costs, self.topics.handoff)

    async def _until_known(self, topics: Sequence[str]) -> None:
        """A busy broker takes a while: longer than workers would wait for topics that they are told of."""
        while True:
            with suppress(Misconfigured):
                return await require_topics(self.client, topics)

    async def _read_live(self) -> None:
        async with tail(self.client, self._results, from_start=True) as records:
            async for record in records:
                self.live.take(record)

    async def _unsettled(self) -> list[str]:
        """Positions that are not at the end of their partition, and partitions with an open transaction."""
        found = ["never looked"]
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLED_S):
                while found := [*await self._behind(), *await self._open()]:
                    await asyncio.sleep(0.2)
        return found

    async def _behind(self) -> list[str]:
        async with self._consumer("read_committed", self._job.group) as consumer:
            ends = await consumer.end_offsets(await _partitions(consumer, [self.topics.requests]))
            committed = {partition: await consumer.committed(partition) or 0 for partition in ends}
        return [f"{p} is committed up to {committed[p]} of {ends[p]}" for p in ends if committed[p] != ends[p]]

    async def _open(self) -> list[str]:
        ends: dict[TopicPartition, list[int]] = defaultdict(list)
        for isolation in ("read_committed", "read_uncommitted"):
            async with self._consumer(isolation) as consumer:
                for partition, end in (
                    await consumer.end_offsets(await _partitions(consumer, [*self._results, self.topics.dead_letters]))
                ).items():
                    ends[partition].append(end)
        return [f"a transaction is open in {p}: {stable} of {end}" for p, (stable, end) in ends.items() if stable < end]

    async def _raw(self, topic: str) -> list[dict[str, Any]]:
        async with self._consumer("read_uncommitted") as consumer:
            partitions = await _partitions(consumer, [topic])
            consumer.assign(partitions)
            await consumer.seek_to_beginning(*partitions)
            found = []
            while batches := await consumer.getmany(timeout_ms=500):
                found += [_readable(raw) for batch in batches.values() for raw in batch]
            return found

    @asynccontextmanager
    async def _consumer(self, isolation: str, group: str | None = None) -> AsyncIterator[AIOKafkaConsumer]:
        consumer = AIOKafkaConsumer(
            group_id=group, isolation_level=isolation, enable_auto_commit=False, **self.client.client_options()
        )
        await consumer.start()
        try:
            yield consumer
        finally:
            await consumer.stop()


async def _partitions(consumer: AIOKafkaConsumer, topics: Sequence[str]) -> list[TopicPartition]:
    cluster = await consumer._client.fetch_all_metadata()
    found = {topic: cluster.partitions_for_topic(topic) for topic in topics}
    return [TopicPartition(topic, number) for topic in topics for number in found[topic]]


def _readable(raw: Any) -> dict[str, Any]:
    def text(value: bytes | None) -> str | None:
        if value is None:
            return None
        try:
            return value.decode()
        except UnicodeDecodeError:
            return f"base64:{base64.b64encode(value).decode()}"

    return {
        "partition": raw.partition,
        "offset": raw.offset,
        "timestamp_ms": raw.timestamp,
        "key": text(raw.key),
        "headers": {name: text(value) for name, value in raw.headers},
        "value": text(raw.value),
    }


def some_requests(dice: random.Random, model: Path, count: int, tokens_max: int = 60) -> list[bytes]:
    """Chats and texts of mixed length, some with several choices, some sampled."""
    return [_any_request(dice, model.name, number, tokens_max) for number in range(count)]


def request(model: str, prompt: str | list[int], tokens: int, name: str = "", **body: Any) -> bytes:
    """A text completion of so many tokens."""
    own = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, **body}
    return msgspec.json.encode({"url": "/v1/completions", "custom_id": name or str(prompt), "body": own})


def long_requests(model: Path, count: int) -> list[bytes]:
    """Greedy and seeded, one choice and several, with logprobs, stop strings, penalties and a grammar."""
    dice = random.Random(3)
    return [_long_request(dice, model.name, number) for number in range(count)]


def _long_request(dice: random.Random, model: str, number: int) -> bytes:
    body = {
        "model": model,
        "max_tokens": dice.randint(300, 600),
        "n": dice.choice([1, 1, 2]),
        "temperature": dice.choice([0, 1]),
        "seed": 100 + number,  # the record's place is another in each run
        "ignore_eos": True,
        "messages": [{"role": "user", "content": f"tell me a long story about the {number} foxes"}],
    }
    if number % 3 == 0:
        body |= {"logprobs": True, "top_logprobs": 1}
    if number % 4 == 0:
        body["stop"] = ["qu", "zz"]
    if number % 5 == 0:
        body |= {"frequency_penalty": 0.5, "repetition_penalty": 1.2}
    if number % 6 == 0:
        body |= {"response_format": {"type": "regex", "pattern": "([a-z]{2,9} ){30,90}"}, "ignore_eos": False}
    # Tenants of their own: what a cached prefix saves hangs on who ran before.
    own = {"custom_id": f"r{number}", "tenant": f"t{number}"}
    return msgspec.json.encode({"url": "/v1/chat/completions", **own, "body": body})


def said(completions: Sequence[Completion]) -> dict[str, Any]:
    """What each request's choices say, their tokens where there are logprobs, and the price of it all.

    The price as if no prompt had been cached: who begins a request again may find its prompt, and then charges less.
    """
    prices, found = load_price_book(), {}
    for one in completions:
        assert one.response
        assert one.custom_id
        assert one.bill
        body = one.response.body
        assert isinstance(body, ChatResult)
        num_cached = body.usage.prompt_tokens_details.cached_tokens
        uncached, cached = (
            prices.price(body.model, body.service_tier, kind, num_cached) for kind in ("prompt", "prompt_cached")
        )
        found[one.custom_id] = (
            picodollars(one.bill.price) + uncached - cached,
            [
                (
                    choice.message.content,
                    choice.finish_reason,
                    [token.token for token in choice.logprobs.content] if choice.logprobs else None,
                )
                for choice in body.choices
            ],
        )
    return found


def _any_request(dice: random.Random, model: str, number: int, tokens_max: int) -> bytes:
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
