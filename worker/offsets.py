"""Which offsets of one partition are finished, and how to say so in one commit.

Requests finish out of order, a group's position is one number. So a commit carries two things: the lowest unfinished
offset, and in its metadata the unfinished ones among those up to the highest finished. The next owner starts at the
first and skips what the second says is done. Without the second, out-of-order completion and exactly-once exclude each
other. The metadata also names the life that committed it: two owners may come equally far, and each must be able to
tell its own commit from the other's.

Pure: no clock, no broker. Offsets that never arrive (transaction markers, compaction, retention) count as finished.
"""

import base64
from collections import deque
from collections.abc import Iterable, Iterator

from worker.brokers.base import Position
from worker.errors import Misconfigured

# METADATA_CHARS_MAX (worker/brokers/base.py) bounds both. With at most 1,024 unfinished offsets there are at most 2,049
# runs. A run is one byte long unless it spans 128 offsets, and a window of 16,384 holds 128 of those; one jump past the
# window may cost 9 bytes more. So 2,186 bytes at the most, 2,982 characters with the owner: nothing can overflow.
UNFINISHED_MAX = 1024
WINDOW_MAX = 16_384

FORMAT = "1"  # first character of the metadata; a newer format takes another
OWNER_CHARS_MAX = 64
SEPARATOR = ","  # no character of base64


class OffsetLedger:
    """The offsets of one partition, from the moment it is assigned until it is revoked."""

    def __init__(self, committed: Position, owner: str) -> None:
        """Takes up where the committed position says that the last owner stood. `owner` is the name of this life.

        Raises Misconfigured for metadata that this project did not write.
        """
        unfinished, self._next = unpack(committed)
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
        self._highest_finished = max(self._highest_finished, offset)

    def position(self) -> Position:
        """What to commit."""
        first = min(self._unfinished, default=self._next)
        between = sorted(offset for offset in self._unfinished if offset < self._highest_finished)
        return Position(first, pack(self._owner, first, between, self._highest_finished))

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
        return len(self._unfinished) >= UNFINISHED_MAX or window >= WINDOW_MAX


def pack(owner: str, first: int, unfinished: Iterable[int], highest_finished: int) -> str:
    """The metadata that goes with a position at `first`.

    The owner, and where something above `first` is finished: lengths of alternating runs of unfinished and finished
    offsets, from `first` to `highest_finished`, as LEB128 varints in base64.
    """
    runs = _runs(first, unfinished, highest_finished) if highest_finished >= first else ()
    return FORMAT + owner + SEPARATOR + base64.b64encode(b"".join(map(_varint, runs))).decode()


def unpack(position: Position) -> tuple[list[int], int]:
    """The unfinished offsets of a committed position, rising, and the first offset that it says nothing about."""
    if not position.metadata:
        return [], position.offset
    if position.metadata[0] != FORMAT:
        raise Misconfigured(
            f"the group has committed metadata of an unknown format, {position.metadata[:16]!r}: another program, or a "
            "newer version of this one, uses the same group; give this one another with --group"
        )
    unfinished: list[int] = []
    start, is_finished = position.offset, False
    _, _, runs = position.metadata.partition(SEPARATOR)
    for length in _varints(base64.b64decode(runs, validate=True)):
        if not is_finished:
            unfinished.extend(range(start, start + length))
        start, is_finished = start + length, not is_finished
    return unfinished, start


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
