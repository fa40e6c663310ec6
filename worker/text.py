"""Text to tokens and back, for one model: its tokenizer, its chat template, and stop strings.

Owns the tokenizer's files of a model folder. The template comes from there and from nowhere else: a request that could
bring its own would run a program of its own. Knows nothing of the engine.

Decoding works on bytes. A token is a piece of a byte string, often not a whole character; text appears when the bytes
before it are whole. Both families of tokenizers in use are known: GPT-2's byte alphabet (Llama 3, Qwen, SmolLM) and
SentencePiece with byte fallback (Llama 2, Mixtral).
"""

import codecs
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import minijinja
import msgspec
import tokenizers
from msgspec import Struct

from schemas.requests import Message
from schemas.results import ErrorCode
from worker.errors import Misconfigured, RequestError

# English takes 4 bytes a token, source code 3; beyond 16 nothing but long runs of one character fits the context. Such
# text is refused unread, so that tokenising (1 us a byte) never takes longer than its context is worth.
BYTES_PER_TOKEN_MAX = 16

# Steps of the template's interpreter: 4,096 messages through a plain template take 50,000; a million take 0.1 s.
TEMPLATE_FUEL = 1_000_000

Loaded = TypeVar("Loaded")


class Tokenizer:
    """What one model calls its tokens."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        token_bytes: list[bytes],
        template: "ChatTemplate | None",
        eos: frozenset[int],
    ) -> None:
        self._inner = inner
        self._bytes = token_bytes
        self._template = template
        self.special_token_ids = frozenset(
            token for token, added in inner.get_added_tokens_decoder().items() if added.special
        )
        self.eos_token_ids = eos

    def check_same(self, other: "Tokenizer", name: str) -> None:
        """Raise Misconfigured unless the other model calls the same tokens by the same numbers."""
        own, others = self._bytes, other._bytes
        if len(own) != len(others):
            raise Misconfigured(f"{name} has {len(others)} tokens, the model {len(own)}: it cannot draft for it")
        for number, (one, another) in enumerate(zip(own, others, strict=True)):
            if one != another:
                raise Misconfigured(
                    f"token {number} is {another!r} to {name} and {one!r} to the model: it cannot draft for it"
                )

    def encode(self, text: str, tokens_max: int) -> tuple[int, ...]:
        """The tokens of a text to go on from, with what the model wants before it. Raises RequestError if more."""
        return self._encode(text, tokens_max, special=True)

    def encode_chat(self, messages: Sequence[Message], tokens_max: int) -> tuple[int, ...]:
        """The tokens of a chat up to where the assistant's answer begins.

        Raises RequestError if they are more than `tokens_max`, or if the template does not take these messages.
        """
        if self._template is None:
            raise RequestError(ErrorCode.INVALID_REQUEST, "this model has no chat template: use /v1/completions")
        if len(messages) > tokens_max:  # each has a token at least: no need to render thousands
            raise RequestError(ErrorCode.CONTEXT_EXCEEDED, f"{len(messages)} messages cannot fit {tokens_max} tokens")
        return self._encode(self._template.render(messages), tokens_max, special=False)

    def encode_piece(self, text: str) -> list[int]:
        """The tokens of a text that stands amid others."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these tokens. Bytes that are no text become U+FFFD."""
        return b"".join(map(self.text_bytes, tokens)).decode(errors="replace")

    def text_bytes(self, token: int) -> bytes:
        """What the token adds to the text: nothing if it is special, or no token of ours."""
        return b"" if token in self.special_token_ids else self.token_bytes(token)

    def token_bytes(self, token: int) -> bytes:
        """The token's name in logprobs: as `text_bytes`, but special tokens have theirs too."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""

    def _encode(self, text: str, tokens_max: int, special: bool) -> tuple[int, ...]:
        bytes_max = tokens_max * BYTES_PER_TOKEN_MAX
        if len(text) > bytes_max or len(text.encode()) > bytes_max:
            raise RequestError(
                ErrorCode.CONTEXT_EXCEEDED,
                f"the prompt's text is longer than {bytes_max} bytes: it cannot fit {tokens_max} tokens",
            )
        tokens = tuple(self._inner.encode(text, add_special_tokens=special).ids)
        if len(tokens) > tokens_max:
            raise RequestError(
                ErrorCode.CONTEXT_EXCEEDED, f"the prompt is {len(tokens)} tokens long; there is room for {tokens_max}"
            )
        return tokens


class ChatTemplate:
    """A model's own way of writing a chat as one text."""

    def __init__(self, source: str, names: dict[str, str]) -> None:
        self._names = names
        # As transformers sets up Jinja for these templates: they are written for it.
        self._environment = minijinja.Environment(fuel=TEMPLATE_FUEL, trim_blocks=True, lstrip_blocks=True)
        self._environment.add_global("raise_exception", _refuse)
        self._environment.add_template("chat", source)

    def render(self, messages: Sequence[Message]) -> str:
        """The chat as text, up to where the answer begins. Raises RequestError if the template does not take it."""
        turns = [_turn(message) for message in messages]
        try:
            return self._environment.render_template("chat", messages=turns, add_generation_prompt=True, **self._names)
        except minijinja.TemplateError:  # its text may quote the messages
            raise RequestError(
                ErrorCode.INVALID_REQUEST, "the model's chat template does not take these messages"
            ) from None


class TextStream:
    """The text of one choice as its tokens come.

    Gives out text that is final: whole characters, and none that a stop string could still begin with. A stop string
    ends the text before it, wherever the tokens' seams are; of several, the one that is complete first. It is looked
    for once `tokens_min` tokens are there.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence["StopString"] = (), tokens_min: int = 0) -> None:
        self.stopped = False
        self.num_tokens = 0
        self.num_chars = 0  # decoded so far, given out or not
        self._tokenizer = tokenizer
        self._tokens_min = tokens_min
        self._stops = stops
        self._matched = [0] * len(stops)  # characters of each stop string that the text ends with
        self._beginnings = frozenset(stop.text[0] for stop in stops)
        self._held = ""  # the longest end of the text that a stop string begins with
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that this token makes final. Must not be called once `stopped`."""
        self.num_tokens += 1
        return self._release(self._utf8.decode(self._tokenizer.text_bytes(token)))

    def end(self) -> str:
        """What was held back, as nothing follows."""
        if self.stopped:
            return ""
        text = self._release(self._utf8.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        self.num_chars += len(text)
        if self.num_tokens < self._tokens_min or (not self._held and self._beginnings.isdisjoint(text)):
            return text  # nearly always: no stop string has begun
        for seen, char in enumerate(text, start=1):
            self._matched = [stop.advance(state, char) for stop, state in zip(self._stops, self._matched, strict=True)]
            found = [
                len(stop.text)
                for stop, state in zip(self._stops, self._matched, strict=True)
                if state == len(stop.text)
            ]
            if found:
                self.stopped = True
                return (self._held + text[:seen])[: -max(found)]
        text = self._held + text
        final = len(text) - max(self._matched)
        self._held = text[final:]
        return text[:final]


class StopString:
    """A text to look for, one character at a time (Knuth, Morris and Pratt: a character is looked at twice at most)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._fallback = [0]  # after i + 1 characters: how many of the last of them the text begins with
        for char in text[1:]:
            self._fallback.append(self.advance(self._fallback[-1], char))

    def advance(self, matched: int, char: str) -> int:
        """How many characters match once this one has come, if `matched`, less than all, did before."""
        while matched and self.text[matched] != char:
            matched = self._fallback[matched - 1]
        return matched + (self.text[matched] == char)


class _Part(Struct):
    type: str
    decoders: list["_Part"] = []


class _TokenizerFile(Struct):
    decoder: _Part | None = None


class _NamedTemplate(Struct):
    name: str
    template: str


class _AddedToken(Struct):
    content: str


class _TokenizerConfig(Struct):
    chat_template: str | list[_NamedTemplate] | None = None
    bos_token: str | _AddedToken | None = None
    eos_token: str | _AddedToken | None = None


class _ModelConfig(Struct):
    eos_token_id: int | list[int] | None = None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of the model in this folder. Raises Misconfigured, naming the file at fault."""
    path = folder / "tokenizer.json"
    decoder = _read(path, _TokenizerFile).decoder
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever it does not like
        raise Misconfigured(f"{path} is no tokenizer: {error}") from error
    inner.no_truncation()
    inner.no_padding()
    return Tokenizer(inner, _token_bytes(inner, decoder, path), _load_template(folder), _load_eos(folder))


def _token_bytes(inner: tokenizers.Tokenizer, decoder: _Part | None, path: Path) -> list[bytes]:
    """Each token's bytes, by its number."""
    kinds = {decoder.type, *(part.type for part in decoder.decoders)} if decoder else set()
    if "ByteLevel" in kinds:
        to_bytes = _from_byte_alphabet
    elif "ByteFallback" in kinds:
        to_bytes = _from_sentencepiece
    else:
        raise Misconfigured(f"{path}: its decoder is neither ByteLevel nor ByteFallback; no other kind is known here")
    vocabulary = inner.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for name, token in vocabulary.items():
        table[token] = to_bytes(name)
    return table


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 for itself, the others from U+0100 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _from_byte_alphabet(name: str) -> bytes:
    if all(char in _BYTES for char in name):
        return bytes(_BYTES[char] for char in name)
    return name.encode()  # an added token: written as it is


def _from_sentencepiece(name: str) -> bytes:
    if byte := _BYTE_TOKEN.fullmatch(name):
        return bytes([int(byte[1], 16)])
    return name.replace("▁", " ").encode()


def _load_template(folder: Path) -> ChatTemplate | None:
    """The folder's chat template: in a file of its own, or in the tokenizer's configuration; some models have none."""
    config_path, path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = _read(config_path, _TokenizerConfig) if config_path.exists() else _TokenizerConfig()
    if path.exists():
        source: str | None = path.read_text(encoding="utf-8")
    else:
        path, source = config_path, config.chat_template if isinstance(config.chat_template, str) else None
        if isinstance(config.chat_template, list):
            source = next((one.template for one in config.chat_template if one.name == "default"), None)
    if source is None:
        return None
    names = {"bos_token": _content(config.bos_token), "eos_token": _content(config.eos_token)}
    try:
        return ChatTemplate(source, names)
    except minijinja.TemplateError as error:
        raise Misconfigured(f"{path}: the chat template cannot be read: {error}") from error


def _load_eos(folder: Path) -> frozenset[int]:
    """The tokens that end an answer: generation_config.json knows more of them than config.json."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        eos = _read(path, _ModelConfig).eos_token_id if path.exists() else None
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()


def _read(path: Path, kind: type[Loaded]) -> Loaded:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, ValueError, RecursionError) as error:
        raise Misconfigured(f"cannot read {path}: {error}; fetch the model again") from error


def _turn(message: Message) -> dict[str, Any]:
    """The message as templates expect it: one text, and `system` for what OpenAI has renamed `developer`."""
    parts = message.content
    return {
        "role": "system" if message.role == "developer" else message.role,
        "content": parts if isinstance(parts, str) else "\n".join(part.text for part in parts),
        **({"name": message.name} if message.name else {}),
    }


def _refuse(reason: str) -> None:
    """What templates call when they do not take a chat; the reason is the template's own text."""
    raise RequestError(ErrorCode.INVALID_REQUEST, f"the model's chat template refuses: {reason[:200]}")


def _content(token: str | _AddedToken | None) -> str:
    return token.content if isinstance(token, _AddedToken) else token or ""
