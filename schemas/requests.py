"""Requests as producers write them: an OpenAI batch line, plus our control fields.

Owns the shape and the limits that a decoder can check by itself. Never decides what a model can do: that is
`worker/intake.py`. A field that we would have to ignore silently is no field here: unknown names are refused, because a
parameter that is dropped gives a wrong answer, and a wrong answer is worse than an error.

Source of the names: OpenAI's chat, completion and batch references; `min_p`, `top_k`, `min_tokens`, `ignore_eos`
follow vLLM, and so does `repetition_penalty`.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

NAME_CHARS_MAX = 512  # OpenAI's own limit for custom_id is 512
TEXT_CHARS_MAX = 4_000_000  # four characters a token, a million tokens: above every context length in use
MESSAGES_MAX = 4096
STOPS_MAX = 16  # OpenAI allows 4; each stop is searched in every token's text
CHOICES_MAX = 128  # OpenAI's limit for n
TOP_LOGPROBS_MAX = 20  # OpenAI's limit
TOKENS_MAX = 1_048_576  # longest context of any model in use
METADATA_MAX = 64
BIASES_MAX = 300  # OpenAI's limit
SCHEMA_LEVELS_MAX = 64  # of objects and arrays; OpenAI takes 10 levels of objects, llguidance 128 of both
PATTERN_CHARS_MAX = 4096  # a regular expression that nobody could read is longer
CHOICES_IN_FORMAT_MAX = 1000  # OpenAI's limit for the values of all enums in a schema

# Names travel in headers, logs and terminals: no control characters (CloudEvents forbids them too). In Python's dialect
# `$` alone would let a line break at the end pass; the look-ahead closes that gap and does no harm in JavaScript's.
NO_CONTROLS = r"^[^\u0000-\u001f\u007f-\u009f]+$(?!\n)"

Name = Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX, pattern=NO_CONTROLS)]
Text = Annotated[str, Meta(max_length=TEXT_CHARS_MAX)]
Stop = Annotated[str, Meta(min_length=1, max_length=256)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenCount = Annotated[int, Meta(ge=1, le=TOKENS_MAX)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]  # OpenAI's range
Bias = Annotated[float, Meta(ge=-100, le=100)]  # OpenAI's range
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Dollars = Annotated[
    str, Meta(pattern=r"^[0-9]{1,9}(\.[0-9]{1,12})?$(?!\n)", description="US dollars, to the picodollar")
]
Tier = Literal["realtime", "batch"]


class TextPart(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """One piece of a message's content. Text is the only kind: nothing is ever fetched for a request."""

    text: Text


class Message(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Meta(min_length=1, max_length=MESSAGES_MAX)]
    name: Name | None = None


class StreamOptions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the live topic carries beside the chunks of text."""

    include_usage: bool = False


class AnyText(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """An answer of any form."""


class JsonObject(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """An answer that is a JSON object."""


class NamedSchema(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A JSON Schema as OpenAI wraps it. It is always kept to: `strict` may say so, and changes nothing."""

    name: Name
    schema: dict[str, Any]
    description: Text | None = None
    strict: bool | None = None


class JsonSchema(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    """An answer that is JSON by this schema."""

    json_schema: NamedSchema


class Regex(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="regex"):
    """An answer that a regular expression matches from end to end."""

    pattern: Annotated[str, Meta(min_length=1, max_length=PATTERN_CHARS_MAX)]


class OneOf(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="choice"):
    """An answer that is one of these."""

    choices: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=NAME_CHARS_MAX)]],
        Meta(min_length=1, max_length=CHOICES_IN_FORMAT_MAX),
    ]


Grammatical = JsonObject | JsonSchema | Regex | OneOf  # formats that forbid tokens
ResponseFormat = AnyText | Grammatical


class SamplingFields(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both request bodies share. Defaults are OpenAI's."""

    model: Name
    max_tokens: TokenCount | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=TOKENS_MAX)] = 0
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=TOKENS_MAX)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.1, le=10)] = 1.0  # in use: 1.0 to 1.5
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=BIASES_MAX)] | None = None
    n: Annotated[int, Meta(ge=1, le=CHOICES_MAX)] = 1
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=STOPS_MAX)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=STOPS_MAX)] = []
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Name | None = None
    metadata: Annotated[dict[Name, Text], Meta(max_length=METADATA_MAX)] | None = None


class ChatBody(SamplingFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of OpenAI's chat completion, as far as a text model can honour it."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MESSAGES_MAX)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=TOP_LOGPROBS_MAX)] = 0


class TextBody(SamplingFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of OpenAI's text completion: one prompt, as text or as token ids."""

    prompt: Text | Annotated[list[TokenId], Meta(min_length=1, max_length=TOKENS_MAX)]
    logprobs: Annotated[int, Meta(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    echo: bool = False
    best_of: Annotated[int, Meta(ge=1, le=CHOICES_MAX)] | None = None


class Generate(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="url"):
    """One request: a line of an OpenAI batch file, plus control fields. The url chooses the body."""

    custom_id: Name
    method: Literal["POST"] = "POST"
    tenant: Name = "default"
    tier: Tier | None = None  # None: as the topic says
    deadline: Annotated[float, Meta(ge=0, le=1e11)] | None = None  # seconds since 1970, as OpenAI's created
    max_cost: Dollars | None = None  # the price that the caller will not exceed


class Chat(Generate, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="/v1/chat/completions"):
    """A chat."""

    body: ChatBody


class Complete(Generate, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="/v1/completions"):
    """A text to go on from."""

    body: TextBody


AnyGenerate = Chat | Complete
