"""Real processes on a real broker are told to leave amid long answers: others go on, and nobody can tell."""

import asyncio
import random
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest

from schemas.results import ChatResult, Completion
from tests.campaign import Campaign, tiny_model
from worker.config import Kafka

DRAIN_S = 0.3  # short: there is to be something left to hand over
PARTITIONS = 3
GONE_S = DRAIN_S + 4.0  # the engine's last step, a flush, leaving the group, and Python's own end


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def long_requests(model: Path, count: int) -> list[bytes]:
    """Greedy and seeded, one choice and several, with logprobs, stop strings, penalties and a grammar."""
    dice = random.Random(3)
    return [_request(dice, model.name, number) for number in range(count)]


def _request(dice: random.Random, model: str, number: int) -> bytes:
    body = {
        "model": model,
        "max_tokens": dice.randint(300, 600),
        "n": dice.choice([1, 1, 2]),
        "temperature": dice.choice([0, 1]),
        "seed": 100 + number,  # the record's place is another in each run
        "ignore_eos": True,
        "messages": [{"role": "user", "content": f"tell me a long story about the {number} foxes"}],
    }
    if number % 3 == 0:
        body |= {"logprobs": True, "top_logprobs": 1}
    if number % 4 == 0:
        body["stop"] = ["qu", "zz"]
    if number % 5 == 0:
        body |= {"frequency_penalty": 0.5, "repetition_penalty": 1.2}
    if number % 6 == 0:
        body |= {"response_format": {"type": "regex", "pattern": "([a-z]{2,9} ){30,90}"}, "ignore_eos": False}
    # Tenants of their own: what a cached prefix saves hangs on who ran before.
    own = {"custom_id": f"r{number}", "tenant": f"t{number}"}
    return msgspec.json.encode({"url": "/v1/chat/completions", **own, "body": body})


def said(completions: list[Completion]) -> dict[str, Any]:
    """What each request's choices say, and their tokens where there are logprobs."""
    found: dict[str, Any] = {}
    for one in completions:
        assert one.response
        assert one.custom_id
        assert isinstance(one.response.body, ChatResult)
        found[one.custom_id] = [
            (
                choice.message.content,
                choice.finish_reason,
                [token.token for token in choice.logprobs.content] if choice.logprobs else None,
            )
            for choice in one.response.body.choices
        ]
    return found


def prices(completions: list[Completion]) -> dict[str | None, str]:
    return {one.custom_id: one.bill.price for one in completions if one.bill}


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_answers_and_prices_are_those_of_workers_that_stayed(kafka, model, tmp_path):
    """Drafts and all. The workers that stay draft nothing: it must not matter."""
    requests, prefix = long_requests(model, 24), f"leave_{uuid.uuid4().hex[:8]}"
    async with Campaign(Kafka(brokers=kafka.brokers), f"{prefix}_stay", model).opened(PARTITIONS) as campaign:
        campaign.hire("a")
        await campaign.ask(requests)
        assert await campaign.until_answered()
        assert await campaign.dismiss() == [0]
        stayed = (await campaign.late()).completions
    leaving = {"drain_s": DRAIN_S, "drafts_max": 3, "notices": str(tmp_path)}
    async with Campaign(Kafka(brokers=kafka.brokers), prefix, model, **leaving).opened(PARTITIONS) as campaign:
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
        assert await campaign.dismiss() == [0, 0]
        late = await campaign.late()
    assert campaign.violations(late) == []
    assert len(late.handoffs) > 3
    assert said(late.completions) == said(stayed)
    assert prices(late.completions) == prices(stayed)
