"""Writes `jars.toml` anew: `python -m worker.local_broker.lock`, after changing its `kafka` or `roots` by hand.

The one place that resolves Maven dependencies. Run it on purpose, read the difference, commit it. It trusts what the
network says at that moment; everything else trusts only what it wrote.
"""

import hashlib
import tempfile
from pathlib import Path

from jgo.env import EnvironmentBuilder, LinkStrategy
from jgo.maven import MavenContext

from worker.local_broker.jars import Jar, Lock, load_lock

HEADER = """\
# Every jar of the local broker: its version and SHA-256. Written by `python -m worker.local_broker.lock` from `roots`.
# kafka-clients is a root of its own: the resolver would take another version of it from a neighbour's dependencies.
"""


def main() -> None:
    """`jars.toml` holds the jars that its own roots resolve to today."""
    lock = load_lock()
    with tempfile.TemporaryDirectory() as folder:
        jars = _resolve(lock.roots, Path(folder))
    Path(__file__).with_name("jars.toml").write_text(_toml(Lock(lock.kafka, lock.roots, jars)))


def _resolve(roots: tuple[str, ...], folder: Path) -> tuple[Jar, ...]:
    repository = folder / "repository"
    context = MavenContext(repo_cache=repository)
    builder = EnvironmentBuilder(context=context, link_strategy=LinkStrategy.HARD, cache_dir=folder / "environments")
    builder.from_endpoint("+".join(roots))
    files = sorted(repository.rglob("*.jar"))
    return tuple(
        Jar(_coordinate(file.relative_to(repository)), hashlib.sha256(file.read_bytes()).hexdigest()) for file in files
    )


def _coordinate(path: Path) -> str:
    *group, artifact, version, _ = path.parts
    return f"{'.'.join(group)}:{artifact}:{version}"


def _toml(lock: Lock) -> str:
    roots = "".join(f'  "{root}",\n' for root in lock.roots)
    jars = "".join(f'"{jar.coordinate}" = "{jar.sha256}"\n' for jar in lock.jars)
    return f'{HEADER}kafka = "{lock.kafka}"\nroots = [\n{roots}]\n\n[sha256]\n{jars}'


if __name__ == "__main__":
    main()
