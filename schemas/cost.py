"""Cost events: what each token owes and what it cost, and the reading of the meter they must add up to.

Money is integers of picodollars (1e-12 US dollars) in code and decimal strings with 12 places on the wire, never a
float: 2**53 picodollars are 9,007 dollars, so JSON numbers would lose cents. `dollars` and `picodollars` convert.
"""

from typing import Literal

from msgspec import Struct

from schemas.results import Input

PICODOLLARS = 10**12  # in one US dollar

CostKind = Literal[
    "prompt",  # prompt tokens computed
    "prompt_cached",  # prompt tokens found in the prefix cache
    "output",  # an output token
    "draft_rejected",  # drafted tokens thrown away
    "drafted",  # tokens that a draft model computed, or the model itself with fewer experts
    "recomputed",  # tokens computed again: after a preemption, or of the prompt for another choice
    "discarded",  # tokens generated past a stop string, or for a request that failed
    "handed_over",  # all work on a choice by a worker that handed the request over
]


class CostEvent(Struct, frozen=True, kw_only=True):
    """One entry of a request's bill, published in the transaction of its completion; handed_over, in its handoff's.

    `index` is the output token's place in its choice, for handed_over how often the request was handed over before, and
    None where the entry counts several tokens. Kinds that nobody owes (draft_rejected, drafted, recomputed,
    discarded, handed_over) have a price of zero.
    """

    id: str  # unique: <input topic>-<partition>-<offset>/<choice>/<kind>[/<index>]
    request_id: str
    custom_id: str
    tenant: str
    model: str
    tier: str
    choice: int
    kind: CostKind
    index: int | None
    tokens: int
    price: str
    cost: str
    device_ns: int
    price_book: str
    worker: str
    life: str  # one run of one worker process: the scope of a meter
    input: Input


class MeterReading(Struct, frozen=True, kw_only=True):
    """A worker's meter, cumulative since its life began: the last reading stands for all before it.

    wall_ns x device_rate = charged + wasted + idle + held, to the picodollar; and `charged` equals the sum of the cost
    of all committed cost events of this life. `tokenmill ledger reconcile` checks both.
    """

    worker: str
    life: str
    sequence: int  # counts readings up from 0
    wall_ns: int
    device_rate: str  # dollars an hour
    charged: str  # cost of what was published
    wasted: dict[str, str]  # by reason: lost (partition taken away), cancelled, unknown (lost sight of)
    idle: dict[str, str]  # by reason: loading, waiting
    held: str  # cost of sequences not yet answered
    final: bool  # the worker left on purpose; held is zero


def dollars(picodollars: int) -> str:
    """The amount in US dollars with all 12 decimal places."""
    whole, rest = divmod(abs(picodollars), PICODOLLARS)
    return f"{'-' if picodollars < 0 else ''}{whole}.{rest:012d}"


def picodollars(amount: str) -> int:
    """The inverse of `dollars`; raises ValueError for anything finer than a picodollar or not a plain decimal."""
    whole, dot, rest = amount.removeprefix("-").partition(".")
    digits = whole + rest
    if not (whole and bool(dot) == bool(rest) and digits.isascii() and digits.isdigit() and len(rest) <= 12):
        raise ValueError(f"not an amount of dollars: {amount[:40]!r}")
    value = int(whole) * PICODOLLARS + int(rest.ljust(12, "0"))
    return -value if amount.startswith("-") else value
