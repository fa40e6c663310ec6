"""From a record to what the engine is asked, or the failure that the record deserves.

Owns every rule about what a request may ask of this model: nothing that reaches the engine can hurt it. Reads bytes
through `schemas/codec.py` and text through `worker/text.py`; knows neither the broker nor the tensors, and keeps
nothing between two requests.
"""

import hashlib
import time
from collections.abc import Callable, Collection, Sequence

from msgspec import Struct, structs

from engine.config import check_request
from engine.errors import RequestRefused
from engine.types import Capacity, Request, Sampling
from schemas.codec import Malformed, WireLimits, decode_handoff, decode_request
from schemas.cost import dollars, picodollars
from schemas.handoff import CarriedChoice, Handoff
from schemas.requests import AnyGenerate, AnyText, Chat, ChatBody, TextBody, Tier
from schemas.results import ErrorCode, Input
from worker.brokers.base import Record
from worker.config import Limits
from worker.errors import RequestError
from worker.grammar import source_of
from worker.handoff import origin, progress
from worker.text import StopString, Tokenizer

PriceCeiling = Callable[[int, int, str, str], int]  # prompt tokens, output tokens, tier, model -> picodollars

PRIORITIES: dict[Tier, int] = {"realtime": 0, "batch": 1}
PRIORITY_HANDED_OVER = -1  # ahead of fresh work of any tier: it has had its turn

# Below this, sampling and taking the likeliest differ in nothing but rounding: a lead of 0.1 is already odds of e**10.
# And logits divided by 1e-300 are infinite.
TEMPERATURE_MIN = 0.01

# What one token adds to a completion, at most in practice: its text, and for each logprob its name, bytes and number.
TEXT_BYTES_PER_TOKEN = 8
LOGPROB_BYTES = 120

# Of one record sent. Unless a topic allows more, Kafka refuses a batch above 1,048,588 bytes, and a record that can
# never be sent would stop its partition for ever. What is between the two is for the frame and our headers.
RECORD_BYTES_MAX = 1_000_000

KEY_BYTES_MAX = 4096  # the request's key is repeated on its completion and on each of its cost events


class Refused(RequestError):
    """A RequestError that knows whose request it was, as far as it could be read."""

    def __init__(self, code: str, message: str, custom_id: str | None = None, tenant: str | None = None) -> None:
        super().__init__(code, message)
        self.custom_id = custom_id
        self.tenant = tenant


class Admitted(Struct, frozen=True, kw_only=True):
    """A request that the engine can take, and all that its answer will need."""

    record: Record
    generate: AnyGenerate
    request: Request
    tier: Tier
    stops: tuple[StopString, ...]  # the engine knows stop tokens only
    grammar: str | None  # what the answer must follow: to be compiled before the engine has the request
    tokens_reserved: int  # places of the cache that it may come to need
    admitted_s: float  # seconds since 1970, as `deadline`; by the first worker that did
    received_s: float  # the same by this worker
    handoff: Handoff | None = None  # where another worker has begun it

    @property
    def carried(self) -> Sequence[CarriedChoice]:
        """How far each choice had come when it was handed over; empty where none is gone on with."""
        return self.handoff.choices if self.handoff and self.request.progress else ()

    @property
    def handovers(self) -> int:
        """How often it was handed over."""
        return self.handoff.handovers if self.handoff else 0

    @property
    def spent(self) -> int:
        """What other workers' work on it has cost, in picodollars; in cost events of its own."""
        return picodollars(self.handoff.spent) if self.handoff else 0

    @property
    def input(self) -> Input:
        """The record that the answer names."""
        return input_of(self.record)

    @property
    def deadline(self) -> float | None:
        """When the answer is worth nothing any more, in seconds since 1970."""
        return self.generate.deadline


class Intake:
    """Admits records for one model. Called from one thread; a call takes milliseconds and never waits."""

    def __init__(
        self,
        *,
        models: Collection[str],
        tokenizer: Tokenizer,
        capacity: Capacity,
        limits: Limits,
        price_ceiling: PriceCeiling,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._models = frozenset(models)
        self._tokenizer = tokenizer
        self._capacity = capacity
        self._limits = limits
        self._wire = WireLimits(value_bytes_max=limits.record_bytes_max)
        self._price_ceiling = price_ceiling
        self._clock = clock
        self.eos_token_ids = tuple(sorted(tokenizer.eos_token_ids.union(capacity.eos_token_ids)))

    def admit(self, record: Record, topic_tier: Tier, id: int) -> Admitted:
        """The request in this record, ready for the engine under the handle `id`. Raises Refused, and nothing else."""
        if record.key is not None and len(record.key) > KEY_BYTES_MAX:
            raise Refused(ErrorCode.INVALID_REQUEST, f"the record's key is longer than {KEY_BYTES_MAX} bytes")
        try:
            generate = decode_request(record.value, record.headers, self._wire)
        except Malformed as error:
            raise Refused(ErrorCode.INVALID_REQUEST, str(error), error.custom_id) from error
        try:
            return self._admit(record, generate, topic_tier, id)
        except RequestError as error:
            raise Refused(error.code, error.message, generate.custom_id, generate.tenant) from error

    def handoff(self, record: Record) -> Handoff:
        """What is left of a request that another worker has begun. Raises Refused, and nothing else."""
        try:
            return decode_handoff(record.value, record.headers)
        except Malformed as error:
            raise Refused(ErrorCode.INVALID_REQUEST, str(error)) from error

    def resume(self, handoff: Handoff, id: int) -> Admitted:
        """The request, ready to be gone on with: all that `admit` checks holds. Raises Refused, and nothing else.

        Progress that is not this model's is left aside: the request itself is there, and begins anew.
        """
        admitted = self.admit(origin(handoff), handoff.tier, id)
        fresh = structs.replace(admitted.request, priority=PRIORITY_HANDED_OVER)
        begun = structs.replace(fresh, progress=tuple(map(progress, handoff.choices)))
        request = begun if self._fits(begun, handoff) else fresh
        return structs.replace(admitted, request=request, handoff=handoff, admitted_s=handoff.admitted_s)

    def poisoned(self, record: Record, num_deaths: int) -> Refused:
        """The refusal of a record that has killed its workers. It is decoded, for its names, and nothing more."""
        message = f"{num_deaths} workers have died while they worked on this request, the last one on it alone"
        try:
            generate = decode_request(record.value, record.headers, self._wire)
        except Malformed as error:
            return Refused(ErrorCode.POISONED, message, error.custom_id)
        return Refused(ErrorCode.POISONED, message, generate.custom_id, generate.tenant)

    def _admit(self, record: Record, generate: AnyGenerate, topic_tier: Tier, id: int) -> Admitted:
        now_s = self._clock()
        tier = generate.tier or topic_tier  # whoever waits in the realtime lane may still ask for the batch price
        self._check(generate, now_s)
        prompt = self._prompt(generate)
        tokens_max = self._tokens_max(generate, len(prompt))
        self._check_price(generate, len(prompt), tokens_max, tier)
        stop = generate.body.stop or []
        return Admitted(
            record=record,
            generate=generate,
            request=Request(
                id=id,
                prompt=prompt,
                sampling=self._sampling(record, generate, tokens_max),
                priority=PRIORITIES[tier],
                cache_salt=generate.tenant,  # a tenant must not learn by timing what another has asked
            ),
            tier=tier,
            grammar=self._grammar(generate),
            stops=tuple(StopString(text) for text in ([stop] if isinstance(stop, str) else stop)),
            # Never more than there is: choices beyond the cache's room run one after the other.
            tokens_reserved=min((len(prompt) + tokens_max) * generate.body.n, self._capacity.cache_tokens),
            admitted_s=now_s,
            received_s=now_s,
        )

    def _fits(self, begun: Request, handoff: Handoff) -> bool:
        """Whether the tokens that were carried can have come of this model and this request."""
        wants_logprobs = begun.sampling.num_logprobs is not None
        num_scored = 0 if begun.sampling.num_prompt_logprobs is None else len(begun.prompt) - 1
        # The choice that scores the prompt has a token once that is done; without one it would score it again.
        if len(handoff.prompt_logprobs or ()) != num_scored or (num_scored and not handoff.choices[0].tokens):
            return False
        try:
            check_request(begun, self._capacity)
        except RequestRefused:
            return False
        return all(
            choice.usage.num_prompt == len(begun.prompt)
            and (len(choice.logprobs) == len(choice.tokens) if choice.logprobs is not None else not wants_logprobs)
            for choice in handoff.choices
        )

    def _check(self, generate: AnyGenerate, now_s: float) -> None:
        """What can be refused without reading the prompt, so that a bad request costs little."""
        body = generate.body
        if body.model not in self._models:
            raise RequestError(ErrorCode.MODEL_NOT_FOUND, f"these workers serve {', '.join(sorted(self._models))}")
        if generate.deadline is not None and generate.deadline <= now_s:
            raise RequestError(ErrorCode.DEADLINE_EXCEEDED, "the deadline had passed when the request was taken on")
        if body.n > self._limits.choices_max:
            raise invalid(f"n is {body.n}; at most {self._limits.choices_max} choices are given")
        if any(token >= self._capacity.vocab_size for token in body.stop_token_ids):
            raise invalid(f"stop_token_ids: the model's tokens go up to {self._capacity.vocab_size - 1}")
        if any(token >= self._capacity.vocab_size for token in body.logit_bias or ()):
            raise invalid(f"logit_bias: the model's tokens go up to {self._capacity.vocab_size - 1}")
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options is there for stream: true alone")
        _check_body(body)

    def _prompt(self, generate: AnyGenerate) -> tuple[int, ...]:
        room = self._room - 1  # a place for the first token of the answer
        if isinstance(generate, Chat):
            tokens = self._tokenizer.encode_chat(generate.body.messages, room)
        elif isinstance(generate.body.prompt, str):
            tokens = self._tokenizer.encode(generate.body.prompt, room) if generate.body.prompt else ()
        else:
            tokens = tuple(generate.body.prompt)
            if max(tokens) >= self._capacity.vocab_size:
                raise invalid(f"prompt: the model's tokens go up to {self._capacity.vocab_size - 1}")
        if not tokens:
            raise invalid("the prompt is empty")
        if len(tokens) > room:
            raise too_long(f"the prompt is {len(tokens)} tokens long; there is room for {room}")
        return tokens

    def _tokens_max(self, generate: AnyGenerate, num_prompt: int) -> int:
        """How long each answer may become: as asked, or the default as far as the context goes."""
        body = generate.body
        asked = (body.max_completion_tokens if isinstance(body, ChatBody) else None) or body.max_tokens
        room = self._room - num_prompt
        tokens_max = asked or min(self._limits.output_tokens_default, room)
        if tokens_max > room:
            raise too_long(f"{num_prompt} tokens of prompt and {tokens_max} of answer; there is room for {self._room}")
        if tokens_max > self._limits.output_tokens_max:
            raise invalid(f"max_tokens is {tokens_max}; at most {self._limits.output_tokens_max} are given")
        if body.min_tokens > tokens_max:
            raise invalid(f"min_tokens is {body.min_tokens}, and the answer ends after {tokens_max}")
        self._check_size(generate, tokens_max + (num_prompt if _echoes(generate) else 0))
        return tokens_max

    def _check_size(self, generate: AnyGenerate, num_tokens: int) -> None:
        """The answer fits into a record: better refused now than thrown away when it is paid for."""
        wanted = _num_logprobs(generate)
        per_token = TEXT_BYTES_PER_TOKEN + (0 if wanted is None else LOGPROB_BYTES * (1 + wanted))
        if (size := num_tokens * generate.body.n * per_token) > RECORD_BYTES_MAX:
            raise invalid(
                f"the answer may take {size} bytes, and a record holds {RECORD_BYTES_MAX}: "
                "ask for fewer tokens, choices or logprobs"
            )

    def _check_price(self, generate: AnyGenerate, num_prompt: int, tokens_max: int, tier: Tier) -> None:
        if generate.max_cost is None:
            return
        ceiling = self._price_ceiling(num_prompt, tokens_max * generate.body.n, tier, generate.body.model)
        if ceiling > picodollars(generate.max_cost):
            raise RequestError(
                ErrorCode.BUDGET_EXCEEDED,
                f"the answer may cost {dollars(ceiling)} dollars: raise max_cost, or lower max_tokens or n",
            )

    def _sampling(self, record: Record, generate: AnyGenerate, tokens_max: int) -> Sampling:
        body = generate.body
        return Sampling(
            tokens_max=tokens_max,
            tokens_min=body.min_tokens,
            temperature=body.temperature if body.temperature >= TEMPERATURE_MIN else 0.0,
            top_k=body.top_k if body.top_k < self._capacity.vocab_size else 0,
            top_p=body.top_p,
            min_p=body.min_p,
            frequency_penalty=body.frequency_penalty,
            presence_penalty=body.presence_penalty,
            repetition_penalty=body.repetition_penalty,
            logit_bias=tuple((body.logit_bias or {}).items()),
            seed=_seed(record) if body.seed is None else body.seed % 2**63,
            stop_token_ids=(*(() if body.ignore_eos else self.eos_token_ids), *body.stop_token_ids),
            num_logprobs=_num_logprobs(generate),
            num_prompt_logprobs=_num_logprobs(generate) if _echoes(generate) else None,
            num_choices=body.n,
        )

    def _grammar(self, generate: AnyGenerate) -> str | None:
        response_format = generate.body.response_format
        if response_format is None or isinstance(response_format, AnyText):
            return None
        if generate.body.ignore_eos:
            raise invalid("ignore_eos and response_format contradict each other: a format says where an answer ends")
        if not self.eos_token_ids:
            raise invalid("response_format: this model has no token to end an answer with")
        return source_of(response_format)

    @property
    def _room(self) -> int:
        """Tokens of prompt and answer that one sequence can have."""
        return min(self._capacity.context_max, self._capacity.cache_tokens)


def input_of(record: Record) -> Input:
    """The record's name in results."""
    return Input(topic=record.place.topic, partition=record.place.partition, offset=record.offset)


def invalid(message: str) -> RequestError:
    """The request asks for what no retry can give."""
    return RequestError(ErrorCode.INVALID_REQUEST, message)


def too_long(message: str) -> RequestError:
    """Prompt and answer do not fit."""
    return RequestError(ErrorCode.CONTEXT_EXCEEDED, message)


def _check_body(body: ChatBody | TextBody) -> None:
    """What one kind of body alone can ask for, and what of it contradicts itself."""
    if isinstance(body, TextBody) and body.best_of not in (None, body.n):
        raise invalid("best_of is not there yet, it will come with group requests: ask for n, and choose among them")
    if isinstance(body, ChatBody):
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs is there for logprobs: true alone")
        if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
            raise invalid("max_tokens and max_completion_tokens are two names of one limit; give one")


def _num_logprobs(generate: AnyGenerate) -> int | None:
    """None: no logprobs; 0: the chosen token's alone."""
    if isinstance(generate, Chat):
        return generate.body.top_logprobs if generate.body.logprobs else None
    return generate.body.logprobs


def _echoes(generate: AnyGenerate) -> bool:
    """Whether the prompt comes before the answer."""
    return isinstance(generate.body, TextBody) and generate.body.echo


def _seed(record: Record) -> int:
    """A seed that belongs to the record: whoever computes it again, after a crash, draws the same tokens."""
    name = f"{record.place.topic}\0{record.place.partition}\0{record.offset}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1
