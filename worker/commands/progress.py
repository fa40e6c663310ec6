"""Progress of any wait over a second, on stderr: a live spinner on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

Report = Callable[[str], None]

_REPEAT_S = 5.0  # a log that is not watched live: enough to see that it moves, not a line per jar


@contextmanager
def progress() -> Iterator[Report]:
    """The body may say, as often as it likes, what is being waited for: `"what: how far"`."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        with console.status("") as status:
            yield status.update
    else:
        yield _Lines(console).say


class _Lines:
    """A line for each new `what`, and for the same one again only every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._what = ""
        self._said_at = 0.0

    def say(self, text: str) -> None:
        what, now = text.partition(":")[0], time.monotonic()
        if what != self._what or now - self._said_at >= _REPEAT_S:
            self._console.print(text, markup=False, soft_wrap=True)
            self._what, self._said_at = what, now
