"""What the worker says: the records of an answer with its bill, of a refusal, of a chunk and of a meter reading.

Owns the composition, and nothing that it composes: messages are `outcome.py`'s, money is `cost.py`'s, topics and
headers are `envelope.py`'s. Pure but for two clocks; the service sends what comes out of here.
"""

import time
from collections.abc import Callable, Sequence

from schemas.cost import CostEvent, MeterReading, picodollars
from schemas.handoff import Handoff
from schemas.results import Chunk, Completion
from worker.brokers.base import Outgoing, Record
from worker.cost import Account, Attribution, Granularity, bill, cost_events, handover_events
from worker.envelope import DEAD_LETTERED, Envelope
from worker.errors import RequestError
from worker.intake import Admitted, Refused
from worker.outcome import Answer, failure
from worker.price_book import PriceBook
from worker.text import Tokenizer


class Outbound:
    """Makes all records that one worker sends in its life."""

    def __init__(
        self,
        *,
        envelope: Envelope,
        tokenizer: Tokenizer,
        prices: PriceBook,
        granularity: Granularity,
        worker: str,
        life: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock`: what answers are timed by."""
        self._envelope = envelope
        self._tokenizer = tokenizer
        self._prices = prices
        self._granularity: Granularity = granularity
        self._worker = worker
        self._life = life
        self._clock = clock

    def answer(self, admitted: Admitted) -> Answer:
        """An answer to gather the engine's events in."""
        return Answer(admitted, self._tokenizer, self._worker, self._clock)

    def refusal(self, record: Record, error: Refused, handoff: Handoff | None = None) -> Sequence[Outgoing]:
        """The failure of a record that never became a request; with `handoff`, of one that was to be gone on with."""
        spent = bill((), self._prices, picodollars(handoff.spent)) if handoff else None
        handovers = handoff.handovers if handoff else 0
        completion = failure(record, error, self._worker, bill=spent, handovers=handovers)
        return [self._envelope.completion(completion, record), *self._dead_letter(record, error)]

    def records(self, answer: Answer, account: Account, fault: RequestError | None) -> Sequence[Outgoing]:
        """The completion, its cost events, and a dead letter where somebody must look.

        `fault`: why it is a failure, be it the answer's own fault or that the request is given up.
        """
        events = self._bill(answer, account, is_owed=fault is None)
        amount = bill(events, self._prices, answer.admitted.spent)
        completion: Completion = answer.give_up(fault, amount) if fault else answer.completion(amount)
        record = answer.admitted.record
        return [
            self._envelope.completion(completion, record),
            *self._envelope.costs(events, record),
            *(self._dead_letter(record, fault) if fault else ()),
        ]

    def handoff(self, answer: Answer, account: Account, num_chunks: Sequence[int]) -> Sequence[Outgoing]:
        """What another worker goes on with, and what the work so far has cost; nothing where it is too large to send.

        `num_chunks`: the previews sent of each choice.
        """
        admitted = answer.admitted
        message = answer.handoff(admitted.spent + account.cost, num_chunks)
        record = self._envelope.handoff(message, admitted.record, admitted.generate.custom_id)
        if record is None:
            return ()
        events = handover_events(account, len(num_chunks), admitted.handovers, self._prices, self._attribution(answer))
        return [record, *self._envelope.costs(events, admitted.record)]

    def chunk(self, chunk: Chunk, record: Record) -> Outgoing:
        """A preview."""
        return self._envelope.chunk(chunk, record)

    def meter(self, reading: MeterReading) -> Outgoing:
        """A reading of the meter."""
        return self._envelope.meter(reading)

    def _bill(self, answer: Answer, account: Account, *, is_owed: bool) -> list[CostEvent]:
        usages = answer.owed if is_owed else ()
        return cost_events(account, usages, self._prices, self._attribution(answer), self._granularity)

    def _attribution(self, answer: Answer) -> Attribution:
        admitted = answer.admitted
        return Attribution(
            request_id=answer.id,
            custom_id=admitted.generate.custom_id,
            tenant=admitted.generate.tenant,
            model=admitted.generate.body.model,
            tier=admitted.tier,
            worker=self._worker,
            life=self._life,
            input=admitted.input,
        )

    def _dead_letter(self, record: Record, error: RequestError) -> Sequence[Outgoing]:
        return [self._envelope.dead_letter(record, error)] if error.code in DEAD_LETTERED else []
