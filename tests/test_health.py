"""The health endpoints: restart what hangs, send no traffic to what cannot answer, and never restart for a broker."""

import socket
from collections.abc import AsyncIterator

import aiohttp
import msgspec
import pytest
import pytest_asyncio

from worker.errors import Misconfigured
from worker.health import BROKER_SILENCE_MAX_S, ENGINE_SILENCE_MAX_S, Vitals, serve_health

WELL = Vitals(engine_silence_s=0.1, broker_silence_s=0.1, is_assigned=True, is_draining=False)


class Worker:
    """What the endpoints ask."""

    def __init__(self) -> None:
        self.now = WELL
        self.base = ""

    def vitals(self) -> Vitals:
        return self.now

    def has(self, **changes: object) -> None:
        self.now = msgspec.structs.replace(self.now, **changes)

    async def get(self, path: str) -> tuple[int, list[str]]:
        async with aiohttp.ClientSession() as session, session.get(self.base + path) as answer:
            body = await answer.json()
            assert body["ok"] == (answer.status == 200) == (body["reasons"] == [])
            return answer.status, body["reasons"]


@pytest_asyncio.fixture
async def worker() -> AsyncIterator[Worker]:
    worker = Worker()
    async with serve_health(worker, lambda: b"tokenmill_steps_total 3.0\n", host="127.0.0.1", port=0) as port:
        worker.base = f"http://127.0.0.1:{port}"
        yield worker


async def test_a_worker_that_is_well_says_so_everywhere(worker: Worker):
    for path in ("/livez", "/readyz", "/startupz"):
        assert await worker.get(path) == (200, [])


async def test_a_worker_that_loads_its_model_is_alive_and_neither_started_nor_ready(worker: Worker):
    worker.has(engine_silence_s=None)
    assert await worker.get("/livez") == (200, [])
    assert await worker.get("/startupz") == (503, ["the model is not loaded yet"])
    assert await worker.get("/readyz") == (503, ["the model is not loaded yet"])


async def test_an_engine_that_hangs_is_a_reason_to_restart(worker: Worker):
    worker.has(engine_silence_s=ENGINE_SILENCE_MAX_S + 1)
    for path in ("/livez", "/readyz"):
        assert await worker.get(path) == (503, ["the engine has not come round for 151 s"])


@pytest.mark.parametrize("silence_s", [None, BROKER_SILENCE_MAX_S + 1])
async def test_a_broker_that_is_away_makes_a_worker_unready_and_never_dead(worker: Worker, silence_s: float | None):
    worker.has(broker_silence_s=silence_s)
    assert await worker.get("/livez") == (200, [])
    status, reasons = await worker.get("/readyz")
    assert status == 503
    assert "the broker has not answered" in reasons[0]


async def test_all_reasons_are_given_at_once(worker: Worker):
    worker.has(engine_silence_s=None, broker_silence_s=None, is_assigned=False, is_draining=True)
    _, reasons = await worker.get("/readyz")
    assert len(reasons) == 4


async def test_metrics_are_served_in_prometheus_text_format(worker: Worker):
    async with aiohttp.ClientSession() as session, session.get(worker.base + "/metrics") as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert await answer.text() == "tokenmill_steps_total 3.0\n"


async def test_a_port_that_is_taken_is_named(worker: Worker):
    port = int(worker.base.rpartition(":")[2])
    with pytest.raises(Misconfigured, match=f"127.0.0.1:{port}.*set another port"):
        async with serve_health(worker, bytes, host="127.0.0.1", port=port):
            pass


async def test_the_port_is_free_again_afterwards():
    async with serve_health(Worker(), bytes, host="127.0.0.1", port=0) as port:
        pass
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
