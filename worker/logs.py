"""How log lines look, and what never gets into one.

Owns the shape: JSON lines for machines, colours for a terminal, one shape for our own lines and for those of libraries.
Never their words: which events are logged, and under which names, is `worker/telemetry.py`'s. The last thing before a
line is written is a check that it carries no prompt and no answer.
"""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Literal, TextIO

import structlog

# Names under which text of prompts and answers goes about in this code base and in OpenAI's.
CONTENT_KEYS = frozenset((
    "body", "chunk", "completion", "content", "message", "messages", "output", "payload", "prompt", "record",
    "response", "stop", "text", "token", "tokens", "value",
))  # fmt: skip
VALUE_CHARS_MAX = 500  # longer than any name that we log; a traceback is exempt
WITHHELD = "[withheld]"


def configure_logs(
    level: Literal["debug", "info", "warning", "error"] = "info",
    form: Literal["auto", "text", "json"] = "auto",
    stream: TextIO = sys.stderr,
) -> None:
    """From now on everything logged in this process goes to `stream`: as JSON lines, unless it is a terminal.

    Libraries are heard from warnings on: what they say below that is for their own developers.
    """
    as_json = form == "json" or (form == "auto" and not stream.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        withhold_content,
    ]
    render: list[structlog.typing.Processor]
    if as_json:
        render = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:  # plain tracebacks: structlog's own show local variables, and those hold prompts
        render = [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


def withhold_content(_logger: object, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The line without anything that could be a prompt or an answer.

    By its key, or by its kind: bytes are a record's, and a long text is nobody's name. It is replaced and not raised,
    because a line in a log must never take a worker down.
    """
    for key, value in line.items():
        if key in CONTENT_KEYS or isinstance(value, (bytes, bytearray, memoryview)):
            line[key] = WITHHELD
        elif isinstance(value, str) and len(value) > VALUE_CHARS_MAX:
            line[key] = f"{value[:VALUE_CHARS_MAX]}... {WITHHELD}"
    return line
