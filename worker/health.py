"""The health endpoints: whether to restart this worker, whether it works, and its metrics.

Owns the HTTP server and the judgement, never the facts: those come from a `Probe`. /livez asks whether a restart would
help, so it looks at the event loop (which must turn to answer at all) and at the engine, and never at Kafka: brokers
that are away do not come back by restarting workers. /readyz asks whether requests are being answered: the model is
loaded, the group has assigned, the broker was heard from. /startupz is done once the model is loaded, however long
that takes.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol

import msgspec
from aiohttp import web
from msgspec import Struct

from worker.errors import Misconfigured

# Above the limit of 120 s after which the service ends the process and says why: this one is for when it does not.
ENGINE_SILENCE_MAX_S = 150.0
# Heartbeats go out every 3 s; a broker that restarts is back within 30 s, and until then waiting is all there is to do.
BROKER_SILENCE_MAX_S = 30.0


class Vitals(Struct, frozen=True, kw_only=True):
    """The facts, as of now. None: not yet."""

    engine_silence_s: (
        float | None
    )  # since the engine's thread last came round, at work or waiting for it; None: loading
    broker_silence_s: float | None  # since the broker last answered anything
    is_assigned: bool  # the group has told us our partitions, if only that there are none for us
    is_draining: bool  # asked to leave


class Probe(Protocol):
    """Whoever knows."""

    def vitals(self) -> Vitals:
        """Called on the event loop for each request; must not wait."""


class Verdict(Struct, frozen=True, kw_only=True):
    """The body of an answer."""

    ok: bool
    reasons: list[str]  # why not


@asynccontextmanager
async def serve_health(probe: Probe, exposition: Callable[[], bytes], *, host: str, port: int) -> AsyncIterator[int]:
    """The endpoints answer during the body of the `async with`, at the port that it is given (any free one for port 0).

    Raises Misconfigured if the address cannot be listened on.
    """
    app = web.Application()
    for path, reasons_not in (("/livez", why_not_alive), ("/readyz", why_not_ready), ("/startupz", why_not_started)):
        app.router.add_get(path, _verdict(probe, reasons_not))
    app.router.add_get("/metrics", _metrics(exposition))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)  # answers take milliseconds
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise Misconfigured(
                f"health: cannot listen on {host}:{port}: {error.strerror}; set another port"
            ) from error
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def why_not_alive(vitals: Vitals) -> list[str]:
    """Reasons to restart the worker."""
    if vitals.engine_silence_s is not None and vitals.engine_silence_s > ENGINE_SILENCE_MAX_S:
        return [f"the engine has not come round for {vitals.engine_silence_s:.0f} s"]
    return []


def why_not_started(vitals: Vitals) -> list[str]:
    """Reasons to go on waiting for the start."""
    return ["the model is not loaded yet"] if vitals.engine_silence_s is None else []


def why_not_ready(vitals: Vitals) -> list[str]:
    """Reasons why requests are not being answered."""
    reasons = why_not_started(vitals) + why_not_alive(vitals)
    if not vitals.is_assigned:
        reasons.append("the group has not assigned partitions yet")
    if vitals.broker_silence_s is None:
        reasons.append("the broker has not answered yet")
    elif vitals.broker_silence_s > BROKER_SILENCE_MAX_S:
        reasons.append(f"the broker has not answered for {vitals.broker_silence_s:.0f} s")
    if vitals.is_draining:
        reasons.append("the worker is leaving")
    return reasons


_Handler = Callable[[web.Request], Awaitable[web.Response]]


def _verdict(probe: Probe, reasons_not: Callable[[Vitals], list[str]]) -> _Handler:
    async def answer(_: web.Request) -> web.Response:
        reasons = reasons_not(probe.vitals())
        body = msgspec.json.encode(Verdict(ok=not reasons, reasons=reasons))
        return web.Response(body=body, status=503 if reasons else 200, content_type="application/json")

    return answer


def _metrics(exposition: Callable[[], bytes]) -> _Handler:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=exposition(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    return answer
