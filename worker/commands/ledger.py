"""`tokenmill ledger reconcile`: the audit of everything committed, read back from the topics."""

from typing import Annotated

from cyclopts import App, Parameter

import worker.ledger
from schemas.cost import CostEvent, MeterReading
from schemas.results import Completion
from worker.brokers.kafka_client import read_all
from worker.brokers.kafka_settings import KafkaSettings
from worker.commands.answers import decode
from worker.commands.output import Json, console, print_json
from worker.commands.progress import progress
from worker.config import Kafka, Topics
from worker.ledger import Report, render

app = App(name="ledger", help="Prove from the topic that every second of the device is accounted for.")


@app.command
async def reconcile(
    *, kafka: Annotated[Kafka, Parameter(name="*")] = Kafka(), topics: Topics = Topics(), json: Json = False
) -> int:
    """Add up all cost events, meter readings and completions; exit code 1 if they differ by a picodollar.

    Checked: each request was answered once and billed what its answer says; each worker's wall clock times its rate is
    what it charged, wasted and idled; and what it charged is what its committed events say.

        tokenmill ledger reconcile --brokers kafka:9092
        tokenmill ledger reconcile --json | jq .difference
    """
    with progress() as report:
        report(f"reading {topics.costs} and {topics.completions}")
        found = await audit(kafka.client(), topics)
    if json:
        print_json(found)
    else:
        console().print(render(found))
    return 0 if found.is_clean else 1


async def audit(client: KafkaSettings, topics: Topics) -> Report:
    """The report on everything that is committed now."""
    messages = [decode(record) for record in await read_all(client, [topics.costs, topics.completions])]
    return worker.ledger.reconcile(
        (message for message in messages if isinstance(message, CostEvent)),
        (message for message in messages if isinstance(message, MeterReading)),
        (message for message in messages if isinstance(message, Completion)),
    )
