"""What the device's time cost, and whom: the meter, the accounts of requests, and the cost events of an answer.

Owns two promises. The meter: every nanosecond of a worker's life passes through it once and is charged, wasted, idle or
held, so that these four add up to the wall clock times the device's rate, to the picodollar, at any moment. The events:
the costs of a request's events add up to its account, and their prices to its usage times the price book.

Integers of picodollars throughout. Device time comes from the engine's steps, usage from the finished choices, prices
from `worker/price_book.py`; the events and readings leave in the flush of the completions that they belong to.
Pure: no clock, no broker. One owner, the event loop; nothing here is locked.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from msgspec import Struct

from engine.types import Charge, StepResult, Usage, Work
from schemas.cost import CostEvent, CostKind, MeterReading, dollars, picodollars
from schemas.results import Bill, Input
from worker.price_book import PriceBook

HOUR_NS = 3600 * 10**9

WasteReason = Literal[
    "lost",  # its partition was taken away: the next owner does it again
    "cancelled",  # spent on a request after its end was decided, before the engine heard of it
    "unknown",  # its flush was lost sight of: either it was committed, or it is lost; the ledger can tell which
]
IdleReason = Literal["loading", "waiting"]
Granularity = Literal["token", "request"]


class Entry(Struct):
    """Device time of one kind of work, and what it cost."""

    tokens: int = 0
    device_ns: int = 0
    cost: int = 0


@dataclass(kw_only=True)
class Account:
    """The device time that one request has used, by choice, work and output token."""

    request: int
    entries: dict[tuple[int, Work, int | None], Entry] = field(default_factory=dict)
    cost: int = 0  # of all entries together
    state: Literal["open", "closed", "settled"] = "open"

    def add(self, charge: Charge, cost: int) -> None:
        """The charge is part of the account."""
        entry = self.entries.setdefault((charge.choice, charge.work, charge.index), Entry())
        entry.tokens += charge.num_tokens
        entry.device_ns += charge.device_ns
        entry.cost += cost
        self.cost += cost


class Meter:
    """Turns the device's nanoseconds into money, once each and in order, and knows where every picodollar is.

    An account is opened when its request is given to the engine, closed when the answer is made, and then either
    charged (its events are committed) or wasted. In between it is held. What the engine still spends on a closed
    account is wasted: the bill is written already.
    """

    def __init__(self, *, worker: str, life: str, rate: int) -> None:
        """`rate` is the device's, in picodollars an hour."""
        self._worker, self._life, self._rate = worker, life, rate
        self._open: dict[int, Account] = {}
        self._rest = 0  # what the floor has kept back so far, in picodollars x HOUR_NS
        self._wall_ns = 0
        self._charged = self._held = 0
        self._wasted: dict[WasteReason, int] = dict.fromkeys(("lost", "cancelled", "unknown"), 0)
        self._idle: dict[IdleReason, int] = dict.fromkeys(("loading", "waiting"), 0)
        self._num_readings = 0

    def open(self, request: int) -> Account:
        """From now on the device time of this engine request is held in the account returned."""
        if request in self._open:
            raise ValueError(f"request {request} has an open account")
        account = self._open[request] = Account(request=request)
        return account

    def step(self, result: StepResult) -> None:
        """The step's time is on the meter: idle, held for a request, or wasted."""
        self.idle(result.idle_ns, "waiting")
        for charge in result.charges:
            cost = self._pass(charge.device_ns)
            if account := self._open.get(charge.request):
                account.add(charge, cost)
                self._held += cost
            else:
                self._wasted["cancelled"] += cost

    def idle(self, device_ns: int, reason: IdleReason) -> None:
        """The device did nothing that anybody asked for, this long."""
        self._idle[reason] += self._pass(device_ns)

    def close(self, account: Account) -> None:
        """The account does not change any more: its events may be written."""
        if account.state != "open":
            raise ValueError(f"the account of request {account.request} is {account.state}")
        account.state = "closed"
        del self._open[account.request]

    def charge(self, account: Account) -> None:
        """The events of this closed account are committed."""
        if account.state != "closed":
            raise ValueError(f"the account of request {account.request} is {account.state}")
        account.state = "settled"
        self._held -= account.cost
        self._charged += account.cost

    def waste(self, account: Account, reason: WasteReason) -> None:
        """Nobody will be charged for this account, open or closed."""
        if account.state == "open":
            self.close(account)
        if account.state != "closed":
            raise ValueError(f"the account of request {account.request} is {account.state}")
        account.state = "settled"
        self._held -= account.cost
        self._wasted[reason] += account.cost

    def reading(self, publishing: Iterable[Account] = (), *, final: bool = False) -> MeterReading:
        """The meter as it stands once the events of these closed accounts are committed: send it in their transaction.

        A final reading is the last of a worker that leaves on purpose, and raises ValueError if it would hold anything.
        """
        published = sum(account.cost for account in publishing)
        held = self._held - published
        if final and held:
            raise ValueError(f"{dollars(held)} dollars are held: settle every account before the final reading")
        self._num_readings += 1
        return MeterReading(
            worker=self._worker,
            life=self._life,
            sequence=self._num_readings - 1,
            wall_ns=self._wall_ns,
            device_rate=dollars(self._rate),
            charged=dollars(self._charged + published),
            wasted={reason: dollars(amount) for reason, amount in self._wasted.items()},
            idle={reason: dollars(amount) for reason, amount in self._idle.items()},
            held=dollars(held),
            final=final,
        )

    def _pass(self, device_ns: int) -> int:
        """The cost of the next slice of time. The amounts handed out so far add up to floor(wall x rate), always."""
        self._wall_ns += device_ns
        cost, self._rest = divmod(self._rest + device_ns * self._rate, HOUR_NS)
        return cost


class Attribution(Struct, frozen=True, kw_only=True):
    """What a request's cost events say beside the figures."""

    request_id: str
    custom_id: str
    tenant: str
    model: str
    tier: str
    worker: str
    life: str
    input: Input


def cost_events(
    account: Account,
    usages: Sequence[Usage],
    book: PriceBook,
    attribution: Attribution,
    granularity: Granularity = "token",
) -> list[CostEvent]:
    """The bill of one request, entry by entry: costs add up to the account, prices to usage times price.

    `usages` has one entry a choice, its `num_output` the tokens that the completion counts; what was generated past
    them is "discarded". The prompt is owed once, by choice 0; what other choices computed of it is "recomputed". A
    request that failed has no usages: it owes nothing, and its device time is "discarded".
    """
    model, tier = attribution.model, attribution.tier
    lines: dict[_Key, _Line] = {}
    for key, tokens in _owed(usages):
        line = lines.setdefault(_at(key, granularity), _Line())
        line.tokens += tokens
        line.price += book.price(model, tier, key[1], tokens)
    for key, entry in _spent(account.entries, usages):
        line = lines.setdefault(_at(key, granularity), _Line())
        line.cost += entry.cost
        line.device_ns += entry.device_ns
        if key[1] not in _OWED:  # the tokens of the others are counted by usage
            line.tokens += entry.tokens
    return [_event(key, line, book.version, attribution) for key, line in lines.items()]


def handover_events(
    account: Account, num_choices: int, handovers: int, book: PriceBook, attribution: Attribution
) -> list[CostEvent]:
    """All work on a request that goes on elsewhere, by choice: costs add up to the account, and nothing is owed yet.

    `handovers`: how often it was handed over before.
    """
    lines = {(choice, HANDED_OVER, handovers): _Line() for choice in range(num_choices)}
    for (choice, _, _), entry in account.entries.items():
        line = lines[choice, HANDED_OVER, handovers]
        line.tokens += entry.tokens
        line.cost += entry.cost
        line.device_ns += entry.device_ns
    return [_event(key, line, book.version, attribution) for key, line in lines.items()]


def bill(events: Sequence[CostEvent], book: PriceBook, spent: int = 0) -> Bill:
    """The sum of the events, and of those of before that came to `spent` picodollars of cost."""
    return Bill(
        price=dollars(sum(picodollars(event.price) for event in events)),
        cost=dollars(spent + sum(picodollars(event.cost) for event in events)),
        price_book=book.version,
    )


HANDED_OVER: CostKind = "handed_over"
_Key = tuple[int, CostKind, int | None]  # choice, kind, index
_OWED: frozenset[CostKind] = frozenset(("prompt", "prompt_cached", "output"))


class _Line(Struct):
    """A cost event in the making."""

    tokens: int = 0
    price: int = 0
    cost: int = 0
    device_ns: int = 0


def _owed(usages: Sequence[Usage]) -> Iterator[tuple[_Key, int]]:
    if usages and (computed := usages[0].num_prompt - usages[0].num_cached):
        yield (0, "prompt", None), computed
    if usages and usages[0].num_cached:
        yield (0, "prompt_cached", None), usages[0].num_cached
    for choice, usage in enumerate(usages):
        for index in range(usage.num_output):
            yield (choice, "output", index), 1


def _spent(
    entries: Mapping[tuple[int, Work, int | None], Entry], usages: Sequence[Usage]
) -> Iterator[tuple[_Key, Entry]]:
    for (choice, work, index), entry in entries.items():
        kind: CostKind = "discarded"
        if usages and (work is not Work.OUTPUT or (index is not None and index < usages[choice].num_output)):
            kind = "recomputed" if work is Work.PROMPT and choice > 0 else work.value
        yield (choice, kind, index if kind == "output" else None), entry


def _at(key: _Key, granularity: Granularity) -> _Key:
    return key if granularity == "token" else (key[0], key[1], None)


def _event(key: _Key, line: _Line, price_book: str, attribution: Attribution) -> CostEvent:
    choice, kind, index = key
    source = attribution.input
    place = f"{source.topic}-{source.partition}-{source.offset}/{choice}/{kind}"
    return CostEvent(
        id=place if index is None else f"{place}/{index}",
        request_id=attribution.request_id,
        custom_id=attribution.custom_id,
        tenant=attribution.tenant,
        model=attribution.model,
        tier=attribution.tier,
        choice=choice,
        kind=kind,
        index=index,
        tokens=line.tokens,
        price=dollars(line.price),
        cost=dollars(line.cost),
        device_ns=line.device_ns,
        price_book=price_book,
        worker=attribution.worker,
        life=attribution.life,
        input=source,
    )
