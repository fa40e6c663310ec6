"""Told to leave by whoever owns the machine: a file that appears, or a cloud's metadata service that says so.

Owns the shapes of the notices and the looking, now and then. What leaving means is `drain.py`'s and the service's. A
service that does not answer is no notice: it is looked at again, and warned of once.

Sources: AWS, "Spot Instance interruption notices" (IMDSv2: a token first; 404 until there is a notice, two minutes
before the end); Google Cloud, "Handle Spot VM preemption" (TRUE, 30 seconds before the end).
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from worker.config import Notice
from worker.drain import Drain
from worker.telemetry import Telemetry

Look = Callable[[], str | None]  # the notice in words, or None; raises OSError or HTTPException where nobody answers

ANSWER_S = 0.5  # on the machine's own network milliseconds; and a worker that leaves waits for the look under way
BODY_BYTES_MAX = 4096  # a notice has a hundred
AWS_TOKEN_TTL_S = 60  # of a token that is used at once


@asynccontextmanager
async def watching(settings: Notice, drain: Drain, telemetry: Telemetry) -> AsyncIterator[None]:
    """While the body runs, a notice asks the drain to begin."""
    watch = asyncio.create_task(_watch(looks(settings), settings.interval_s, drain, telemetry))
    try:
        yield
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch


def looks(settings: Notice) -> list[Look]:
    """A way of looking for each source that is set; none by default."""
    found: list[Look] = []
    if file := settings.file:
        found.append(lambda: _file(file))
    if settings.cloud == "aws":
        found.append(lambda: _aws(settings.address))
    if settings.cloud == "gcp":
        found.append(lambda: _gcp(settings.address))
    return found


async def _watch(looks: list[Look], interval_s: float, drain: Drain, telemetry: Telemetry) -> None:
    is_warned = False
    while looks and not drain.is_asked:
        for look in looks:
            try:
                notice = await asyncio.to_thread(look)
            except (OSError, HTTPException) as error:
                if not is_warned:
                    telemetry.notice_unreadable(str(error) or type(error).__name__)
                is_warned = True
                continue
            if notice:
                telemetry.noticed(notice)
                drain.ask()
        await asyncio.sleep(interval_s)


def _file(path: Path) -> str | None:
    return f"{path} is there" if path.exists() else None


def _aws(address: str) -> str | None:
    host = address or "169.254.169.254"
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(AWS_TOKEN_TTL_S)}
    status, token = _ask(host, "PUT", "/latest/api/token", lifetime)
    if status != 200:
        raise OSError(f"{host} gives no token: status {status}")
    # latin-1: whatever bytes come go back as they are, but for a line break, which http.client refuses.
    status, body = _ask(
        host, "GET", "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token.decode("latin-1")}
    )
    if status == 404:
        return None
    if status != 200:
        raise OSError(f"{host} answers with status {status}")
    return f"the cloud takes the machine away: {body[:200].decode(errors='replace')}"


def _gcp(address: str) -> str | None:
    host = address or "metadata.google.internal"
    status, body = _ask(host, "GET", "/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    if status != 200 or body.strip() not in (b"TRUE", b"FALSE"):
        raise OSError(f"{host} answers with status {status} and neither TRUE nor FALSE")
    return "the cloud takes the machine away" if body.strip() == b"TRUE" else None


def _ask(host: str, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
    """Status and body. Never by a proxy: the answer is about this machine."""
    connection = HTTPConnection(host, timeout=ANSWER_S)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read(BODY_BYTES_MAX)
    finally:
        connection.close()
