"""Ports on loopback, and the one question asked of a node: which nodes do you see?"""

import random
import socket
import struct
from itertools import islice

from worker.local_broker.errors import PortTaken

HOST = "127.0.0.1"
# Below the ranges from which systems take the ports of outgoing connections (32768 up on Linux, 49152 up on macOS): a
# client that keeps calling a dead node's port could otherwise be given that very port and keep the node from returning.
_FREE = range(20_000, 32_000)
_ANSWER_S = 2.0  # a node that starts may accept and then not answer for a while: ask again on a new connection
_ANSWER_BYTES_MAX = 1 << 20  # a few nodes come to a hundred bytes; anything large is not Kafka

_API_VERSIONS = struct.pack(">ihhih", 10, 18, 0, 0, -1)  # length, key, version, correlation, no client id
_METADATA = struct.pack(">ihhihi", 14, 3, 1, 0, -1, 0)  # version 1, of no topics: the live nodes alone


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listened on a moment ago."""
    untried = iter(random.sample(_FREE, len(_FREE)))  # at random: two clusters that start at once rarely meet
    return list(islice(filter(_is_free, untried), count))


def require_free(port: int) -> None:
    """Nobody listens on the port, or `PortTaken` is raised."""
    if not _is_free(port):
        raise PortTaken(port)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as Java does: connections that linger do not count
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def nodes_seen(port: int) -> set[int]:
    """The ids of the nodes that the one at this port answers for; empty when it does not answer yet.

    Two raw requests, so that no Kafka client is needed: ApiVersions, which any listener that is open for clients
    answers, then Metadata, which lists the nodes that are registered and unfenced: those that can be given a partition.
    """
    try:
        with socket.create_connection((HOST, port), timeout=_ANSWER_S) as connection:
            _ask(connection, _API_VERSIONS)
            return _node_ids(_ask(connection, _METADATA))
    except (OSError, struct.error):
        return set()


def _ask(connection: socket.socket, request: bytes) -> bytes:
    connection.sendall(request)
    (length,) = struct.unpack(">i", _receive(connection, 4))
    if not 4 <= length <= _ANSWER_BYTES_MAX:
        raise OSError(f"an answer of {length} bytes is not Kafka's")
    return _receive(connection, length)[4:]  # after the correlation id


def _receive(connection: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length:
        part = connection.recv(length - len(received))
        if not part:
            raise ConnectionError("closed in mid-answer")
        received += part
    return received


def _node_ids(metadata: bytes) -> set[int]:
    """Metadata v1 opens with an array of (id int32, host string, port int32, rack nullable string)."""
    (count,) = struct.unpack_from(">i", metadata)
    at, ids = 4, set()
    for _ in range(count):
        node, host_length = struct.unpack_from(">ih", metadata, at)
        at += 6 + host_length + 4
        (rack_length,) = struct.unpack_from(">h", metadata, at)
        at += 2 + max(rack_length, 0)
        ids.add(node)
    return ids
