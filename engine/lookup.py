"""Drafts by prompt lookup: what followed when a sequence's last tokens were last seen (Saxena, 2023).

Owns the index of each sequence's n-grams. It costs next to nothing, and brings much where answers repeat their prompt.
"""

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from engine.sequence import Proposed, Sequence

NGRAM_SIZES = (4, 3, 2)  # longest first: the longer the match, the likelier its sequel; one token matches by chance


class PromptLookup:
    """A drafter that computes nothing."""

    num_seen_behind = 0

    def __init__(self) -> None:
        self._indexes: WeakKeyDictionary[Sequence, Index] = WeakKeyDictionary()

    def can_draft(self, sequence: Sequence) -> bool:
        """Whether its last tokens have been seen before."""
        return self._index(sequence).sequel(sequence.tokens) is not None

    def propose(self, wanted: Mapping[Sequence, int]) -> Proposed:
        """What followed then."""
        return Proposed({s: self._index(s).propose(s.tokens, num) for s, num in wanted.items()})

    def _index(self, sequence: Sequence) -> "Index":
        return self._indexes.setdefault(sequence, Index())


class Index:
    """The n-grams of one sequence, each with the place behind its latest occurrence."""

    def __init__(self) -> None:
        self._sequels: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def propose(self, tokens: list[int], num: int) -> list[int]:
        """So many tokens that may follow `tokens`; none where no n-gram repeats. `tokens` only ever grow."""
        sequel = self.sequel(tokens)
        if sequel is None:
            return []
        # A sequel that runs into the end goes on as the loop that it then is.
        period = len(tokens) - sequel
        return [tokens[sequel + place % period] for place in range(num)]

    def sequel(self, tokens: list[int]) -> int | None:
        """The place behind the latest earlier occurrence of the longest of the last n-grams that has one."""
        self._read(tokens)
        for size in NGRAM_SIZES:
            if (sequel := self._sequels.get(tuple(tokens[-size:]))) is not None:
                return sequel
        return None

    def _read(self, tokens: list[int]) -> None:
        """Note the sequel of every n-gram that has one, the newest token being nobody's n-gram yet."""
        for position in range(max(self._num_indexed, min(NGRAM_SIZES)), len(tokens)):
            for size in NGRAM_SIZES:
                if size <= position:
                    self._sequels[tuple(tokens[position - size : position])] = position
        self._num_indexed = len(tokens)
