"""Real processes on a real broker are told to leave amid long answers: others go on, and nobody can tell."""

import asyncio
import uuid

import pytest

from tests.campaign import Campaign, long_requests, said
from tests.tiny_models import tiny_served
from worker.config import Kafka

DRAIN_S = 0.3  # short: there is to be something left to hand over
PARTITIONS = 3
GONE_S = 12.0  # what an orchestrator grants, with room: 2 s on a free machine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_served(tmp_path_factory.mktemp("model"))


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_answers_and_prices_are_those_of_workers_that_stayed(kafka, model, tmp_path):
    """Drafts and all. The workers that stay draft nothing: it must not matter."""
    requests, prefix = long_requests(model, 24), f"leave_{uuid.uuid4().hex[:8]}"
    brokers = Kafka(brokers=kafka.brokers)
    async with Campaign(brokers, f"{prefix}_stay", model, tmp_path, is_scripted=False).opened(PARTITIONS) as campaign:
        campaign.hire("a")
        await campaign.ask(requests)
        assert await campaign.until_answered()
        assert await campaign.dismiss() == [0]
        stayed = (await campaign.late()).completions
    leaving = {"drain_s": DRAIN_S, "drafts_max": 3, "notices": str(tmp_path), "is_scripted": False}
    async with Campaign(brokers, prefix, model, tmp_path, **leaving).opened(PARTITIONS) as campaign:
        campaign.hire("a")
        campaign.hire("b")
        await campaign.ask(requests)
        for name, notice in (("a", None), ("b", tmp_path / "b"), ("a", None), ("b", None)):
            await campaign.until_serving(name)
            await asyncio.sleep(0.5)  # some tokens are there
            code, seconds = await campaign.gone(name, notice)
            assert (code, seconds < GONE_S) == (0, True), seconds
            campaign.hire(name)
        assert await campaign.until_answered()
        await campaign.until_serving("b")  # whoever does not listen yet dies of SIGTERM
        assert await campaign.dismiss() == [0, 0]
        late = await campaign.late()
    assert campaign.violations(late) == []
    assert len(late.handoffs) > 3
    assert said(late.completions) == said(stayed)
