"""The audit: cost events, meter readings and completions, read back from their topics, must agree to the picodollar.

Owns the checks and what is printed of them, never where the records come from. It trusts nothing that a worker has in
memory: only what is committed counts. Three agreements are checked. Of each worker's life: its wall clock times its
rate is what it charged, wasted, idled and held. Of each life: what it charged is the sum of its committed cost events.
Of each request: it was answered once, and its events are its usage and its bill.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec import Struct
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from schemas.cost import CostEvent, MeterReading, dollars, picodollars
from schemas.results import Completion, Input
from worker.cost import HANDED_OVER, HOUR_NS

PROBLEMS_MAX = 100  # named in a report; past that a reader needs the count, not the list
KILLED = "killed"  # what was held when a worker's life ended without a final reading: wasted by whoever killed it


class Life(Struct, frozen=True, kw_only=True):
    """One run of one worker: its last reading beside its committed events. Money in dollars."""

    worker: str
    life: str
    final: bool
    wall_ns: int
    device_rate: str
    device_cost: str  # wall clock x rate
    charged: str
    wasted: dict[str, str]
    idle: dict[str, str]
    events: str  # cost of the committed cost events
    difference: str  # picodollars that either agreement is off by, added up


class Row(Struct, frozen=True, kw_only=True):
    """What one kind of tokens came to. Money in dollars."""

    tenant: str
    model: str
    tier: str
    kind: str
    tokens: int
    price: str
    cost: str


class Report(Struct, frozen=True, kw_only=True):
    """The outcome of an audit: clean when it found no problem, and then the difference is zero."""

    num_events: int
    num_billed: int  # requests that have cost events
    num_handed_over: int  # of them, those that wait half done for a worker to go on with
    num_completions: int | None  # None: completions were not looked at
    price: str
    cost: str
    difference: str
    lives: list[Life]
    rows: list[Row]
    num_problems: int
    problems: list[str]  # the first PROBLEMS_MAX

    @property
    def is_clean(self) -> bool:
        """Everything agrees."""
        return self.num_problems == 0


def reconcile(
    events: Iterable[CostEvent], readings: Iterable[MeterReading], completions: Iterable[Completion] | None = None
) -> Report:
    """The report on everything committed so far. Each iterable is read once; events are not kept."""
    audit = _Audit()
    for event in events:
        audit.add_event(event)
    last: dict[str, MeterReading] = {}
    for reading in readings:
        if reading.life not in last or reading.sequence >= last[reading.life].sequence:
            last[reading.life] = reading
    lives = [audit.life(reading) for reading in last.values()]
    for life in audit.cost_by_life.keys() - last.keys():
        audit.problem(f"life {life} has cost events but no meter reading", audit.cost_by_life[life])
    num_completions = None if completions is None else audit.check_completions(completions)
    return audit.report(lives, num_completions)


@dataclass
class _Sums:
    """Tokens by kind and money in picodollars."""

    tokens: dict[str, int] = field(default_factory=dict)
    price: int = 0
    cost: int = 0

    def add(self, kind: str, tokens: int, price: int, cost: int) -> None:
        self.tokens[kind] = self.tokens.get(kind, 0) + tokens
        self.price += price
        self.cost += cost


@dataclass
class _Audit:
    """What has been added up so far, and what was found wrong."""

    ids: set[str] = field(default_factory=set)
    num_events: int = 0
    by_request: dict[Input, _Sums] = field(default_factory=dict)
    by_row: dict[tuple[str, str, str, str], _Sums] = field(default_factory=dict)
    num_handed_over: int = 0
    cost_by_life: dict[str, int] = field(default_factory=dict)
    difference: int = 0
    problems: list[str] = field(default_factory=list)
    num_problems: int = 0

    def problem(self, text: str, difference: int = 0) -> None:
        """Something is wrong, by this many picodollars."""
        self.num_problems += 1
        self.difference += abs(difference)
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(text)

    def amount(self, dollars_: str, where: str) -> int:
        """In picodollars; one that cannot be read is a problem, and zero."""
        try:
            return picodollars(dollars_)
        except ValueError as error:
            self.problem(f"{where}: {error}")
            return 0

    def add_event(self, event: CostEvent) -> None:
        """The event counts, even when it is a duplicate: what is committed is what a reader would charge."""
        price, cost = self.amount(event.price, event.id), self.amount(event.cost, event.id)
        self.num_events += 1
        if event.id in self.ids:
            self.problem(f"event {event.id} is committed more than once", price)
        self.ids.add(event.id)
        row = (event.tenant, event.model, event.tier, event.kind)
        for sums in (self.by_request.setdefault(event.input, _Sums()), self.by_row.setdefault(row, _Sums())):
            sums.add(event.kind, event.tokens, price, cost)
        self.cost_by_life[event.life] = self.cost_by_life.get(event.life, 0) + cost

    def life(self, reading: MeterReading) -> Life:
        """Both agreements of a life, by its last reading."""
        where = f"life {reading.life}"
        wall = reading.wall_ns * self.amount(reading.device_rate, where) // HOUR_NS
        charged, held = self.amount(reading.charged, where), self.amount(reading.held, where)
        wasted = {reason: self.amount(amount, where) for reason, amount in reading.wasted.items()}
        idle = {reason: self.amount(amount, where) for reason, amount in reading.idle.items()}
        unexplained = wall - charged - held - sum(wasted.values()) - sum(idle.values())
        if unexplained:
            self.problem(f"{where}: {dollars(unexplained)} of its wall clock is unexplained", unexplained)
        events = self.cost_by_life.get(reading.life, 0)
        # A flush whose outcome the worker never learned: the events are there, so it was committed after all.
        found = min(max(0, events - charged), wasted.get("unknown", 0))
        unpublished = charged + found - events
        if unpublished:
            text = f"{where}: charged {dollars(charged + found)}, but its events come to {dollars(events)}"
            self.problem(text, unpublished)
        if found:
            charged, wasted["unknown"] = charged + found, wasted["unknown"] - found
        if held:
            wasted[KILLED] = held
            if reading.final:
                self.problem(f"{where}: its final reading holds {dollars(held)}", held)
        return Life(
            worker=reading.worker,
            life=reading.life,
            final=reading.final,
            wall_ns=reading.wall_ns,
            device_rate=reading.device_rate,
            device_cost=dollars(wall),
            charged=dollars(charged),
            wasted={reason: dollars(amount) for reason, amount in wasted.items()},
            idle={reason: dollars(amount) for reason, amount in idle.items()},
            events=dollars(events),
            difference=dollars(abs(unexplained) + abs(unpublished)),
        )

    def check_completions(self, completions: Iterable[Completion]) -> int:
        """Each request is answered once, and billed for what the answer says. Returns how many were answered."""
        answered: set[Input] = set()
        for completion in completions:
            place = _place(completion.input)
            if completion.input in answered:
                self.problem(f"request {place} is answered more than once")
                continue
            answered.add(completion.input)
            self._check_usage(place, completion)
            self._check_bill(place, completion)
        for unanswered in self.by_request.keys() - answered:
            place, sums = _place(unanswered), self.by_request[unanswered]
            if sums.tokens.keys() == {HANDED_OVER}:  # owes nothing yet: its answer's events will
                self.num_handed_over += 1
            else:
                self.problem(f"request {place} is billed {dollars(sums.price)} but not answered", sums.price)
        return len(answered)

    def _check_usage(self, place: str, completion: Completion) -> None:
        tokens = self.by_request.get(completion.input, _Sums()).tokens
        billed = tuple(tokens.get(kind, 0) for kind in ("prompt", "prompt_cached", "output"))
        used = (0, 0, 0)
        if completion.response is not None:
            usage = completion.response.body.usage
            cached = usage.prompt_tokens_details.cached_tokens
            used = (usage.prompt_tokens - cached, cached, usage.completion_tokens)
        if billed != used:
            self.problem(f"request {place} used {used} tokens (prompt, cached, output), but its events say {billed}")

    def _check_bill(self, place: str, completion: Completion) -> None:
        sums = self.by_request.get(completion.input, _Sums())
        if completion.bill is None:
            if sums.price or completion.response is not None:
                self.problem(f"request {place} has events of {dollars(sums.price)} but no bill", sums.price)
            return
        for name, stated, summed in (
            ("price", completion.bill.price, sums.price),
            ("cost", completion.bill.cost, sums.cost),
        ):
            if off := self.amount(stated, f"request {place}") - summed:
                self.problem(
                    f"request {place}: the {name} on its bill is {stated}, of its events {dollars(summed)}", off
                )

    def report(self, lives: list[Life], num_completions: int | None) -> Report:
        """All of it, at the edge: money as decimal strings."""
        rows = [
            Row(
                tenant=tenant,
                model=model,
                tier=tier,
                kind=kind,
                tokens=sums.tokens[kind],
                price=dollars(sums.price),
                cost=dollars(sums.cost),
            )
            for (tenant, model, tier, kind), sums in sorted(self.by_row.items())
        ]
        return Report(
            num_events=self.num_events,
            num_billed=len(self.by_request),
            num_handed_over=self.num_handed_over,
            num_completions=num_completions,
            price=dollars(sum(sums.price for sums in self.by_row.values())),
            cost=dollars(sum(self.cost_by_life.values())),
            difference=dollars(self.difference),
            lives=lives,
            rows=rows,
            num_problems=self.num_problems,
            problems=self.problems,
        )


def _place(source: Input) -> str:
    return f"{source.topic}-{source.partition}-{source.offset}"


def render(report: Report) -> RenderableType:
    """The report for a terminal: what was billed, where each worker's time went, and the verdict."""
    parts: list[RenderableType] = [_bill_table(report), _lives_table(report)]
    parts += [Text(f"  {problem}", style="red") for problem in report.problems]
    if unnamed := report.num_problems - len(report.problems):
        parts.append(Text(f"  and {unnamed} more", style="red"))
    answered = "" if report.num_completions is None else f"{report.num_completions:,} answered, "
    counts = f"{answered}{report.num_billed:,} billed, {report.num_events:,} cost events"
    if report.num_handed_over:
        counts += f", {report.num_handed_over:,} handed over and not answered yet"
    verdict = "reconciled" if report.is_clean else f"NOT reconciled, {report.num_problems:,} problems"
    text = f"{counts}: {verdict}, difference ${report.difference}"
    return Group(*parts, Text(text, style="bold green" if report.is_clean else "bold red"))


def _bill_table(report: Report) -> Table:
    table = Table("tenant", "model", "tier", "kind", title="Billed", title_justify="left")
    for name in ("tokens", "price $", "cost $"):
        table.add_column(name, justify="right")
    for row in report.rows:
        table.add_row(row.tenant, row.model, row.tier, row.kind, f"{row.tokens:,}", row.price, row.cost)
    table.add_section()
    table.add_row("all", "", "", "", "", report.price, report.cost)
    return table


def _lives_table(report: Report) -> Table:
    table = Table("worker", "life", "end", title="Device time", title_justify="left")
    for name in ("hours", "wall x rate $", "charged $", "wasted $", "idle $", "difference $"):
        table.add_column(name, justify="right")
    for life in report.lives:
        table.add_row(
            life.worker,
            life.life,
            "left" if life.final else "open or killed",
            f"{life.wall_ns / HOUR_NS:.4f}",
            life.device_cost,
            life.charged,
            _by_reason(life.wasted),
            _by_reason(life.idle),
            life.difference,
        )
    return table


def _by_reason(amounts: dict[str, str]) -> str:
    return "\n".join(f"{reason} {amount}" for reason, amount in amounts.items() if picodollars(amount)) or "0"
