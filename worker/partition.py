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
    """What one flush sends for one partition: the outcomes, and the position that becomes true with them."""

    outcomes: Sequence[Outcome]
    before: Position
    position: Position


@dataclass
class Partition:
    """Begin a record, finish it with an outcome, take a burst, settle it once it is committed."""

    place: Place
    committed: Position
    owner: str  # the life that holds it
    outbox: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._offsets = OffsetLedger(self.committed, self.owner)

    def begin(self, offset: int) -> bool:
        """False if the record was finished, or begun, before: skip it."""
        return self._offsets.begin(offset)

    def finish(self, offset: int, outcome: Outcome) -> None:
        """The next burst carries the outcome and counts the offset as finished."""
        self._offsets.finish(offset)
        self.outbox.append(outcome)

    def burst(self) -> Burst | None:
        """All that waits in the outbox, or None. The outbox keeps it until `settle`: a flush may fail."""
        if not self.outbox:
            return None
        return Burst(outcomes=tuple(self.outbox), before=self.committed, position=self._offsets.position())

    def settle(self, burst: Burst) -> None:
        """The burst is committed. Outcomes that came in since stay for the next one."""
        del self.outbox[: len(burst.outcomes)]
        self.committed = burst.position

    @property
    def resume_at(self) -> int:
        """The offset to read next."""
        return self._offsets.resume_at

    @property
    def is_full(self) -> bool:
        """Read no further: what is committed must fit its metadata."""
        return self._offsets.is_full
