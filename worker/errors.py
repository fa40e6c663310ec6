"""The error tree: each leaf is answered, let go, or fatal. There is no fourth outcome.

RequestError   the request's fault     ANSWER it with a failure, commit its offset
Fenced         another worker owns it  LET GO of the partitions, keep serving
Fatal          ours                    EXIT non-zero, the next owner replays
"""


class TokenmillError(Exception):
    """Any error that this project raises on purpose. Its text says what is wrong and what to do next."""


class RequestError(TokenmillError):
    """The request's own fault: it is answered with `code` and `message`, and its offset is committed."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Fenced(TokenmillError):
    """The group has moved on: what was not committed belongs to another worker now.

    `outcome_known` False: our last commit may have been among what the other has found.
    """

    def __init__(self, message: str, *, outcome_known: bool = True) -> None:
        super().__init__(message)
        self.outcome_known = outcome_known


class OutcomeUnknown(TokenmillError):
    """A transaction's end was asked for and no answer came: it may or may not have been committed.

    Raised by a broker, resolved in `worker/flush.py`, never seen above it.
    """


class Fatal(TokenmillError):
    """The worker cannot go on. The process ends with `exit_code`, and the next owner replays."""

    exit_code = 70  # sysexits EX_SOFTWARE


class Unavailable(Fatal):
    """A service that we need does not answer."""

    exit_code = 69  # sysexits EX_UNAVAILABLE


class Misconfigured(Fatal):
    """A setting, a file or a topic is not what it must be."""

    exit_code = 78  # sysexits EX_CONFIG
