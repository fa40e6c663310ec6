"""`tokenmill send`: requests from arguments, a file or a pipe, to the topic of their tier; and their answers.

A client like any other: it knows the wire and the topics, and nothing of workers.
"""

import asyncio
import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter, validators

from schemas.codec import Malformed, decode_request
from schemas.requests import AnyGenerate, Chat, ChatBody, Message
from worker.brokers.base import Outgoing
from worker.commands.answers import JsonLines, Teller, exchange, outgoing, send_all
from worker.commands.output import Json, print_json
from worker.commands.progress import progress
from worker.config import Kafka, Topics
from worker.errors import Misconfigured, Unavailable

app = App(name="send")

WAIT_S = 600.0  # a busy group may be minutes behind; a group without a worker never answers
SOURCE = "/tokenmill/send"

_Positive = Parameter(validator=validators.Number(gt=0))


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What is asked for each prompt. The lines of a batch file say it themselves."""

    max_tokens: Annotated[int | None, _Positive] = None
    """Tokens of an answer at most."""
    temperature: Annotated[float, Parameter(validator=validators.Number(gte=0, lte=2))] = 1.0
    """0 is greedy: always the likeliest token."""
    seed: int | None = None
    """The same seed gives the same answer."""
    n: Annotated[int, _Positive] = 1
    """Answers to each prompt."""
    tenant: str = "default"
    """Who pays."""
    stream: Annotated[bool, Parameter(negative="")] = False
    """Have the text while it is generated, too."""

    def request(self, custom_id: str, prompt: str, model: str) -> AnyGenerate:
        """A chat of this one prompt."""
        body = ChatBody(
            model=model,
            messages=[Message(role="user", content=prompt)],
            max_completion_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            n=self.n,
            stream=self.stream,
        )
        return Chat(custom_id=custom_id, tenant=self.tenant, body=body)


@app.default
async def send(
    *prompts: str,
    file: Path | None = None,
    wishes: Annotated[Wishes, Parameter(name="*")] = Wishes(),
    tier: Literal["realtime", "batch"] = "realtime",
    model: str = "smollm2-moe",
    count: Annotated[int, _Positive] = 1,
    wait: Annotated[bool, Parameter(negative="")] = False,
    wait_s: Annotated[float, _Positive] = WAIT_S,
    kafka: Annotated[Kafka, Parameter(name="*")] = Kafka(),
    topics: Topics = Topics(),
    json: Json = False,
) -> int:
    """Send requests, and with --wait print their answers; exit code 1 if one of them is a failure.

    One prompt with its answer; a thousand short ones; an OpenAI batch file as it is; a pipe, a prompt a line:

        tokenmill send "What is a transaction?" --wait
        tokenmill send "Say a word." --count 1000 --max-tokens 4 --tier batch
        tokenmill send --file batch.jsonl --wait --json > answers.jsonl
        grep '?$' notes.txt | tokenmill send

    Parameters
    ----------
    file
        A request a line if its name ends in .jsonl (an OpenAI batch file), else a prompt a line.
    tier
        batch costs less, and waits for realtime requests. A batch file's line may name its own.
    model
        Who shall answer: the name of the model that the workers serve.
    count
        Send each prompt so many times.
    wait
        Print the answers as they are committed.
    wait_s
        Give up waiting after so many seconds.
    """
    requests = list(_requests(prompts, file, wishes, Path(model).name, count))
    records = [
        outgoing(request, topics.batch if (request.tier or tier) == "batch" else topics.requests, SOURCE)
        for request in requests
    ]
    if wait:
        chunks = any(request.body.stream for request in requests)
        return await _answered(records, kafka, topics, wait_s, chunks, JsonLines() if json else Teller())
    with progress() as report:
        report(f"sending {len(records)} requests")
        places = await send_all(kafka.client(), records)
    if json:
        for request, place in zip(requests, places, strict=True):
            print_json({"custom_id": request.custom_id, "input": place})
    else:
        print(f"sent {len(records)} requests; see what becomes of them with  tokenmill watch")
    return 0


async def _answered(
    records: list[Outgoing], kafka: Kafka, topics: Topics, wait_s: float, chunks: bool, teller: Teller | JsonLines
) -> int:
    """Sends the records and tells every answer; the exit code."""
    try:
        with ExitStack() as spinner:
            report = spinner.enter_context(progress())
            report(f"sending {len(records)} requests")
            async with (
                asyncio.timeout(wait_s),
                exchange(kafka.client(), topics, records, chunks=chunks) as events,
            ):
                report("waiting for the first answer")
                async for event in events:
                    spinner.close()  # from here on the answers themselves show the progress
                    teller.tell(event)
    except TimeoutError:
        raise Unavailable(
            f"{len(records) - teller.num_answers} of {len(records)} requests are not answered after {wait_s:g} s; they "
            "stay on the topic, and are answered once a worker gets to them: does one run?"
        ) from None
    return 1 if teller.num_failures else 0


def _requests(
    prompts: tuple[str, ...], file: Path | None, wishes: Wishes, model: str, count: int
) -> Iterator[AnyGenerate]:
    """The requests, every one checked. Raises Misconfigured."""
    if file and file.suffix == ".jsonl":
        if prompts or wishes != Wishes() or count > 1:
            raise Misconfigured(f"{file} holds whole requests: leave out prompts, --count, and what its lines can say")
        yield from _batch(file)
        return
    lines = [*prompts, *(_lines(file) if file else [] if prompts or sys.stdin.isatty() else sys.stdin)]
    texts = [line.rstrip("\n") for line in lines if line.strip()]
    if not texts:
        raise Misconfigured("nothing to send: give a prompt, --file, or a prompt a line on stdin")
    run = secrets.token_hex(4)  # tells this call's requests from another's
    for number, text in enumerate(text for text in texts for _ in range(count)):
        yield wishes.request(f"{run}-{number}", text, model)


def _batch(file: Path) -> Iterator[AnyGenerate]:
    for number, line in enumerate(_lines(file), start=1):
        if line.strip():
            try:
                yield decode_request(line.encode())
            except Malformed as error:
                raise Misconfigured(f"{file}, line {number}: {error}; nothing was sent") from None


def _lines(file: Path) -> Iterable[str]:
    try:
        return file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Misconfigured(f"cannot read {file}: {error}") from None
