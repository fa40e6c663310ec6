"""On a real broker: one worker process reads everything hostile that we know of, and works on as if it were nothing."""

import random
import uuid

import pytest

from schemas.codec import header_text
from schemas.results import Completion, Input
from tests.campaign import Campaign, some_requests, tiny_model
from tests.hostile import ADMITTED, MODEL, REFUSED, fuzz
from tests.invariants import place
from worker.brokers.base import Outgoing, Record
from worker.brokers.kafka_client import read_all
from worker.config import Kafka

NUM_FUZZED = 2000
NUM_GOOD = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return tiny_model(folder).rename(folder / MODEL)


def good(model, dice: random.Random) -> list[Record]:
    values = some_requests(dice, model, NUM_GOOD, tokens_max=16)
    plain = ADMITTED["plain chat"]
    return [Record(place=plain.place, offset=0, key=None, value=value, headers=(), timestamp_ms=0) for value in values]


def outcome(completion: Completion) -> str:
    """The code of a failure, or that it is none."""
    return completion.error.code if completion.error else "completed"


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_one_worker_answers_every_hostile_record_once_and_lives(kafka, model):
    dice = random.Random(1)
    fuzzed = list(fuzz(1, NUM_FUZZED))
    records = [record for _, record in REFUSED.values()] + list(ADMITTED.values()) + good(model, dice) + fuzzed
    expected = [code for code, _ in REFUSED.values()] + ["completed"] * (len(ADMITTED) + NUM_GOOD)
    order = dice.sample(range(len(records)), len(records))

    settings = Kafka(brokers=kafka.brokers)
    async with Campaign(settings, f"hostile_{uuid.uuid4().hex[:8]}", model).opened(partitions=4) as campaign:
        campaign.hire("a")
        pid = campaign.pid("a")
        asked = dict(zip(order, await campaign.put([sent(records[index], campaign) for index in order]), strict=True))
        await campaign.until_answered()
        assert campaign.pid("a") == pid
        assert await campaign.dismiss() == [0]
        late = await campaign.late()
        letters = await read_all(settings.client(), [campaign.topics.dead_letters])

    assert campaign.violations(late) == []
    answers = {place(completion.input): outcome(completion) for completion in late.completions}
    assert [answers[place(asked[index])] for index in range(len(expected))] == expected
    assert len({answers[place(asked[index])] for index in range(len(expected), len(records))}) > 3
    for letter in letters:
        original = records[next(index for index, where in asked.items() if where == origin(letter))]
        assert letter.value in (original.value, None)


def sent(record: Record, campaign: Campaign) -> Outgoing:
    return Outgoing(topic=campaign.topics.requests, key=record.key, value=record.value, headers=record.headers)


def origin(letter: Record) -> Input:
    """Where the record of a dead letter is."""
    topic, partition, offset = (
        header_text(letter.headers, f"tokenmill.error.{part}") or "" for part in ("topic", "partition", "offset")
    )
    return Input(topic=topic, partition=int(partition), offset=int(offset))
