"""Real processes on a real broker are killed and frozen; nothing is lost, repeated or billed twice."""

import asyncio
import random
import signal
import time
import uuid

import msgspec
import pytest

from schemas.results import ErrorCode
from tests.campaign import Campaign, some_requests, tiny_model
from tests.worker_process import DEADLY_SEED, HANGING_SEED
from worker.config import Kafka
from worker.errors import Fatal

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


async def under_fire(campaign: Campaign, seed: int, num_requests: int, num_kills: int) -> None:
    """Requests come in while workers are killed at random, and one is frozen in mid-flush for longer than its session.

    It holds a burst that others will have answered by the time it wakes up: whether it may still commit it is the test.
    """
    dice = random.Random(seed)
    requests = some_requests(dice, campaign.model, num_requests)
    frozen, *others = NAMES
    campaign.hire(frozen, freezes_at=dice.randint(5, 10))
    for name in others:
        campaign.hire(name)
    feeding = asyncio.create_task(feed(campaign, requests))
    await campaign.until_frozen(frozen)
    thaw_s = time.monotonic() + campaign.session_timeout_s + 3
    for _ in range(num_kills):
        await asyncio.sleep(dice.uniform(0.5, 2.5))
        campaign.replace(dice.choice(others))
    await asyncio.sleep(max(0, thaw_s - time.monotonic()))
    await feeding
    await campaign.until_answered()  # the frozen worker's share too
    campaign.signal(frozen, signal.SIGCONT)


async def feed(campaign: Campaign, requests: list[bytes]) -> None:
    for start in range(0, len(requests), 40):
        await campaign.ask(requests[start : start + 40])
        await asyncio.sleep(0.5)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_kills_and_a_frozen_worker_lose_repeat_and_bill_nothing_twice(kafka, model):
    async with Campaign(Kafka(brokers=kafka.brokers), f"kills_{uuid.uuid4().hex[:8]}", model).opened() as campaign:
        await under_fire(campaign, seed=1, num_requests=500, num_kills=5)
        assert set(await campaign.dismiss()) == {0}
        late = await campaign.late()
        assert campaign.violations(late) == []
        await campaign.caught_up(late)
        assert campaign.violations(campaign.live) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_the_same_run_with_stock_commits_answers_and_bills_twice(kafka, model):
    """The negative control: without the generation in the commit, what the frozen worker held is there again."""
    name = f"stock_{uuid.uuid4().hex[:8]}"
    async with Campaign(Kafka(brokers=kafka.brokers), name, model, stock_commits=True).opened() as campaign:
        await under_fire(campaign, seed=1, num_requests=500, num_kills=5)
        await campaign.dismiss()
        found = campaign.violations(await campaign.late())
        assert any("answered 2 times" in violation for violation in found), found
        assert any("cost event" in violation and "came 2 times" in violation for violation in found), found


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_request_that_kills_its_workers_is_given_up_and_all_others_are_answered(kafka, model):
    num_healthy, attempts_max = 200, 3
    dice = random.Random(2)
    requests = some_requests(dice, model, num_healthy, tokens_max=20)
    deadly = {"model": model.name, "prompt": "farewell", "max_tokens": 5, "seed": DEADLY_SEED}
    requests.insert(num_healthy // 2, msgspec.json.encode({"url": "/v1/completions", "custom_id": "x", "body": deadly}))
    name = f"poison_{uuid.uuid4().hex[:8]}"
    async with Campaign(Kafka(brokers=kafka.brokers), name, model, attempts_max=attempts_max).opened() as campaign:
        for worker in NAMES:
            campaign.hire(worker)
        await campaign.ask(requests)
        assert await campaign.until_answered()
        assert set(await campaign.dismiss()) <= {0, -signal.SIGTERM}  # one that was only starting holds nothing yet
        late = await campaign.late()
        assert campaign.violations(late) == []
        failed = {one.custom_id: one.error.code for one in late.completions if one.error}
        assert failed == {"x": ErrorCode.POISONED}
        assert attempts_max - 1 <= len(campaign.deaths) <= attempts_max
        assert set(campaign.deaths) == {-signal.SIGKILL}


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_step_that_hangs_ends_its_worker(kafka, model):
    name = f"hang_{uuid.uuid4().hex[:8]}"
    async with Campaign(Kafka(brokers=kafka.brokers), name, model, silence_s_max=3.0).opened() as campaign:
        campaign.hire("a")
        body = {"model": model.name, "prompt": "for ever", "max_tokens": 5, "seed": HANGING_SEED}
        await campaign.ask([msgspec.json.encode({"url": "/v1/completions", "custom_id": "x", "body": body})])
        assert await campaign.until_ended("a") == Fatal.exit_code
