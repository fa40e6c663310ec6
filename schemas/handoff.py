"""Handoffs: a request that is half done, from the worker that leaves to whichever goes on with it.

Owns the shape of what is carried: the request's own record, byte for byte, and how far each choice has come. Workers
alone write and read it. The text, the random numbers and the cache are not in it: they follow from the tokens.
"""

from typing import Annotated

from msgspec import Meta, Struct

from schemas.requests import CHOICES_MAX, TOKENS_MAX, Dollars, Name, Tier, TokenId
from schemas.results import FinishReason, Input

Count = Annotated[int, Meta(ge=0, le=2**53)]  # what JSON readers of every language can hold


class CarriedLogprob(Struct, frozen=True, array_like=True):
    """A token's logarithmic probability, and the likeliest tokens of its position with theirs."""

    logprob: float
    top: list[tuple[TokenId, float]]


class CarriedUsage(Struct, frozen=True, kw_only=True):
    """One choice's counts so far, in tokens, as the engines kept them."""

    num_prompt: Count
    num_cached: Count
    num_drafted: Count
    num_accepted: Count
    num_recomputed: Count
    num_preemptions: Count


class CarriedChoice(Struct, frozen=True, kw_only=True):
    """How far one of the request's choices has come. With a `finish_reason` it is over."""

    tokens: Annotated[list[TokenId], Meta(max_length=TOKENS_MAX)]
    logprobs: list[CarriedLogprob] | None  # one a token, where the request asks for them
    usage: CarriedUsage
    finish_reason: FinishReason | None
    num_chunks: Count  # previews sent: the next one has this number


class Handoff(Struct, frozen=True, kw_only=True):
    """The rest of a request. It is committed together with the request's own offset, and takes its place.

    `key`, `value`, `headers` and `timestamp_ms` are those of the request's record, `input` says where that was.
    """

    input: Input
    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes | None]]
    timestamp_ms: int
    tier: Tier
    admitted_s: float  # when the first worker took it on, in seconds since 1970
    first_token_s: float  # when its first token was there
    handovers: Annotated[int, Meta(ge=1, le=2**31 - 1)]  # this one included
    spent: Dollars  # the cost of all work on it so far, in cost events of its own
    worker: Name  # which hands it over
    choices: Annotated[list[CarriedChoice], Meta(min_length=1, max_length=CHOICES_MAX)]
    prompt_logprobs: list[CarriedLogprob] | None = None  # of its second token and all after, where they are asked for
