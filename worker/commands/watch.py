"""`tokenmill watch`: completions and costs as they are committed, in a table that stays or as lines."""

import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from schemas.codec import AnyResult
from schemas.cost import CostEvent, MeterReading, dollars, picodollars
from schemas.results import Completion
from worker.brokers.kafka_client import tail
from worker.commands.answers import decode, headline, printable
from worker.commands.output import Json, console, print_json
from worker.config import Kafka, Topics

app = App(name="watch")

RECENT_MAX = 12  # completions shown: with the sums below them they fit a terminal of 24 lines
RATE_S = 10.0  # tokens a second are those of the last ten
REFRESHES_PER_S = 4


@app.default
async def watch(
    *,
    kafka: Annotated[Kafka, Parameter(name="*")] = Kafka(),
    topics: Topics = Topics(),
    from_start: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> None:
    """Show completions and costs as they are committed, until Ctrl-C.

    A table on a terminal, a line for each completion elsewhere; with --json every message as it came over the wire:

        tokenmill watch --brokers kafka:9092
        tokenmill watch --json | jq 'select(.error)'

    Parameters
    ----------
    from_start
        Begin with the oldest that the topics keep, not with the next.
    """
    tally = Tally()
    live = Live(console=console(), refresh_per_second=REFRESHES_PER_S, get_renderable=tally.render)
    async with tail(kafka.client(), [topics.completions, topics.costs], from_start=from_start) as records:
        if not json and sys.stdout.isatty():
            with live:
                async for record in records:
                    tally.add(decode(record))
        async for record in records:
            message = decode(record)
            if json and message is not None:
                print_json(message)
            elif isinstance(message, Completion):
                print(headline(message), flush=True)


@dataclass
class Tally:
    """What was seen so far, and how it looks."""

    num_completions: int = 0
    num_failures: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    price: int = 0
    cost: int = 0
    workers: dict[str, MeterReading] = field(default_factory=dict)
    _recent: deque[Completion] = field(default_factory=lambda: deque(maxlen=RECENT_MAX))
    _outputs: deque[tuple[float, int]] = field(default_factory=deque)

    def add(self, message: AnyResult | None) -> None:
        """The message counts."""
        match message:
            case Completion():
                self._add_completion(message)
            case CostEvent():
                self.price += picodollars(message.price)
                self.cost += picodollars(message.cost)
            case MeterReading():
                self.workers[message.worker] = message

    def _add_completion(self, completion: Completion) -> None:
        self.num_completions += 1
        self.num_failures += completion.error is not None
        self._recent.append(completion)
        if completion.response is not None:
            usage = completion.response.body.usage
            self.tokens_in += usage.prompt_tokens
            self.tokens_out += usage.completion_tokens
            self._outputs.append((time.monotonic(), usage.completion_tokens))

    def rate(self, now_s: float) -> float:
        """Output tokens a second, of late."""
        while self._outputs and now_s - self._outputs[0][0] > RATE_S:
            self._outputs.popleft()
        return sum(tokens for _, tokens in self._outputs) / RATE_S

    def render(self) -> RenderableType:
        """The last completions, above the sums."""
        recent = Table("request", "tenant", box=None, pad_edge=False)
        for column in ("in", "cached", "out", "first token", "price $"):
            recent.add_column(column, justify="right")
        for completion in self._recent:
            recent.add_row(*_row(completion))
        sums = (
            f"{self.num_completions:,} answered, {self.num_failures:,} failed · {self.tokens_in:,} tokens in, "
            f"{self.tokens_out:,} out · {self.rate(time.monotonic()):,.0f} tokens/s · price ${dollars(self.price)}, "
            f"device cost ${dollars(self.cost)} · {sum(not one.final for one in self.workers.values())} workers"
        )
        return Group(recent, Text(), Text(sums, style="bold"))


def _row(completion: Completion) -> tuple[str, ...]:
    name, tenant = printable(completion.custom_id or "?"), printable(completion.tenant or "?")
    if completion.response is None:
        return (name, tenant, completion.error.code if completion.error else "", "", "", "", "")
    usage = completion.response.body.usage
    first = f"{completion.timing.time_to_first_token_ms / 1000:.2f} s" if completion.timing else ""
    return (
        name,
        tenant,
        f"{usage.prompt_tokens:,}",
        f"{usage.prompt_tokens_details.cached_tokens:,}",
        f"{usage.completion_tokens:,}",
        first,
        completion.bill.price if completion.bill else "",
    )
