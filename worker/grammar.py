"""What an answer must look like: from a request's `response_format` to a grammar that the engine can follow.

Owns the limits on both, and the only use of llguidance, which compiles grammars and says which tokens they allow
(https://github.com/guidance-ai/llguidance). Nothing is cached: a grammar grows with the tokens that it has seen, up to
a limit, and one that several requests share would let one of them end the others.
"""

import asyncio
import re
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.constraint import ConstraintFailed
from schemas.requests import Grammatical, JsonObject, JsonSchema, OneOf, Regex
from schemas.results import ErrorCode
from worker.errors import RequestError
from worker.text import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # a name of its stubs alone

# A schema as JSON, or all choices together. As many again as OpenAI allows for all names in a schema (15,000); the
# worst that fits, 1,300 optional properties, is compiled in 0.3 s.
SOURCE_CHARS_MAX = 32 << 10

# Of compiling one grammar, with its first mask: ten times the worst that was found within the limits. The thread cannot
# be stopped; it goes on to the limits below, and its result is dropped.
COMPILE_S_MAX = 5.0

# What one grammar may cost on the engine's thread and in memory. Ordinary schemas use a tenth. The rates are the
# library's own documentation; a mask takes 10 to 100 us as a rule, and 10 ms in the worst case that was found.
LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,  # 50,000 a millisecond: 10 ms
    step_lexer_fuel=50_000,  # 14,000 a millisecond: 4 ms a mask
    step_max_items=20_000,  # 20,000 a millisecond: 1 ms a mask
    max_items_in_row=6_000,  # 1,300 optional properties have 5,200
    max_lexer_states=20_000,  # 1 to 2 kB each: 40 MB a request
    max_grammar_size=50_000,  # symbols: 1,300 properties have 10,000
    verbose_errors=False,  # they would quote the schema
)

# A model may put white space between JSON's tokens, but not without end, as small models do when they are at a loss.
# The schema's own `x-guidance` must not change what a keyword means.
JSON_OPTIONS: "JsonCompileOptions" = {"whitespace_pattern": r"[ \n\t]{1,24}", "lenient": False, "coerce_one_of": False}

# Those that people meet, of the library's own texts.
_REGEX_ERRORS = (
    "unclosed group|unopened group|unclosed character class|unrecognized escape sequence"
    "|repetition operator missing expression|backreferences are not supported"
    "|look-around, including look-ahead and look-behind, is not supported"
)

# What the library says, and what may be said of it: its words quote the schema, and errors are published and logged.
_REASONS = (
    (r"^Unimplemented keys: (\[(?:\"[A-Za-z$]{1,32}\"(?:, )?)+\])", "these keywords are not supported: {}"),
    (r"Invalid type|Unknown format", "a type or format is unknown"),
    (r"Unsatisfiable schema|NoExtension", "nothing can satisfy it"),
    (r"oneOf", "alternatives of oneOf that may hold together are not supported"),
    (r"recursion limit", "it is nested too deeply"),
    (r"Resource|[Pp]ointer|\$ref", "a $ref leads to nothing within it"),
    (r"too many|limit|too large|too big|[Ff]uel|exceed", "it is too complex"),
    (rf"(?m)^error: ({_REGEX_ERRORS})$", "a regular expression is not supported: {}"),
    (r"invalid regex|regex parse error", "a regular expression is not supported"),
)


def source_of(response_format: Grammatical) -> str:
    """The grammar as the library's own text: plain data. Raises RequestError if the format is too large."""
    match response_format:
        case JsonObject():
            return _of_schema({"type": "object"})
        case JsonSchema(json_schema=named):
            return _of_schema(named.schema)
        case Regex(pattern=pattern):
            return LLMatcher.grammar_from_regex(pattern)
        case OneOf(choices=choices):
            _check_size(sum(map(len, choices)))
            # A terminal, in capitals, is one state machine, however many the choices are.
            return LLMatcher.grammar_from_lark("start: ONE\nONE: " + " | ".join(map(_quoted, choices)))


def _of_schema(schema: dict[str, Any]) -> str:
    try:
        text = msgspec.json.encode(schema).decode()
    except TypeError:  # of keys that MessagePack alone knows
        raise _invalid("the schema holds what JSON cannot say") from None
    _check_size(len(text))
    try:
        return LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
    except ValueError as error:
        raise _invalid(_reason(str(error))) from None


def _check_size(num_chars: int) -> None:
    if num_chars > SOURCE_CHARS_MAX:
        raise _invalid(f"it has {num_chars} characters; at most {SOURCE_CHARS_MAX} are read")


def _quoted(text: str) -> str:
    return msgspec.json.encode(text).decode().replace("\x7f", "\\u007f")  # JSON need not escape it, a grammar must


class Grammars:
    """Compiles grammars for one model."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids

    async def compile(self, source: str) -> "Grammar":
        """The grammar, compiled on another thread. Raises RequestError where that cannot be done, or not in time."""
        try:
            async with asyncio.timeout(COMPILE_S_MAX):
                return await asyncio.to_thread(self._compile, source)
        except TimeoutError:
            raise _invalid(f"it takes longer than {COMPILE_S_MAX:.0f} s to compile") from None

    def _compile(self, source: str) -> "Grammar":
        matcher = LLMatcher(self._library_tokenizer, source, limits=LIMITS, log_level=0)
        matcher.compute_bitmask()  # what leads nowhere shows here, and the dearest mask is made here
        if matcher.is_error():
            raise _invalid(_reason(matcher.get_error()))
        return Grammar(matcher)

    @cached_property
    def _library_tokenizer(self) -> LLTokenizer:
        """Made when the first request needs it: it takes 0.2 s for 49,152 tokens."""
        vocabulary = _Vocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids)
        made = LLTokenizer(vocabulary, n_vocab=self._vocab_size, eos_token=list(self._eos_token_ids))  # type: ignore[arg-type]
        vocabulary.longest_first = made.greedy_tokenize
        return made


class Grammar:
    """One request's grammar: an `engine.constraint.Constraint`."""

    def __init__(self, beginning: LLMatcher) -> None:
        self._beginning = beginning

    def start(self) -> "Matcher":
        """A matcher that stands at the beginning of an answer."""
        return Matcher(self._beginning.deep_copy())


class Matcher:
    """One choice's place in its grammar: an `engine.constraint.Matcher`, which says what each call promises."""

    def __init__(self, inner: LLMatcher) -> None:
        self._inner = inner

    def mask(self) -> bytes:  # noqa: D102
        mask = self._inner.compute_bitmask()
        if self._inner.is_error():  # then the mask allows an end, which would be none
            raise ConstraintFailed(f"response_format: {_reason(self._inner.get_error())}")
        return mask

    def advance(self, token: int) -> bool:  # noqa: D102
        return self._inner.consume_token(token) and self._inner.is_stopped()

    def rewind(self, num_tokens: int) -> None:  # noqa: D102
        self._inner.rollback(num_tokens)

    def num_allowed(self, tokens: list[int]) -> int:  # noqa: D102
        return self._inner.validate_tokens(tokens)


class _Vocabulary:
    """Our tokenizer as the library asks for it, so that both mean the same bytes by a token."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.is_tokenizer_wrapper = True
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_token_ids)
        self.eos_token_id = eos_token_ids[0]
        self.bos_token_id = None
        self.longest_first: Callable[[str], list[int]] = tokenizer.encode_piece
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that nothing else can stand for: what the model would have written by itself."""
        tokens = self._tokenizer.encode_piece(text)
        if b"".join(map(self._tokenizer.text_bytes, tokens)) == text.encode():
            return tokens
        return self.longest_first(text)  # SentencePiece puts a space before; a control token's name is no text


def _reason(error: str) -> str:
    for pattern, reason in _REASONS:
        if found := re.search(pattern, error):
            return reason.format(*found.groups())
    return "it cannot be followed"


def _invalid(message: str) -> RequestError:
    return RequestError(ErrorCode.INVALID_REQUEST, f"response_format: {message}")
