"""Which offsets of one partition are finished, and how to say so in one commit.

Requests finish out of order, a group's position is one number. So a commit carries two things: the lowest unfinished
offset, and in its metadata the unfinished ones among those up to the highest finished. The next owner starts at the
first and skips what the second says is done. Without the second, out-of-order completion and exactly-once exclude each
other. The metadata also names the life that committed it: two owners may come equally far, and each must be able to
tell its own commit from the other's. And it counts attempts: how many lives have begun an offset that none lived to
finish (`containment.py` says what for).

Pure: no clock, no broker. Offsets that never arrive (transaction markers, compaction, retention) count as finished.
"""

import base64
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from worker.brokers.base import Position
from worker.errors import Misconfigured

# METADATA_CHARS_MAX (worker/brokers/base.py) bounds them all. With at most 1,024 unfinished offsets there are at most
# 2,049 runs. A run is one byte long unless it spans 128 offsets, and a window of 16,384 holds 128 of those; one jump
# past the window may cost 9 bytes more. So 2,186 bytes at the most, 2,982 characters with the owner. An attempt takes
# two bytes, or three after a distance of 128 offsets, and 9 more for a jump: 585 bytes, 781 characters with its comma.
# In all 3,763: nothing can overflow, even by the poll that filled it up.
UNFINISHED_MAX = 1024
WINDOW_MAX = 16_384
ATTEMPTS_KEPT_MAX = 192
ATTEMPTS_OPEN_MAX = 128  # a poll more, and there are as many as are kept

FORMAT = "2"  # first character of the metadata; a newer format takes another
OWNER_CHARS_MAX = 64
SEPARATOR = ","  # no character of base64


class OffsetLedger:
    """The offsets of one partition, from the moment it is assigned until it is revoked."""

    def __init__(self, committed: Position, owner: str) -> None:
        """Takes up where the committed position says that the last owner stood. `owner` is the name of this life.

        Raises Misconfigured for metadata that this project did not write.
        """
        unfinished, self._next, self._attempts = unpack(committed)
        self._open: set[int] = set()  # offsets with an attempt of this life's
        self._owner = owner[:OWNER_CHARS_MAX]
        self._unfinished = set(unfinished)
        self._awaited = deque(unfinished)  # unfinished by the last owner, not seen by us yet
        self._highest_finished = self._next - 1

    def begin(self, offset: int) -> bool:
        """True if the record at `offset` is to be worked on. False: it has been finished, or begun, before.

        Offsets must come in rising order; what is skipped does not exist in the log any more.
        """
        while self._awaited and self._awaited[0] < offset:
            self._unfinished.discard(self._awaited.popleft())
        if self._awaited and self._awaited[0] == offset:
            self._awaited.popleft()
            return True
        if offset < self._next:
            return False
        self._next = offset + 1
        self._unfinished.add(offset)
        return True

    def finish(self, offset: int) -> None:
        """From now on `position` counts the offset as finished. Raises KeyError if it was not begun."""
        self._unfinished.remove(offset)
        self._attempts.pop(offset, None)
        self._open.discard(offset)
        self._highest_finished = max(self._highest_finished, offset)

    def attempts(self, offset: int) -> int:
        """How often the offset was begun by a life that neither finished nor released it."""
        return self._attempts.get(offset, 0)

    def attempt(self, offset: int) -> None:
        """From now on `position` counts one attempt more, until the offset is finished."""
        self._attempts[offset] = self.attempts(offset) + 1
        self._open.add(offset)

    @property
    def open_attempts(self) -> list[int]:
        """The offsets with an attempt of this life's, rising."""
        return sorted(self._open)

    def position(self, *, released: bool = False) -> Position:
        """What to commit. `released`: without this life's attempts, for it lets go of the partition alive."""
        first = min(self._unfinished, default=self._next)
        between = sorted(offset for offset in self._unfinished if offset < self._highest_finished)
        attempts = {
            offset: number - (released and offset in self._open)
            for offset, number in sorted(self._attempts.items())
            if offset in self._unfinished or offset >= self._next  # else the log has lost it
        }
        return Position(first, pack(self._owner, first, between, self._highest_finished, attempts))

    @property
    def resume_at(self) -> int:
        """The offset to read next."""
        return self._awaited[0] if self._awaited else self._next

    @property
    def num_unfinished(self) -> int:
        """Offsets that were begun, here or by the last owner, and not finished."""
        return len(self._unfinished)

    @property
    def is_full(self) -> bool:
        """No further offset may be begun until the lowest unfinished one is finished.

        What the last owner left unfinished is always welcome: it is in the metadata already.
        """
        if self._awaited:
            return False
        window = self._next - min(self._unfinished, default=self._next)
        return len(self._unfinished) >= UNFINISHED_MAX or window >= WINDOW_MAX or len(self._open) >= ATTEMPTS_OPEN_MAX


def pack(owner: str, first: int, unfinished: Iterable[int], highest_finished: int, attempts: Mapping[int, int]) -> str:
    """The metadata that goes with a position at `first`: three fields, numbers as LEB128 varints in base64.

    The owner. Where something above `first` is finished, the lengths of alternating runs of unfinished and finished
    offsets, from `first` to `highest_finished`. Where offsets have attempts, pairs of their distance, each from the one
    before and the first from `first`, and their number; `attempts` comes in rising order, and the lowest are kept.
    """
    runs = _runs(first, unfinished, highest_finished) if highest_finished >= first else ()
    return FORMAT + SEPARATOR.join((owner, _packed(runs), _packed(_pairs(first, attempts))))


def unpack(position: Position) -> tuple[list[int], int, dict[int, int]]:
    """A committed position's unfinished offsets, rising; the first offset that it says nothing about; the attempts."""
    if not position.metadata:
        return [], position.offset, {}
    if position.metadata[0] != FORMAT:
        raise Misconfigured(
            f"the group has committed metadata of an unknown format, {position.metadata[:16]!r}: another program, or a "
            "newer version of this one, uses the same group; give this one another with --group"
        )
    _, runs, pairs = position.metadata.split(SEPARATOR)
    unfinished: list[int] = []
    start, is_finished = position.offset, False
    for length in _unpacked(runs):
        if not is_finished:
            unfinished.extend(range(start, start + length))
        start, is_finished = start + length, not is_finished
    attempts: dict[int, int] = {}
    offset, numbers = position.offset, _unpacked(pairs)
    for distance in numbers:
        offset += distance
        attempts[offset] = next(numbers)
    return unfinished, start, attempts


def _runs(first: int, unfinished: Iterable[int], highest_finished: int) -> Iterator[int]:
    run_start = first  # of the present run of unfinished offsets
    expected = first  # the next offset, if the run goes on
    for offset in unfinished:
        if offset != expected:
            yield expected - run_start
            yield offset - expected
            run_start = offset
        expected = offset + 1
    yield expected - run_start
    yield highest_finished + 1 - expected


def _pairs(first: int, attempts: Mapping[int, int]) -> Iterator[int]:
    for offset, number in islice(attempts.items(), ATTEMPTS_KEPT_MAX):
        if number:
            yield offset - first
            yield number
            first = offset


def _packed(numbers: Iterable[int]) -> str:
    return base64.b64encode(b"".join(map(_varint, numbers))).decode()


def _unpacked(field: str) -> Iterator[int]:
    return _varints(base64.b64decode(field, validate=True))


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _varints(data: bytes) -> Iterator[int]:
    number = shift = 0
    for byte in data:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield number
            number = shift = 0
