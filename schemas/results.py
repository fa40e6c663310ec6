"""Results as consumers read them: an OpenAI batch output line, plus what an event-driven reader needs.

Owns the shape of completions, failures and chunks. A result always names the record that it answers (`input`), so that
a reader can prove that each was answered once.
"""

from typing import Literal

from msgspec import Struct

FinishReason = Literal["stop", "length"]


class ErrorCode:
    """Why a request was not completed. Codes of the llm-d queue convention, where it has one."""

    INVALID_REQUEST = "INVALID_REQUEST"  # the record cannot be understood, or asks for what no retry can give
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"  # this group of workers serves another model
    CONTEXT_EXCEEDED = "CONTEXT_EXCEEDED"  # prompt plus output cannot fit the model or the cache
    BUDGET_EXCEEDED = "BUDGET_EXCEEDED"  # max_cost is below what the answer may cost
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    INFERENCE_ERROR = "INFERENCE_ERROR"  # the engine failed on this request alone
    POISONED = "POISONED"  # workers died of it, again and again
    RESULT_TOO_LARGE = "RESULT_TOO_LARGE"  # the answer does not fit into one record


class Input(Struct, frozen=True, kw_only=True):
    """The record that a result answers."""

    topic: str
    partition: int
    offset: int


class TopLogprob(Struct, frozen=True, kw_only=True):
    """One of the likeliest tokens at a position, natural logarithm."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct, frozen=True, kw_only=True):
    """A chosen token with its logarithmic probability and the likeliest alternatives."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True, kw_only=True):
    """OpenAI's chat form of logprobs."""

    content: list[TokenLogprob]


class TextLogprobs(Struct, frozen=True, kw_only=True):
    """OpenAI's text completion form of logprobs: parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]  # None: of an echoed prompt's first token, which follows nothing
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  # characters of `text` before each token


class AssistantMessage(Struct, frozen=True, kw_only=True):
    """What the model said."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(Struct, frozen=True, kw_only=True):
    """One of the n answers to a chat."""

    index: int
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None = None


class TextChoice(Struct, frozen=True, kw_only=True):
    """One of the n continuations of a text."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: TextLogprobs | None = None


class PromptTokensDetails(Struct, frozen=True, kw_only=True):
    """How many of the prompt's tokens came from the cache: a part of `prompt_tokens`, never beside it."""

    cached_tokens: int


class CompletionTokensDetails(Struct, frozen=True, kw_only=True):
    """Drafted tokens, kept and thrown away. Neither is billed beside `completion_tokens`."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Struct, frozen=True, kw_only=True):
    """Counts, in tokens, over all choices. The prompt counts once, as OpenAI counts it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class ChatResult(Struct, frozen=True, kw_only=True, tag_field="object", tag="chat.completion"):
    """OpenAI's chat.completion object (the tag is its `object` field)."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: str


class TextResult(Struct, frozen=True, kw_only=True, tag_field="object", tag="text_completion"):
    """OpenAI's text_completion object (the tag is its `object` field)."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    service_tier: str


class Response(Struct, frozen=True, kw_only=True):
    """The HTTP-shaped part of an OpenAI batch output line."""

    status_code: int
    request_id: str
    body: ChatResult | TextResult


class Bill(Struct, frozen=True, kw_only=True):
    """The sum of the request's cost events: dollars as decimal strings with 12 places."""

    price: str  # what the tenant owes
    cost: str  # what the device time behind it cost
    price_book: str
    currency: Literal["USD"] = "USD"


class Timing(Struct, frozen=True, kw_only=True):
    """Where the time went, in milliseconds; the names are vLLM's. Their sum is the time from record to answer."""

    queue_time_ms: float  # from the record's timestamp until the worker took it on
    time_to_first_token_ms: float  # from there to the first token of any choice
    generation_time_ms: float  # from there to the end of the last choice


class Failed(Struct, frozen=True, kw_only=True):
    """Why there is no completion. `message` says what to change and never quotes the prompt."""

    code: str
    message: str


class Completion(Struct, frozen=True, kw_only=True):
    """The one answer to a request: `response` on success, `error` on failure, never both."""

    id: str
    custom_id: str | None  # None: the record could not be read that far
    tenant: str | None
    response: Response | None
    error: Failed | None
    input: Input
    worker: str
    bill: Bill | None = None
    timing: Timing | None = None
    handovers: int = 0  # workers that began it and handed it over half done, before `worker` completed it


class Chunk(Struct, frozen=True, kw_only=True):
    """A streamed piece of text on the live topic: a preview, may be lost or repeated; the completion is the truth.

    `sequence` counts up from 0 within one choice; a reader that sees a number again drops what it had from there on,
    for another worker begins there. `usage` comes with the request's last chunk, where `stream_options.include_usage`
    asks for it.
    """

    id: str
    custom_id: str
    choice: int
    sequence: int
    text: str
    finish_reason: FinishReason | None
    input: Input
    worker: str
    usage: Usage | None = None
