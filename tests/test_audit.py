"""The audit of what we depend on, against a database of our own on this machine."""

import json
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests import audit

Packages = Sequence[Mapping[str, Any]]

VULNERABLE = {
    "id": "PYSEC-0000-1",
    "aliases": ["CVE-0000-1"],
    "summary": "Answers to anybody.",
    "affected": [
        {
            "package": {"name": "structlog", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.1"}]}],
        }
    ],
}


class Database(BaseHTTPRequestHandler):
    """Knows of one package, whatever its version."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = [VULNERABLE] if asked["package"]["name"] == "structlog" else []
        answer = json.dumps({"vulns": known}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def asked() -> Packages:
    """What came of an audit by that database."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Database) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asked = audit.audit(f"http://127.0.0.1:{server.server_port}/v1/query", audit.CONSTRAINTS)
        server.shutdown()
    assert asked is not None
    return asked


def test_a_vulnerable_package_fails_the_audit_and_is_named(asked, monkeypatch, capsys):
    monkeypatch.setattr(audit, "audit", lambda *_: asked)
    assert audit.main() == 1
    pinned = next(line for line in audit.CONSTRAINTS.read_text().splitlines() if line.startswith("structlog=="))
    assert f"structlog {pinned.partition('==')[2]}: PYSEC-0000-1, mended in 99.1" in capsys.readouterr().out


def test_every_pinned_package_is_asked_about(asked):
    everywhere = {line.partition("==")[0] for line in audit.CONSTRAINTS.read_text().splitlines() if is_pinned(line)}
    assert everywhere - {package["name"] for package in asked} == set()


def is_pinned(line: str) -> bool:
    """A package of every system."""
    return "==" in line and ";" not in line


def test_a_vulnerability_that_does_not_reach_us_is_passed_over_by_any_of_its_names(asked, monkeypatch):
    assert len(audit.vulnerabilities(asked)) == 1
    monkeypatch.setattr(audit, "KNOWN", {"CVE-0000-1": "we never let it answer"})
    assert audit.vulnerabilities(asked) == []


def test_a_database_out_of_reach_is_said_loudly_and_fails_nothing(monkeypatch, capsys):
    monkeypatch.setattr(audit, "SERVICE", "http://127.0.0.1:9/v1/query")
    assert audit.main() == 0
    assert capsys.readouterr().out.startswith("NOT AUDITED")


def test_an_audit_that_breaks_off_is_no_audit(tmp_path):
    with pytest.raises(RuntimeError, match="broke off"):
        audit.audit("http://127.0.0.1:9/v1/query", tmp_path / "missing.txt")
