"""Between what is known of a half done request here and what is carried of it: the handoff's two ends.

Owns how a handoff is read: the request's own record, the tokens as events to be heard again, the progress for the
engine. Pure. When a request is handed over is `generations.py`'s to say, what else is sent `outbound.py`'s.
"""

from collections.abc import Iterator

from engine.types import Finished, FinishReason, Logprob, Progress, Token, Usage
from schemas.handoff import CarriedChoice, CarriedLogprob, CarriedUsage, Handoff
from worker.brokers.base import Place, Record


def origin(handoff: Handoff) -> Record:
    """The record that the request was asked with, as it was."""
    place = handoff.input
    return Record(
        place=Place(place.topic, place.partition),
        offset=place.offset,
        key=handoff.key,
        value=handoff.value,
        headers=tuple(handoff.headers),
        timestamp_ms=handoff.timestamp_ms,
    )


def usage_of(usage: Usage) -> CarriedUsage:
    """The counts that the next engine goes on from. That of its tokens follows from them."""
    return CarriedUsage(
        num_prompt=usage.num_prompt,
        num_cached=usage.num_cached,
        num_drafted=usage.num_drafted,
        num_accepted=usage.num_accepted,
        num_recomputed=usage.num_recomputed,
        num_preemptions=usage.num_preemptions,
    )


def progress(choice: CarriedChoice) -> Progress:
    """How far the choice has come, for the engine. One without a token begins anew, and counts anew."""
    num_prompt = choice.usage.num_prompt
    usage = _usage(choice) if choice.tokens else Usage(num_prompt=num_prompt, num_cached=0, num_output=0)
    return Progress(tokens=tuple(choice.tokens), usage=usage, is_over=choice.finish_reason is not None)


def tokens(choice: CarriedChoice, request: int, number: int) -> Iterator[Token]:
    """The events that have brought the choice so far, under the engine's new handle."""
    for index, token in enumerate(choice.tokens):
        own, top = logprobs(token, choice.logprobs[index]) if choice.logprobs else (None, ())
        yield Token(
            request=request,
            choice=number,
            index=index,
            token=token,
            logprob=own,
            top_logprobs=top,
        )


def logprobs(token: int, carried: CarriedLogprob) -> tuple[Logprob, tuple[Logprob, ...]]:
    """The token's own, and those of the likeliest in its place."""
    return Logprob(token, carried.logprob), tuple(Logprob(*one) for one in carried.top)


def end(choice: CarriedChoice, request: int, number: int) -> Finished | None:
    """The event that has ended the choice, if it is over."""
    if choice.finish_reason is None:
        return None
    return Finished(request=request, choice=number, reason=FinishReason(choice.finish_reason), usage=_usage(choice))


def _usage(choice: CarriedChoice) -> Usage:
    usage = choice.usage
    return Usage(
        num_prompt=usage.num_prompt,
        num_cached=usage.num_cached,
        num_output=len(choice.tokens),
        num_drafted=usage.num_drafted,
        num_accepted=usage.num_accepted,
        num_recomputed=usage.num_recomputed,
        num_preemptions=usage.num_preemptions,
    )
