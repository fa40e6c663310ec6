"""A proxy in front of one Kafka broker that sees requests and answers, and can lose or delay them.

Clients that bootstrap from it stay on it: the broker's address is rewritten in the answers that carry one.
"""

import asyncio
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

PRODUCE, FETCH, METADATA, OFFSET_FETCH, FIND_COORDINATOR, JOIN_GROUP, HEARTBEAT = 0, 1, 3, 9, 10, 11, 12
INIT_PRODUCER_ID, ADD_PARTITIONS_TO_TXN, ADD_OFFSETS_TO_TXN, END_TXN, TXN_OFFSET_COMMIT = 22, 24, 25, 26, 28

HOST = "127.0.0.1"

Answer = Callable[[int, bytes], bytes]  # of (version, frame that the broker answered): what the client sees


@dataclass
class _Connection:
    """Between one client and the broker."""

    client: asyncio.StreamWriter
    broker: asyncio.StreamWriter
    asked: dict[int, tuple[int, int]] = field(default_factory=dict)  # correlation id -> key and version

    def close(self) -> None:
        self.client.close()
        self.broker.close()


class KafkaProxy:
    """Faults are switched on by the API key of the request that they are for, or for all that passes.

    `host` is the address of this machine at which it listens.
    """

    def __init__(self, brokers: str, host: str = HOST) -> None:
        self._port = int(brokers.rpartition(":")[2])
        self._host = host
        self._lost_requests: set[int] = set()
        self._held_next: set[int] = set()
        self._lost_answers: set[int] = set()
        self._answers: dict[int, list[Answer]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.held: list[bytes] = []
        self.drops_requests = self.drops_answers = False  # all of them, while the connections stay as they are
        self.latency_s, self.bytes_per_s = 0.0, float("inf")  # of each frame, in either direction
        self.num_struck = 0  # requests and answers that were held, lost once, or answered otherwise

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self._host, 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def brokers(self) -> str:
        """What clients bootstrap from."""
        return f"{self._host}:{self.port}"

    def hold_next(self, key: int) -> None:
        """The next such request does not arrive until it is delivered; the client waits for its answer in vain."""
        self._held_next.add(key)

    async def deliver(self) -> None:
        """The request that was held first arrives, as if it had been long on its way; the broker has dealt with it."""
        reader, writer = await asyncio.open_connection(HOST, self._port)
        await _write(writer, self.held.pop(0))
        await _read(reader)
        writer.close()

    def lose_requests(self, *keys: int) -> None:
        """From now on such requests never arrive."""
        self._lost_requests.update(keys)

    def lose_next_answer(self, key: int) -> None:
        """The next such request is dealt with, and its connection cut before the answer."""
        self._lost_answers.add(key)

    def answer_next(self, key: int, *answers: Answer) -> None:
        """The next such requests are answered so, in turn."""
        self._answers.setdefault(key, []).extend(answers)

    async def _serve(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        broker_reader, broker = await asyncio.open_connection(HOST, self._port)
        connection = _Connection(client, broker)
        for relay in (self._relay_requests(connection, client_reader), self._relay_answers(connection, broker_reader)):
            task = asyncio.create_task(relay)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _relay_requests(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                frame = await _read(reader)
                key, version, correlation = struct.unpack(">hhi", frame[:8])
                connection.asked[correlation] = (key, version)
                if key in self._held_next:
                    self._held_next.remove(key)
                    self.held.append(frame)
                    self.num_struck += 1
                elif not (key in self._lost_requests or self.drops_requests):
                    await self._pass_on(connection.broker, frame)
        connection.close()

    async def _relay_answers(self, connection: _Connection, reader: asyncio.StreamReader) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                frame = await _read(reader)
                key, version = connection.asked.pop(struct.unpack(">i", frame[:4])[0])
                if key in self._lost_answers:
                    self._lost_answers.remove(key)
                    self.num_struck += 1
                    break
                if answers := self._answers.get(key):
                    self.num_struck += 1
                    frame = frame[:4] + answers.pop(0)(version, frame[4:])
                if key in (METADATA, FIND_COORDINATOR):
                    frame = self._readdressed(frame)
                if not self.drops_answers:
                    await self._pass_on(connection.client, frame)
        connection.close()

    async def _pass_on(self, writer: asyncio.StreamWriter, frame: bytes) -> None:
        if self.latency_s:
            await asyncio.sleep(self.latency_s + len(frame) / self.bytes_per_s)
        await _write(writer, frame)

    def _readdressed(self, frame: bytes) -> bytes:
        for host in (HOST.encode(), b"localhost"):
            for string in (_string, _compact_string):
                theirs = string(host) + struct.pack(">i", self._port)
                frame = frame.replace(theirs, string(self._host.encode()) + struct.pack(">i", self.port))
        return frame


def _string(text: bytes) -> bytes:
    return struct.pack(">h", len(text)) + text


def _compact_string(text: bytes) -> bytes:
    return bytes([len(text) + 1]) + text


async def _read(reader: asyncio.StreamReader) -> bytes:
    (length,) = struct.unpack(">i", await reader.readexactly(4))
    return await reader.readexactly(length)


async def _write(writer: asyncio.StreamWriter, frame: bytes) -> None:
    writer.write(struct.pack(">i", len(frame)) + frame)
    await writer.drain()
