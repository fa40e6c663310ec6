"""Formats become grammars: what they allow is what was asked for, and nothing that is asked for can cost much."""

import gc
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from llguidance import LLParserLimits

from engine.constraint import ConstraintFailed, Matcher
from schemas.requests import Grammatical, JsonObject, JsonSchema, NamedSchema, OneOf, Regex
from schemas.results import ErrorCode
from tests.tiny_tokenizer import save_byte_fallback, save_byte_level
from worker import grammar
from worker.errors import RequestError
from worker.grammar import SOURCE_CHARS_MAX, Grammar, Grammars, source_of
from worker.text import Tokenizer, load_tokenizer

VOCAB = 420  # more than either tokenizer has: models are padded
END = 1
LENGTH_MAX = 400

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mail": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 3, None]}, "minItems": 1, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "x": {"type": "number"}},
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
}
DATE = r"(19|20)[0-9]{2}-[01][0-9](-[0-3][0-9])?"
CITIES = ["Bern", "Berlin", "Zürich", 'a "quoted" one', "two\nlines", "back\\slash", "\x7f", "日本語 😀"]


def schema(content: dict[str, Any]) -> JsonSchema:
    return JsonSchema(json_schema=NamedSchema(name="answer", schema=content))


@pytest.fixture(scope="module", params=[save_byte_level, save_byte_fallback], ids=["byte level", "byte fallback"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    save: Callable[[Path], Path] = request.param
    return load_tokenizer(save(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def grammars(tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCAB, (END,))


async def compiled(grammars: Grammars, response_format: Grammatical) -> Grammar:
    return await grammars.compile(source_of(response_format))


async def refusal(grammars: Grammars, response_format: Grammatical) -> str:
    with pytest.raises(RequestError) as refused:
        await compiled(grammars, response_format)
    assert refused.value.code == ErrorCode.INVALID_REQUEST
    assert refused.value.message.startswith("response_format: ")
    return refused.value.message


def allowed(matcher: Matcher) -> list[int]:
    mask = matcher.mask()
    return [token for token in range(len(mask) * 8) if mask[token // 8] >> token % 8 & 1]


def written(matcher: Matcher, tokenizer: Tokenizer, seed: int) -> str | None:
    """What somebody writes who throws dice for each token; None: not at an end after LENGTH_MAX tokens."""
    dice, text = random.Random(seed), b""
    for _ in range(LENGTH_MAX):
        token = dice.choice(allowed(matcher))
        is_complete = matcher.advance(token)
        if token == END:
            return text.decode()
        text += tokenizer.text_bytes(token)
        if is_complete:
            return text.decode()
    return None


FORMATS: dict[str, tuple[Grammatical, Callable[[str], object]]] = {
    "object": (JsonObject(), lambda text: isinstance(json.loads(text), dict) or pytest.fail(text)),
    "schema": (schema(PERSON), lambda text: jsonschema.validate(json.loads(text), PERSON)),
    "regex": (Regex(pattern=DATE), lambda text: re.fullmatch(DATE, text) or pytest.fail(text)),
    "anchored regex": (Regex(pattern=f"^{DATE}$"), lambda text: re.fullmatch(DATE, text) or pytest.fail(text)),
    "choice": (OneOf(choices=CITIES), lambda text: text in CITIES or pytest.fail(text)),
}


@pytest.mark.parametrize("name", FORMATS)
async def test_whatever_is_chosen_of_what_is_allowed_an_answer_that_ends_is_of_its_format(grammars, tokenizer, name):
    response_format, judge = FORMATS[name]
    beginning = await compiled(grammars, response_format)
    written_ones = (written(beginning.start(), tokenizer, seed) for seed in range(40))
    texts = {text for text in written_ones if text is not None}
    for text in texts:
        judge(text)
    assert len(texts) >= 6


KEYWORDS: list[dict[str, Any]] = [
    {"type": "object", "minProperties": 2},
    {"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": False},
    {"allOf": [{"type": "integer"}, {"minimum": 3}, {"maximum": 1000}]},
    {"type": "integer", "multipleOf": 7, "exclusiveMinimum": -5, "exclusiveMaximum": 1e3},
    {"type": "number", "minimum": -0.5, "maximum": 2.25},
    {"const": {"a": [1, 2, None]}},
    {"type": ["string", "null"], "maxLength": 4},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"const": "x"}], "items": False},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    {"type": "string", "pattern": "^ab+c?$"},
    {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]},
    {"anyOf": [{"properties": {"k": {"const": 1}}, "required": ["k"], "type": "object"}, {"type": "boolean"}]},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
]


@pytest.mark.parametrize("content", KEYWORDS, ids=str)
async def test_each_keyword_that_is_not_refused_is_kept_to(grammars, tokenizer, content):
    beginning = await compiled(grammars, schema(content))
    texts = [text for seed in range(12) if (text := written(beginning.start(), tokenizer, seed)) is not None]
    assert texts
    for text in texts:
        jsonschema.validate(json.loads(text), content, format_checker=jsonschema.FormatChecker())


async def test_all_choices_can_be_chosen(grammars, tokenizer):
    beginning = await compiled(grammars, OneOf(choices=CITIES))
    for city in CITIES:
        matcher = beginning.start()
        for byte in city.encode():
            token = next(t for t in range(VOCAB) if tokenizer.token_bytes(t) == bytes([byte]))
            matcher.advance(token)
        matcher.mask()  # it raises where a token before was not allowed


async def test_matchers_of_one_grammar_do_not_notice_each_other(grammars):
    beginning = await compiled(grammars, OneOf(choices=["ab", "cd"]))
    first, second = beginning.start(), beginning.start()
    at_first = second.mask()
    first.advance(allowed(first)[0])
    assert second.mask() == at_first != first.mask()


async def test_what_is_rewound_has_not_come(grammars):
    matcher = (await compiled(grammars, Regex(pattern="[a-c]{4}"))).start()
    masks, tokens = [], []
    for _ in range(4):
        masks.append(matcher.mask())
        tokens.append(random.Random(1).choice(allowed(matcher)))
        is_complete = matcher.advance(tokens[-1])
        if is_complete:
            break
    assert is_complete
    for mask in reversed(masks):
        matcher.rewind(1)
        assert matcher.mask() == mask
    assert matcher.num_allowed(tokens) == len(tokens)
    assert matcher.num_allowed([*tokens, tokens[0]]) == len(tokens)
    assert matcher.mask() == masks[0]


async def test_a_token_that_was_not_allowed_shows_at_the_next_mask_and_for_ever(grammars):
    matcher = (await compiled(grammars, Regex(pattern="a+"))).start()
    assert not matcher.advance(END)
    for _ in range(2):
        with pytest.raises(ConstraintFailed, match="response_format"):
            matcher.mask()


async def test_tokens_beyond_the_tokenizer_are_never_allowed(grammars, tokenizer):
    names = len(tokenizer._bytes)
    matcher = (await compiled(grammars, Regex(pattern="(?s:.)*"))).start()
    assert allowed(matcher)
    assert max(allowed(matcher)) < names < VOCAB


async def test_a_control_token_is_not_allowed_for_its_name(grammars, tokenizer):
    """Text that spells one is made of other tokens: it must not steer the chat."""
    special = tokenizer.token_bytes(0).decode()
    matcher = (await compiled(grammars, Regex(pattern=re.escape(special) + "!"))).start()
    assert 0 not in allowed(matcher)
    assert written(matcher, tokenizer, seed=0) == special + "!"


async def test_white_space_between_jsons_tokens_ends(grammars, tokenizer):
    matcher = (await compiled(grammars, JsonObject())).start()
    spaces = {t for t in range(VOCAB) if tokenizer.token_bytes(t) in (b" ", b"\n", b"\t")}
    for _ in range(24 + 1):  # the brace, then as many as there may be
        matcher.advance((spaces & set(allowed(matcher)) or set(allowed(matcher))).pop())
    assert not spaces & set(allowed(matcher))


# ---------------------------------------------------------------------------------------------- what cannot be honoured


def nested(levels: int) -> dict[str, Any]:
    content: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        content = {"type": "object", "properties": {"a": content}}
    return content


@pytest.mark.parametrize(
    ("response_format", "why"),
    [
        (schema({"not": {"type": "string"}}), 'not supported: ["not"]'),
        (schema({"type": "object", "dependentRequired": {"a": ["SECRET"]}}), '["dependentRequired"]'),
        (schema({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "alternatives of oneOf"),
        (schema({"type": "SECRET"}), "a type or format is unknown"),
        (schema({"type": "string", "format": "SECRET"}), "a type or format is unknown"),
        (schema({"$ref": "#"}), "nothing can satisfy it"),
        (schema({"type": "string", "minLength": 5, "maxLength": 3}), "nothing can satisfy it"),
        (
            schema({"type": "object", "properties": {"SECRET": False}, "required": ["SECRET"]}),
            "nothing can satisfy it",
        ),
        (schema({"$ref": "http://169.254.169.254/SECRET"}), "a $ref leads to nothing within it"),
        (schema({"$ref": "#/$defs/SECRET"}), "a $ref leads to nothing within it"),
        (schema({"type": "string", "pattern": "(SECRET"}), "not supported: unclosed group"),
        (schema(nested(70)), "nested too deeply"),
        (schema({"type": "string", "not": {}, "x-guidance": {"lenient": True}}), '["not"]'),
        (Regex(pattern="(SECRET"), "unclosed group"),
        (Regex(pattern="error: SECRET\nerror: secret\n("), "unclosed group"),
        (Regex(pattern=r"\bSECRET\b"), "a regular expression is not supported"),
        (Regex(pattern="SECRET{5,2}"), "a regular expression is not supported"),
        (Regex(pattern="(?=SECRET)a"), "look-around"),
        (Regex(pattern=r"(SECRET)\1"), "backreferences are not supported"),
    ],
)
async def test_a_format_that_cannot_be_honoured_is_refused_with_the_reason_and_never_quoted(
    grammars, response_format, why
):
    message = await refusal(grammars, response_format)
    assert why in message
    assert "secret" not in message.lower()


@pytest.mark.parametrize(
    "response_format",
    [
        schema({"enum": ["x" * SOURCE_CHARS_MAX]}),
        OneOf(choices=["x" * 500] * 100),
        schema({"const": {(): 1}}),
        schema({"const": {None: 1}}),
        schema({"const": msgspec.msgpack.Ext(5, b"x")}),
    ],
)
def test_what_is_too_large_or_no_json_is_refused_before_it_is_compiled(response_format):
    with pytest.raises(RequestError, match="response_format"):
        source_of(response_format)


# --------------------------------------------------------------------------------------------- what others have died of

HOSTILE: dict[str, Grammatical] = {
    "catastrophic": Regex(pattern="(a+)+$"),
    "ambiguous": Regex(pattern="((a|aa|aaa)*b){50}"),
    "exponential states": Regex(pattern="(.*a){18}.{400}"),
    "counted thrice": Regex(pattern="((a{1,200}){1,200}){1,200}"),
    "long run": Regex(pattern="x{30000}"),
    "optional run": Regex(pattern="(a?){500}a{500}"),
    "unicode classes": Regex(pattern=r"(\p{L}\p{M}*){1,500}"),
    "dots": Regex(pattern="(.*){100}z"),
    "1,300 properties": schema({"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(1300)}}),
    "wide enum": schema({"enum": [f"{i:025}" for i in range(1000)]}),
    "huge counts": schema({"type": "array", "items": {"type": "string", "maxLength": 10**7}, "minItems": 10**6}),
    "recursion": schema({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 500}}}),
    "30 levels": schema(nested(30)),
    "1,000 choices": OneOf(choices=[f"choice {i}" for i in range(1000)]),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_no_format_takes_long_whether_it_is_compiled_or_refused(grammars, tokenizer, name):
    """Processor time: twenty times what each takes on a quiet machine, and no more than compiling may take at all."""
    start_s = time.process_time()
    try:
        matcher = (await compiled(grammars, HOSTILE[name])).start()
    except RequestError:
        assert time.process_time() - start_s < COMPILED_S
        return
    assert time.process_time() - start_s < COMPILED_S
    start_s, dice = time.process_time(), random.Random(0)
    try:
        for _ in range(30):
            if matcher.advance(dice.choice(allowed(matcher))):
                break
    except ConstraintFailed:
        pass
    assert time.process_time() - start_s < 30 * MASK_S


COMPILED_S = 4.0  # the slowest here takes 0.2
MASK_S = 0.2  # the slowest here takes 0.01


async def test_thousands_of_different_schemas_leave_nothing_behind(grammars):
    async def some(numbers: range) -> None:
        for number in numbers:
            matcher = (await compiled(grammars, schema({"enum": [f"{number}-{i}" for i in range(40)]}))).start()
            matcher.mask()

    await some(range(300))
    gc.collect()
    before = resident_bytes()
    await some(range(300, 1800))
    gc.collect()
    # Were each kept, 1,500 of some 20 kB at the least would be there.
    assert resident_bytes() - before < 10 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def test_a_grammar_that_exhausts_its_limits_ends_its_own_request_alone(grammars, monkeypatch):
    """The library's copies share what they have learnt, and its limit: so requests share no grammar."""
    monkeypatch.setattr(grammar, "LIMITS", LLParserLimits(max_lexer_states=100))
    response_format = HOSTILE["exponential states"]
    one, other = (await compiled(grammars, response_format), await compiled(grammars, response_format))
    bystander = other.start()
    matcher, dice = one.start(), random.Random(0)

    def go_on() -> None:
        while True:
            matcher.advance(dice.choice(allowed(matcher)))

    with pytest.raises(ConstraintFailed, match="too complex"):
        go_on()
    assert allowed(bystander)


async def test_a_grammar_that_is_not_ready_in_time_is_refused(grammars, monkeypatch):
    monkeypatch.setattr(grammar, "COMPILE_S_MAX", 0.0)
    assert "to compile" in await refusal(grammars, JsonObject())
