"""`tokenmill config show | check`: what a worker started here and now would be told. Touches nothing."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from worker.commands.output import Json, print_json
from worker.config import Settings
from worker.errors import Misconfigured, TokenmillError
from worker.folders import model_folder
from worker.price_book import DEFAULT_BOOK, load_price_book
from worker.setting_sources import flat, unknown_variables

app = App(name="config", help="Show the settings and where they come from, or check them.")

All = Annotated[Settings, Parameter(name="*")]

# What a bug report has no need of: where things are and who we are. Secrets are never settings.
_PRIVATE = frozenset(("brokers", "security.username", "worker", "health.host"))


@app.command
def show(*, settings: All = Settings(), redacted: bool = False, json: Json = False) -> None:
    """Print every setting as a worker would get it.

    The output is a settings file: `tokenmill config show > tokenmill.toml` is a start.

    Parameters
    ----------
    redacted
        Hide addresses, names and paths, for a bug report. Secrets are never shown: settings name their files alone.
    """
    values = {name: _redacted(name, value) if redacted else value for name, value in flat(settings)}
    if json:
        print_json(values)
    else:
        print("\n".join(_toml(values)))


@app.command(name="check")
def check_settings(*, settings: All = Settings(), json: Json = False) -> int:
    """Check every setting and every file that they name: exit code 78 if a worker could not start with them.

    Also names variables that begin with TOKENMILL_ and set nothing: most often a typo. Example:

        tokenmill config check --config production.toml
    """
    faults = _faults(settings)
    warnings = [f"{name} is set, and is no setting" for name in unknown_variables(os.environ)]
    if json:
        print_json({"ok": not faults, "faults": faults, "warnings": warnings})
    else:
        for line in (*(f"fault: {fault}" for fault in faults), *(f"warning: {warning}" for warning in warnings)):
            print(line)
        print("a worker cannot start with these settings" if faults else "the settings are good")
    return Misconfigured.exit_code if faults else 0


def _faults(settings: Settings) -> list[str]:
    """What is wrong, each found on its own: the whole list at once, not one fault a run."""
    checks: tuple[Callable[[], object], ...] = (
        settings.kafka.client,
        lambda: load_price_book(settings.bill.price_book or DEFAULT_BOOK),
        lambda: model_folder(settings.model),
    )
    faults = []
    for check in checks:
        try:
            check()
        except TokenmillError as error:
            faults.append(str(error))
    return faults


def _redacted(name: str, value: Any) -> Any:
    return "(hidden)" if value and (name in _PRIVATE or isinstance(value, Path)) else value


def _toml(values: dict[str, Any]) -> list[str]:
    """Lines that read back as the same values; a setting without one is a comment, as TOML has no null."""
    lines, tables = list[str](), dict[str, list[str]]()
    for name, value in values.items():
        table, _, key = name.rpartition(".")
        line = f"# {key} =" if value is None else f"{key} = {_toml_value(value)}"
        (tables.setdefault(table, []) if table else lines).append(line)
    for table, body in tables.items():
        lines += ["", f"[{table}]", *body]
    return lines


def _toml_value(value: object) -> str:
    """Numbers, booleans and strings are written as JSON writes them: in these three TOML agrees."""
    return json.dumps(str(value) if isinstance(value, Path) else value)
