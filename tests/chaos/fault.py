"""What a fault is, what a trial of it is given, and what comes out: plain values that this whole package knows."""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.campaign import Campaign, in_nursery
from worker.config import Kafka
from worker.local_broker import Cluster

SESSION_S = 3.0  # of workers here: brokers allow 6 at least, the local broker 1
STARTING = -15  # exit code of a worker that was asked to leave before it listened: it held nothing
TRIAL_S_MAX = 600.0  # the longest takes 90 s on a quiet machine: what takes longer hangs
BROKER_HEAP = "768m"  # twice what one user needs: trials of many faults share a broker
DUMP_S_MAX = 30.0  # brokers that hang may have been what the trial broke off for


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What trials share."""

    brokers: str
    model: Path  # a folder
    own_cluster: Cluster | None = None  # None: the brokers are others' too, and stay as they are

    async def checkpoint(self) -> Path:
        """The folder of a real one, small and random."""
        return Path(await asyncio.shield(self._checkpoint))

    @cached_property
    def _checkpoint(self) -> "asyncio.Task[str]":
        return asyncio.create_task(asyncio.to_thread(in_nursery, checkpoint_in, str(self.model.parent), ""))

    @property
    def cluster(self) -> Cluster:
        """The brokers, to be stopped and killed."""
        assert self.own_cluster, "this fault needs brokers of its own"
        return self.own_cluster


def checkpoint_in(folder: str) -> str:
    """A small random checkpoint is in the folder; its own."""
    from tests.tiny_models import tiny_served  # brings transformers, which few faults need

    return str(tiny_served(Path(folder)))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a fault; its seed decides everything in it."""

    seed: int
    size: int  # how many times the fault strikes
    folder: Path  # for logs, and whatever proves what went wrong
    stack: Stack
    job: Mapping[str, Any] = field(default_factory=dict)  # what workers are told beside what the fault tells them

    @property
    def dice(self) -> random.Random:
        """New dice: the same throws each time."""
        return random.Random(self.seed)

    @asynccontextmanager
    async def group(
        self, partitions: int = 12, topics: Mapping[str, str] | None = None, **job: Any
    ) -> AsyncIterator[Campaign]:
        """A group of its own, with its topics of these settings; no worker of it is left afterwards.

        Nor a topic, where the brokers are others' too: they would carry some thousand partitions in the end.
        """
        name = f"{self.folder.name}_{uuid.uuid4().hex[:6]}".replace("-", "_")
        job = {"session_timeout_s": SESSION_S, **job, **self.job}
        campaign = Campaign(Kafka(brokers=self.stack.brokers), name, self.stack.model, self.folder, **job)
        async with campaign.opened(partitions, **(topics or {})):
            try:
                yield campaign
            except (Exception, asyncio.CancelledError):
                with suppress(Exception):  # what went wrong with the trial is what is told
                    await asyncio.wait_for(campaign.dump(), DUMP_S_MAX)
                raise
        if not self.stack.own_cluster:
            await campaign.delete_topics()


@asynccontextmanager
async def own_brokers(folder: Path, nodes: int = 1) -> AsyncIterator[Cluster]:
    """Brokers that nobody else has, in the folder. To start them takes seconds, in which other trials go on."""
    cluster = Cluster(folder, nodes=nodes, heap=BROKER_HEAP)
    try:
        await asyncio.to_thread(cluster.start)
        yield cluster
    finally:
        await asyncio.to_thread(cluster.kill)


@dataclass(kw_only=True)
class Finding:
    """What a trial showed."""

    violations: list[str] = field(default_factory=list)
    recoveries_s: list[float] = field(default_factory=list)
    tokens_repeated: int = 0
    notes: list[str] = field(default_factory=list)  # figures that the table has no column for

    def expect(self, holds: bool, otherwise: str) -> None:  # reads as a sentence
        """Another violation, unless it holds."""
        if not holds:
            self.violations.append(otherwise)


@dataclass(frozen=True, kw_only=True)
class Control:
    """A worker without the protection: if nothing goes wrong with it either, the trials prove nothing."""

    job: Mapping[str, Any]
    shows: str  # the violation that must come


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is done, how often, and what it may cost."""

    id: str
    title: str
    unit: str  # what is counted: kills, restarts, records
    pr: int  # how many of them in `make chaos`
    nightly: int  # and in `make chaos-long`
    run: Callable[[Trial], Awaitable[Finding]]
    per_trial: int = 1
    percent: int  # of a processor, that a trial keeps busy: what decides how many run side by side
    nodes: int = 0  # of a cluster of the trial's own; 0: it leaves brokers whole, and shares them
    trial_s_max: float = TRIAL_S_MAX
    recovery_max_s: float | None = None  # at p99
    control: Control | None = None


async def judged(
    campaign: Campaign,
    *,
    recoveries_s: Collection[float] = (),
    violations: Collection[str] = (),
    failures: Collection[str] = (),
    deaths: Collection[int] = (),
) -> Finding:
    """The finding, once all is answered and all workers have left.

    `violations` are what the trial itself has found; `failures` and `deaths` the codes that requests may be answered
    with, and that workers may end with by themselves.
    """
    answered = await campaign.until_answered()
    codes = await campaign.dismiss()
    finding = Finding(violations=[*violations, *await campaign.judge()], recoveries_s=list(recoveries_s))
    finding.tokens_repeated = campaign.tokens_repeated()
    finding.expect(answered, "patience ended before all was answered")
    finding.expect(set(codes) <= {0, STARTING}, f"workers left with the exit codes {codes}")
    finding.expect(set(campaign.deaths) <= {*deaths}, f"workers ended by themselves: {campaign.deaths}")
    unexpected = {code: count for code, count in campaign.failures().items() if code not in failures}
    finding.expect(not unexpected, f"good requests were answered with failures: {unexpected}")
    if finding.violations:
        await campaign.dump()
    return finding
