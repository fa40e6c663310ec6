"""Where the values of settings come from, and what a setting is called there.

A setting has one name. `engine.block_size` is the flag `--engine.block-size`, the variable
`TOKENMILL_ENGINE_BLOCK_SIZE` and the line `block_size` under `[engine]` of a TOML file; the flag wins over the
variable, the variable over the file, the file over the default in `config.py`. Names in the file that are no setting
are refused: a typo is never a silent default.
"""

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from cyclopts import ArgumentCollection, Token

from worker.config import Settings
from worker.errors import Misconfigured

ENVIRONMENT_PREFIX = "TOKENMILL_"
DEFAULT_FILE = Path("tokenmill.toml")  # read from the working directory where there is one and no other is named
FILE_BYTES_MAX = 1 << 20  # a settings file is a few kilobytes: a bigger one is a mistaken path


class SettingsFile:
    """A source of values for cyclopts: fills the settings of the called command that no flag or variable has set.

    Checks the whole file, whatever part of it the command takes. Raises Misconfigured.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = _read(path)

    def __call__(self, _app: object, _commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        """Called by cyclopts after flags and variables are in place."""
        for argument in arguments:
            key = argument.name.lstrip("-").replace("-", "_")
            if key in self.values and not argument.tokens:
                argument.append(Token(keyword=key, value=_text(self.values[key]), source=str(self.path)))


def setting_names() -> frozenset[str]:
    """The name of every setting, as in a file: `engine.block_size`."""
    return frozenset(name for name, _ in flat(Settings()))


def flat(settings: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting's name with its value, in the order of the tree."""
    hints = get_type_hints(type(settings), include_extras=True)
    for name in (one.name for one in fields(settings)):  # type: ignore[arg-type]  # only ever called with dataclasses
        value = getattr(settings, name)
        if is_dataclass(value):
            yield from flat(value, prefix if _is_unnamed(hints[name]) else f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def as_flags(values: Mapping[str, object]) -> list[str]:
    """The command line that gives these settings, by name, to a command; empty ones stay at their default."""
    flags: list[str] = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif value not in (None, False, ""):
            flags += [flag, str(value)]
    return flags


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like settings and are none. Not an error: container platforms add variables of their own."""
    known = {ENVIRONMENT_PREFIX + name.upper().replace(".", "_") for name in setting_names()} | {"TOKENMILL_CONFIG"}
    return sorted(name for name in environment if name.startswith(ENVIRONMENT_PREFIX) and name not in known)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
        if len(content) > FILE_BYTES_MAX:
            raise Misconfigured(f"{path} is longer than {FILE_BYTES_MAX} bytes: is it the right file?")
        values = dict(_leaves(tomllib.loads(content.decode())))
    except OSError as error:
        raise Misconfigured(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # of TOML, and of UTF-8
        raise Misconfigured(f"{path} is not TOML: {error}") from None
    known = setting_names()
    for name in values.keys() - known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else "`tokenmill config show` lists what there is"
        raise Misconfigured(f"{path}: {name} is no setting; {hint}")
    return values


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_unnamed(hint: object) -> bool:
    """Whether the branch of the tree adds nothing to its settings' names."""
    return get_origin(hint) is Annotated and any(getattr(extra, "name", None) == ("*",) for extra in get_args(hint))
