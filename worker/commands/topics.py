"""`tokenmill topics create | list`: the topics that workers need, made here on purpose and never by a worker."""

from typing import Annotated

from cyclopts import App, Parameter, validators

from worker.brokers.kafka_client import TopicSpec, count_partitions, create_topics
from worker.commands.output import Json, print_json, print_table
from worker.config import Kafka, Topics

app = App(name="topics", help="Create the topics that workers need, or list them.")

# Each is a count of parallel owners: requests can have at most so many workers. A dozen divides by 2, 3, 4 and 6.
PARTITIONS = 12
DAY_MS = 24 * 3600 * 1000

# What is worth keeping longer or shorter than Kafka's week: chunks are previews, the bill is the company's books.
_RETENTION_MS = {"chunks": DAY_MS, "costs": -1}

Brokers = Annotated[Kafka, Parameter(name="*")]


@app.command
async def create(
    *,
    kafka: Brokers = Kafka(),
    topics: Topics = Topics(),
    partitions: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=10_000))] = PARTITIONS,
    replicas: Annotated[int, Parameter(validator=validators.Number(gte=-1, lte=100))] = -1,
    json: Json = False,
) -> None:
    """Create the topics that are missing; those that exist stay as they are.

    For example, for up to 24 workers on a cluster of three brokers or more:

        tokenmill topics create --brokers kafka:9092 --partitions 24 --replicas 3

    Parameters
    ----------
    partitions
        Of each topic. A group cannot have more busy workers than the requests have partitions: 2 to 4 for each.
    replicas
        Of each partition; -1: as the cluster is set up.
    """
    specs = [
        TopicSpec(
            name=name,
            partitions=partitions,
            replicas=replicas,
            config={"retention.ms": str(_RETENTION_MS[setting])} if setting in _RETENTION_MS else {},
        )
        for setting, name in topics.by_setting.items()
    ]
    made = await create_topics(kafka.client(), specs)
    if json:
        print_json({"created": made.created, "existing": made.existing})
    else:
        print_table(
            ("topic", "state"),
            [(name, "created" if name in made.created else "was there") for name in topics.by_setting.values()],
        )


@app.command(name="list")
async def list_topics(*, kafka: Brokers = Kafka(), topics: Topics = Topics(), json: Json = False) -> int:
    """List the topics that workers need, with their partitions; exit code 1 if one is missing.

    For example, before workers are started:

        tokenmill topics list --brokers kafka:9092
    """
    counts = await count_partitions(kafka.client(), list(topics.by_setting.values()))
    rows = [{"topic": name, "for": setting, "partitions": counts[name]} for setting, name in topics.by_setting.items()]
    if json:
        print_json(rows)
    else:
        print_table(("topic", "partitions"), [(row["topic"], row["partitions"] or "missing") for row in rows])
    return 0 if all(counts.values()) else 1
