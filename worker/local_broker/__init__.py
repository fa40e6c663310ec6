"""Apache Kafka on this machine with nothing installed but Python: for the demo, for tests, for a first try.

Owns the jars (fetched once, verified before every start), the settings of a small cluster, and the processes of one to
three nodes. It never serves production, never speaks the client protocol beyond the question "are you ready?", and
needs the extra `tokenmill[local]` (a Java runtime and a Maven resolver in wheels), which it imports only when a node is
to start.
"""

from worker.local_broker.cluster import Cluster
from worker.local_broker.errors import (
    BrokerNotReady,
    DataMismatch,
    ExtraMissing,
    JarMismatch,
    JarUnavailable,
    LocalBrokerError,
    PortTaken,
)
from worker.local_broker.folders import data_folder, held, jar_folder

__all__ = [
    "BrokerNotReady",
    "Cluster",
    "DataMismatch",
    "ExtraMissing",
    "JarMismatch",
    "JarUnavailable",
    "LocalBrokerError",
    "PortTaken",
    "data_folder",
    "held",
    "jar_folder",
]
