"""One of a request's answers as its tokens come: the text, the logprobs in OpenAI's two shapes, the end."""

from engine.types import Finished, Logprob, Token, Usage
from engine.types import FinishReason as EngineReason
from schemas.handoff import CarriedChoice
from schemas.results import (
    AssistantMessage,
    ChatChoice,
    ChatLogprobs,
    FinishReason,
    TextChoice,
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
)
from worker import handoff
from worker.echo import Echo, carry, finite
from worker.intake import Admitted
from worker.text import TextStream, Tokenizer


class Choice:
    """Takes the choice's events in order; makes its part of the result once `finished`."""

    def __init__(self, admitted: Admitted, tokenizer: Tokenizer, echo: Echo) -> None:
        self.finished: Finished | None = None
        self.left_off: Usage | None = None  # its counts where the engine was interrupted, if it was
        self.stream = TextStream(tokenizer, admitted.stops, admitted.request.sampling.tokens_min)
        self._tokenizer = tokenizer
        self._wants_logprobs = admitted.request.sampling.num_logprobs is not None
        self._echo = echo
        self._pieces = [echo.text]
        self._tokens: list[tuple[Token, int]] = []  # with the number of characters before each

    def take(self, event: Token) -> str:
        """The text that this token makes final: none past a stop string."""
        if self.stream.stopped:
            return ""
        prompt = "" if self._tokens else self._echo.text  # `_pieces` has it
        self._tokens.append((event, self.stream.num_chars))
        return prompt + self._keep(self.stream.feed(event.token))

    def finish(self, event: Finished) -> str:
        """The text that was held back until now."""
        self.finished = event
        return self._keep(self.stream.end())

    def interrupt(self, usage: Usage) -> None:
        """Another worker may go on from here."""
        self.left_off = usage

    def carried(self, num_chunks: int) -> CarriedChoice:
        """What whoever goes on needs to know. Only of a choice that is finished or interrupted."""
        usage = self.finished.usage if self.finished else self.left_off
        if usage is None:
            raise ValueError("the engine has not said how far the choice has come")
        events = [event for event, _ in self._tokens]
        return CarriedChoice(
            tokens=[event.token for event in events],
            logprobs=[carry(event.logprob, event.top_logprobs) for event in events] if self._wants_logprobs else None,
            usage=handoff.usage_of(usage),
            finish_reason=self.finish_reason,
            num_chunks=num_chunks,
        )

    def take_up(self, carried: CarriedChoice, request: int, number: int) -> None:
        """It stands where another worker left off: it has heard again what that one heard."""
        for event in handoff.tokens(carried, request, number):
            self.take(event)
        if end := handoff.end(carried, request, number):
            self.finish(end)

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the choice ended; None while it goes on, or if it failed."""
        if self.finished is None or self.finished.reason is EngineReason.FAILED:
            return None
        return "stop" if self.stream.stopped or self.finished.reason is EngineReason.STOP else "length"

    def chat(self, index: int) -> ChatChoice:
        """As a chat's answer."""
        logprobs = [self._token_logprob(event) for event, _ in self._tokens]
        return ChatChoice(
            index=index,
            message=AssistantMessage(content="".join(self._pieces)),
            finish_reason=self._reason(),
            logprobs=ChatLogprobs(content=logprobs) if self._wants_logprobs else None,
        )

    def text(self, index: int) -> TextChoice:
        """As a text's continuation."""
        return TextChoice(
            index=index,
            text="".join(self._pieces),
            finish_reason=self._reason(),
            logprobs=self._text_logprobs() if self._wants_logprobs else None,
        )

    def _keep(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text

    def _reason(self) -> FinishReason:
        if (reason := self.finish_reason) is None:
            raise ValueError("the choice has not ended well: there is no result of it")
        return reason

    def _token_logprob(self, event: Token) -> TokenLogprob:
        raw = self._tokenizer.token_bytes(event.token)
        return TokenLogprob(
            token=_name(raw),
            logprob=finite(event.logprob),
            bytes=list(raw),
            top_logprobs=[self._top_logprob(one) for one in event.top_logprobs],
        )

    def _top_logprob(self, one: Logprob) -> TopLogprob:
        raw = self._tokenizer.token_bytes(one.token)
        return TopLogprob(token=_name(raw), logprob=finite(one), bytes=list(raw))

    def _text_logprobs(self) -> TextLogprobs:
        echo, events = self._echo, [event for event, _ in self._tokens]
        lines = [*echo.lines, *((event.logprob, event.top_logprobs) for event in events)]
        return TextLogprobs(
            tokens=[self._name(token) for token in (*echo.tokens, *(event.token for event in events))],
            token_logprobs=[finite(line[0]) if line else None for line in lines],
            # The likeliest first, so of two tokens of one name (parts of characters) the likelier stays.
            top_logprobs=[
                {self._name(one.token): finite(one) for one in reversed(line[1])} if line else None for line in lines
            ],
            text_offset=[*echo.offsets, *(echo.num_chars + offset for _, offset in self._tokens)],
        )

    def _name(self, token: int) -> str:
        return _name(self._tokenizer.token_bytes(token))


def _name(raw: bytes) -> str:
    """The token as text: a part of a character shows as U+FFFD, and the bytes beside it say which."""
    return raw.decode(errors="replace")
