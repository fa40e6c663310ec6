"""compose.yaml and the Dockerfile, as far as that can be told without an engine; `make compose-test` runs them."""

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from worker.config import Settings
from worker.setting_sources import unknown_variables

ROOT = Path(__file__).parents[1]
CALL_S = 60  # each takes under a second on an idle machine

DRAIN_MARGIN_S = 5  # to commit, to leave the group and to flush telemetry, after the drain's own budget


def called(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=CALL_S)


def tool(name: str) -> str:
    """A program of the environment that the tests run in, wherever that is."""
    return str(Path(sys.executable).parent / name)


@pytest.fixture(scope="module")
def services() -> Mapping[str, Mapping[str, Any]]:
    """The services with their shared parts merged in; variables unreplaced."""
    loaded: dict[str, Any] = YAML(typ="safe").load(ROOT / "compose.yaml")
    parts: dict[str, Mapping[str, Any]] = loaded["services"]
    return parts


def test_compose_yaml_follows_the_compose_specification() -> None:
    checked = called(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", "compose.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_docker_compose_accepts_every_profile() -> None:
    """Sharper than the schema: undefined services and volumes, merges, variables. Needs the plugin, not an engine."""
    if shutil.which("docker") is None or called("docker", "compose", "version").returncode:
        pytest.skip("NOT RUN: `docker compose config` needs docker with its compose plugin, which is not here")
    checked = called("docker", "compose", "--profile", "*", "config", "--quiet")
    assert checked.returncode == 0, checked.stderr
    assert not checked.stderr, "compose warns"


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    checked = called(tool("hadolint"), "--failure-threshold", "style", "Dockerfile")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_published_ports_are_reachable_from_this_machine_alone(services: Mapping[str, Mapping[str, Any]]) -> None:
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_no_service_has_more_than_it_needs(services: Mapping[str, Mapping[str, Any]]) -> None:
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["mem_limit"], name
        assert service["pids_limit"], name
        assert service["read_only"], name


def test_the_image_does_not_run_as_root() -> None:
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    users = [re.findall(r"^USER (.*)$", stage, re.MULTILINE) for stage in stages]
    assert [stage[-1] for stage in users if stage] == ["10001:10001"] * 2  # the image, and cuda, which installs as root


def test_a_worker_is_given_the_time_to_drain(services: Mapping[str, Mapping[str, Any]]) -> None:
    for name in ("worker", "worker-gpu"):
        grace_s = float(services[name]["stop_grace_period"].removesuffix("s"))
        assert grace_s >= Settings().drain_s + DRAIN_MARGIN_S


def test_every_variable_that_is_set_is_a_setting(services: Mapping[str, Mapping[str, Any]]) -> None:
    in_services = {name: "" for service in services.values() for name in service["environment"]}
    in_image = dict.fromkeys(re.findall(r"\b(TOKENMILL_[A-Z_]+)=", (ROOT / "Dockerfile").read_text()), "")
    assert "TOKENMILL_MODEL" in in_services
    assert "TOKENMILL_HEALTH_HOST" in in_image
    assert unknown_variables(in_services | in_image) == []
