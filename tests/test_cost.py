"""The meter and the bill: every nanosecond is somewhere, every picodollar explained, and a token is owed for once."""

import random
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.types import Charge, StepResult, Usage, Work
from schemas.cost import CostEvent, MeterReading, picodollars
from schemas.results import Input
from worker.cost import HOUR_NS, Account, Attribution, Meter, bill, cost_events, handover_events
from worker.price_book import PriceBook, Rates

RATE = 2_490_000_000_001  # picodollars an hour: dear, and dividing nothing evenly
BOOK = PriceBook(
    version="test-1",
    rates={
        ("*", "realtime"): Rates(input=1000, cached_input=500, output=4000),
        ("*", "batch"): Rates(input=500, cached_input=250, output=2000),
    },
)
WHO = Attribution(
    request_id="r",
    custom_id="c",
    tenant="t",
    model="m",
    tier="realtime",
    worker="w",
    life="l",
    input=Input(topic="in", partition=3, offset=812),
)


def meter(rate: int = RATE) -> Meter:
    return Meter(worker="w", life="l", rate=rate)


def charge(request: int, work: Work, device_ns: int, *, choice: int = 0, tokens: int = 1, index: int | None = None):
    return Charge(request=request, choice=choice, work=work, num_tokens=tokens, device_ns=device_ns, index=index)


def step(*charges: Charge, idle_ns: int = 0) -> StepResult:
    return StepResult(idle_ns=idle_ns, tokens=[], finished=[], charges=list(charges))


def usage(prompt: int, cached: int, output: int) -> Usage:
    return Usage(num_prompt=prompt, num_cached=cached, num_output=output)


def account_of(*charges: Charge) -> Account:
    meter_ = meter()
    account = meter_.open(charges[0].request)
    meter_.step(step(*charges))
    meter_.close(account)
    return account


def unexplained(reading: MeterReading) -> int:
    """Picodollars of the wall clock that are neither charged, wasted, idle nor held."""
    parts = (reading.charged, reading.held, *reading.wasted.values(), *reading.idle.values())
    return reading.wall_ns * picodollars(reading.device_rate) // HOUR_NS - sum(map(picodollars, parts))


def by_kind(events: Iterable[CostEvent]) -> dict[tuple[int, str], tuple[int, int]]:
    """(tokens, price) by choice and kind."""
    sums: dict[tuple[int, str], tuple[int, int]] = {}
    for event in events:
        tokens, price = sums.get((event.choice, event.kind), (0, 0))
        sums[event.choice, event.kind] = (tokens + event.tokens, price + picodollars(event.price))
    return sums


# ---------------------------------------------------------------------------------------------------------- the meter


def test_an_hour_of_the_device_costs_its_rate():
    meter_ = meter()
    for _ in range(3600):
        meter_.idle(10**9, "loading")
    assert picodollars(meter_.reading().idle["loading"]) == RATE


def test_slices_too_short_to_cost_a_picodollar_add_up_all_the_same():
    meter_ = meter(rate=HOUR_NS // 10)  # a tenth of a picodollar a nanosecond
    for _ in range(25):
        meter_.idle(1, "waiting")
    assert picodollars(meter_.reading().idle["waiting"]) == 2


def test_a_request_is_held_until_its_events_are_committed_and_then_charged():
    meter_ = meter()
    account = meter_.open(7)
    meter_.step(step(charge(7, Work.PROMPT, 10**6, tokens=9)))
    assert picodollars(meter_.reading().held) == account.cost > 0
    meter_.close(account)
    meter_.charge(account)
    reading = meter_.reading()
    assert (picodollars(reading.charged), picodollars(reading.held)) == (account.cost, 0)


def test_a_reading_shows_what_it_is_published_with_as_charged_and_a_failed_flush_changes_nothing():
    meter_ = meter()
    account = meter_.open(7)
    meter_.step(step(charge(7, Work.PROMPT, 10**6)))
    meter_.close(account)
    assert picodollars(meter_.reading([account]).charged) == account.cost
    assert picodollars(meter_.reading().charged) == 0  # that flush failed; nothing was settled
    again = meter_.reading([account])
    assert (picodollars(again.charged), picodollars(again.held)) == (account.cost, 0)
    assert again.sequence == 2


def test_work_for_a_request_that_the_worker_no_longer_knows_is_wasted_as_cancelled():
    meter_ = meter()
    account = meter_.open(7)
    meter_.step(step(charge(7, Work.OUTPUT, 10**6, index=0)))
    meter_.close(account)
    before = account.cost
    meter_.step(step(charge(7, Work.OUTPUT, 10**6, index=1), charge(8, Work.PROMPT, 10**6)))
    assert account.cost == before
    assert picodollars(meter_.reading().wasted["cancelled"]) > 0


def test_accounts_of_a_partition_that_was_taken_away_are_lost_whether_answered_or_not():
    meter_ = meter()
    running, answered = meter_.open(1), meter_.open(2)
    meter_.step(step(charge(1, Work.PROMPT, 10**6), charge(2, Work.PROMPT, 10**6)))
    meter_.close(answered)
    for account in (running, answered):
        meter_.waste(account, "lost")
    reading = meter_.reading(final=True)
    assert picodollars(reading.wasted["lost"]) == running.cost + answered.cost
    assert unexplained(reading) == 0


def test_a_final_reading_that_would_hold_money_is_refused():
    meter_ = meter()
    meter_.open(1)
    meter_.step(step(charge(1, Work.PROMPT, 10**6)))
    with pytest.raises(ValueError, match="settle every account"):
        meter_.reading(final=True)


def test_an_account_is_settled_once():
    meter_ = meter()
    account = meter_.open(1)
    with pytest.raises(ValueError, match="is open"):
        meter_.charge(account)
    with pytest.raises(ValueError, match="has an open account"):
        meter_.open(1)
    meter_.close(account)
    meter_.charge(account)
    for settle in (meter_.charge, meter_.close, lambda settled: meter_.waste(settled, "lost")):
        with pytest.raises(ValueError, match="is settled"):
            settle(account)


@given(st.randoms(use_true_random=False), st.integers(0, 10**14), st.integers(1, 120))
def test_charged_wasted_idle_and_held_add_up_to_the_wall_clock_at_any_moment_whatever_happens(
    rng: random.Random, rate: int, num_events: int
):
    meter_ = meter(rate)
    accounts: list[Account] = []
    wall_ns = committed = 0
    for _ in range(num_events):
        action = rng.choice(["open", "step", "step", "step", "load", "close", "flush", "failed flush", "drop"])
        if action == "open":
            accounts.append(meter_.open(len(accounts)))
        elif action == "step":
            idle_ns = rng.choice([0, 1, rng.randrange(10**10)])
            charges = [
                charge(rng.randrange(len(accounts) + 1), rng.choice(list(Work)), rng.randrange(10**9), index=0)
                for _ in range(rng.randrange(5))
            ]
            wall_ns += idle_ns + sum(slice_.device_ns for slice_ in charges)
            meter_.step(step(*charges, idle_ns=idle_ns))
        elif action == "load":
            wall_ns += 12_345
            meter_.idle(12_345, "loading")
        elif action == "close" and (opened := [account for account in accounts if account.state == "open"]):
            meter_.close(rng.choice(opened))
        elif action in ("flush", "failed flush"):
            closed = [account for account in accounts if account.state == "closed" and rng.random() < 0.7]
            reading = meter_.reading(closed)
            assert unexplained(reading) == 0
            assert picodollars(reading.charged) == committed + sum(account.cost for account in closed)
            for account in closed if action == "flush" else []:
                meter_.charge(account)
                committed += account.cost
        elif action == "drop" and (left := [account for account in accounts if account.state != "settled"]):
            meter_.waste(rng.choice(left), rng.choice(["lost", "cancelled", "unknown"]))
        reading = meter_.reading()
        assert reading.wall_ns == wall_ns
        assert unexplained(reading) == 0


# ----------------------------------------------------------------------------------------------------------- the bill


def test_each_output_token_has_an_event_of_its_own_with_its_price_and_cost():
    account = account_of(
        charge(1, Work.PROMPT, 900, tokens=6),
        charge(1, Work.OUTPUT, 100, index=0),
        charge(1, Work.OUTPUT, 300, index=1),
    )
    events = cost_events(account, [usage(10, 4, 2)], BOOK, WHO)
    assert [(event.kind, event.index, event.tokens, picodollars(event.price)) for event in events] == [
        ("prompt", None, 6, 6000),
        ("prompt_cached", None, 4, 2000),
        ("output", 0, 1, 4000),
        ("output", 1, 1, 4000),
    ]
    assert [event.device_ns for event in events] == [900, 0, 100, 300]
    assert [event.id for event in events] == [
        "in-3-812/0/prompt",
        "in-3-812/0/prompt_cached",
        "in-3-812/0/output/0",
        "in-3-812/0/output/1",
    ]


def test_a_token_that_fell_out_of_the_prompts_last_step_is_owed_for_though_it_has_no_device_time():
    events = cost_events(account_of(charge(1, Work.PROMPT, 900, tokens=6)), [usage(6, 0, 1)], BOOK, WHO)
    assert by_kind(events) == {(0, "prompt"): (6, 6000), (0, "output"): (1, 4000)}


def test_what_nobody_asked_for_costs_and_is_owed_by_nobody():
    account = account_of(
        charge(1, Work.PROMPT, 900, tokens=6),
        charge(1, Work.OUTPUT, 100, index=0),
        charge(1, Work.OUTPUT, 100, index=1),  # past the stop string: the completion counts one token
        charge(1, Work.REJECTED, 50, tokens=3),
        charge(1, Work.DRAFTED, 20, tokens=5),
        charge(1, Work.RECOMPUTED, 70, tokens=7),
    )
    events = cost_events(account, [usage(6, 0, 1)], BOOK, WHO)
    assert by_kind(events) == {
        (0, "prompt"): (6, 6000),
        (0, "output"): (1, 4000),
        (0, "discarded"): (1, 0),
        (0, "draft_rejected"): (3, 0),
        (0, "drafted"): (5, 0),
        (0, "recomputed"): (7, 0),
    }
    assert all(picodollars(event.cost) > 0 for event in events)


def test_the_prompt_is_owed_once_however_many_choices_there_are():
    account = account_of(
        charge(1, Work.PROMPT, 900, tokens=10),
        charge(1, Work.PROMPT, 90, choice=1, tokens=2),  # the tail that is not in a whole block
        charge(1, Work.OUTPUT, 100, index=0),
        charge(1, Work.OUTPUT, 100, choice=1, index=0),
        charge(1, Work.OUTPUT, 100, choice=1, index=1),
    )
    events = cost_events(account, [usage(10, 0, 1), usage(10, 8, 2)], BOOK, WHO)
    assert by_kind(events) == {
        (0, "prompt"): (10, 10_000),
        (0, "output"): (1, 4000),
        (1, "output"): (2, 8000),
        (1, "recomputed"): (2, 0),
    }


def test_a_failed_request_owes_nothing_and_its_device_time_is_discarded():
    account = account_of(charge(1, Work.PROMPT, 900, tokens=10), charge(1, Work.OUTPUT, 100, index=0))
    events = cost_events(account, [], BOOK, WHO)
    assert by_kind(events) == {(0, "discarded"): (11, 0)}
    assert picodollars(events[0].cost) == account.cost > 0


def test_by_request_there_is_one_event_for_each_kind_of_a_choice_with_the_same_sums():
    charges = [charge(1, Work.PROMPT, 900, tokens=10)]
    charges += [charge(1, Work.OUTPUT, 1001 * index, index=index) for index in range(5)]
    account = account_of(*charges)
    fine = cost_events(account, [usage(10, 0, 5)], BOOK, WHO)
    coarse = cost_events(account, [usage(10, 0, 5)], BOOK, WHO, granularity="request")
    assert [event.id for event in coarse] == ["in-3-812/0/prompt", "in-3-812/0/output"]
    assert by_kind(coarse) == by_kind(fine)
    assert bill(coarse, BOOK) == bill(fine, BOOK)


def test_what_is_handed_over_costs_what_was_spent_on_each_choice_and_owes_nothing_yet():
    account = account_of(
        charge(1, Work.PROMPT, 70_003, tokens=6),
        charge(1, Work.OUTPUT, 9_001, index=1),
        charge(1, Work.RECOMPUTED, 8_009, choice=1, tokens=3),
    )
    events = handover_events(account, 3, 2, BOOK, WHO)
    assert [(event.id, event.tokens) for event in events] == [
        ("in-3-812/0/handed_over/2", 7),
        ("in-3-812/1/handed_over/2", 3),
        ("in-3-812/2/handed_over/2", 0),
    ]
    assert sum(picodollars(event.cost) for event in events) == account.cost
    assert sum(event.device_ns for event in events) == 87_013
    assert all(picodollars(event.price) == 0 for event in events)


def test_a_bill_has_the_cost_of_what_was_spent_elsewhere_and_no_price_for_it():
    events = cost_events(account_of(charge(1, Work.OUTPUT, 10**7, index=3)), [usage(6, 2, 4)], BOOK, WHO)
    whole, rest = bill(events, BOOK, spent=1000), bill(events, BOOK)
    assert (picodollars(whole.cost) - picodollars(rest.cost), whole.price) == (1000, rest.price)
    assert [event.index for event in events if event.kind == "output"] == [0, 1, 2, 3]


def test_the_tier_decides_the_price():
    account = account_of(charge(1, Work.PROMPT, 900, tokens=6))
    who = msgspec.structs.replace(WHO, tier="batch")
    assert by_kind(cost_events(account, [usage(6, 0, 2)], BOOK, who)) == {
        (0, "prompt"): (6, 3000),
        (0, "output"): (2, 4000),
    }


@st.composite
def answered(draw: st.DrawFn) -> tuple[Account, list[Usage]]:
    """An account and the usages of an answer, as uneven as an engine can make them."""
    usages = [
        usage(draw(st.integers(0, 9)) + 9, draw(st.integers(0, 9)), draw(st.integers(0, 6)))
        for _ in range(draw(st.integers(0, 3)))
    ]
    choices = st.integers(0, max(0, len(usages) - 1))
    charges = draw(
        st.lists(
            st.builds(
                lambda choice, work, device_ns, tokens, index: charge(
                    1, work, device_ns, choice=choice, tokens=tokens, index=index if work is Work.OUTPUT else None
                ),
                choices, st.sampled_from(Work), st.integers(0, 10**9), st.integers(0, 9), st.integers(0, 8),
            ),
            min_size=1, max_size=30,
        )
    )  # fmt: skip
    return account_of(*charges), usages


@given(answered(), st.sampled_from(["token", "request"]))
def test_costs_add_up_to_the_account_and_prices_to_usage_times_price(answer, granularity):
    account, usages = answer
    events = cost_events(account, usages, BOOK, WHO, granularity)
    total = bill(events, BOOK)
    owed = 0
    if usages:
        owed = 1000 * (usages[0].num_prompt - usages[0].num_cached) + 500 * usages[0].num_cached
        owed += 4000 * sum(usage.num_output for usage in usages)
    assert picodollars(total.price) == owed
    assert picodollars(total.cost) == account.cost
    assert sum(event.device_ns for event in events) == sum(entry.device_ns for entry in account.entries.values())
    assert len({event.id for event in events}) == len(events)
