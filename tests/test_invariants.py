"""The checker can fail: each thing that may go wrong with answers and money is noticed, and named."""

import pytest
from msgspec import structs

from schemas.cost import CostEvent, CostKind, MeterReading
from schemas.handoff import CarriedChoice, CarriedUsage, Handoff
from schemas.results import (
    Bill,
    Completion,
    CompletionTokensDetails,
    Failed,
    Input,
    PromptTokensDetails,
    Response,
    TextChoice,
    TextResult,
    Usage,
)
from tests.invariants import violations

LIFE = "a-life"
RATE = "3.600000000000"  # dollars an hour: a picodollar a nanosecond


def money(picodollars: int) -> str:
    return f"0.{picodollars:012d}"


def place(offset: int) -> Input:
    return Input(topic="tokenmill.requests", partition=0, offset=offset)


def event(offset: int, kind: CostKind, price: int, cost: int, index: int | None = None) -> CostEvent:
    return CostEvent(
        id=f"tokenmill.requests-0-{offset}/0/{kind}/{index}",
        request_id=f"tokenmill.requests-0-{offset}",
        custom_id="mine",
        tenant="acme",
        model="tiny",
        tier="realtime",
        choice=0,
        kind=kind,
        index=index,
        tokens=1,
        price=money(price),
        cost=money(cost),
        device_ns=cost,
        price_book="test",
        worker="worker",
        life=LIFE,
        input=place(offset),
    )


def completion(offset: int, price: int, cost: int, num_output: int) -> Completion:
    usage = Usage(
        prompt_tokens=1,
        completion_tokens=num_output,
        total_tokens=1 + num_output,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=0),
        completion_tokens_details=CompletionTokensDetails(accepted_prediction_tokens=0, rejected_prediction_tokens=0),
    )
    choices = [TextChoice(index=0, text="", finish_reason="length")]
    body = TextResult(id="", created=0, model="tiny", choices=choices, usage=usage, service_tier="realtime")
    return Completion(
        id=f"tokenmill.requests-0-{offset}",
        custom_id="mine",
        tenant="acme",
        response=Response(status_code=200, request_id="", body=body),
        error=None,
        input=place(offset),
        worker="worker",
        bill=Bill(price=money(price), cost=money(cost), price_book="test"),
    )


def failure(offset: int) -> Completion:
    failed = Failed(code="INFERENCE_ERROR", message="")
    return structs.replace(completion(offset, 0, 0, 0), response=None, error=failed, bill=None)


def reading(**changes) -> MeterReading:
    """1,000 ns: 65 charged, 30 wasted, 900 idle, 5 held."""
    balanced = MeterReading(
        worker="worker",
        life=LIFE,
        sequence=1,
        wall_ns=1000,
        device_rate=RATE,
        charged=money(65),
        wasted={"lost": money(20), "cancelled": money(10)},
        idle={"loading": money(700), "waiting": money(200)},
        held=money(5),
        final=False,
    )
    return structs.replace(balanced, **changes)


ASKED = [place(0), place(1)]
ANSWERED = [completion(0, price=7, cost=60, num_output=2), failure(1)]
COSTS = [
    event(0, "prompt", price=1, cost=30),
    event(0, "output", price=3, cost=10, index=0),
    event(0, "output", price=3, cost=20, index=1),
    event(1, "discarded", price=0, cost=5),
]
READINGS = [reading(sequence=0, wall_ns=0, charged=money(0)), reading()]


def found(asked=ASKED, answered=ANSWERED, costs=COSTS, readings=READINGS, handoffs=()) -> str:
    """All violations, as one text."""
    return "\n".join(violations(asked, answered, costs, readings, handoffs))


def test_a_ledger_in_order_has_no_violations():
    assert found() == ""


def test_a_lost_answer_is_noticed():
    assert found(answered=ANSWERED[:1], costs=COSTS[:3], readings=[reading(charged=money(60), held=money(10))]) == (
        "tokenmill.requests-0-1 was never answered"
    )


def test_a_double_answer_is_noticed():
    assert "tokenmill.requests-0-1 was answered 2 times" in found(answered=[*ANSWERED, failure(1)])


def test_an_answer_to_nothing_is_noticed():
    assert found(answered=[*ANSWERED, failure(2)]) == "tokenmill.requests-0-2 was answered but never asked"


def test_a_double_cost_event_is_noticed():
    assert "/0/output/1 came 2 times" in found(costs=[*COSTS, COSTS[2]])


def test_a_lost_cost_event_is_noticed():
    lines = found(costs=[*COSTS[:2], COSTS[3]])
    assert "has 2 output tokens and cost events for 1" in lines
    assert "its cost events say 45 picodollars" in lines


def test_a_wrong_price_is_noticed():
    wrong = completion(0, price=8, cost=60, num_output=2)
    assert found(answered=[wrong, ANSWERED[1]]) == (
        "tokenmill.requests-0-0 is billed 0.000000000008, its events say 7 picodollars"
    )


def test_a_wrong_cost_is_noticed():
    wrong = completion(0, price=7, cost=61, num_output=2)
    assert found(answered=[wrong, ANSWERED[1]]) == (
        "tokenmill.requests-0-0 cost 0.000000000061, its events say 60 picodollars"
    )


def test_a_missing_bill_is_noticed():
    assert "has no bill" in found(answered=[structs.replace(ANSWERED[0], bill=None), ANSWERED[1]])


def test_a_failure_that_owes_is_noticed():
    assert found(costs=[*COSTS[:3], event(1, "discarded", price=1, cost=5)]) == (
        "tokenmill.requests-0-1 failed and owes 1 picodollars"
    )


def test_cost_events_without_an_answer_are_noticed():
    assert "tokenmill.requests-0-1 has cost events but no answer" in found(answered=ANSWERED[:1])


def test_an_unbalanced_meter_is_noticed():
    assert found(readings=[reading(idle={"loading": money(700), "waiting": money(201)})]) == (
        f"life {LIFE}: 1000 picodollars of device time, 1001 accounted for"
    )


def test_a_meter_that_charged_other_than_its_events_is_noticed():
    assert found(readings=[reading(charged=money(66), held=money(4))]) == (
        f"life {LIFE}: charged 0.000000000066, its cost events say 65 picodollars"
    )


@pytest.mark.parametrize(("unknown", "is_right"), [(30, True), (4, False)])
def test_what_a_life_lost_sight_of_may_have_been_charged_up_to_what_it_says_is_unknown(unknown, is_right):
    wasted = {"lost": money(35 - unknown), "unknown": money(unknown)}
    assert (found(readings=[reading(charged=money(60), wasted=wasted)]) == "") is is_right


def test_a_life_without_a_meter_is_noticed():
    assert found(readings=[]) == f"life {LIFE} has cost events but no meter reading"


def test_the_last_reading_of_a_life_counts_in_whatever_order_they_come():
    assert found(readings=READINGS[::-1]) == ""


# ----------------------------------------------------------------------------------------------------------- handovers

COUNTS = CarriedUsage(num_prompt=1, num_cached=0, num_drafted=0, num_accepted=0, num_recomputed=0, num_preemptions=0)


def handoff(number: int, tokens: list[int], spent: int) -> Handoff:
    choice = CarriedChoice(tokens=tokens, logprobs=None, usage=COUNTS, finish_reason=None, num_chunks=0)
    return Handoff(
        input=place(0), key=None, value=b"", headers=[], timestamp_ms=0, tier="realtime", admitted_s=0,
        first_token_s=0, handovers=number, spent=money(spent), worker="first", choices=[choice],
    )  # fmt: skip


TWICE = [handoff(1, [7], spent=10), handoff(2, [7, 8], spent=25)]
MOVED = [
    event(0, "handed_over", price=0, cost=10, index=0),
    event(0, "handed_over", price=0, cost=15, index=1),
    event(0, "prompt", price=1, cost=0),
    event(0, "recomputed", price=0, cost=5),
    event(0, "output", price=3, cost=0, index=0),
    event(0, "output", price=3, cost=0, index=1),
    event(0, "output", price=3, cost=30, index=2),
    COSTS[3],
]
GONE_ON = [structs.replace(completion(0, price=10, cost=60, num_output=3), handovers=2), failure(1)]


def found_of(answered=GONE_ON, costs=MOVED, handoffs=TWICE) -> str:
    return found(answered=answered, costs=costs, handoffs=handoffs)


def test_a_request_that_was_handed_over_twice_has_no_violations():
    assert found_of() == ""


def test_a_lost_handoff_is_noticed():
    lines = found_of(handoffs=TWICE[1:])
    assert "was handed over 1 times, and its answer says 2" in lines
    assert "has a handoff numbered 2 where number 1 should be" in lines


def test_a_double_handoff_is_noticed():
    assert "numbered 1 where number 2 should be" in found_of(handoffs=[*TWICE, TWICE[0]])


def test_a_handoff_that_nobody_goes_on_with_is_noticed():
    lines = found(handoffs=[structs.replace(TWICE[0], input=place(5))])
    assert lines == "tokenmill.requests-0-5 was handed over and never answered"


def test_a_token_that_was_handed_over_and_computed_again_is_noticed():
    again = [
        *MOVED[:5],
        structs.replace(MOVED[5], cost=money(10), device_ns=10),
        event(0, "output", 3, 20, 2),
        COSTS[3],
    ]
    assert found_of(costs=again) == "tokenmill.requests-0-0/0/output/1 was handed over and computed again"


def test_tokens_lost_between_two_handoffs_are_noticed():
    assert "0-0/0 has lost tokens" in found_of(handoffs=[TWICE[0], handoff(2, [9, 8], spent=25)])


def test_tokens_lost_between_handoff_and_answer_are_noticed():
    long = handoff(2, [7, 8, 9, 10], spent=25)
    assert "with 4 tokens and answered with 3" in found_of(handoffs=[TWICE[0], long])


def test_a_handoff_that_forgets_what_was_spent_is_noticed():
    assert "was handed over for 0.000000000015, its events say 25" in found_of(
        handoffs=[TWICE[0], handoff(2, [7, 8], spent=15)]
    )
