"""How commands print: one JSON document or line for programs, an aligned table for people. Only ever on stdout."""

import sys
from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print JSON.")]


def print_json(value: object) -> None:
    """One JSON value, on one line, there at once for whoever reads the pipe."""
    print(msgspec.json.encode(value, enc_hook=str).decode(), flush=True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """The rows under their columns: ruled on a terminal, plain text to grep elsewhere."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console().print(table)


def console() -> Console:
    """What people read. Off a terminal it is wide: nothing that goes to a file is folded."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
