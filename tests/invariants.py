"""What must hold whatever died: the one checker for the simulation, the contract tests and the real-broker tests.

Takes only what a read_committed reader saw, and recomputes the money by itself: it shares no code with the worker
beyond the decoding of the wire.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence

from schemas.cost import CostEvent, MeterReading, picodollars
from schemas.handoff import Handoff
from schemas.results import Completion, Input

NS_PER_HOUR = 3_600 * 10**9


def violations(
    requests: Collection[Input],
    completions: Sequence[Completion],
    costs: Sequence[CostEvent],
    readings: Sequence[MeterReading],
    handoffs: Sequence[Handoff] = (),
) -> list[str]:
    """Everything that is wrong, in words; an empty list means: each request answered once and billed once, to the
    picodollar, and what was handed over was gone on with."""
    return [
        *answered_once(requests, completions),
        *billed_once(completions, costs),
        *reconciled(costs, readings),
        *handed_over_once(completions, costs, handoffs),
    ]


def answered_once(requests: Collection[Input], completions: Sequence[Completion]) -> Iterable[str]:
    """Each request has one completion, and nothing else has."""
    answers = Counter(place(completion.input) for completion in completions)
    asked = {place(request) for request in requests}
    yield from (f"{where} was never answered" for where in sorted(asked - answers.keys()))
    yield from (f"{where} was answered {count} times" for where, count in sorted(answers.items()) if count > 1)
    yield from (f"{where} was answered but never asked" for where in sorted(answers.keys() - asked))


def billed_once(completions: Sequence[Completion], costs: Sequence[CostEvent]) -> Iterable[str]:
    """Each completion's bill is the sum of its cost events, which count its tokens; failures owe nothing."""
    ids = Counter(event.id for event in costs)
    yield from (f"cost event {event_id} came {count} times" for event_id, count in sorted(ids.items()) if count > 1)
    events_of: dict[str, list[CostEvent]] = defaultdict(list)
    for event in costs:
        events_of[place(event.input)].append(event)
    for completion in completions:
        where = place(completion.input)
        events = events_of.pop(where, [])
        price = sum(picodollars(event.price) for event in events)
        cost = sum(picodollars(event.cost) for event in events)
        if completion.response is None:
            if price:
                yield f"{where} failed and owes {price} picodollars"
            continue
        if completion.bill is None:
            yield f"{where} has no bill"
            continue
        if picodollars(completion.bill.price) != price:
            yield f"{where} is billed {completion.bill.price}, its events say {price} picodollars"
        if picodollars(completion.bill.cost) != cost:
            yield f"{where} cost {completion.bill.cost}, its events say {cost} picodollars"
        yield from counts_agree(where, completion, events)
    yield from (f"{where} has cost events but no answer" for where in sorted(events_of))


def counts_agree(where: str, completion: Completion, events: Sequence[CostEvent]) -> Iterable[str]:
    """The cost events count the same tokens as the completion's usage."""
    assert completion.response is not None
    usage = completion.response.body.usage
    counted = Counter[str]()
    for event in events:
        if event.kind in ("output", "prompt_cached") or picodollars(event.price):
            counted[event.kind] += event.tokens
    if counted["output"] != usage.completion_tokens:
        yield f"{where} has {usage.completion_tokens} output tokens and cost events for {counted['output']}"


def reconciled(costs: Sequence[CostEvent], readings: Sequence[MeterReading]) -> Iterable[str]:
    """For each life: wall clock x rate = charged + wasted + idle + held, and charged = its cost events.

    But for commits that it lost sight of: their cost is wasted as "unknown" and, if they held, in events as well.
    """
    last: dict[str, MeterReading] = {}
    for reading in readings:
        if reading.life not in last or reading.sequence > last[reading.life].sequence:
            last[reading.life] = reading
    charged = Counter[str]()
    for event in costs:
        charged[event.life] += picodollars(event.cost)
    yield from (f"life {life} has cost events but no meter reading" for life in charged.keys() - last.keys())
    for life, reading in last.items():
        due = reading.wall_ns * picodollars(reading.device_rate) // NS_PER_HOUR
        parts = (reading.charged, reading.held, *reading.wasted.values(), *reading.idle.values())
        accounted = sum(picodollars(part) for part in parts)
        if due != accounted:
            yield f"life {life}: {due} picodollars of device time, {accounted} accounted for"
        # A life that lost sight of a commit has the amount under "unknown"; the events say whether it was charged.
        found = charged[life] - picodollars(reading.charged)
        if not 0 <= found <= picodollars(reading.wasted.get("unknown", "0")):
            yield f"life {life}: charged {reading.charged}, its cost events say {charged[life]} picodollars"


def handed_over_once(
    completions: Sequence[Completion], costs: Sequence[CostEvent], handoffs: Sequence[Handoff]
) -> Iterable[str]:
    """A request's handoffs are numbered without a gap, each goes on from the one before, and its answer from the last.

    No token of a handoff is computed as output by whoever comes after, as far as there is a cost event for each token.
    """
    answers = {place(completion.input): completion for completion in completions}
    events_of: dict[str, list[CostEvent]] = defaultdict(list)
    for event in costs:
        events_of[place(event.input)].append(event)
    chains: dict[str, list[Handoff]] = {}
    for handoff in sorted(handoffs, key=lambda handoff: handoff.handovers):
        chains.setdefault(place(handoff.input), []).append(handoff)
    for where, answer in answers.items():
        if answer.handovers != (number := len(chains.get(where, ()))):
            yield f"{where} was handed over {number} times, and its answer says {answer.handovers}"
    for where, chain in chains.items():
        if where not in answers:
            yield f"{where} was handed over and never answered"
            continue
        yield from chain_holds(where, chain, events_of[where])
        response = answers[where].response
        num_carried = sum(len(choice.tokens) for choice in chain[-1].choices)
        if response and response.body.usage.completion_tokens < num_carried:
            num_answered = response.body.usage.completion_tokens
            yield f"{where} was handed over with {num_carried} tokens and answered with {num_answered}"


def chain_holds(where: str, chain: Sequence[Handoff], events: Sequence[CostEvent]) -> Iterable[str]:
    """One request's handoffs, in order, beside its cost events."""
    known: dict[int, list[int]] = {}
    for number, handoff in enumerate(chain, start=1):
        if handoff.handovers != number:
            yield f"{where} has a handoff numbered {handoff.handovers} where number {number} should be"
        before = [event for event in events if event.kind == "handed_over" and (event.index or 0) < number]
        if (spent := sum(picodollars(event.cost) for event in before)) != picodollars(handoff.spent):
            yield f"{where} was handed over for {handoff.spent}, its events say {spent} picodollars"
        for choice, carried in enumerate(handoff.choices):
            if carried.tokens[: len(known.get(choice, []))] != known.get(choice, []):
                yield f"{where}/{choice} has lost tokens that were handed over"
            known[choice] = carried.tokens
    for event in events:
        is_known = event.kind == "output" and event.index is not None and event.index < len(known.get(event.choice, []))
        if is_known and event.device_ns:
            yield f"{event.id} was handed over and computed again"


def place(where: Input) -> str:
    """The record's name, for messages and for counting."""
    return f"{where.topic}-{where.partition}-{where.offset}"
