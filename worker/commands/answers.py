"""The client's side of the wire: sends requests, recognises their answers, and says an answer in a line.

Serves `send`, `watch` and `demo`. Sees only what is committed; chunks, which are previews, excepted.
"""

import asyncio
import textwrap
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

import msgspec

from schemas.codec import JSON_TYPE, KINDS, REQUEST_KIND, AnyResult, decode_result, encode, header_text
from schemas.requests import AnyGenerate
from schemas.results import ChatChoice, Chunk, Completion, Input, TextChoice
from worker.brokers.base import Outgoing, Record
from worker.brokers.kafka_client import Sender, tail
from worker.brokers.kafka_settings import KafkaSettings
from worker.commands.output import console, print_json
from worker.config import Topics
from worker.errors import Fatal

_MESSAGES: dict[str, type[AnyResult]] = {kind: message for message, kind in KINDS.items()}


def outgoing(request: AnyGenerate, topic: str, source: str) -> Outgoing:
    """The request as a record: a CloudEvent in binary mode, spread over the partitions by its id."""
    headers = {
        "ce_specversion": "1.0",
        "ce_id": request.custom_id,
        "ce_source": source,
        "ce_type": REQUEST_KIND,
        "content-type": JSON_TYPE,
    }
    return Outgoing(
        topic=topic,
        key=request.custom_id.encode(),
        value=encode(request),
        headers=tuple((name, text.encode()) for name, text in headers.items()),
    )


async def send_all(client: KafkaSettings, records: Iterable[Outgoing]) -> list[Input]:
    """The brokers have all the records; where each is."""
    async with Sender(client) as sender:
        kept = await asyncio.gather(*[await sender.send(record) for record in records])
    return [Input(topic=place.topic, partition=place.partition, offset=offset) for place, offset in kept]


@asynccontextmanager
async def exchange(
    client: KafkaSettings, topics: Topics, records: Sequence[Outgoing], *, chunks: bool = False
) -> AsyncIterator[AsyncIterator[Completion | Chunk]]:
    """The records are sent; within, their answers as they are committed, and at the end of the last one the end.

    With `chunks` the streamed pieces come too. Nothing is missed: reading begins before sending.
    """
    read = [topics.completions, *([topics.chunks] if chunks else [])]
    async with tail(client, read, from_start=False) as events:
        sent = await send_all(client, records)
        yield _answers(events, set(sent))


async def _answers(events: AsyncIterator[Record], unanswered: set[Input]) -> AsyncIterator[Completion | Chunk]:
    while unanswered:
        message = decode(await anext(events))
        if isinstance(message, Completion | Chunk) and message.input in unanswered:
            if isinstance(message, Completion):
                unanswered.remove(message.input)
            yield message


def decode(record: Record) -> AnyResult | None:
    """The message in a record of a result topic; None for one that somebody else put there. Raises Fatal."""
    kind = _MESSAGES.get(header_text(record.headers, "ce_type") or "")
    if kind is None or record.value is None:
        return None
    try:
        return decode_result(kind, record.value)
    except msgspec.DecodeError as error:
        place = f"{record.place.topic}-{record.place.partition}-{record.offset}"
        raise Fatal(f"record {place} says that it is a {KINDS[kind]} and is not one: {error}") from error


def texts(completion: Completion) -> list[str]:
    """What was said, by choice."""
    if completion.response is None:
        return []
    choices: Sequence[ChatChoice | TextChoice] = completion.response.body.choices
    return [choice.message.content if isinstance(choice, ChatChoice) else choice.text for choice in choices]


def printable(text: str) -> str:
    """The text without what a terminal would obey: a model may write escape sequences, and a prompt may ask it to."""
    return "".join(one if one.isprintable() or one in "\n\t" else "\N{REPLACEMENT CHARACTER}" for one in text)


def headline(completion: Completion) -> str:
    """Everything about the answer but its text, in one line."""
    name = (
        printable(completion.custom_id or "")
        or f"{completion.input.topic}-{completion.input.partition}-{completion.input.offset}"
    )
    if completion.error is not None:
        return f"{name}: {completion.error.code}, {completion.error.message}"
    parts = [name]
    if completion.response is not None:
        usage = completion.response.body.usage
        cached = usage.prompt_tokens_details.cached_tokens
        parts.append(f"{usage.prompt_tokens} tokens in{f' ({cached} cached)' if cached else ''}")
        parts.append(f"{usage.completion_tokens} out")
        parts.append("/".join(choice.finish_reason for choice in completion.response.body.choices))
    if completion.timing is not None:
        parts.append(f"first token after {_seconds(completion.timing.time_to_first_token_ms)}")
        parts.append(f"{_seconds(completion.timing.generation_time_ms)} in all")
    if completion.bill is not None:
        parts.append(f"price ${completion.bill.price}, cost ${completion.bill.cost}")
    return " · ".join(parts)


class JsonLines:
    """Tells answers to programs: each a line of JSON, as it came over the wire."""

    num_answers = 0
    num_failures = 0

    def tell(self, event: Completion | Chunk) -> None:
        """The event is on stdout."""
        if isinstance(event, Completion):
            self.num_answers += 1
            self.num_failures += event.error is not None
        print_json(event)


class Teller:
    """Tells answers to people: what they cost in a line, then what was said; a streamed one while it is said.

    `prompts` are repeated with their answers, by custom id.
    """

    def __init__(self, prompts: Mapping[str, str] | None = None) -> None:
        self._prompts = prompts or {}
        self.num_answers = 0
        self.num_failures = 0
        self._console = console()
        self._streamed: set[Input] = set()
        self._open: Input | None = None  # whose text stands on the unfinished last line

    def tell(self, event: Completion | Chunk) -> None:
        """The event is on stdout."""
        if isinstance(event, Chunk):
            self._tell_chunk(event)
        else:
            self._tell_completion(event)

    def _tell_chunk(self, chunk: Chunk) -> None:
        if chunk.choice:  # several streams on one screen would be read by nobody: the first stands for them
            return
        if self._open != chunk.input:
            self._end_line()
            self._console.print(f"{printable(chunk.custom_id)} streams: ", style="dim", end="")
        self._open = chunk.input
        self._streamed.add(chunk.input)
        self._console.out(printable(chunk.text), end="")

    def _tell_completion(self, completion: Completion) -> None:
        self.num_answers += 1
        self.num_failures += completion.error is not None
        self._end_line()
        self._console.print(headline(completion), style="red" if completion.error else "dim")
        if prompt := self._prompts.get(completion.custom_id or ""):
            self._console.print(textwrap.indent(printable(prompt), "> "), style="italic")
        said = texts(completion)
        for number, text in enumerate(said):
            if number or completion.input not in self._streamed:
                numbered = f"[{number}] {text.strip()}" if len(said) > 1 else text.strip()
                self._console.print(textwrap.indent(printable(numbered), "  "))

    def _end_line(self) -> None:
        if self._open is not None:
            self._console.print()
        self._open = None


def _seconds(milliseconds: float) -> str:
    return f"{milliseconds / 1000:.2f} s"
