"""The jars that make up Apache Kafka: which ones, where they lie, and the proof that they are the locked ones.

`jars.toml` (written by `python -m worker.local_broker.lock`) holds the version and SHA-256 of every jar. It is the
whole class path, so nothing is resolved here: a missing jar is fetched by its exact coordinate and enters the cache
only once its checksum holds, and every jar is hashed again before each start (50 ms for all 45). Addresses are the
resolver's business.
"""

import hashlib
import tempfile
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from worker.local_broker.errors import ExtraMissing, JarMismatch, JarUnavailable
from worker.local_broker.folders import jar_folder

Report = Callable[[str], None]  # told what is being waited for

DOWNLOADS_MAX = 6  # at once: 4 s for all 45 jars against 20 s one by one, and still polite


@dataclass(frozen=True)
class Jar:
    """One locked jar: `group:artifact:version` and the SHA-256 of its file."""

    coordinate: str
    sha256: str

    @property
    def path(self) -> Path:
        """Its place below the cache folder, in Maven's own layout."""
        group, artifact, version = self.coordinate.split(":")
        return Path(*group.split("."), artifact, version, f"{artifact}-{version}.jar")


@dataclass(frozen=True)
class Lock:
    """The committed lock: Kafka's version, the coordinates that were asked for, and every jar they come to."""

    kafka: str
    roots: tuple[str, ...]
    jars: tuple[Jar, ...]


def load_lock() -> Lock:
    """The lock that ships with this package."""
    data = tomllib.loads(resources.files(__package__).joinpath("jars.toml").read_text())
    return Lock(data["kafka"], tuple(data["roots"]), tuple(Jar(*item) for item in data["sha256"].items()))


def class_path(report: Report) -> list[Path]:
    """Every jar of the lock, present and verified just now, in the lock's order.

    Fetches what is missing. Raises `JarMismatch` for a jar that is not the locked one, `JarUnavailable` for one that
    cannot be fetched, `ExtraMissing` where a fetch is needed and the resolver is not installed.
    """
    lock = load_lock()
    folder = jar_folder(lock.kafka)
    missing = [jar for jar in lock.jars if not (folder / jar.path).exists()]
    if missing:
        _fetch_all(
            missing, folder, lambda done: report(f"fetching Apache Kafka {lock.kafka}: {done} of {len(missing)} jars")
        )
    for jar in lock.jars:
        verify(jar, folder / jar.path)
    return [folder / jar.path for jar in lock.jars]


def verify(jar: Jar, path: Path) -> None:
    """The file at `path` is the locked jar, or `JarMismatch` names it."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != jar.sha256:
        raise JarMismatch(jar.coordinate, path, jar.sha256, actual)


def _fetch_all(jars: list[Jar], folder: Path, report: Callable[[int], None]) -> None:
    report(0)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="arriving-", dir=folder) as arriving,
        ThreadPoolExecutor(DOWNLOADS_MAX) as pool,
    ):
        pending = [pool.submit(_fetch, jar, folder, Path(arriving)) for jar in jars]
        try:
            for done, future in enumerate(as_completed(pending), start=1):
                future.result()
                report(done)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # one failure, or Ctrl-C, ends the queue


def _fetch(jar: Jar, folder: Path, arriving: Path) -> None:
    """Verified on the way in and moved in one step, so that the cache never holds half a jar or an unknown one."""
    arrived = download(jar, arriving)
    verify(jar, arrived)
    target = folder / jar.path
    target.parent.mkdir(parents=True, exist_ok=True)
    arrived.replace(target)


def download(jar: Jar, into: Path) -> Path:
    """The jar as Maven Central has it, unverified, at the returned path below `into`."""
    try:
        from jgo.maven import MavenContext  # an extra: imported only where it is needed
    except ImportError as missing:
        raise ExtraMissing("jgo") from missing
    group, artifact, version = jar.coordinate.split(":")
    component = MavenContext(repo_cache=into).project(group, artifact).at_version(version)
    try:
        return component.artifact().resolve()
    except (OSError, RuntimeError) as error:  # requests' errors are OSErrors; jgo's "not found" is a RuntimeError
        raise JarUnavailable(jar.coordinate, str(error)) from error
