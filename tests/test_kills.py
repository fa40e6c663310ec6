"""Requests that kill or hang the process that works on them: given up in the end, and no other request with them."""

import random
import signal
import uuid

import pytest

from schemas.results import ErrorCode
from tests.campaign import Campaign, request, scripted_model, some_requests
from tests.tiny_models import tiny_served
from tests.worker_process import DEADLY_SEED, HANGING_SEED
from worker.config import Kafka
from worker.errors import Fatal

NAMES = ("a", "b", "c")


def campaign_of(kafka, model, folder, **job) -> Campaign:
    return Campaign(Kafka(brokers=kafka.brokers), f"kills_{uuid.uuid4().hex[:8]}", model, folder, **job)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_request_that_kills_its_workers_is_given_up_and_all_others_are_answered(kafka, tmp_path):
    """With a checkpoint and the whole engine: the other campaigns' models are scripted."""
    num_healthy, attempts_max = 200, 3
    model = tiny_served(tmp_path)
    requests = some_requests(random.Random(2), model, num_healthy, tokens_max=20)
    requests.insert(num_healthy // 2, request(model.name, "farewell", tokens=5, name="x", seed=DEADLY_SEED))
    job = {"is_scripted": False, "attempts_max": attempts_max}
    async with campaign_of(kafka, model, tmp_path, **job).opened() as campaign:
        for worker in NAMES:
            campaign.hire(worker)
        await campaign.ask(requests)
        assert await campaign.until_answered()
        assert set(await campaign.dismiss()) <= {0, -signal.SIGTERM}  # one that was only starting holds nothing yet
        assert await campaign.judge() == []
        failed = {one.custom_id: one.error.code for one in campaign.live.completions if one.error}
        assert failed == {"x": ErrorCode.POISONED}
        assert attempts_max - 1 <= len(campaign.deaths) <= attempts_max
        assert set(campaign.deaths) == {-signal.SIGKILL}


@pytest.mark.slow
async def test_a_step_that_hangs_ends_its_worker(kafka, tmp_path):
    model = scripted_model(tmp_path)
    async with campaign_of(kafka, model, tmp_path, silence_s_max=3.0).opened() as campaign:
        campaign.hire("a")
        await campaign.ask([request(model.name, "for ever", tokens=5, seed=HANGING_SEED)])
        assert await campaign.until_ended("a") == Fatal.exit_code
