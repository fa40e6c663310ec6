"""Faults of what is between a worker and the brokers: requests late, answers lost, partitions, a slow line."""

import asyncio
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import BytesIO

from aiokafka import errors
from aiokafka.client import ConnectionGroup, CoordinationType
from aiokafka.producer.transaction_manager import PidAndEpoch

from tests import kafka_proxy
from tests.campaign import LOOK_S, Campaign, Hired, some_requests
from tests.chaos.fault import TRIAL_S_MAX, Control, Fault, Finding, Trial, judged
from tests.chaos.workers import STEP_S, at_work_again_s
from tests.kafka_proxy import Answer, KafkaProxy
from worker.brokers.kafka_eos import ExactlyOnceProducer
from worker.brokers.kafka_errors import CONCURRENT_TRANSACTIONS, LOAD_IN_PROGRESS, NETWORK_EXCEPTION, NOT_COORDINATOR
from worker.brokers.kafka_settings import KafkaSettings
from worker.brokers.kafka_wire import (
    NO_TAGS,
    EpochEndTxnRequest,
    EpochEndTxnResponse,
    Exactly,
    TxnOffsetCommitResponse,
)
from worker.errors import Unavailable

REQUEST_TIMEOUT_S = 1.5  # how soon a worker gives an answer up: what is late must come later than that
LATE_S = (0.5, 3.0)  # before a worker has given it up, and after it has gone on with another transaction
STRUCK_S = 10.0  # a flush comes at least every 5
REQUESTS_PER_STRIKE = 30
REBALANCES_MAX = 4  # for one cut: two when whoever is cut off is given up, and two when it comes back
GROWTH_BYTES_MAX = 50 << 20
LAST_EPOCH = 32_766  # Kafka gives a producer another id instead of its epoch 32,767
EPOCHS_LEFT = 10


@dataclass(frozen=True)
class Mischief:
    """One thing that a network does to one request of a transaction."""

    name: str
    strike: Callable[[KafkaProxy], None]
    is_late: bool = False  # what was held arrives after all
    is_strict: bool = False  # the request is made on older clusters only
    is_fatal: bool = False  # it arrives in the middle of the next transaction, and the worker dies there


def late(name: str, key: int, *, is_strict: bool = False) -> Mischief:
    """The request arrives when nobody waits for it any more."""
    return Mischief(f"{name} late", lambda proxy: proxy.hold_next(key), is_late=True, is_strict=is_strict)


def lost(name: str, key: int) -> Mischief:
    """The request is dealt with, and the connection breaks before the answer."""
    return Mischief(f"{name} answered in vain", lambda proxy: proxy.lose_next_answer(key))


def failed(name: str, key: int, answer: Answer) -> Mischief:
    """The request is dealt with and the answer is an error: twice, for once may be luck."""
    return Mischief(name, lambda proxy: proxy.answer_next(key, answer, answer))


def offsets_failed(code: int) -> Answer:
    """TxnOffsetCommit's answer, each partition with this error."""

    def answer(version: int, answer: bytes) -> bytes:
        if version < TxnOffsetCommitResponse.API_VERSION:  # stock aiokafka's
            return answer
        throttle_ms, topics, _ = TxnOffsetCommitResponse.SCHEMA.decode(BytesIO(answer[1:]))  # after the header's tags
        changed = [(topic, [(number, code, NO_TAGS) for number, *_ in rows], NO_TAGS) for topic, rows, _ in topics]
        return answer[:1] + bytes(TxnOffsetCommitResponse.SCHEMA.encode((throttle_ms, changed, NO_TAGS)))

    return answer


def end_failed(code: int) -> Answer:
    """EndTxn's answer with this error: throttle (4 bytes), error (2), and in v5 the next epoch."""

    def answer(version: int, answer: bytes) -> bytes:
        start = 5 if version >= EpochEndTxnResponse.API_VERSION else 4  # flexible: after the header's tags
        return answer[:start] + code.to_bytes(2, "big") + answer[start + 2 :]

    return answer


MISCHIEF = (
    Mischief("EndTxn late, and the worker dead", lambda proxy: proxy.hold_next(kafka_proxy.END_TXN), is_fatal=True),
    lost("EndTxn", kafka_proxy.END_TXN),
    late("EndTxn", kafka_proxy.END_TXN),
    late("TxnOffsetCommit", kafka_proxy.TXN_OFFSET_COMMIT),
    failed("TxnOffsetCommit: NETWORK_EXCEPTION", kafka_proxy.TXN_OFFSET_COMMIT, offsets_failed(NETWORK_EXCEPTION)),
    late("AddPartitionsToTxn", kafka_proxy.ADD_PARTITIONS_TO_TXN, is_strict=True),
    late("AddOffsetsToTxn", kafka_proxy.ADD_OFFSETS_TO_TXN, is_strict=True),
    late("Produce", kafka_proxy.PRODUCE),
    lost("TxnOffsetCommit", kafka_proxy.TXN_OFFSET_COMMIT),
    failed("TxnOffsetCommit: LOAD_IN_PROGRESS", kafka_proxy.TXN_OFFSET_COMMIT, offsets_failed(LOAD_IN_PROGRESS)),
    failed("EndTxn: NOT_COORDINATOR", kafka_proxy.END_TXN, end_failed(NOT_COORDINATOR)),
    lost("Produce", kafka_proxy.PRODUCE),
)
WAYS = (2, 0)  # transaction.version: an epoch for each transaction, and the fallback for older clusters


async def unknown_outcomes(trial: Trial) -> Finding:
    """Requests that move a worker's transactions come late, or their answers never; the seed's parity is the way."""
    dice, wrong = trial.dice, []
    version = WAYS[trial.seed % 2]
    known = [one for one in MISCHIEF if not (one.is_strict and version)]
    async with (
        KafkaProxy(trial.stack.brokers) as proxy,
        trial.group(step_s=STEP_S, transaction_version=version, request_timeout_s=REQUEST_TIMEOUT_S) as campaign,
    ):
        campaign.hire("a", brokers=proxy.brokers)
        campaign.hire("b")
        await at_work_again_s(campaign, "a")
        recoveries_s = []
        for number in range(trial.size):
            mischief = known[(trial.seed // 2 * trial.size + number) % len(known)]
            if not await struck(campaign, proxy, mischief, dice):
                wrong.append(f"{mischief.name}: no such request was made")
            recoveries_s.append(await campaign.recovery_s())
        # Who has no answer from a busy broker in 1.5 s, when it opens a new producer, ends and is started again.
        deaths = {Unavailable.exit_code}
        return await judged(campaign, recoveries_s=recoveries_s, violations=wrong, deaths=deaths)


async def struck(campaign: Campaign, proxy: KafkaProxy, mischief: Mischief, dice: random.Random) -> bool:
    """The mischief was done, under load that goes on."""
    mischief.strike(proxy)
    if not await noticed(campaign, proxy, dice):
        return False
    if mischief.is_fatal:
        proxy.hold_next(kafka_proxy.TXN_OFFSET_COMMIT)  # of the next transaction, whose records the broker has
        if not await noticed(campaign, proxy, dice):
            return False
        await proxy.deliver()
        campaign.replace("a")
        proxy.held.clear()
    elif mischief.is_late:
        await asyncio.sleep(dice.uniform(*LATE_S))
        await campaign.ask(some_requests(dice, campaign.model, REQUESTS_PER_STRIKE))
        await proxy.deliver()
    return True


async def noticed(campaign: Campaign, proxy: KafkaProxy, dice: random.Random) -> bool:
    """Requests have come in, and among what the worker sent for them was one to strike."""
    num_before = proxy.num_struck
    await campaign.ask(some_requests(dice, campaign.model, REQUESTS_PER_STRIKE))
    with suppress(TimeoutError):
        async with asyncio.timeout(STRUCK_S):
            while proxy.num_struck == num_before:
                campaign.revive()
                await asyncio.sleep(LOOK_S)
    return proxy.num_struck > num_before


async def partition(trial: Trial) -> Finding:
    """One worker's line is cut for a while: the link is down, or one of the two directions swallows all."""
    if os.geteuid():
        return Finding(violations=["not root: networks cannot be made here"])
    dice, cut_s = trial.dice, CUT_S[trial.seed % len(CUT_S)]
    cut = CUTS[trial.seed // len(CUT_S) % len(CUTS)]
    with network(trial.seed) as line:
        async with (
            KafkaProxy(trial.stack.brokers, line.host) as proxy,
            trial.group(step_s=STEP_S, session_timeout_s=6.0) as campaign,
        ):
            far = campaign.hire("a", brokers=proxy.brokers, network=line.name)
            near = campaign.hire("b")
            await at_work_again_s(campaign, "a")
            num_before = num_generations(near)
            with cut(line, proxy):
                end_s = time.monotonic() + cut_s
                while time.monotonic() < end_s:
                    await campaign.ask(some_requests(dice, campaign.model, REQUESTS_PER_STRIKE))
                    campaign.revive()
                    await asyncio.sleep(min(1.0, cut_s))
            recovery_s = await campaign.recovery_s()
            back_s = await at_work_again_s(campaign, "a")
            finding = await judged(campaign, recoveries_s=[recovery_s], deaths={Unavailable.exit_code})
            num_rebalances = num_generations(near) - num_before
            finding.expect(num_rebalances <= REBALANCES_MAX, f"{num_rebalances} rebalances for one cut")
            finding.notes.append(
                f"{cut.__name__.replace('_', ' ')} for {cut_s} s: at work again after {back_s:.1f} s, "
                f"{num_rebalances} rebalances, {'it lived' if far.process.exitcode == 0 else 'it was started again'}"
            )
            return finding


@dataclass(frozen=True)
class Line:
    """A network namespace with one line to this machine."""

    name: str
    link: str  # our end
    host: str  # its address


@contextmanager
def network(number: int) -> Iterator[Line]:
    """The namespace exists. Needs root."""
    name, subnet = f"tokenmill-{os.getpid()}-{number}", f"10.213.{number % 256}"
    line = Line(name, f"tm{os.getpid() % 100_000}-{number % 1000}a", f"{subnet}.1")
    far = f"{line.link[:-1]}b"
    ip("netns", "add", name)
    try:
        ip("link", "add", line.link, "type", "veth", "peer", "name", far, "netns", name)
        ip("addr", "add", f"{line.host}/24", "dev", line.link)
        ip("link", "set", line.link, "up")
        ip("-n", name, "addr", "add", f"{subnet}.2/24", "dev", far)
        for inner in (far, "lo"):
            ip("-n", name, "link", "set", inner, "up")
        yield line
    finally:
        ip("netns", "del", name)


def ip(*arguments: str) -> None:
    """Raises CalledProcessError."""
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def link_down(line: Line, _proxy: KafkaProxy) -> Iterator[None]:
    """Nothing passes, and nobody is told."""
    ip("link", "set", line.link, "down")
    try:
        yield
    finally:
        ip("link", "set", line.link, "up")


@contextmanager
def answers_dropped(_line: Line, proxy: KafkaProxy) -> Iterator[None]:
    """The brokers hear the worker, and it hears nothing."""
    proxy.drops_answers = True
    yield
    proxy.drops_answers = False


@contextmanager
def requests_dropped(_line: Line, proxy: KafkaProxy) -> Iterator[None]:
    """The brokers hear nothing; what they had to say still arrives."""
    proxy.drops_requests = True
    yield
    proxy.drops_requests = False


CUT_S = (1, 10, 45)
CUTS = (link_down, answers_dropped, requests_dropped)


def num_generations(life: Hired) -> int:
    """How often the group has dealt out its partitions, as this member has seen it."""
    return max((line["generation"] for line in life.logged() if line["event"] == "partitions assigned"), default=0)


async def slow_line(trial: Trial) -> Finding:
    """Half a second for each frame, and 64 KB/s, between all workers and the broker."""
    dice, wrong = trial.dice, []
    async with KafkaProxy(trial.stack.brokers) as proxy, trial.group(session_timeout_s=10.0) as campaign:
        lives = [campaign.hire(name, brokers=proxy.brokers) for name in "ab"]
        for name in "ab":
            await campaign.until_serving(name)
        await campaign.recovery_s()  # both have joined, and the group has dealt out its partitions
        before = [one.memory_bytes for one in lives]
        num_before = num_generations(lives[0])
        proxy.latency_s, proxy.bytes_per_s = 0.25, 64e3  # each way
        end_s = time.monotonic() + trial.size
        while time.monotonic() < end_s:
            await campaign.ask(some_requests(dice, campaign.model, 3))
            await asyncio.sleep(1)
        recovery_s = await campaign.recovery_s()
        grown = [one.memory_bytes - num_bytes for one, num_bytes in zip(lives, before, strict=True)]
        if max(grown) > GROWTH_BYTES_MAX:
            wrong.append(f"the workers' memory grew by {max(grown) >> 20} MiB")
        if num_generations(lives[0]) != num_before:
            wrong.append("slowness was taken for death: the group dealt out its partitions anew")
        proxy.latency_s = 0.0
        return await judged(campaign, recoveries_s=[recovery_s], violations=wrong)


async def epochs_run_out(trial: Trial) -> Finding:
    """A worker commits on when its producer's epochs are used up, and is given another producer id."""
    dice = trial.dice
    async with trial.group(step_s=STEP_S) as campaign:
        client = replace(campaign.client, group=campaign.group, worker="a")
        used = await use_up(client, LAST_EPOCH - EPOCHS_LEFT)
        campaign.hire("a")
        for _ in range(3 * EPOCHS_LEFT):  # a transaction or more for each
            await campaign.ask(some_requests(dice, campaign.model, 1, tokens_max=5))
            await campaign.until_answered()
        fresh = await use_up(client, 0)
        finding = await judged(campaign, deaths={})
        finding.expect(fresh.pid != used.pid, "the producer still has the same id: its epochs have not run out")
        return finding


async def use_up(client: KafkaSettings, epoch: int) -> PidAndEpoch:
    """The producer's id, and its epoch that is at least this one: each empty transaction that is aborted takes one."""
    producer = ExactlyOnceProducer(transactional_id=client.transactional_id, **client.client_options())
    await producer.start()
    try:
        transaction = producer._txn_manager
        while transaction.producer_epoch < epoch:
            node = await producer._sender._find_coordinator(CoordinationType.TRANSACTION, client.transactional_id)
            request = EpochEndTxnRequest(
                client.transactional_id, transaction.producer_id, transaction.producer_epoch, False, NO_TAGS
            )
            response = await producer.client.send(node, Exactly(request), group=ConnectionGroup.COORDINATION)
            if response.error_code not in (0, CONCURRENT_TRANSACTIONS):
                raise errors.for_code(response.error_code)
            if not response.error_code:
                transaction._pid_and_epoch = PidAndEpoch(response.producer_id, response.producer_epoch)
        return transaction._pid_and_epoch
    finally:
        await producer.stop()


FAULTS = (
    Fault(
        id="F7",
        title="one worker's line cut for 1, 10 or 45 s: link down, answers dropped, requests dropped",
        unit="cuts",
        pr=9,
        nightly=60,
        percent=25,
        run=partition,
    ),
    Fault(
        id="F9",
        title="a slow line: 500 ms for a request and its answer, 64 KB/s",
        unit="seconds",
        pr=60,
        nightly=600,
        per_trial=600,
        trial_s_max=600 + TRIAL_S_MAX,
        percent=25,
        run=slow_line,
    ),
    Fault(
        id="F21",
        title="a producer's epochs run out (32,766 transactions)",
        unit="producer ids",
        pr=1,
        nightly=5,
        percent=60,
        run=epochs_run_out,
    ),
    Fault(
        id="F8",
        title="unknown outcomes: requests of a transaction late, their answers lost or errors (KAFKA-17754), both ways",
        unit="strikes",
        pr=20,
        nightly=300,
        per_trial=5,
        percent=60,
        control=Control(job={"stock_commits": True}, shows="answered"),
        run=unknown_outcomes,
    ),
)
