"""One assigned partition: its offsets and its outbox.

A `Partition` lives exactly as long as we may answer for it. Holding it is owning it: what a former owner still has in
flight refers to an object that nobody flushes any more, so it can do no harm, and nothing has to be looked up by a
number that may have been given to somebody else.

Pure: no clock, no broker, no engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from worker.brokers.base import Outgoing, Place, Position
from worker.cost import Account
from worker.offsets import OffsetLedger


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The terminal answer to one record: what to send for it, and the device time that it used, if any."""

    records: Sequence[Outgoing]
    account: Account | None = None


@dataclass(frozen=True, kw_only=True)
class Burst:
    """What one flush sends for one partition: the outcomes, and the position that becomes true with them.

    With it the attempts at these offsets are on record.
    """

    outcomes: Sequence[Outcome]
    attempts: Sequence[int]
    before: Position
    position: Position

    @property
    def num_bytes(self) -> int:
        """What its records hold, before compression."""
        return sum(
            len(record.value or b"") + sum(len(name) + len(value or b"") for name, value in record.headers)
            for outcome in self.outcomes
            for record in outcome.records
        )


@dataclass
class Partition:
    """Begin a record, finish it with an outcome, take a burst, settle it once it is committed."""

    place: Place
    committed: Position
    owner: str  # the life that holds it
    end: int  # of the log when it was taken over: no dead owner has begun what came later
    outbox: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._offsets = OffsetLedger(self.committed, self.owner)
        self._attempts: list[int] = []  # counted, and not on record yet

    def begin(self, offset: int) -> bool:
        """False if the record was finished, or begun, before: skip it."""
        return self._offsets.begin(offset)

    def attempts(self, offset: int) -> int:
        """How many of the lives that began the offset did not live to finish it, as far as is on record."""
        return self._offsets.attempts(offset)

    def attempt(self, offset: int) -> None:
        """The attempt is counted, with the next burst, if it must be on record before it is made."""
        if self.must_record(offset):
            self._offsets.attempt(offset)
            self._attempts.append(offset)

    def awaits_record(self, offset: int) -> bool:
        """Whether the attempt is counted and not on record yet."""
        return offset in self._attempts

    def must_record(self, offset: int) -> bool:
        """Whether an earlier owner may have died of it."""
        return offset < self.end

    def finish(self, offset: int, outcome: Outcome) -> None:
        """The next burst carries the outcome and counts the offset as finished."""
        self._offsets.finish(offset)
        self.outbox.append(outcome)

    @property
    def has_news(self) -> bool:
        """Whether anything waits to be committed."""
        return bool(self.outbox or self._attempts)

    def burst(self) -> Burst | None:
        """All that waits to be committed, or None. It waits until `settle`: a flush may fail."""
        if not self.has_news:
            return None
        return Burst(
            outcomes=tuple(self.outbox),
            attempts=tuple(self._attempts),
            before=self.committed,
            position=self._offsets.position(),
        )

    def last_burst(self) -> Burst | None:
        """As `burst`, of an owner who lets go alive: its attempts killed nobody, and are not counted any more."""
        position = self._offsets.position(released=True)
        if not self.outbox and position == self.committed:
            return None
        return Burst(outcomes=tuple(self.outbox), attempts=(), before=self.committed, position=position)

    def settle(self, burst: Burst) -> None:
        """The burst is committed. What came in since stays for the next one."""
        del self.outbox[: len(burst.outcomes)]
        del self._attempts[: len(burst.attempts)]
        self.committed = burst.position

    def go_on(self) -> None:
        """After `last_burst` the partition has come back: what is under way is to be counted again."""
        self._attempts = self._offsets.open_attempts

    @property
    def resume_at(self) -> int:
        """The offset to read next."""
        return self._offsets.resume_at

    @property
    def is_full(self) -> bool:
        """Read no further: what is committed must fit its metadata."""
        return self._offsets.is_full
