"""What the engine must know of a grammar: which tokens may come next, and when an answer is complete.

Owns the protocol alone. Grammars are made of text, which the engine does not know: `worker/grammar.py` makes them.
"""

from typing import Protocol


class ConstraintFailed(Exception):
    """The grammar has come to a dead end or to a limit. Its text says which."""


class Matcher(Protocol):
    """Follows the tokens of one choice. What it allows depends on them alone. Used by one thread at a time."""

    def mask(self) -> bytes:
        """The tokens that may come next, one at least: token t by bit t % 8, lowest first, of byte t // 8.

        Raises ConstraintFailed, and from then on always.
        """
        ...

    def advance(self, token: int) -> bool:
        """The token has come; whether the answer is complete, so that nothing could follow but its end.

        A token that was not allowed shows as ConstraintFailed at the next mask.
        """
        ...

    def rewind(self, num_tokens: int) -> None:
        """As many of the last tokens have not come."""
        ...

    def num_allowed(self, tokens: list[int]) -> int:
        """How many of these could come one after the other; nothing has changed afterwards."""
        ...


class Constraint(Protocol):
    """A grammar. Any thread may hold it; what `start` returns is new."""

    def start(self) -> Matcher:
        """A matcher that stands at the beginning of an answer."""
        ...
