"""Faults of the brokers: restarted, killed, one after the other."""

import asyncio
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path

from tests.campaign import LOOK_S, some_requests
from tests.chaos.fault import Fault, Finding, Trial, judged, own_brokers
from tests.chaos.workers import STEP_S
from worker.errors import TokenmillError, Unavailable
from worker.health import BROKER_SILENCE_MAX_S
from worker.local_broker import Cluster
from worker.local_broker.ports import free_ports

RESUMED_MAX_S = 30.0
REQUESTS_PER_RESTART = 100
NODES = 3
DISK_BYTES = 64 << 20  # an empty broker takes 10 MiB
DOWN_S = 20.0  # a broker that cannot write stops at its next write, be it its own heartbeat's
UNREADY_S = BROKER_SILENCE_MAX_S + 2
DEAD_S = (0.0, 3.0)  # how long the broker stays away, on top of what it needs to start


async def restart(trial: Trial) -> Finding:
    """The one broker stops, cleanly or by kill -9 as the seed's parity says, under load, and comes back."""
    dice, cluster = trial.dice, trial.stack.cluster
    go_away: Callable[[], None] = (cluster.stop, cluster.kill)[trial.seed % 2]
    async with trial.group(step_s=STEP_S) as campaign:
        for name in "ab":
            campaign.hire(name)
        await campaign.recovery_s()
        await campaign.ask(some_requests(dice, campaign.model, REQUESTS_PER_RESTART))
        await asyncio.sleep(dice.uniform(0, 1))
        await asyncio.to_thread(go_away)
        await asyncio.sleep(dice.uniform(*DEAD_S))
        await asyncio.to_thread(cluster.start)
        back_s = time.monotonic()
        await campaign.recovery_s()
        resumed_s = time.monotonic() - back_s
        return await judged(campaign, recoveries_s=[resumed_s], deaths={Unavailable.exit_code})


async def rolling_kill(trial: Trial) -> Finding:
    """Of three brokers one after the other is killed and comes back, with two copies in sync asked for."""
    dice, cluster, times_s = trial.dice, trial.stack.cluster, []
    async with trial.group(step_s=STEP_S) as campaign:
        for name in "ab":
            campaign.hire(name)
        await campaign.recovery_s()
        for number in range(trial.size):
            node = 1 + number % NODES
            await campaign.ask(some_requests(dice, campaign.model, REQUESTS_PER_RESTART // 2))
            await asyncio.sleep(dice.uniform(0, 1))
            await asyncio.to_thread(cluster.kill, node)
            times_s.append(await campaign.recovery_s())  # with one of three gone
            await asyncio.to_thread(cluster.start, node)
            await campaign.recovery_s()
        return await judged(campaign, recoveries_s=times_s, deaths={Unavailable.exit_code})


async def disk_full(trial: Trial) -> Finding:
    """The broker's disk is full: it stops. Somebody frees it and starts the broker again."""
    if os.geteuid():
        return Finding(violations=["not root: a small disk cannot be mounted here"])
    disk = trial.folder.absolute() / "disk"
    with mounted(disk):
        async with own_brokers(disk / "kafka") as cluster:
            stack = replace(trial.stack, brokers=cluster.brokers, own_cluster=cluster)
            return await fill_and_free(replace(trial, stack=stack), disk / "filler")


async def fill_and_free(trial: Trial, filler: Path) -> Finding:
    """A worker at work while the file fills the disk, and until a while after it is gone."""
    dice, cluster, wrong = trial.dice, trial.stack.cluster, []
    async with trial.group(partitions=2, step_s=STEP_S, attempts_max=100) as campaign:
        (health_port,) = free_ports(1)
        campaign.hire("a", health_port=health_port)
        await campaign.recovery_s()
        await asyncio.to_thread(fill, filler)
        with suppress(TokenmillError):
            await campaign.ask(some_requests(dice, campaign.model, REQUESTS_PER_RESTART))
        await until_down(cluster)
        await asyncio.sleep(UNREADY_S)
        if (status := await asyncio.to_thread(readiness, health_port)) != HTTPStatus.SERVICE_UNAVAILABLE:
            wrong.append(f"/readyz answers {status} while there is no broker")
        await asyncio.to_thread(filler.unlink)
        await asyncio.to_thread(cluster.start)
        resumed_s = await campaign.recovery_s()
        finding = await judged(campaign, recoveries_s=[resumed_s], violations=wrong, deaths={Unavailable.exit_code})
        finding.notes.append(f"seed {trial.seed}: {len(campaign.deaths)} workers ended and were started again")
        return finding


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A disk in memory, as small as one broker can live on."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(file: Path) -> None:
    """The disk is full."""
    with suppress(OSError), file.open("wb", buffering=0) as opened:
        while True:
            opened.write(bytes(1 << 16))


async def until_down(cluster: Cluster) -> None:
    """The broker has noticed and stopped, or patience ends: then it is killed, as its owner would."""
    with suppress(TimeoutError):
        async with asyncio.timeout(DOWN_S):
            while cluster.running():
                await asyncio.sleep(LOOK_S)
    await asyncio.to_thread(cluster.kill)


def readiness(port: int) -> int:
    """What the worker's health endpoint says; 0 where nobody listens."""
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


FAULTS = (
    Fault(
        id="F5",
        title="the broker stops cleanly, or by kill -9, and comes back; recovery counts from its being there again",
        unit="restarts",
        pr=6,
        nightly=50,
        percent=50,
        nodes=1,
        recovery_max_s=RESUMED_MAX_S,
        run=restart,
    ),
    Fault(
        id="F6",
        title="of three brokers (two copies in sync) one after the other is killed; recovery is with one of them gone",
        unit="broker kills",
        pr=0,
        nightly=20,
        per_trial=5,
        percent=150,
        nodes=NODES,
        run=rolling_kill,
    ),
    Fault(
        id="F10",
        title=f"the broker's disk ({DISK_BYTES >> 20} MiB) full, then freed; recovery counts from the broker's return",
        unit="full disks",
        pr=1,
        nightly=5,
        percent=30,
        recovery_max_s=RESUMED_MAX_S,
        run=disk_full,
    ),
)
