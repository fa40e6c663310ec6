"""`tokenmill healthcheck`: whether the worker of this machine is ready, for probes that run a command."""

import http.client
import sys

from cyclopts import App

from worker.commands.output import Json, print_json
from worker.config import Health

TIMEOUT_S = 3.0  # probes are repeated every few seconds; the answer takes milliseconds

app = App(name="healthcheck")


@app.default
def healthcheck(*, health: Health = Health(), json: Json = False) -> int:
    """Ask the worker of this machine whether it is ready: exit code 0 if it is, 1 if not.

    For probes that run a command, as in a Dockerfile:

        HEALTHCHECK CMD ["tokenmill", "healthcheck"]
    """
    ready, reason = _ask(health)
    if json:
        print_json({"ready": ready, "reason": reason})
    else:
        print(reason, file=sys.stdout if ready else sys.stderr)
    return 0 if ready else 1


def _ask(health: Health) -> tuple[bool, str]:
    host = "127.0.0.1" if health.host in ("0.0.0.0", "::") else health.host  # noqa: S104  # asked, not listened on
    connection = http.client.HTTPConnection(host, health.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        return answer.status == http.HTTPStatus.OK, answer.read(4096).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        return False, f"no worker answers at {host}:{health.port}: {error}"
    finally:
        connection.close()
