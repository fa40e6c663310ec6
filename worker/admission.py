"""Which topics may be polled now: what was handed over first, realtime before batch, and batch never forgotten.

Owns the two rules of intake. Room: the engine's cache bounds how many tokens may be taken on; a full worker polls
nothing and leaves the backlog to others, and the last part of the room is kept for realtime. Requests that were handed
over have had their turn: there is some room for them beyond that. Lanes: batch is polled when realtime has nothing
waiting, and both when nothing that was handed over waits; and when batch has been shut out for `ageing_s`, it is given
one small poll, so that it moves however busy realtime is.

Pure: time comes in as an argument.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from schemas.requests import Tier

REALTIME: Tier = "realtime"
BATCH: Tier = "batch"
HANDOFF: Literal["handoff"] = "handoff"

Lane = Tier | Literal["handoff"]
LANES: tuple[Lane, ...] = (HANDOFF, REALTIME, BATCH)  # the most urgent first

# Records of one poll. The last is looked at after all others, which take up to 0.3 ms each; and intake can overshoot
# its room by so many.
POLL_RECORDS_MAX = 32
AGED_RECORDS_MAX = 4  # of an aged poll: an eighth of a poll, so that realtime hardly notices
HANDOFF_SHARE = 4  # a quarter more than the room: what a leaving neighbour hands over must not wait for fresh work
REALTIME_SHARE = 4  # one part in four of the room is out of batch's reach: a burst of realtime finds a place at once


@dataclass(frozen=True)
class Poll:
    """What to ask the broker for."""

    lanes: frozenset[Lane]
    num_max: int


NOTHING = Poll(frozenset(), 1)


@dataclass
class Admission:
    """Decides each poll, and is told what came of it."""

    tokens_max: int  # taken on and not yet answered
    ageing_s: float
    _tokens: int = 0
    _waits: dict[Lane, bool] = field(default_factory=lambda: dict.fromkeys(LANES, False))
    _batch_polled_s: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens reserved by requests that are not answered yet."""
        return self._tokens

    def reserve(self, tokens: int) -> None:
        """A request was taken on that may need this many tokens."""
        self._tokens += tokens

    def release(self, tokens: int) -> None:
        """The request is answered, or let go."""
        self._tokens -= tokens

    def next_poll(self, now_s: float) -> Poll:
        """What to poll for at this moment."""
        if self._tokens >= self.tokens_max + self.tokens_max // HANDOFF_SHARE:
            return NOTHING
        if self._tokens >= self.tokens_max or self._waits[HANDOFF]:
            return Poll(frozenset((HANDOFF,)), POLL_RECORDS_MAX)
        if self._tokens >= self.tokens_max - self.tokens_max // REALTIME_SHARE:
            return Poll(frozenset((HANDOFF, REALTIME)), POLL_RECORDS_MAX)
        if not self._waits[REALTIME]:
            return Poll(frozenset(LANES), POLL_RECORDS_MAX)
        if now_s - self._batch_polled_s >= self.ageing_s:
            return Poll(frozenset((HANDOFF, BATCH)), AGED_RECORDS_MAX)
        return Poll(frozenset((HANDOFF, REALTIME)), POLL_RECORDS_MAX)

    def polled(self, poll: Poll, nums: Mapping[Lane, int], now_s: float) -> None:
        """Takes note of an answer, so many records of each lane: where one came, more may wait behind it."""
        if BATCH in poll.lanes:
            self._batch_polled_s = now_s
        self._waits.update((lane, nums.get(lane, 0) > 0) for lane in poll.lanes)
