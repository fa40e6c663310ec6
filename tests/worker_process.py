"""A worker as a process of its own, with what `tokenmill worker` does not offer.

Short sessions make takeovers quick; stock commits are the negative control; a scripted model makes requests cheap; and
it can kill or freeze itself at a named point, where a signal from outside would arrive a moment too late. Runs in a
process that `tests/campaign.py` forks from one that has all this imported: the import alone takes 4 s.
"""

import asyncio
import ctypes
import mmap
import os
import resource
import signal
import struct
import sys
import threading
import time
from collections.abc import Awaitable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any, Literal, get_args
from unittest.mock import patch

import numpy as np
from aiokafka.conn import AIOKafkaConnection
from msgspec import Struct

from engine.build import build
from engine.config import EngineConfig
from engine.core import Core
from engine.errors import EngineMisconfigured, ModelError
from engine.types import Request, StepResult, Work
from tests.scripted_model import Script, scripted_engine
from worker.brokers.base import Outgoing, Place, Record
from worker.brokers.kafka import KafkaBroker
from worker.brokers.kafka_settings import KafkaSettings
from worker.config import Bill, Engine, Health, Kafka, Log, Notice, Security, Settings, Topics
from worker.envelope import Envelope
from worker.errors import Fatal, Misconfigured
from worker.intake import Intake
from worker.partition import Outcome, Partition
from worker.start import run
from worker.text import load_tokenizer

CONTEXT_MAX = 1024  # of the scripted model
CACHE_TOKENS = 4096
VOCAB_SIZE = 400  # of the tiny tokenizer

# In the order in which a life comes by. Those from `begun` to `end acked` are counted in bursts with answers in them.
Point = Literal[
    "sync acked",  # the group has given us partitions, and we have not heard of it
    "positions acked",  # we know where to go on, and have not begun
    "submitted",  # a request is with the engine
    "stepped",  # tokens are there that nobody has seen
    "begun",  # a burst of answers is decided on and nothing of it sent: no open transaction tells
    "produce sent",
    "produce acked",
    "offsets sent",
    "offsets acked",
    "end sent",  # the commit is asked for, and only the broker will know what became of it
    "end acked",
    "leave sent",
]
POINTS: tuple[Point, ...] = get_args(Point)

_PRODUCE, _OFFSET_FETCH, _LEAVE_GROUP, _SYNC_GROUP, _END_TXN, _TXN_OFFSET_COMMIT = 0, 9, 13, 14, 26, 28
_REQUESTS = {_OFFSET_FETCH: "positions", _LEAVE_GROUP: "leave", _SYNC_GROUP: "sync"}
_REQUESTS_OF_BURSTS = {_PRODUCE: "produce", _TXN_OFFSET_COMMIT: "offsets", _END_TXN: "end"}


class Stop(Struct, frozen=True, kw_only=True):
    """Where the process sends itself a signal."""

    point: Point
    visit: int = 1  # the time that it comes by there
    number: int = signal.SIGKILL


class Job(Struct, frozen=True, kw_only=True):
    """What the process is to be."""

    brokers: str
    name: str
    group: str
    prefix: str
    model: str
    is_scripted: bool = True  # the model is a script: only its tokenizer is in the folder
    step_s: float = 0.0  # a step takes this much longer: a scripted model is too quick to be caught at work
    stock_commits: bool = False
    transaction_version: int | None = None  # None: the cluster's
    session_timeout_s: float = 3.0  # the group must allow it: Kafka's smallest by default is 6
    request_timeout_s: float = 4.0
    events: Literal["token", "request"] = "token"
    attempts_max: int = 4
    silence_s_max: float = 120.0  # of the engine
    drain_s: float = 8.0
    notices: str = ""  # the folder in which a file of its name tells it to leave
    drafts_max: int = 0
    health_port: int = 0
    clock_file: str = ""  # what its wall clock is ahead by, in seconds, as a float of 8 bytes
    network: str = ""  # the network namespace that it is in
    stop: Stop | None = None
    tokens_file: str  # where the number of tokens computed is kept, 8 bytes: it outlives the process
    refusals_file: str  # seconds that each refusal took, 16 bytes: by the clock, and of the processor
    log: str  # the file of all that the process says


DEADLY_SEED = 13  # of a request that kills whatever process begins it
HANGING_SEED = 14  # of a request whose step never ends
STARVED_SEED = 15  # of a request for which there is not the memory
NAN_PROMPT = [VOCAB_SIZE - 1] * 6  # of a request whose logits are not numbers; a script says that once in 400**6 tokens


@dataclass(frozen=True)
class PoisonedScript(Script):
    """A script that has nothing to say to `NAN_PROMPT`."""

    def logits_after(self, context: list[int]) -> np.ndarray:
        if context[-len(NAN_PROMPT) :] == NAN_PROMPT:
            return np.full(self.vocab_size, np.nan, dtype=np.float32)
        return super().logits_after(context)


class Watch:
    """Sees the process come by at its points, and sends the signal."""

    def __init__(self, stop: Stop | None) -> None:
        self.is_answering = False  # a burst with answers in it is under way
        self._stop = stop
        self._visits = 0

    def reach(self, point: str) -> None:
        """The process is there."""
        if self._stop and point == self._stop.point:
            self._visits += 1
            if self._visits == self._stop.visit:
                os.kill(os.getpid(), self._stop.number)

    def send(self, send: Any, connection: Any, request: Any, expect_response: bool = True) -> Any:  # aiokafka's
        """Stands in the place of aiokafka's method that writes a request to its connection."""
        answered = send(connection, request, expect_response)
        name = _REQUESTS.get(request.API_KEY)
        if self.is_answering:
            name = name or _REQUESTS_OF_BURSTS.get(request.API_KEY)
        if not name:
            return answered
        self.reach(f"{name} sent")
        return self._answered(name, answered)

    async def _answered(self, name: str, answered: Awaitable[Any]) -> Any:
        answer = await answered
        self.reach(f"{name} acked")
        return answer


class Refusals:
    """Notes how long each refusal takes, from the poll that brought the record to the outbox."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("ab", buffering=0)
        self._polled_s: dict[tuple[Place, int], tuple[float, float]] = {}

    def polled(self, records: Sequence[Record]) -> None:
        """These records have come."""
        self._polled_s |= dict.fromkeys(((one.place, one.offset) for one in records), _times_s())

    def finish(self, finish: Any, partition: Partition, offset: int, outcome: Outcome) -> None:
        """Stands in the place of the partition's own."""
        finish(partition, offset, outcome)
        polled_s = self._polled_s.pop((partition.place, offset))
        if outcome.account is None:  # it never was the engine's
            self._file.write(struct.pack("<2d", *(now - then for now, then in zip(_times_s(), polled_s, strict=True))))


def _times_s() -> tuple[float, float]:
    """By the clock, and of the processor for this thread: the event loop's."""
    return time.monotonic(), time.thread_time()


class WatchedBroker(KafkaBroker):
    """Tells the watch of bursts of answers, and the refusals of what was polled."""

    def __init__(self, watch: Watch, refusals: Refusals, settings: KafkaSettings, outputs: Sequence[str]) -> None:
        super().__init__(settings, outputs)
        self._watch = watch
        self._refusals = refusals

    async def poll(self, places: Collection[Place], num_max: int, timeout_s: float) -> list[Record]:
        records = await super().poll(places, num_max, timeout_s)
        self._refusals.polled(records)
        return records

    async def begin(self) -> None:
        self._watch.is_answering = False
        await super().begin()

    async def send(self, record: Outgoing) -> Awaitable[None]:
        if not self._watch.is_answering and dict(record.headers)["ce_type"] == b"tokenmill.completion.v1":
            self._watch.is_answering = True
            self._watch.reach("begun")
        return await super().send(record)


class WatchedCore(Core):
    """Counts the tokens that it computes, and dies or hangs of the requests that ask for it."""

    def __init__(self, job: Job, watch: Watch, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        self._watch = watch
        self._step_s = job.step_s
        self._num_tokens = 0
        self._tokens = shared(Path(job.tokens_file))

    def submit(self, request: Request) -> None:
        if request.sampling.seed == DEADLY_SEED:
            os.kill(os.getpid(), signal.SIGKILL)
        if request.sampling.seed == HANGING_SEED:
            time.sleep(3600)
        if request.sampling.seed == STARVED_SEED:
            raise MemoryError
        super().submit(request)
        self._watch.reach("submitted")

    def step(self) -> StepResult:
        time.sleep(self._step_s)
        result = super().step()
        # As bills count: an output token is one, though the first of them comes with the last of the prompt.
        others = (charge.num_tokens for charge in result.charges if charge.work is not Work.OUTPUT)
        self._num_tokens += sum(others) + len(result.tokens)
        struct.pack_into("<q", self._tokens, 0, self._num_tokens)
        if result.tokens:
            self._watch.reach("stepped")
        return result


def serve(job: Job) -> None:
    """The process is that worker until it ends."""
    _redirect(job.log)
    if job.network:
        _enter(job.network)
    _die_with_parent()
    sys.exit(_run(job))


class Loading(Struct, frozen=True):
    """How a process loaded a model."""

    exit_code: int
    duration_s: float  # of the processor: the machine does other things meanwhile
    grown_bytes: int  # of its memory, at the most


def load_model(folder: str) -> Loading:
    """Loads the model as a worker does, and nothing more."""
    begun_s, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    exit_code = 0
    try:
        load_tokenizer(Path(folder))
        build(EngineConfig(device="cpu", threads=1, cache_tokens=CACHE_TOKENS), Path(folder))
    except (ModelError, EngineMisconfigured, Misconfigured):
        exit_code = Misconfigured.exit_code
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return Loading(exit_code, time.process_time() - begun_s, grown << 10)


def _run(job: Job) -> int:
    watch, send = Watch(job.stop), AIOKafkaConnection.send
    refusals, finish = Refusals(Path(job.refusals_file)), Partition.finish
    core = partial(WatchedCore, job, watch)
    with ExitStack() as patched:
        for name, value in {
            "worker.start.KafkaBroker": partial(WatchedBroker, watch, refusals),
            "worker.partition.Partition.finish": lambda *given: refusals.finish(finish, *given),
            "aiokafka.conn.AIOKafkaConnection.send": lambda *given, **named: watch.send(send, *given, **named),
            "worker.service.SILENCE_S_MAX": job.silence_s_max,
            "engine.build.Core": core,
            "tests.scripted_model.Core": core,
            **({"worker.start.build": _scripted} if job.is_scripted else {}),
        }.items():
            patched.enter_context(patch(name, value))
        if job.clock_file:
            _set_clock(Path(job.clock_file))
        try:
            return asyncio.run(run(_settings(job), _client(job)))
        except Fatal as error:  # as the command does it
            print(error, file=sys.stderr)
            return error.exit_code


def _settings(job: Job) -> Settings:
    return Settings(
        kafka=_kafka(job),
        topics=Topics(prefix=job.prefix),
        group=job.group,
        model=job.model,
        worker=job.name,
        engine=Engine(
            device="cpu",
            threads=1,
            cache_tokens=CACHE_TOKENS,
            sequences_max=16,
            tokens_per_step_max=128,
            drafts_max=job.drafts_max,
        ),
        bill=Bill(events=job.events),
        attempts_max=job.attempts_max,
        drain_s=job.drain_s,
        notice=Notice(file=Path(job.notices) / job.name if job.notices else None, interval_s=0.1),
        health=Health(port=job.health_port),
        log=Log(format="json"),
    )


def _kafka(job: Job) -> Kafka:
    return Kafka(brokers=job.brokers, security=Security(insecure=True))  # a network of this machine's own


def _client(job: Job) -> KafkaSettings:
    return replace(
        _kafka(job).client(worker=job.name, group=job.group),
        session_timeout_s=job.session_timeout_s,
        heartbeat_s=job.session_timeout_s / 6,
        transaction_timeout_s=job.request_timeout_s + 1,
        request_timeout_s=job.request_timeout_s,
        stock_commits=job.stock_commits,
        transaction_version=job.transaction_version,
    )


def _scripted(config: EngineConfig, _folder: Path) -> Core:
    return scripted_engine(
        PoisonedScript(vocab_size=VOCAB_SIZE),
        context_max=CONTEXT_MAX,
        clock=time.monotonic_ns,
        cache_tokens=config.cache_tokens,
        sequences_max=config.sequences_max,
        tokens_per_step_max=config.tokens_per_step_max,
        drafts_max=config.drafts_max,
    ).core


def _set_clock(file: Path) -> None:
    """From now on the wall clock is ahead by what the file says. Defaults of arguments were taken long before."""
    real, opened = time.time, file.open("rb")
    ahead = mmap.mmap(opened.fileno(), 8, access=mmap.ACCESS_READ)

    def shifted() -> float:
        return real() + float(struct.unpack("<d", ahead)[0])

    time.time = shifted
    for call in (Intake.__init__, Envelope.__init__):
        call.__defaults__ = call.__defaults__ and tuple(shifted if one is real else one for one in call.__defaults__)
        call.__kwdefaults__ = {n: shifted if one is real else one for n, one in (call.__kwdefaults__ or {}).items()}


def shared(file: Path) -> mmap.mmap:
    """Eight bytes of the file, which keeps whatever is written to them, however this process ends."""
    file.write_bytes(bytes(8))
    with file.open("r+b") as opened:
        return mmap.mmap(opened.fileno(), 8)


def _redirect(log: str) -> None:
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(number, stream)


def _enter(network: str) -> None:
    """This process is in the network namespace of this name. Python has no call for it before 3.12."""
    with Path("/run/netns", network).open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {network}")


def _die_with_parent() -> None:
    """No worker outlives who asked for it: topics and folders go with it."""
    parent = parent_process()
    assert parent

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
