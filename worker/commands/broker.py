"""`tokenmill broker up | down | status`: the local Kafka of one user, kept in one data folder.

Turns flags into calls of `worker.local_broker` and its answers into text or JSON on stdout; progress goes to stderr.
Errors are `LocalBrokerError`s and pass through: the command line says them and sets the exit code.
"""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter, validators

from worker.commands.progress import progress
from worker.local_broker import Cluster, data_folder, held
from worker.local_broker.cluster import NODES_MAX

app = App(
    name="broker",
    help="""Run Apache Kafka on this machine, with no Docker and no Java installed.

    For a first try, the demo and tests. A Kafka of your own takes its place: set TOKENMILL_BROKERS=host:port.""",
)

Data = Annotated[
    Path | None, Parameter(name="--data", help="Folder of the topics and logs. Default: your state folder.")
]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]
Port = Annotated[
    int | None,
    Parameter(
        validator=validators.Number(gte=1024, lte=65535 - NODES_MAX),
        help="Port of the first node; further nodes take the next ones. Default: the last used, or a free one.",
    ),
]
Nodes = Annotated[
    int | None,
    Parameter(
        validator=validators.Number(gte=1, lte=NODES_MAX), help="How many nodes, 1 to 3. Default: as last time, or 1."
    ),
]
Heap = Annotated[str, Parameter(help="Java heap of each node, as -Xmx takes it.")]


@app.command
def up(*, data: Data = None, port: Port = None, nodes: Nodes = None, heap: Heap = "384m", json: Json = False) -> None:
    """Start Kafka and wait until it answers. If it runs already, print where.

    The first time fetches 45 jars (43 MB) into your cache folder; each is verified against its committed SHA-256 before
    every start. Kafka goes on running when this command ends: stop it with `tokenmill broker down`.
    """
    folder = data or data_folder()
    with held(folder), progress() as report:
        cluster = Cluster(folder, nodes=nodes, port=port, heap=heap, owned=False).start(report=report)
    if json:
        _print_json({"brokers": cluster.brokers})
    else:
        print(f"Kafka answers at {cluster.brokers}\nexport TOKENMILL_BROKERS={cluster.brokers}")


@app.command
def down(*, data: Data = None, purge: bool = False) -> None:
    """Stop Kafka; its topics are there again at the next `up`.

    Parameters
    ----------
    purge
        Delete its topics and logs too.
    """
    folder = data or data_folder()
    if not folder.exists():
        print("Kafka does not run, and has no data.")
        return
    with held(folder), progress() as report:
        cluster = Cluster(folder)
        if cluster.running():
            report(f"stopping Apache Kafka: {cluster.brokers}")
        cluster.stop()
        if purge:
            cluster.purge()
    print("Kafka is down, and its data deleted." if purge else f"Kafka is down; its data stays in {folder}.")


@app.command
def status(*, data: Data = None, json: Json = False) -> None:
    """Say whether Kafka runs, where, as which process and with how much memory."""
    folder = data or data_folder()
    cluster = Cluster(folder)
    running = [(node, process) for node in cluster.nodes if (process := node.process())]
    if json:
        nodes = [
            {"node": node.id, "address": node.address, "pid": process.pid, "memory_bytes": process.memory_bytes}
            for node, process in running
        ]
        brokers = cluster.brokers if running else None
        _print_json({"running": bool(running), "brokers": brokers, "data": str(folder), "nodes": nodes})
        return
    for node, process in running:
        print(f"node {node.id} runs at {node.address}, pid {process.pid}, {process.memory_bytes / 2**20:.0f} MiB")
    if not running:
        print("Kafka does not run: start it with  tokenmill broker up")
    print(f"data in {folder}")


def _print_json(value: dict[str, object]) -> None:
    print(json.dumps(value))


if __name__ == "__main__":
    app()
