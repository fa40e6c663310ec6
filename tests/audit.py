"""`make audit`, a part of `make lint`: what is known of the pinned packages' vulnerabilities, by the OSV database.

Ends with 1 if a package of `constraints.txt` has one that is not in `KNOWN`. Where the database cannot be reached
nothing was audited: that is said in capitals, and is no failure, for it says nothing about the packages.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
SERVICE = "https://api.osv.dev/v1/query"
ANSWER_S = 10  # one answer, of one package
AUDIT_S = 300.0  # all of them: some seventy

KNOWN: Mapping[str, str] = {}  # id of a vulnerability -> why it does not reach us


def main() -> int:
    """The exit code."""
    audited = audit(SERVICE, CONSTRAINTS)
    if audited is None:
        print(f"NOT AUDITED: {SERVICE} cannot be reached from here; nobody has looked for vulnerable packages")
        return 0
    found = vulnerabilities(audited)
    print("\n".join([*found, f"{len(found)} known vulnerabilities in {len(audited)} packages"]))
    return int(bool(found))


def audit(service: str, constraints: Path) -> Sequence[Mapping[str, Any]] | None:
    """What the service knows of each package that is pinned there; None if it cannot be reached."""
    command = [sys.executable, "-m", "pip_audit"]  # it has no other interface
    command += ["--requirement", str(constraints), "--no-deps", "--disable-pip"]
    command += ["--vulnerability-service", "osv", "--osv-url", service, "--timeout", str(ANSWER_S)]
    command += ["--format", "json", "--progress-spinner", "off"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=AUDIT_S, check=False)
    if not ended.stdout.strip():
        unreachable = any(name in ended.stderr for name in ("ConnectionError", "ConnectTimeout", "ServiceError"))
        if not unreachable:
            raise RuntimeError(f"pip-audit broke off: {ended.stderr.strip()[-2000:]}")
        return None
    packages: list[Mapping[str, Any]] = json.loads(ended.stdout)["dependencies"]
    return packages


def vulnerabilities(packages: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each that is not known; a package that could not be judged is one."""
    lines = [f"{package['name']}: {package['skip_reason']}" for package in packages if "skip_reason" in package]
    for package in packages:
        for one in package.get("vulns", ()):
            if not KNOWN.keys() & {one["id"], *one["aliases"]}:
                mended = ", ".join(one["fix_versions"]) or "no version"
                lines.append(f"{package['name']} {package['version']}: {one['id']}, mended in {mended}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
