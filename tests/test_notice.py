"""A notice to leave starts the drain, whatever shape it has; whoever does not answer gives none."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import structlog
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.trace import NoOpTracerProvider

from worker.config import Notice
from worker.drain import Drain
from worker.errors import Misconfigured
from worker.notice import looks, watching
from worker.telemetry import Telemetry

INTERVAL_S = 0.1
SOON_S = 5.0  # dozens of looks, on a busy machine a few
ACTION = json.dumps({"action": "terminate", "time": "2026-11-26T12:00:00Z"}).encode()


class Metadata(BaseHTTPRequestHandler):
    """A cloud's metadata service: AWS's with its token, Google's with its header."""

    def do_PUT(self) -> None:
        lifetime = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        is_right = self.path == "/latest/api/token" and lifetime and 0 < int(lifetime) <= 21600
        self._answer(*((200, b"secret==") if is_right else (400, b"")))

    def do_GET(self) -> None:
        token, flavour = self.headers.get("X-aws-ec2-metadata-token"), self.headers.get("Metadata-Flavor")
        is_right = {
            "/latest/meta-data/spot/instance-action": token == "secret==",
            "/computeMetadata/v1/instance/preempted": flavour == "Google",
        }.get(self.path)
        self._answer(*((self.server.status, self.server.body) if is_right else (401, b"")))  # type: ignore[attr-defined]

    def _answer(self, status: int, body: bytes) -> None:
        self.server.num_asked += 1  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    status, body, num_asked = 404, b"", 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    def says(self, status: int, body: bytes) -> None:
        self.status, self.body = status, body


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Metadata) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@contextmanager
def logged() -> Iterator[list[str]]:
    with structlog.testing.capture_logs() as logs:
        events: list[str] = []
        yield events
        events += [log["event"] for log in logs]


async def is_asked(notice: Notice, within_s: float = SOON_S) -> bool:
    """Whether the drain is asked for within the time."""
    drain = Drain(1.0)
    telemetry = Telemetry(NoOpMeterProvider(), NoOpTracerProvider(), worker="w", group="g")
    async with watching(notice, drain, telemetry):
        try:
            await asyncio.wait_for(drain.asked(), within_s)
        except TimeoutError:
            return False
        return True


async def test_by_default_nobody_is_asked():
    assert looks(Notice()) == []


async def test_a_file_that_appears_is_a_notice(tmp_path):
    notice = Notice(file=tmp_path / "leave", interval_s=INTERVAL_S)
    assert not await is_asked(notice, 3 * INTERVAL_S)
    asking = asyncio.create_task(is_asked(notice))
    await asyncio.sleep(2 * INTERVAL_S)
    (tmp_path / "leave").touch()
    assert await asking


@pytest.mark.parametrize(
    ("cloud", "before", "notice"),
    [("aws", (404, b"not found"), (200, ACTION)), ("gcp", (200, b"FALSE"), (200, b"TRUE\n"))],
)
async def test_a_clouds_notice_is_heard(server, cloud, before, notice):
    server.says(*before)
    settings = Notice(cloud=cloud, address=server.address, interval_s=INTERVAL_S)
    with logged() as events:
        assert not await is_asked(settings, 4 * INTERVAL_S)
    assert events == []
    assert server.num_asked >= 3
    server.says(*notice)
    with logged() as events:
        assert await is_asked(settings)
    assert events == ["notice to leave"]


@pytest.mark.parametrize(
    ("cloud", "answer"),
    [
        ("aws", (500, b"")),
        ("aws", (301, b"")),
        ("gcp", (404, b"")),
        ("gcp", (200, b"x" * 100_000)),
        ("gcp", (503, b"TRUE")),
    ],
)
async def test_what_is_no_answer_is_no_notice_and_warned_of_once(server, cloud, answer):
    server.says(*answer)
    settings = Notice(cloud=cloud, address=server.address, interval_s=INTERVAL_S)
    with logged() as events:
        assert not await is_asked(settings, 4 * INTERVAL_S)
    assert events == ["cannot look for a notice to leave"]
    assert server.num_asked >= 2


async def test_a_service_that_is_not_there_is_no_notice_and_a_file_beside_it_is(server, tmp_path):
    address = server.address
    server.server_close()
    (tmp_path / "leave").touch()
    for cloud in ("aws", "gcp"):
        assert not await is_asked(Notice(cloud=cloud, address=address, interval_s=INTERVAL_S), 3 * INTERVAL_S)
        assert await is_asked(Notice(cloud=cloud, address=address, file=tmp_path / "leave", interval_s=INTERVAL_S))


async def test_a_service_that_hangs_holds_up_neither_the_file_nor_the_end(tmp_path):
    silent = await asyncio.start_server(lambda _reader, _writer: asyncio.sleep(60), "127.0.0.1", 0)
    address = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
    asking = asyncio.create_task(
        is_asked(Notice(cloud="gcp", address=address, file=tmp_path / "leave", interval_s=INTERVAL_S))
    )
    await asyncio.sleep(0.3)
    (tmp_path / "leave").touch()
    assert await asking
    silent.close()


@pytest.mark.parametrize("address", ["host", "host:", ":80", "host:0", "host:99999"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(Misconfigured, match=r"notice\.address"):
        Notice(cloud="aws", address=address)
