"""Who may know whom: the direction of knowledge, read from the source itself."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = ("engine", "kernels", "schemas", "worker")


def modules() -> Iterator[Path]:
    for package in OURS:
        yield from sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names.add(node.module or "")
    return names


def importers(library: str) -> set[str]:
    """Our files that import the library, or anything within."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in modules()
        if any(name.partition(".")[0] == library for name in imported(path))
    }


def test_the_wire_imports_msgspec_and_nothing_else():
    known = {"msgspec", "schemas"} | sys.stdlib_module_names
    for path in (ROOT / "schemas").rglob("*.py"):
        assert {name.partition(".")[0] for name in imported(path)} <= known, path


def test_only_the_kafka_files_import_its_client():
    assert {Path(path).stem.partition("_")[0] for path in importers("aiokafka")} == {"kafka"}
    assert {Path(path).parent.as_posix() for path in importers("aiokafka")} == {"worker/brokers"}


def test_only_kernels_import_triton():
    assert {path.partition("/")[0] for path in importers("triton")} <= {"kernels"}


def test_only_the_grammar_file_imports_the_compiler_of_grammars():
    assert importers("llguidance") == {"worker/grammar.py"}


def test_the_worker_never_imports_torch():
    assert {path.partition("/")[0] for path in importers("torch")} == {"engine", "kernels"}


def test_everything_imported_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {canonical(requirement) for requirement in (*project["dependencies"], *extras["local"], *extras["demo"])}
    distributions = packages_distributions()
    for path in modules():
        for top in {name.partition(".")[0] for name in imported(path)} - sys.stdlib_module_names - set(OURS):
            provided_by = {canonical(name) for name in distributions.get(top, [top])}
            assert provided_by & declared, f"{path} imports {top}, which pyproject.toml does not ask for"


def canonical(requirement: str) -> str:
    name = requirement.partition(";")[0]
    for mark in "<>=!~[ ":
        name = name.partition(mark)[0]
    return name.lower().replace("_", "-").replace(".", "-")


def test_every_package_is_pinned_exactly_and_from_nowhere_in_particular():
    for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]:
        name, _, version = line.partition(";")[0].strip().partition("==")
        assert name, line
        assert not name.startswith(("-", "nvidia", "cuda")), "no options; CUDA's libraries differ with each torch"
        assert version.replace(".", "").replace("post", "").replace("b", "").isdigit(), line  # no +cpu, range or hash


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {canonical(one) for group in project["optional-dependencies"].values() for one in group}
    asked |= {canonical(one) for one in project["dependencies"]}
    pinned = {canonical(line) for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]}
    assert asked - {"tokenmill"} <= pinned
