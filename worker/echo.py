"""A text completion's prompt, as its answer begins with it where `echo` is asked for: text, offsets, logprobs.

Owns what all choices of a request have in common of it. The logprobs come from the engine, or with a handoff.
"""

from engine.types import Logprob
from schemas.handoff import CarriedLogprob
from schemas.requests import TextBody
from worker import handoff
from worker.intake import Admitted
from worker.text import TextStream, Tokenizer

Line = tuple[Logprob, tuple[Logprob, ...]]  # a token's own logprob, and those of the likeliest

LOGPROB_MIN = -9999.0  # OpenAI's own stand-in for the logarithm of zero, which JSON cannot say


class Echo:
    """Nothing at all where it is not asked for."""

    def __init__(self, admitted: Admitted, tokenizer: Tokenizer) -> None:
        body, sampling = admitted.generate.body, admitted.request.sampling
        self.tokens = admitted.request.prompt if isinstance(body, TextBody) and body.echo else ()
        self._is_scored = sampling.num_prompt_logprobs is not None
        self._lines: list[Line] = []  # from the second token on
        stream = TextStream(tokenizer)
        self.offsets: list[int] = []  # characters before each token
        pieces = []
        for token in self.tokens:
            self.offsets.append(stream.num_chars)
            pieces.append(stream.feed(token))
        self.text = "".join(pieces) + stream.end()

    @property
    def num_chars(self) -> int:
        """How long its text is."""
        return len(self.text)

    @property
    def lines(self) -> list[Line | None]:
        """Of each token; None of the first, which follows nothing."""
        return [None, *self._lines] if self.tokens else []

    def take(self, lines: list[Line]) -> None:
        """The next tokens' logprobs."""
        self._lines += lines

    def take_up(self, carried: list[CarriedLogprob] | None) -> None:
        """It has what another worker had of it."""
        self._lines += map(handoff.logprobs, self.tokens[1:], carried or ())

    def carried(self) -> list[CarriedLogprob] | None:
        """What whoever goes on needs to know."""
        return [carry(*line) for line in self._lines] if self._is_scored else None


def carry(own: Logprob | None, top: tuple[Logprob, ...]) -> CarriedLogprob:
    """As finite as it will be shown: the answer is the same whoever makes it."""
    return CarriedLogprob(finite(own), [(one.token, finite(one)) for one in top])


def finite(one: Logprob | None) -> float:
    """JSON has neither infinity nor NaN."""
    return one.logprob if one is not None and one.logprob > LOGPROB_MIN else LOGPROB_MIN
