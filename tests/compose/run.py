"""`make compose-test`: compose.yaml for real, with its parts killed in the middle of the work.

Brings up a stack of its own (own name, own volumes, own port: yours stays untouched), asks the sample producer's
questions and fifty more, kills the worker and the broker while they are answered, stops the worker, reads the topics as
any read_committed consumer would, and has the suite's one checker say what is wrong. Takes everything down again.

Exit code 0 if nothing is wrong, or if no Docker engine answers, which it says loudly; 1 otherwise.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from schemas.cost import CostEvent, MeterReading, dollars, picodollars
from schemas.requests import Chat, ChatBody, Message
from schemas.results import Completion, Input
from tests.invariants import violations
from worker.brokers.base import Outgoing
from worker.brokers.kafka_client import read_all
from worker.brokers.kafka_settings import KafkaSettings
from worker.commands.answers import decode, outgoing, send_all
from worker.config import Topics
from worker.errors import TokenmillError, Unavailable

ROOT = Path(__file__).parents[2]
PROJECT = "tokenmill-test"
TOPICS = Topics()
MODEL = "smollm2-moe"
NUM_REQUESTS = 50
# Answers of different length, so that they come one after the other and a kill finds some committed and some under way.
OUTPUT_TOKENS = range(8, 40)

# What dies, and after how many more answers: six show that what was killed last is back at work. The broker comes last:
# a worker goes on without it, and commits all that it has when it is back.
KILLS = ("worker", "worker", "worker", "kafka")
ANSWERS_BETWEEN_KILLS = 6

UP_S = 1800.0  # the first time: installing torch, carving the model; 3 minutes on an idle machine
BACK_S = 300.0  # after a kill: a restart, a recovered log, a loaded model; 15 s on an idle machine
ANSWERS_S = 600.0  # fifty answers at a tenth of the usual rate
LOOK_S = 0.25
LOG_LINES = 20  # of each service, where the run failed
INSPECT_S = 30.0  # any other call of Docker: milliseconds, unless the machine is very busy


def main() -> int:
    """The exit code of the whole run."""
    if missing := engine_missing():
        banner = f"SKIPPED: compose.yaml was NOT run, because {missing}"
        print(f"{'=' * len(banner)}\n{banner}\n{'=' * len(banner)}", flush=True)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("FAILED: told to stop by SIGTERM"))  # after taking the stack down
    with Stack() as stack:
        return asyncio.run(run(stack))
    return 1  # what failed has been said


def engine_missing() -> str | None:
    """Why compose.yaml cannot be run here; None if it can."""
    for command, missing in (("info", "no Docker engine answers"), ("compose version", "Docker has no compose plugin")):
        try:
            called(["docker", *command.split()], INSPECT_S)
        except (OSError, subprocess.SubprocessError):
            return missing
    return None


class Stack:
    """compose.yaml under a name of its own. Used with `with`: at the end nothing of it is left."""

    def __init__(self) -> None:
        self.port = free_port()
        self._started_s = time.monotonic()

    def say(self, text: str) -> None:
        """A line of the report, after the seconds since the start."""
        print(f"{time.monotonic() - self._started_s:5.0f} s  {text}", flush=True)

    def compose(self, *arguments: str, timeout_s: float = UP_S) -> str:
        """What `docker compose ...` prints; CalledProcessError, with all that it said, if it fails."""
        command = ["docker", "compose", "--project-name", PROJECT, "--profile", "*", *arguments]
        environment = {**os.environ, "KAFKA_PORT": str(self.port)}
        return called(command, timeout_s, environment)

    def state(self, service: str) -> dict[str, Any]:
        """What Docker says of the service's one container."""
        container = self.compose("ps", "--all", "--quiet", service, timeout_s=INSPECT_S).strip()
        details: dict[str, Any] = json.loads(called(["docker", "inspect", container], INSPECT_S))[0]
        return details

    def kill(self, service: str) -> None:
        """The service's first process is gone as by `kill -9` on the host, which `restart:` takes for a crash.

        Not by `docker kill`, which counts as a stop by hand. Sent from a container that sees the host's processes: that
        needs no root here, and works where Docker runs in a machine of its own.
        """
        pid = self.state(service)["State"]["Pid"]
        call = ["docker", "run", "--rm", "--pid", "host", "--user", "0", "--cap-drop", "ALL", "--cap-add", "KILL"]
        called([*call, "--entrypoint", "python", "tokenmill:cpu", "-c", f"import os; os.kill({pid}, 9)"], INSPECT_S)

    async def is_back(self, service: str, restarts: int) -> None:
        """Waits until `restart:` has brought the service up for the n-th time and it says that it is healthy."""
        deadline_s = time.monotonic() + BACK_S
        while time.monotonic() < deadline_s:
            state = await asyncio.to_thread(self.state, service)
            if state["RestartCount"] >= restarts and state["State"]["Health"]["Status"] == "healthy":
                return
            await asyncio.sleep(LOOK_S)
        raise Wrong(f"{service} was killed and not healthy again {BACK_S:.0f} s later")

    def __enter__(self) -> Self:
        self._down()  # of a run that was killed
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        expected = isinstance(error, Wrong | TokenmillError | subprocess.SubprocessError)
        if expected:
            self.say(f"FAILED: {explain(error)}")
            for service in ("kafka", "topics", "model", "worker"):
                print(self.compose("logs", "--no-color", "--tail", str(LOG_LINES), service, timeout_s=INSPECT_S))
        self._down()
        self.say("taken down, with its volumes")
        return expected

    def _down(self) -> None:
        self.compose("down", "--volumes", "--remove-orphans")


class Wrong(Exception):
    """The stack does not do what it should."""


@dataclass
class Seen:
    """What a read_committed reader finds in the topics."""

    requests: list[Input] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    costs: list[CostEvent] = field(default_factory=list)
    readings: list[MeterReading] = field(default_factory=list)


async def run(stack: Stack) -> int:
    """Starts, asks, kills, stops, reads, checks."""
    stack.say("build the image (minutes the first time, seconds after that)")
    stack.compose("build", "--quiet", "worker")
    stack.say("start Kafka, create the topics, fetch the model, start a worker")
    stack.compose("up", "--detach", "--wait", "worker")
    stack.say("the worker is ready; the sample producer asks:")
    print(stack.compose("run", "--rm", "--no-TTY", "producer").rstrip(), flush=True)

    client = KafkaSettings(brokers=f"127.0.0.1:{stack.port}", worker="compose-test")
    stack.say(f"ask {NUM_REQUESTS} more, and kill while they are answered")
    await send_all(client, fifty())
    await kill_in_mid_work(stack, client)
    await answered(client, NUM_REQUESTS)
    stack.say(f"{NUM_REQUESTS} of {NUM_REQUESTS} answered; stop the worker")
    stack.compose("stop", "worker")
    if code := stack.state("worker")["State"]["ExitCode"]:
        raise Wrong(f"the worker ended with {code} when it was told to stop")

    seen = await read(client)
    found = violations(seen.requests, seen.completions, seen.costs, seen.readings)
    report(stack, seen, found)
    return bool(found)


def fifty() -> list[Outgoing]:
    """The requests, as the producer's: greedy, of mixed length."""
    return [
        outgoing(
            Chat(
                custom_id=f"compose-{number}",
                body=ChatBody(
                    model=MODEL,
                    messages=[Message(role="user", content=f"Write a sentence about the number {number}.")],
                    max_completion_tokens=OUTPUT_TOKENS[number * 7 % len(OUTPUT_TOKENS)],
                    temperature=0,
                ),
            ),
            TOPICS.requests,
            "/tokenmill/compose-test",
        )
        for number in range(NUM_REQUESTS)
    ]


async def kill_in_mid_work(stack: Stack, client: KafkaSettings) -> None:
    """Each of KILLS has happened while some requests were answered and others were not. Raises Wrong if not."""
    num_killed = dict.fromkeys(KILLS, 0)
    num_answers = 0
    for service in KILLS:
        num_answers = await answered(client, num_answers + ANSWERS_BETWEEN_KILLS)
        if num_answers >= NUM_REQUESTS:
            raise Wrong(f"all was answered before {service} could be killed: ask for more or longer answers")
        await asyncio.to_thread(stack.kill, service)
        num_killed[service] += 1
        stack.say(f"killed {service} after {num_answers} answers")
        await stack.is_back(service, num_killed[service])
        stack.say(f"{service} is back, by itself")


async def answered(client: KafkaSettings, at_least: int) -> int:
    """Waits for so many answers to the fifty, and returns how many there are."""
    deadline_s = time.monotonic() + ANSWERS_S
    while time.monotonic() < deadline_s:
        try:
            records = await read_all(client, [TOPICS.completions])
        except Unavailable:
            records = []  # a broker that was killed a moment ago
        ids = {one.custom_id for one in map(decode, records) if isinstance(one, Completion)}
        num_answers = len([one for one in ids if one and one.startswith("compose-")])
        if num_answers >= at_least:
            return num_answers
        await asyncio.sleep(LOOK_S)
    raise Wrong(f"{at_least} answers were not there after {ANSWERS_S:.0f} s")


async def read(client: KafkaSettings) -> Seen:
    """All that is committed: what was asked, answered, billed and metered."""
    seen = Seen()
    for record in await read_all(client, TOPICS.intake):
        seen.requests.append(Input(topic=record.place.topic, partition=record.place.partition, offset=record.offset))
    for record in await read_all(client, [TOPICS.completions, TOPICS.costs]):
        match decode(record):
            case Completion() as completion:
                seen.completions.append(completion)
            case CostEvent() as event:
                seen.costs.append(event)
            case MeterReading() as reading:
                seen.readings.append(reading)
    return seen


def report(stack: Stack, seen: Seen, found: Sequence[str]) -> None:
    """The closing table, and what is wrong."""
    usages = [one.response.body.usage for one in seen.completions if one.response]
    bills = [one.bill for one in seen.completions if one.bill]
    last = {one.life: one for one in sorted(seen.readings, key=lambda one: one.sequence)}.values()
    wasted = [picodollars(amount) for one in last for amount in one.wasted.values()]
    price = sum(picodollars(bill.price) for bill in bills)
    rows = {
        "requests": len(seen.requests),
        "answers": f"{len(seen.completions)}, {len(usages)} of them completions",
        "bills": f"{len(bills)}, of {len(seen.costs)} cost events",
        "kills": ", ".join(f"{KILLS.count(service)} x {service}" for service in dict.fromkeys(KILLS)),
        "worker lives": len(last),
        "tokens in": sum(one.prompt_tokens for one in usages),
        "tokens out": sum(one.completion_tokens for one in usages),
        "price / device cost": f"${dollars(price)} / ${dollars(sum(picodollars(bill.cost) for bill in bills))}",
        "device cost wasted": f"${dollars(sum(wasted))}",
        "violations": len(found) or "none: each request answered once and billed once, to the picodollar",
    }
    stack.say("the topics, read by a read_committed consumer:")
    for name, value in rows.items():
        print(f"         {name:20} {value}")
    for violation in found:
        print(f"         WRONG: {violation}")
    sys.stdout.flush()


def called(command: Sequence[str], timeout_s: float, environment: dict[str, str] | None = None) -> str:
    """What the command prints on stdout; CalledProcessError with its stderr if it fails."""
    done = subprocess.run(
        command, capture_output=True, check=True, text=True, timeout=timeout_s, cwd=ROOT, env=environment
    )
    return done.stdout


def explain(error: BaseException | None) -> str:
    """The error, with what the failed command said."""
    if isinstance(error, subprocess.CalledProcessError):
        return f"{' '.join(error.cmd)}\n{error.stdout}{error.stderr}"
    return f"{type(error).__name__}: {error}"


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(main())
