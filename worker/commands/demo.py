"""`tokenmill demo`: the main job, once, on real parts of this machine; nothing is left running.

Owns the order of things and the closing table. Every part is the one that a user runs: the broker is that of
`tokenmill broker`, the worker a process of `tokenmill worker`, the requests an OpenAI batch file beside this module.
"""

import asyncio
import http.client
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated

import msgspec
from cyclopts import App, Parameter
from msgspec import Struct

from schemas.codec import decode_request
from schemas.cost import dollars, picodollars
from schemas.requests import AnyGenerate, Chat
from schemas.results import Completion
from worker.brokers.kafka_client import TopicSpec, create_topics
from worker.brokers.kafka_settings import KafkaSettings
from worker.commands.answers import JsonLines, Teller, exchange, outgoing
from worker.commands.ledger import audit
from worker.commands.model import DEMO_MODEL, fetched
from worker.commands.output import Json, print_json, print_table
from worker.commands.progress import Report as Progress
from worker.commands.progress import progress
from worker.config import Kafka, Topics
from worker.errors import Unavailable
from worker.ledger import Report
from worker.local_broker import Cluster, data_folder, held
from worker.local_broker.ports import free_ports
from worker.local_broker.process import Lifeline
from worker.setting_sources import as_flags, flat

app = App(name="demo")

REQUESTS = Path(__file__).with_name("demo.jsonl")
SOURCE = "/tokenmill/demo"
PARTITIONS = 4  # more than one, so that requests finish out of their order; one worker has them all
READY_S = 300.0  # loading takes 10 s; on two cores that others kept busy it has taken 90
ANSWERS_S = 600.0  # 20 short answers take half a minute on two cores
STOP_S = 30.0  # the worker's own drain takes 12 s at most


@app.default
def demo(
    *,
    model: str = DEMO_MODEL,
    kafka: Annotated[Kafka | None, Parameter(name="*")] = None,
    keep: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> int:
    """Run the whole thing once: Kafka, the model, a worker, twenty requests, their completions and their bill.

    Needs nothing but this package; the first time it fetches Kafka (43 MB) and a small model (93 MB). The exit code is
    0 if every request was answered and the ledger's difference is zero.

        tokenmill demo
        tokenmill demo --brokers kafka:9092     # on your own Kafka; its topics there get a name of their own

    Parameters
    ----------
    model
        A fetched model's name, or the path of a checkpoint's folder.
    keep
        Leave Kafka running afterwards, to look at what is there: `tokenmill watch --from-start`.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidies up, as Ctrl-C does
    requests = [_for_model(line, Path(model).name) for line in REQUESTS.read_bytes().splitlines()]
    with ExitStack() as stack:
        brokers, topics = stack.enter_context(_brokers(kafka, keep))
        with _phase("making sure of the model") as report:
            folder = fetched(model, report)
        client = brokers.client()
        asyncio.run(
            create_topics(client, [TopicSpec(name=t, partitions=PARTITIONS) for t in topics.by_setting.values()])
        )
        with _worker(brokers, topics, folder) as worker:
            teller = JsonLines() if json else Teller({one.custom_id: _prompt(one) for one in requests})
            began_s = time.monotonic()
            completions = asyncio.run(_converse(client, topics, requests, teller))
            wall_s = time.monotonic() - began_s
            with _phase("stopping the worker"):
                left_well = worker.stop() == 0
        ledger = asyncio.run(audit(client, topics))
    figures = _figures(completions, wall_s, ledger)
    _print(figures, json)
    if keep and kafka is None:
        print(f"Kafka still answers at {brokers.brokers}; stop it with  tokenmill broker down", file=sys.stderr)
    return 0 if left_well and figures.num_answered == len(requests) and ledger.is_clean else 1


async def _converse(
    client: KafkaSettings, topics: Topics, requests: Sequence[AnyGenerate], teller: Teller | JsonLines
) -> list[Completion]:
    """Sends the requests in two waves; when the second is sent, the prefix that it shares with the first is cached."""
    waves = (
        [request for request in requests if (request.body.metadata or {}).get("wave") != "2"],
        [request for request in requests if (request.body.metadata or {}).get("wave") == "2"],
    )
    completions = []
    try:
        async with asyncio.timeout(ANSWERS_S):
            for wave in waves:
                records = [outgoing(request, topics.requests, SOURCE) for request in wave]
                async with exchange(client, topics, records, chunks=True) as events:
                    async for event in events:
                        teller.tell(event)
                        if isinstance(event, Completion):
                            completions.append(event)
    except TimeoutError:
        raise Unavailable(
            f"{len(requests) - len(completions)} of {len(requests)} requests were not answered within {ANSWERS_S:g} s"
        ) from None
    return completions


@contextmanager
def _brokers(given: Kafka | None, keep: bool) -> Iterator[tuple[Kafka, Topics]]:
    """A Kafka and the topics' names there: the user's own, else one of ours that ends with the body unless kept."""
    if given is not None:
        yield given, Topics(prefix=f"tokenmill.demo_{secrets.token_hex(3)}")
        return
    with ExitStack() as stack:
        if keep:  # the one that `tokenmill broker` knows, so that it can be stopped and looked at
            folder = data_folder()
            stack.enter_context(held(folder))
            cluster = Cluster(folder, owned=False)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tokenmill-demo-")))
            cluster = Cluster(folder, owned=True)
            stack.callback(cluster.kill)
        with _phase("bringing up Kafka") as report:
            cluster.start(report=report)
        yield Kafka(brokers=cluster.brokers), Topics()


class _Worker:
    """One process of `tokenmill worker`, with its log in a file."""

    def __init__(self, process: "subprocess.Popen[bytes]", health_port: int, log: Path) -> None:
        self._process = process
        self._port = health_port
        self._log = log

    def await_ready(self) -> None:
        """It answers requests. Raises Unavailable, with the end of its log, if it ends or takes too long."""
        deadline_s = time.monotonic() + READY_S
        while not self._is_ready():
            if self._process.poll() is not None:
                raise Unavailable(f"the worker ended with exit code {self._process.returncode}:\n{self._last_words()}")
            if time.monotonic() > deadline_s:
                raise Unavailable(f"the worker is not ready after {READY_S:g} s:\n{self._last_words()}")
            time.sleep(0.1)

    def stop(self) -> int:
        """Asks it to leave; its exit code. One that does not leave in time is killed."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=1)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _last_words(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])


@contextmanager
def _worker(kafka: Kafka, topics: Topics, model: Path) -> Iterator[_Worker]:
    """A worker that is ready; when the body ends it has left, and however this process ends it is gone."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="tokenmill-demo-worker-") as folder:
        log = Path(folder) / "worker.log"
        flags = {
            **dict(flat(kafka)),
            "topics.prefix": topics.prefix,
            "group": f"{topics.prefix}-demo",
            "model": model,
            "health.port": port,
        }
        command = [sys.executable, "-m", "worker", "worker", *as_flags(flags)]
        with log.open("wb") as stream:
            # Of a session of its own: Ctrl-C is ours to handle, and reaches it as SIGTERM.
            process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
        lifeline, worker = Lifeline(process.pid), _Worker(process, port, log)
        try:
            with _phase("starting a worker"):
                worker.await_ready()
            yield worker
        finally:
            worker.stop()
            lifeline.drop()


class Figures(Struct, frozen=True, kw_only=True):
    """What the run came to. Money in dollars."""

    num_answered: int
    num_failed: int
    tokens_in: int
    tokens_cached: int
    tokens_out: int
    tokens_per_s: float
    first_token_s: float  # the median
    drafts_accepted: int
    drafts_rejected: int
    price: str
    device_cost: str  # of the answers
    device_cost_in_all: str  # of the worker's whole life: loading and waiting too
    difference: str


def _figures(completions: Sequence[Completion], wall_s: float, report: Report) -> Figures:
    usages = [completion.response.body.usage for completion in completions if completion.response]
    tokens_out = sum(usage.completion_tokens for usage in usages)
    first_tokens_s = [one.timing.time_to_first_token_ms / 1000 for one in completions if one.timing]
    return Figures(
        num_answered=len(usages),
        num_failed=len(completions) - len(usages),
        tokens_in=sum(usage.prompt_tokens for usage in usages),
        tokens_cached=sum(usage.prompt_tokens_details.cached_tokens for usage in usages),
        tokens_out=tokens_out,
        tokens_per_s=round(tokens_out / wall_s, 1),
        first_token_s=round(median(first_tokens_s), 3) if first_tokens_s else 0.0,
        drafts_accepted=sum(usage.completion_tokens_details.accepted_prediction_tokens for usage in usages),
        drafts_rejected=sum(usage.completion_tokens_details.rejected_prediction_tokens for usage in usages),
        price=report.price,
        device_cost=report.cost,
        device_cost_in_all=dollars(sum(picodollars(life.device_cost) for life in report.lives)),
        difference=report.difference,
    )


def _print(figures: Figures, json: bool) -> None:
    if json:
        print_json(figures)
        return
    drafted = figures.drafts_accepted + figures.drafts_rejected
    accepted = (
        f"{figures.drafts_accepted} of {drafted} drafts, {figures.drafts_accepted / drafted:.0%}" if drafted else "-"
    )
    print()
    print_table(
        ("", "this run"),
        (
            ("requests answered", f"{figures.num_answered}, {figures.num_failed} failed"),
            ("tokens in", f"{figures.tokens_in}, {figures.tokens_cached} of them cached"),
            ("tokens out", figures.tokens_out),
            ("tokens a second", figures.tokens_per_s),
            ("time to first token (median)", f"{figures.first_token_s:.2f} s"),
            ("drafts accepted", accepted),
            ("price", f"${figures.price}"),
            ("device cost of the answers", f"${figures.device_cost}"),
            ("device cost in all, with loading and waiting", f"${figures.device_cost_in_all}"),
            ("ledger's difference", f"${figures.difference}"),
        ),
    )


def _for_model(line: bytes, model: str) -> AnyGenerate:
    request = decode_request(line)
    return msgspec.structs.replace(request, body=msgspec.structs.replace(request.body, model=model))


def _prompt(request: AnyGenerate) -> str:
    """What is asked, as far as it is text."""
    content = request.body.messages[-1].content if isinstance(request, Chat) else request.body.prompt
    return content if isinstance(content, str) else ""


@contextmanager
def _phase(name: str) -> Iterator[Progress]:
    """Shows what is being waited for, and afterwards how long that took."""
    began_s = time.monotonic()
    with progress() as report:
        report(name)
        yield report
    print(f"{name}: {time.monotonic() - began_s:.1f} s", file=sys.stderr)
