"""A worker reaches a secured Kafka with the rights that `docs/operations.md` lists, and says what keeps it from it."""

import argparse
import asyncio
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from schemas.codec import decode_result
from schemas.results import Completion, ErrorCode, Input
from tests.broker_contract import Owner, read, transact
from tests.invariants import place
from tests.secured_kafka import (
    CREATE,
    DESCRIBE,
    GROUP,
    LITERAL,
    PASSWORD,
    PREFIXED,
    READ,
    TOPIC,
    TRANSACTIONAL_ID,
    WRITE,
    Right,
    SecuredKafka,
    make_authority,
    secured_kafka,
)
from tests.tiny_models import tiny_served
from worker.brokers import kafka_ending
from worker.brokers.base import Outgoing, Position
from worker.brokers.kafka import KafkaBroker
from worker.brokers.kafka_client import Sender, TopicSpec, create_topics, read_all, require_topics
from worker.brokers.kafka_ending import Reach
from worker.brokers.kafka_settings import KafkaSettings
from worker.commands.answers import send_all
from worker.config import Settings
from worker.errors import Fenced, Misconfigured

pytestmark = pytest.mark.slow  # not one by one: certificates and a node come first

ROOT = Path(__file__).parents[1]
DEFAULTS = Settings()
TOPICS = DEFAULTS.topics
REFUSED_S = 20.0  # a refusal is an answer: it comes within a second, on a busy machine within a few
ANSWERED_S = 60.0  # a worker starts and answers three requests in 6 s; the machine may be busy
SECRET_TEXT = "the heron stands in the shallow water"


def documented_rights() -> Iterator[Right]:
    """What the `kafka-acls.sh` lines of the documentation allow a worker."""
    line = argparse.ArgumentParser()
    line.add_argument("--operation", type=str.upper)
    for resource in ("--topic", "--group", "--transactional-id"):
        line.add_argument(resource, action="append", default=[])
    line.add_argument("--resource-pattern-type", default="literal")
    text = (ROOT / "docs" / "operations.md").read_text()
    for acl in (line.parse_args(shlex.split(each)[1:]) for each in text.splitlines() if each.startswith("$acls ")):
        operation = {"READ": READ, "WRITE": WRITE}[acl.operation]
        pattern = {"literal": LITERAL, "prefixed": PREFIXED}[acl.resource_pattern_type]
        for kind, names in ((TOPIC, acl.topic), (GROUP, acl.group), (TRANSACTIONAL_ID, acl.transactional_id)):
            yield from (Right(kind, name, operation, pattern) for name in names)


RIGHTS = tuple(documented_rights())
PREVIEWS = Right(TOPIC, TOPICS.chunks, WRITE)


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    with secured_kafka(tmp_path_factory.mktemp("secured")) as secured:
        specs = [TopicSpec(name=name, partitions=1) for name in TOPICS.by_setting.values()]
        asyncio.run(create_topics(secured.admin, specs))
        yield secured


def client_of(secured: SecuredKafka, worker: str = "worker") -> KafkaSettings:
    client = secured.kafka.client(worker=worker, group=DEFAULTS.group)
    return replace(client, session_timeout_s=6, heartbeat_s=0.2)


async def one_life(secured: SecuredKafka, transaction_version: int = 2, *, previews: bool = True) -> None:
    """All that a worker ever asks of Kafka: it reads requests, answers in a transaction, previews, leaves.

    `previews`: whether the preview is to arrive. Raises TimeoutError where anything hangs.
    """
    client = replace(client_of(secured), transaction_version=transaction_version)
    num_before = await num_previews(secured)
    async with asyncio.timeout(REFUSED_S), Sender(secured.admin) as sender:
        for topic in TOPICS.consumed:
            await (await sender.send(Outgoing(topic=topic, key=None, value=b"request")))
        await require_topics(client, TOPICS.written, "WRITE")
        owner = Owner(KafkaBroker(client, TOPICS.transacted))
        try:
            await owner.broker.start(TOPICS.consumed, owner)
            await one_burst(owner)
            while previews and await num_previews(secured) == num_before:
                await asyncio.sleep(0.05)
        finally:
            await owner.broker.stop()


async def num_previews(secured: SecuredKafka) -> int:
    return len(await read_all(secured.admin, [TOPICS.chunks]))


async def one_burst(owner: Owner) -> None:
    broker = owner.broker
    while len(owner.places) < len(TOPICS.consumed):
        await broker.poll((), 1, 0.05)
    records = [record for place in owner.places for record in await read(broker, [place], 1)]
    positions = {record.place: Position(record.offset + 1) for record in records}
    results = (TOPICS.completions, TOPICS.costs, TOPICS.handoff, TOPICS.dead_letters)
    outgoing = [Outgoing(topic=topic, key=None, value=b"result") for topic in results]
    await broker.preview(Outgoing(topic=TOPICS.chunks, key=None, value=b"chunk"))
    await transact(broker, outgoing, positions, owner.membership)
    await broker.commit()
    assert await broker.positions(owner.places) == positions
    assert (await broker.ends(owner.places)).keys() == set(owner.places)
    assert (await broker.lag()).keys() == set(owner.places)


async def test_a_worker_whose_user_may_only_see_the_topic_of_previews_works_without_them(secured):
    await secured.allow_only(set(RIGHTS) - {PREVIEWS} | {PREVIEWS._replace(operation=DESCRIBE)})
    await one_life(secured, previews=False)


@pytest.mark.parametrize("transaction_version", [0, 2])
async def test_a_worker_needs_no_more_than_the_documented_rights(secured, transaction_version):
    await secured.allow_only(RIGHTS)
    await one_life(secured, transaction_version)


@pytest.mark.parametrize("missing", RIGHTS, ids=str)
async def test_a_missing_right_is_named_at_once(secured, missing):
    await secured.allow_only(set(RIGHTS) - {missing})
    with pytest.raises(Misconfigured, match=f"lacks the right to {missing};"):
        await one_life(secured)


@pytest.mark.parametrize("weakened", [right for right in RIGHTS if right != PREVIEWS], ids=str)
@pytest.mark.parametrize("transaction_version", [0, 2])
async def test_a_right_is_named_that_is_missed_only_in_use(secured, weakened, transaction_version):
    """Whoever may DESCRIBE a topic sees it, and passes every check before the first read or write."""
    await secured.allow_only(set(RIGHTS) - {weakened} | {weakened._replace(operation=DESCRIBE)})
    with pytest.raises(Misconfigured, match=f"lacks the right to {weakened};"):
        await one_life(secured, transaction_version)


async def test_a_worker_ends_open_transactions_of_its_group_and_sees_no_others(secured, monkeypatch):
    monkeypatch.setattr(kafka_ending, "OPEN_TOO_LONG_S", 0.1)
    await secured.allow_only(RIGHTS)
    dead, stranger = client_of(secured, "dead"), replace(secured.admin, group="another", worker="stranger")
    brokers = [KafkaBroker(each, TOPICS.transacted) for each in (dead, stranger)]
    try:
        for broker in brokers:
            await broker.start(TOPICS.consumed, Owner(broker))
            await broker.begin()
            await (await broker.send(Outgoing(topic=TOPICS.completions, key=None, value=b"unfinished")))
        await asyncio.sleep(0.2)
        options, reach = client_of(secured).client_options(), Reach(dead.group, TOPICS.transacted)
        for prefix, ended in (("another/", []), (dead.transactional_id_prefix, [dead.transactional_id])):
            assert await kafka_ending.end_open_transactions(options, prefix, reach, 5000) == ended
        with pytest.raises(Fenced):
            await brokers[0].commit()
        await brokers[1].commit()
    finally:
        for broker in brokers:
            await broker.stop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sasl_password": "wrong"}, r"refuses the login of 'tokenmill'.*security\.password_file"),
        ({"sasl_username": "nobody"}, "refuses the login of 'nobody'"),
        ({"sasl_mechanism": "PLAIN"}, r"takes no login by PLAIN; set security\.mechanism"),
        ({"ssl_cafile": None}, r"no TLS connection.*certificate verify failed.*security\.ca_file"),
    ],
    ids=["password", "user", "mechanism", "authority"],
)
async def test_brokers_that_refuse_us_are_told_from_brokers_that_are_away(secured, change, message):
    client = replace(client_of(secured), **change)
    broker = KafkaBroker(client, TOPICS.transacted)
    sending = Sender(client)
    for attempt in (
        lambda: broker.start(TOPICS.consumed, Owner(broker)),
        sending.__aenter__,
        lambda: create_topics(client, [TopicSpec(name="new", partitions=1)]),
    ):
        with pytest.raises(Misconfigured, match=message) as refused:
            async with asyncio.timeout(REFUSED_S):
                await attempt()
        assert "wrong" not in str(refused.value)


async def test_another_authoritys_certificate_is_not_enough(secured, tmp_path):
    make_authority(tmp_path)
    client = replace(client_of(secured), ssl_cafile=tmp_path / "ca.pem")
    with pytest.raises(Misconfigured, match=r"no TLS connection.*security\.ca_file"):
        await require_topics(client, TOPICS.consumed)


async def test_commands_name_the_right_that_they_lack_and_need_no_other(secured):
    client = secured.kafka.client()
    created = Right(TOPIC, "made.later", CREATE)
    specs = [TopicSpec(name=created.name, partitions=1)]
    record = Outgoing(topic=TOPICS.requests, key=None, value=b"request")

    async def send() -> None:
        async with Sender(client) as sender:
            await (await sender.send(record))

    another = Right(TOPIC, TOPICS.costs, WRITE)  # what every sender is asked for at first: a right to WRITE anything
    for act, right, others in (
        (send, Right(TOPIC, TOPICS.requests, WRITE), [another]),
        (lambda: read_all(client, [TOPICS.completions]), Right(TOPIC, TOPICS.completions, READ), []),
        (lambda: create_topics(client, specs), created, []),
    ):
        await secured.allow_only(others)
        with pytest.raises(Misconfigured, match=f"lacks the right to {right};"):
            async with asyncio.timeout(REFUSED_S):
                await act()
        await secured.allow_only([right])
        await act()
    await secured.allow_only([])
    with pytest.raises(Misconfigured, match="lacks the right to WRITE any topic at all"):
        await send()


async def test_a_worker_process_answers_and_logs_neither_prompts_nor_its_password(secured, tmp_path):
    await secured.allow_only(RIGHTS)
    model = tiny_served(tmp_path)
    (tmp_path / "tokenmill.toml").write_text(settings_file(secured, model))
    records = [Outgoing(topic=TOPICS.requests, key=None, value=value) for value in requests(model.name)]
    asked = await send_all(secured.admin, records)
    log = tmp_path / "worker.log"
    process = started_worker(tmp_path, log)
    try:
        answers = await answers_to(asked, secured, process)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, REFUSED_S) == 0
    finally:
        process.kill()
        process.wait()

    codes = [answer.error and answer.error.code for answer in answers]
    assert codes == [None, ErrorCode.INVALID_REQUEST, ErrorCode.INVALID_REQUEST]
    said = log.read_text()
    assert "worker ready" in said
    for secret in (SECRET_TEXT, SECRET_TEXT.split()[1], PASSWORD):
        assert secret not in said


def settings_file(secured: SecuredKafka, model: Path) -> str:
    """As the documentation shows it, with what makes a small worker that says all it can."""
    security = secured.kafka.security
    return f"""
        brokers = "{secured.kafka.brokers}"
        model = "{model}"
        [security]
        protocol = "{security.protocol}"
        mechanism = "{security.mechanism}"
        username = "{security.username}"
        password_file = "{security.password_file}"
        ca_file = "{security.ca_file}"
        [engine]
        device = "cpu"
        threads = 1
        cache_tokens = 1024
        [health]
        port = 0
        [log]
        level = "debug"
    """


def requests(model: str) -> list[bytes]:
    """One that is answered, one that is refused and one that cannot be read, each with the same text in it."""
    body = {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": SECRET_TEXT}]}
    return [
        msgspec.json.encode({"custom_id": "good", "url": "/v1/chat/completions", "body": body}),
        msgspec.json.encode({"custom_id": "odd", "url": "/v1/chat/completions", "body": {**body, "n": SECRET_TEXT}}),
        f'{{"body": "{SECRET_TEXT}'.encode(),
    ]


def started_worker(folder: Path, log: Path) -> "subprocess.Popen[bytes]":
    """`tokenmill worker` with the settings that are in the folder."""
    with log.open("wb") as file:
        command = [sys.executable, "-m", "worker", "worker"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)


async def answers_to(asked: list[Input], secured: SecuredKafka, process: "subprocess.Popen[bytes]") -> list[Completion]:
    """In the order in which they were asked. What other tests left on the topics is answered as well."""
    deadline_s = time.monotonic() + ANSWERED_S
    while True:
        records = await read_all(secured.admin, [TOPICS.completions])
        answers = [record.value for record in records if record.headers]  # the other tests' results are bare
        completions = [decode_result(Completion, answer) for answer in answers if answer]
        found = {place(completion.input): completion for completion in completions}
        if all(place(request) in found for request in asked):
            return [found[place(request)] for request in asked]
        assert process.poll() is None, "the worker has ended"
        assert time.monotonic() < deadline_s, f"{len(found)} answers"
        await asyncio.sleep(0.2)
