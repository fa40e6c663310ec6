"""What the nodes are told: `server.properties`, the logging configuration and the JVM's flags."""

from collections.abc import Mapping, Sequence

from worker.local_broker.ports import HOST

JVM_FLAGS = (
    "-XX:+UseSerialGC",  # with the next: a node starts with half the CPU time (2.2 s for 4.1 s)
    "-XX:TieredStopAtLevel=1",  # no second compiler; it would pay only under load
    "-XX:-UsePerfData",
    "-Djava.awt.headless=true",
)
LOG4J = """\
<Configuration status="ERROR">
  <Appenders><Console name="console"><PatternLayout pattern="%d %-5p %c{1} %m%n"/></Console></Appenders>
  <Loggers><Root level="WARN"><AppenderRef ref="console"/></Root></Loggers>
</Configuration>
"""


def server_properties(
    node: int,
    ports: Sequence[int],
    controller_ports: Sequence[int],
    data: str,
    extra: Mapping[str, str],
    listeners: Sequence[str],
) -> str:
    """The text of one node's `server.properties`; `extra` has the last word. Nodes are numbered from 1.

    `listeners` are those beside the unencrypted one, which the nodes themselves go on using.
    """
    nodes = len(ports)
    copies, in_sync = (
        min(3, nodes),
        2 if nodes >= 3 else 1,
    )  # the internal topics' default, 3, never comes up on one node
    own_listeners = [f"PLAINTEXT://{HOST}:{ports[node - 1]}", f"CONTROLLER://{HOST}:{controller_ports[node - 1]}"]
    properties: dict[str, object] = {
        "process.roles": "broker,controller",
        "node.id": node,
        "controller.quorum.voters": ",".join(f"{i}@{HOST}:{port}" for i, port in enumerate(controller_ports, start=1)),
        "listeners": ",".join(own_listeners + list(listeners)),
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL",
        "controller.listener.names": "CONTROLLER",
        "log.dirs": data,
        "auto.create.topics.enable": "false",  # topics are created on purpose
        "default.replication.factor": copies,
        "min.insync.replicas": in_sync,
        "offsets.topic.replication.factor": copies,
        "transaction.state.log.replication.factor": copies,
        "transaction.state.log.min.isr": in_sync,
        "share.coordinator.state.topic.replication.factor": copies,
        "share.coordinator.state.topic.min.isr": in_sync,
        "offsets.topic.num.partitions": 8,  # default 50: slower first use, more files, for one machine's few groups
        "transaction.state.log.num.partitions": 8,
        "group.initial.rebalance.delay.ms": 0,  # default 3 s, to let a large group gather
        "group.min.session.timeout.ms": 1000,  # default 6 s: tests of takeovers need not wait so long
        # How long a killed node goes unnoticed and its own restart is refused: default 9 s.
        "broker.session.timeout.ms": 3000,
        "broker.heartbeat.interval.ms": 500,
        # How coarsely transaction.timeout.ms is kept: default 10 s.
        "transaction.abort.timed.out.transaction.cleanup.interval.ms": 1000,
        "log.cleaner.dedupe.buffer.size": 4 << 20,  # default 128 MiB of the heap
        "log.index.size.max.bytes": 1 << 20,  # default 10 MiB a file
        "num.network.threads": 2,
        "num.io.threads": 4,
        "num.recovery.threads.per.data.dir": 1,
        **extra,
    }
    return "".join(f"{name}={value}\n" for name, value in properties.items())
