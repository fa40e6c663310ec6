"""What has come of a request: the engine's events gathered into the one completion, or the failure, that answers it.

Pure: events and the time come in, messages go out. Never sends anything (`worker/envelope.py` makes records of
messages) and never counts money: the bill is an argument.
"""

import time
from collections.abc import Callable, Sequence
from functools import cached_property

from msgspec import structs

from engine.types import Finished, Scored, Token
from engine.types import FinishReason as EngineReason
from engine.types import Usage as EngineUsage
from schemas.codec import encode, place_id
from schemas.cost import dollars
from schemas.handoff import Handoff
from schemas.requests import Chat
from schemas.results import (
    Bill,
    ChatResult,
    Completion,
    CompletionTokensDetails,
    ErrorCode,
    Failed,
    FinishReason,
    PromptTokensDetails,
    Response,
    TextResult,
    Timing,
    Usage,
)
from worker.brokers.base import Record
from worker.choice import Choice
from worker.echo import Echo
from worker.errors import RequestError
from worker.intake import RECORD_BYTES_MAX, Admitted, Refused, input_of
from worker.text import Tokenizer

# What a record holds beside the choices' text: names of 512 characters at 4 bytes, usage, bill, timing, headers.
FRAME_BYTES = 16 << 10
JSON_BYTES_PER_CHAR = 6  # a control character, as \u00XX; all others take fewer


class Answer:
    """One request's answer as it comes in. Whole when `done`; then `fault` says whether it is a failure.

    Its times are the wall clock's as it was on receipt, and from then on count by one that nobody sets. So a step of
    the wall clock shows only where two machines are compared: in the time on the topic, and across a hand-over.
    """

    def __init__(
        self, admitted: Admitted, tokenizer: Tokenizer, worker: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock`: seconds, since whenever; now is when the request was received."""
        self.admitted = admitted
        self.id = place_id(admitted.input)
        self.worker = worker
        self._clock, self._received_s = clock, clock()
        self._echo = Echo(admitted, tokenizer)
        self._choices = [Choice(admitted, tokenizer, self._echo) for _ in range(admitted.request.sampling.num_choices)]
        self._first_token_s: float | None = None
        self._done_s = admitted.admitted_s
        for number, (choice, carried) in enumerate(zip(self._choices, admitted.carried, strict=False)):
            choice.take_up(carried, admitted.request.id, number)
        if admitted.handoff and admitted.carried:
            self._echo.take_up(admitted.handoff.prompt_logprobs)
            self._first_token_s = admitted.handoff.first_token_s

    def score(self, event: Scored) -> None:
        """The prompt's next logprobs are there."""
        self._echo.take(event.logprobs)

    def take(self, event: Token) -> str:
        """The text that this token makes final. A token past a stop string is discarded, and makes none."""
        if self._first_token_s is None:
            self._first_token_s = self._now_s()
        return self._choices[event.choice].take(event)

    def finish(self, event: Finished) -> str:
        """The text that was held back until the choice's end. A choice that is interrupted has not ended, and keeps it;
        but one that a stop string had ended before the engine heard of it has.
        """
        choice = self._choices[event.choice]
        if event.reason is EngineReason.INTERRUPTED and not choice.stream.stopped:
            choice.interrupt(event.usage)
            return ""
        self._done_s = self._now_s()
        return choice.finish(event)

    @property
    def done(self) -> bool:
        """Whether every choice is over."""
        return all(choice.finished for choice in self._choices)

    @property
    def has_begun(self) -> bool:
        """Whether the first token is there."""
        return self._first_token_s is not None

    @property
    def can_be_handed_over(self) -> bool:
        """Whether the engine was interrupted at it and has said how far each choice has come."""
        return self.has_begun and all(choice.finished or choice.left_off for choice in self._choices)

    @property
    def num_new(self) -> int:
        """Tokens that no worker but this one has computed."""
        return sum(choice.stream.num_tokens for choice in self._choices) - sum(
            len(carried.tokens) for carried in self.admitted.carried
        )

    def handoff(self, spent: int, num_chunks: Sequence[int]) -> Handoff:
        """What another worker needs to go on. `spent`: the cost of all work so far; `num_chunks`: of each choice."""
        admitted, record = self.admitted, self.admitted.record
        if record.value is None or self._first_token_s is None:
            raise ValueError("the request has not begun: there is nothing to go on with")
        return Handoff(
            input=admitted.input,
            key=record.key,
            value=record.value,
            headers=list(record.headers),
            timestamp_ms=record.timestamp_ms,
            tier=admitted.tier,
            admitted_s=admitted.admitted_s,
            first_token_s=self._first_token_s,
            handovers=admitted.handovers + 1,
            spent=dollars(spent),
            worker=self.worker,
            choices=[choice.carried(num) for choice, num in zip(self._choices, num_chunks, strict=True)],
            prompt_logprobs=self._echo.carried(),
        )

    def is_stopped(self, choice: int) -> bool:
        """Whether the choice's text has met a stop string: the engine need not go on with it."""
        return self._choices[choice].stream.stopped

    @property
    def owed(self) -> list[EngineUsage]:
        """What each choice is billed for: the tokens up to its stop string. The engine may have made more."""
        ends = [(choice.finished, choice.stream.num_tokens) for choice in self._choices]
        return [structs.replace(end.usage, num_output=num_kept) for end, num_kept in ends if end]

    def finish_reason(self, choice: int) -> FinishReason | None:
        """Why the choice ended; None while it goes on, or if it failed."""
        return self._choices[choice].finish_reason

    @cached_property  # of an answer that does not change any more; it may be encoded to see how large it is
    def fault(self) -> RequestError | None:
        """Why the answer, now `done`, is a failure, which owes nothing; None if it is a completion."""
        for choice in self._choices:
            if choice.finished and choice.finished.reason is EngineReason.FAILED:
                return RequestError(ErrorCode.INFERENCE_ERROR, choice.finished.error or "the engine gave no reason")
        if self._may_be_too_large and (size := len(encode(self._success(bill=None)))) > RECORD_BYTES_MAX - FRAME_BYTES:
            return RequestError(
                ErrorCode.RESULT_TOO_LARGE,
                f"the answer takes {size} bytes, and a record holds {RECORD_BYTES_MAX - FRAME_BYTES}: "
                "ask for fewer tokens, choices or logprobs",
            )
        return None

    @property
    def usage(self) -> Usage:
        """Counts over all choices. The prompt, as it is owed, is choice 0's: computed by it, or found in the cache."""
        ends = [choice.finished.usage for choice in self._choices if choice.finished]
        prompt = len(self.admitted.request.prompt)
        output = sum(choice.stream.num_tokens for choice in self._choices)
        accepted = sum(end.num_accepted for end in ends)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=output,
            total_tokens=prompt + output,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=ends[0].num_cached if ends else 0),
            completion_tokens_details=CompletionTokensDetails(
                accepted_prediction_tokens=accepted,
                rejected_prediction_tokens=sum(end.num_drafted for end in ends) - accepted,
            ),
        )

    @property
    def timing(self) -> Timing:
        """Where the time went. What another machine's clock makes less than nothing shows as no time."""
        start, end = self.admitted.admitted_s, self._done_s
        first = end if self._first_token_s is None else self._first_token_s
        return Timing(
            queue_time_ms=_ms(start - self.admitted.record.timestamp_ms / 1000),
            time_to_first_token_ms=_ms(first - start),
            generation_time_ms=_ms(end - first),
        )

    def _now_s(self) -> float:
        return self.admitted.received_s + self._clock() - self._received_s

    def completion(self, bill: Bill | None) -> Completion:
        """The one answer to the request, a failure where there is a `fault`. Only once `done`."""
        if fault := self.fault:
            return self._failure(fault, bill)
        return self._success(bill)

    def give_up(self, error: RequestError, bill: Bill | None) -> Completion:
        """The answer to a request that is not gone on with, done or not: its deadline has come."""
        self._done_s = self._now_s()
        return self._failure(error, bill)

    def _success(self, bill: Bill | None) -> Completion:
        return Completion(
            id=self.id,
            custom_id=self.admitted.generate.custom_id,
            tenant=self.admitted.generate.tenant,
            response=self._response(),
            error=None,
            input=self.admitted.input,
            worker=self.worker,
            bill=bill,
            timing=self.timing,
            handovers=self.admitted.handovers,
        )

    def _failure(self, error: RequestError, bill: Bill | None) -> Completion:
        generate = self.admitted.generate
        refused = Refused(error.code, error.message, generate.custom_id, generate.tenant)
        return failure(
            self.admitted.record,
            refused,
            self.worker,
            bill=bill,
            timing=self.timing,
            handovers=self.admitted.handovers,
        )

    def _response(self) -> Response:
        body = self._chat_result() if isinstance(self.admitted.generate, Chat) else self._text_result()
        return Response(status_code=200, request_id=self.id, body=body)

    def _chat_result(self) -> ChatResult:
        return ChatResult(
            id=f"chatcmpl-{self.id}",
            created=int(self.admitted.admitted_s),
            model=self.admitted.generate.body.model,
            choices=[choice.chat(index) for index, choice in enumerate(self._choices)],
            usage=self.usage,
            service_tier=self.admitted.tier,
        )

    def _text_result(self) -> TextResult:
        return TextResult(
            id=f"cmpl-{self.id}",
            created=int(self.admitted.admitted_s),
            model=self.admitted.generate.body.model,
            choices=[choice.text(index) for index, choice in enumerate(self._choices)],
            usage=self.usage,
            service_tier=self.admitted.tier,
        )

    @property
    def _may_be_too_large(self) -> bool:
        """A quick look, so that ordinary answers are not encoded twice."""
        if self.admitted.request.sampling.num_logprobs is not None:
            return True
        num_chars = sum(self._echo.num_chars + choice.stream.num_chars for choice in self._choices)
        return num_chars * JSON_BYTES_PER_CHAR > RECORD_BYTES_MAX - FRAME_BYTES


def failure(
    record: Record,
    error: Refused,
    worker: str,
    *,
    bill: Bill | None = None,
    timing: Timing | None = None,
    handovers: int = 0,
) -> Completion:
    """The answer to a record that gets no completion. `bill` is what was spent on it: its price is zero."""
    place = input_of(record)
    return Completion(
        id=place_id(place),
        custom_id=error.custom_id,
        tenant=error.tenant,
        response=None,
        error=Failed(code=error.code, message=error.message),
        input=place,
        worker=worker,
        bill=bill,
        timing=timing,
        handovers=handovers,
    )


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 3)
