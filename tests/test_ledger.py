"""The audit: a whole and honest topic reconciles to zero, and each kind of lie is found and named."""

import re

import msgspec
import pytest
from rich.console import Console

from engine.types import Charge, StepResult, Usage, Work
from schemas.cost import CostEvent, MeterReading, dollars, picodollars
from schemas.results import (
    Bill,
    ChatResult,
    Completion,
    CompletionTokensDetails,
    Failed,
    Input,
    PromptTokensDetails,
    Response,
)
from schemas.results import Usage as WireUsage
from worker.cost import Account, Attribution, Meter, bill, cost_events, handover_events
from worker.ledger import PROBLEMS_MAX, Report, reconcile, render
from worker.price_book import load_price_book

BOOK = load_price_book()
RATE = 2_490_000_000_001


class Worker:
    """A worker's life as the topics see it: what it has committed, and nothing else."""

    def __init__(self, life: str) -> None:
        self.meter = Meter(worker="w", life=life, rate=RATE)
        self.life = life
        self.events: list[CostEvent] = []
        self.readings: list[MeterReading] = []
        self.completions: list[Completion] = []
        self.meter.idle(3 * 10**9, "loading")

    def run(self, offset: int, num_output: int = 3) -> Account:
        account = self.meter.open(offset)
        charges = [Charge(request=offset, choice=0, work=Work.PROMPT, num_tokens=6, device_ns=6_001)]
        for index in range(num_output):
            output = Charge(request=offset, choice=0, work=Work.OUTPUT, num_tokens=1, device_ns=1_003, index=index)
            charges.append(output)
        self.meter.step(StepResult(idle_ns=77, tokens=[], finished=[], charges=charges))
        return account

    def who(self, account: Account) -> Attribution:
        return Attribution(
            request_id=f"in-0-{account.request}",
            custom_id="c",
            tenant="t",
            model="m",
            tier="realtime",
            worker="w",
            life=self.life,
            input=Input(topic="in", partition=0, offset=account.request),
        )

    def hand_over(self, account: Account) -> None:
        """Flushes one handoff's bill."""
        self.meter.close(account)
        self.events += handover_events(account, 1, 0, BOOK, self.who(account))
        self.readings.append(self.meter.reading([account]))
        self.meter.charge(account)

    def answer(self, account: Account, num_output: int = 3, *, fails: bool = False, spent: int = 0) -> None:
        """Flushes one completion, as a transaction would."""
        self.meter.close(account)
        who = self.who(account)
        usages = [] if fails else [Usage(num_prompt=10, num_cached=4, num_output=num_output)]
        events = cost_events(account, usages, BOOK, who)
        response = Response(status_code=200, request_id=who.request_id, body=chat_result(num_output))
        self.readings.append(self.meter.reading([account]))
        self.events += events
        self.completions.append(
            Completion(
                id=who.request_id,
                custom_id="c",
                tenant="t",
                response=None if fails else response,
                error=Failed(code="DEADLINE_EXCEEDED", message="late") if fails else None,
                input=who.input,
                worker="w",
                bill=bill(events, BOOK, spent),
            )
        )
        self.meter.charge(account)

    def leave(self) -> None:
        self.readings.append(self.meter.reading(final=True))

    def audit(self) -> Report:
        return reconcile(self.events, self.readings, self.completions)


def chat_result(num_output: int) -> ChatResult:
    usage = WireUsage(
        prompt_tokens=10,
        completion_tokens=num_output,
        total_tokens=10 + num_output,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=4),
        completion_tokens_details=CompletionTokensDetails(accepted_prediction_tokens=0, rejected_prediction_tokens=0),
    )
    return ChatResult(id="x", created=0, model="m", choices=[], usage=usage, service_tier="default")


@pytest.fixture
def worker() -> Worker:
    """Three requests answered, one of them a failure."""
    worker = Worker("life-1")
    for offset in range(3):
        worker.answer(worker.run(offset), fails=offset == 2)
    return worker


def more(amount: str, picodollars_: int = 1) -> str:
    return dollars(picodollars(amount) + picodollars_)


def test_a_worker_that_answered_and_left_reconciles_to_zero(worker: Worker):
    worker.leave()
    report = worker.audit()
    assert report.problems == []
    assert report.is_clean
    assert report.difference == "0.000000000000"
    assert (report.num_completions, report.num_billed) == (3, 3)
    (life,) = report.lives
    assert life.final
    assert life.charged == life.events == report.cost


def test_totals_are_by_tenant_model_tier_and_kind(worker: Worker):
    rows = {row.kind: (row.tokens, picodollars(row.price)) for row in worker.audit().rows}
    assert rows == {
        "prompt": (12, BOOK.price("m", "realtime", "prompt", 12)),
        "prompt_cached": (8, BOOK.price("m", "realtime", "prompt_cached", 8)),
        "output": (6, BOOK.price("m", "realtime", "output", 6)),
        "discarded": (9, 0),
    }


def test_what_a_killed_worker_held_was_wasted_by_the_kill(worker: Worker):
    cost = worker.run(7).cost
    worker.answer(worker.run(8))
    report = worker.audit()
    assert report.is_clean
    assert picodollars(report.lives[0].wasted["killed"]) == cost


def test_two_lives_of_a_worker_are_audited_apart_and_billed_together(worker: Worker):
    heir = Worker("life-2")
    heir.answer(heir.run(9))
    report = reconcile(
        worker.events + heir.events, worker.readings + heir.readings, worker.completions + heir.completions
    )
    assert report.is_clean
    assert [life.life for life in report.lives] == ["life-1", "life-2"]
    assert report.num_billed == 4


def test_a_reading_sent_twice_or_read_out_of_order_changes_nothing(worker: Worker):
    worker.readings += worker.readings[::-1]
    assert worker.audit().is_clean


@pytest.mark.parametrize("is_committed", [True, False])
def test_a_flush_that_was_lost_sight_of_is_settled_by_what_is_in_the_topic(worker: Worker, is_committed: bool):
    account = worker.run(5)
    worker.meter.close(account)
    worker.meter.waste(account, "unknown")
    worker.leave()
    if is_committed:
        other = Worker(worker.life)
        other.answer(other.run(5))
        worker.events += other.events
        worker.completions += other.completions
    report = worker.audit()
    assert report.is_clean
    assert picodollars(report.lives[0].wasted["unknown"]) == (0 if is_committed else account.cost)
    assert report.lives[0].charged == report.cost


def test_without_completions_the_meter_and_the_events_are_still_held_against_each_other(worker: Worker):
    assert reconcile(worker.events, worker.readings).is_clean
    assert not reconcile(worker.events[1:], worker.readings).is_clean
    assert not reconcile(worker.events, []).is_clean


def _lose_event(worker: Worker) -> None:
    del worker.events[0]


def _repeat_event(worker: Worker) -> None:
    worker.events.append(worker.events[0])


def _bill_twice(worker: Worker) -> None:
    worker.completions.append(worker.completions[0])


def _answer_nobody(worker: Worker) -> None:
    del worker.completions[0]


def _charge_one_more(worker: Worker) -> None:
    worker.readings[-1] = msgspec.structs.replace(worker.readings[-1], charged=more(worker.readings[-1].charged))


def _stop_the_clock(worker: Worker) -> None:
    worker.readings[-1] = msgspec.structs.replace(worker.readings[-1], wall_ns=worker.readings[-1].wall_ns - 2)


def _overprice(worker: Worker) -> None:
    worker.events[0] = msgspec.structs.replace(worker.events[0], price=more(worker.events[0].price))


def _misstate_the_bill(worker: Worker) -> None:
    stated = worker.completions[0].bill
    assert stated is not None
    lie = Bill(price=stated.price, cost=more(stated.cost, -1), price_book=stated.price_book)
    worker.completions[0] = msgspec.structs.replace(worker.completions[0], bill=lie)


def _leave_out_the_bill(worker: Worker) -> None:
    worker.completions[0] = msgspec.structs.replace(worker.completions[0], bill=None)


def _bill_a_failure(worker: Worker) -> None:
    index = next(i for i, event in enumerate(worker.events) if event.kind == "discarded")
    worker.events[index] = msgspec.structs.replace(worker.events[index], kind="output")


def _hold_at_the_end(worker: Worker) -> None:
    worker.run(9)
    worker.readings.append(msgspec.structs.replace(worker.meter.reading(), final=True))


def _write_nonsense(worker: Worker) -> None:
    worker.events[0] = msgspec.structs.replace(worker.events[0], cost="1e3")


@pytest.mark.parametrize(
    ("lie", "finding", "costs_money"),
    [
        (_lose_event, "but its events come to", True),
        (_repeat_event, "committed more than once", True),
        (_bill_twice, "answered more than once", False),
        (_answer_nobody, "in-0-0 is billed .* but not answered", True),
        (_charge_one_more, "life life-1: charged", True),
        (_stop_the_clock, "of its wall clock is unexplained", True),
        (_overprice, "the price on its bill is", True),
        (_misstate_the_bill, "the cost on its bill is", True),
        (_leave_out_the_bill, "but no bill", True),
        (_bill_a_failure, r"used \(0, 0, 0\) tokens", False),
        (_hold_at_the_end, "final reading holds", True),
        (_write_nonsense, "in-0-0/0/prompt: not an amount of dollars", True),
    ],
)
def test_a_lie_is_found_and_named(worker: Worker, lie, finding: str, costs_money: bool):
    lie(worker)
    report = worker.audit()
    assert not report.is_clean
    assert any(re.search(finding, problem) for problem in report.problems), report.problems
    assert (picodollars(report.difference) > 0) == costs_money


def test_a_report_names_the_first_problems_and_counts_the_rest(worker: Worker):
    worker.events += [worker.events[0]] * (PROBLEMS_MAX + 5)
    report = worker.audit()
    assert len(report.problems) == PROBLEMS_MAX < report.num_problems
    assert f"and {report.num_problems - PROBLEMS_MAX} more" in shown(report)


def test_a_report_travels_as_json(worker: Worker):
    report = worker.audit()
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


def test_the_rendered_report_ends_with_the_verdict(worker: Worker):
    text = shown(worker.audit())
    assert "3 answered, 3 billed" in text
    assert text.rstrip().endswith("reconciled, difference $0.000000000000")
    _overprice(worker)
    assert "NOT reconciled" in shown(worker.audit())


def shown(report: Report) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(report))
    return capture.get()


def test_a_request_that_was_handed_over_reconciles_in_both_lives_before_its_answer_and_after(worker):
    account = worker.run(7)
    worker.hand_over(account)
    worker.leave()
    report = worker.audit()
    assert (report.is_clean, report.num_handed_over) == (True, 1)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(report))
    assert "1 handed over and not answered yet" in capture.get()
    heir = Worker("life-2")
    heir.answer(heir.run(7), spent=account.cost)
    heir.leave()
    report = reconcile(
        worker.events + heir.events, worker.readings + heir.readings, worker.completions + heir.completions
    )
    assert report.problems == []
    assert (report.difference, report.num_handed_over) == (dollars(0), 0)


def test_a_bill_that_forgets_what_was_spent_before_the_handover_is_found(worker):
    worker.hand_over(worker.run(7))
    heir = Worker("life-2")
    heir.answer(heir.run(7))
    report = reconcile(
        worker.events + heir.events, worker.readings + heir.readings, worker.completions + heir.completions
    )
    assert any("in-0-7: the cost on its bill" in problem for problem in report.problems)


def test_output_without_an_answer_is_no_handover(worker):
    worker.answer(worker.run(7))
    del worker.completions[-1]
    worker.hand_over(worker.run(7))
    assert any("in-0-7 is billed" in problem for problem in worker.audit().problems)
