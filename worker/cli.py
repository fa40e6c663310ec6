"""The command `tokenmill`: which commands there are, where their settings come from, and how errors end.

Does no command's work: each is a module of `worker/commands/`, imported when it is called, so that `--help` is quick.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.config import Env

from worker.errors import Fatal, TokenmillError
from worker.setting_sources import DEFAULT_FILE, ENVIRONMENT_PREFIX, SettingsFile

EXIT_USAGE = 64  # sysexits EX_USAGE: the command line itself is wrong
EXIT_INTERRUPTED = 130  # what a shell reports for a process ended by SIGINT
EXIT_BROKEN_PIPE = 141  # what a shell reports for a process ended by SIGPIPE

TRY, RUN, LOOK = (Group.create_ordered(name) for name in ("Try it", "Run it", "Look at it"))
EVERYWHERE = Group("Everywhere", sort_key=99)

HELP = """LLM requests from Kafka, completions and their bill exactly once.

A first try, with nothing running yet:

    tokenmill demo

One worker on your own Kafka:

    export TOKENMILL_BROKERS=kafka:9092
    tokenmill topics create
    tokenmill model fetch smollm2-moe
    tokenmill worker --model smollm2-moe
"""
EPILOGUE = (
    "Every setting is a flag (--engine.block-size), a variable (TOKENMILL_ENGINE_BLOCK_SIZE) and a line of a TOML file "
    "(block_size under [engine]). The flag wins, then the variable, then the file."
)


class Command(NamedTuple):
    """A module of `worker/commands/` and its line in the list, which is written here so that listing imports none."""

    name: str
    group: Group
    summary: str


COMMANDS = (
    Command("demo", TRY, "Run the whole thing here, once: Kafka, model, worker, twenty requests, their bill."),
    Command("broker", TRY, "Run Apache Kafka on this machine, with no Docker and no Java."),
    Command("model", TRY, "Fetch models, list and inspect them."),
    Command("worker", RUN, "Answer requests until told to stop."),
    Command("topics", RUN, "Create the topics that workers need, or list them."),
    Command("config", RUN, "Show the settings as a worker would get them, or check them."),
    Command("healthcheck", RUN, "Ask the worker of this machine whether it is ready."),
    Command("send", LOOK, "Send requests: a prompt, a file of prompts, or an OpenAI batch file."),
    Command("watch", LOOK, "Watch completions and costs as they are committed."),
    Command("ledger", LOOK, "Prove from the topic that every second of the device is accounted for."),
    Command("schema", LOOK, "Export the JSON Schemas of everything on the wire, and an AsyncAPI document."),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; whatever went wrong has been said in one line on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = command_line(given).meta(given, exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, TokenmillError, BrokenPipeError, KeyboardInterrupt) as error:
        if "--debug" in given:
            raise
        return _explain(error)
    return result if isinstance(result, int) else 0


def command_line(arguments: Sequence[str] = ()) -> App:
    """The whole command, ready to be called with these arguments (which decide whose help is the long one)."""
    app = App(
        name="tokenmill",
        help=HELP,
        help_format="plaintext",
        help_epilogue=EPILOGUE,
        version=_version,
    )
    for name, group, summary in COMMANDS:
        # A summary given here would replace the text that the called command has of its own.
        listed = None if name in arguments else summary
        app.command(f"worker.commands.{name}:app", name=name, group=group, help=listed)

    @app.meta.default
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[Path | None, Parameter(env_var="TOKENMILL_CONFIG", group=EVERYWHERE)] = None,
        debug: Annotated[bool, Parameter(negative="", group=EVERYWHERE)] = False,  # noqa: ARG001  # `main` looks
    ) -> object:
        """Run the command with its settings filled in.

        Parameters
        ----------
        config
            TOML file of settings. Default: ./tokenmill.toml where there is one.
        debug
            Show where in the code an error arose.
        """
        app.config = (Env(ENVIRONMENT_PREFIX, command=False, show=False), *_settings_files(config))
        return app(tokens, exit_on_error=False, print_error=False, result_action="return_value")

    return app


def _settings_files(named: Path | None) -> Iterator[SettingsFile]:
    if named or DEFAULT_FILE.exists():
        yield SettingsFile(named or DEFAULT_FILE)


def _explain(error: CycloptsError | TokenmillError | BrokenPipeError | KeyboardInterrupt) -> int:
    """Says the error, and returns the exit code that it deserves."""
    match error:
        case BrokenPipeError():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
            return EXIT_BROKEN_PIPE
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED
        case CycloptsError():
            print(f"tokenmill: {' '.join(str(error).split())}", file=sys.stderr)
            return EXIT_USAGE
        case _:
            print(f"tokenmill: {error}", file=sys.stderr)
            return error.exit_code if isinstance(error, Fatal) else Fatal.exit_code


def _version() -> str:
    from importlib.metadata import version  # 30 ms, for the one flag that asks

    return version("tokenmill")
