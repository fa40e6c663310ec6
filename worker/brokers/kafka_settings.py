"""How to reach Kafka and how to behave there: one frozen value, checked when it is made.

Read by everything in `brokers/kafka*.py`; knows nothing of where its fields come from.
"""

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from worker.errors import Misconfigured

SECURITY_PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
SASL_MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")

# A worker that dies in its burst holds up readers for this long at most, as in Kafka Streams; a burst takes 10 to 50 ms
TRANSACTION_TIMEOUT_S = 10.0

# Below the transaction's timeout, so that we learn of a lost answer before the broker gives the transaction up.
REQUEST_TIMEOUT_S = 8.0


@dataclass(frozen=True, kw_only=True)
class KafkaSettings:
    """Everything between us and the brokers. Raises Misconfigured when a field cannot be meant."""

    brokers: str  # host:port, comma-separated
    worker: str = "tokenmill"  # name of this client, and with the group its transactional id
    group: str = "tokenmill"

    session_timeout_s: float = (
        30.0  # silence after which the group takes our partitions: a stalled host, not a busy one
    )
    heartbeat_s: float = 3.0  # a tenth of the session, and how soon we learn that the group is changing
    rebalance_timeout_s: float = 30.0  # how long the others wait for our last flush
    transaction_timeout_s: float = TRANSACTION_TIMEOUT_S
    request_timeout_s: float = REQUEST_TIMEOUT_S
    fetch_max_wait_ms: int = (
        50  # a resumed partition waits for a running fetch to end: 404 ms with Kafka's default, 500
    )
    record_bytes_max: int = 8 << 20  # of one record sent; a completion with log probabilities reaches a few MiB

    security_protocol: str = "PLAINTEXT"
    sasl_mechanism: str = "SCRAM-SHA-512"
    sasl_username: str | None = None
    sasl_password: str | None = field(default=None, repr=False)
    ssl_cafile: Path | None = None  # None: the system's authorities

    transaction_version: int | None = None  # None: what the cluster has; 0 or 2 for tests of the two ways
    stock_commits: bool = (
        False  # for tests: commits and reads positions as aiokafka does, which loses and duplicates work
    )

    def __post_init__(self) -> None:
        if not all(host and port.isdigit() for host, _, port in (a.rpartition(":") for a in self.addresses)):
            raise Misconfigured(f"brokers {self.brokers!r}: give host:port, several separated by commas")
        if self.security_protocol not in SECURITY_PROTOCOLS:
            raise Misconfigured(f"security protocol {self.security_protocol!r}: one of {', '.join(SECURITY_PROTOCOLS)}")
        if self.uses_sasl and self.sasl_mechanism not in SASL_MECHANISMS:
            raise Misconfigured(f"SASL mechanism {self.sasl_mechanism!r}: one of {', '.join(SASL_MECHANISMS)}")
        if self.uses_sasl and not (self.sasl_username and self.sasl_password):
            raise Misconfigured(f"security protocol {self.security_protocol} needs a SASL user name and a password")
        if self.ssl_cafile and not self.ssl_cafile.is_file():
            raise Misconfigured(f"certificate authority file {self.ssl_cafile}: no such file")
        if self.transaction_version not in (None, 0, 2):
            raise Misconfigured(f"transaction version {self.transaction_version}: 0, 2, or none to ask the cluster")
        if self.heartbeat_s * 3 > self.session_timeout_s:
            raise Misconfigured("the session timeout must leave room for three heartbeats")
        if not self.group or not self.worker:
            raise Misconfigured("a worker needs a name and a group")
        if "/" in self.group:  # it ends the group's name in transactional ids: no group may begin with another's
            raise Misconfigured(f"group {self.group!r}: a slash has no place in a group's name")

    @property
    def addresses(self) -> list[str]:
        """The bootstrap brokers, one by one."""
        return self.brokers.split(",")

    @property
    def uses_sasl(self) -> bool:
        """Whether we log in."""
        return self.security_protocol.startswith("SASL")

    @property
    def transactional_id(self) -> str:
        """The same for every life of a worker, so that a new life ends the transaction of the one before."""
        return f"{self.transactional_id_prefix}{self.worker}"

    @property
    def transactional_id_prefix(self) -> str:
        """Shared by the workers of the group, and what their right to WRITE transactional ids is given for."""
        return f"{self.group}/"

    def client_options(self) -> dict[str, Any]:
        """The keyword arguments that every aiokafka client takes."""
        return {
            "bootstrap_servers": self.addresses,
            "retry_backoff_ms": 50,  # 100 by default; most retries wait for a coordinator that is back within 100 ms
            **self.connection_options(),
        }

    def connection_options(self) -> dict[str, Any]:
        """Those of them that a single connection takes, too."""
        return {
            "client_id": self.worker,
            "request_timeout_ms": milliseconds(self.request_timeout_s),
            "security_protocol": self.security_protocol,
            "sasl_mechanism": self.sasl_mechanism if self.uses_sasl else "PLAIN",
            "sasl_plain_username": self.sasl_username,
            "sasl_plain_password": self.sasl_password,
            "ssl_context": self._ssl_context(),
        }

    def _ssl_context(self) -> ssl.SSLContext | None:
        if not self.security_protocol.endswith("SSL"):
            return None
        try:
            return ssl.create_default_context(cafile=self.ssl_cafile)
        except OSError as error:  # SSLError is one
            raise Misconfigured(f"certificate authority file {self.ssl_cafile}: {error}") from error


def milliseconds(seconds: float) -> int:
    """As Kafka's settings want a duration."""
    return round(seconds * 1000)
