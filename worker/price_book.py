"""The price book: what a tenant owes for a token, by model, tier and kind.

Owns the file format and its checks, never what a request used: that is `worker/cost.py`'s to know. Prices are data.
They come from a TOML file and are whole picodollars per token from here on. What cannot be is refused at load, so that
no price is ever rounded.
"""

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from schemas.cost import CostKind, picodollars
from worker.errors import Misconfigured

DEFAULT_BOOK = Path(__file__).with_name("prices.toml")
ANY_MODEL = "*"
MILLION = 10**6
# Above any price ever asked for a token, and low enough that a misplaced decimal point is noticed.
DOLLARS_PER_MILLION_MAX = 100_000


class Rates(Struct, frozen=True, kw_only=True):
    """Prices of one tier, in picodollars per token."""

    input: int
    cached_input: int
    output: int

    def of(self, kind: CostKind) -> int:
        """The price of one token of this kind; zero for the kinds that nobody owes."""
        if kind == "output":
            return self.output
        if kind == "prompt":
            return self.input
        return self.cached_input if kind == "prompt_cached" else 0


class PriceBook(Struct, frozen=True, kw_only=True):
    """All prices under one version. Every model has a price: its own, or that of "*"."""

    version: str
    rates: dict[tuple[str, str], Rates]  # by (model, tier)

    def price(self, model: str, tier: str, kind: CostKind, tokens: int) -> int:
        """What these tokens are owed for, in picodollars."""
        return self._rates(model, tier).of(kind) * tokens

    def ceiling(self, prompt_tokens: int, output_tokens: int, tier: str, model: str) -> int:
        """The most that a request can be priced at, in picodollars: nothing cached, all of `output_tokens` generated.

        `output_tokens` is over all choices.
        """
        rates = self._rates(model, tier)
        return max(rates.input, rates.cached_input) * prompt_tokens + rates.output * output_tokens

    def _rates(self, model: str, tier: str) -> Rates:
        return self.rates.get((model, tier)) or self.rates[ANY_MODEL, tier]


def load_price_book(path: Path = DEFAULT_BOOK) -> PriceBook:
    """The book in this file. Raises Misconfigured, naming the file and the place in it, for anything not exact."""
    try:
        page = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _Book)
        return _book(page)
    except OSError as error:
        raise Misconfigured(f"the price book {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # TOML, UTF-8, msgspec's validation, and our own below
        raise Misconfigured(f"the price book {path} is not valid: {error}") from error


class _Tier(Struct, frozen=True, forbid_unknown_fields=True):
    """A tier as written: quoted dollars per million tokens."""

    input: str
    cached_input: str
    output: str


class _Model(Struct, frozen=True, forbid_unknown_fields=True):
    """A model as written: every tier, so that no price has to be guessed."""

    realtime: _Tier
    batch: _Tier


class _Book(Struct, frozen=True, forbid_unknown_fields=True):
    """The file as written."""

    version: Annotated[str, Meta(min_length=1, max_length=64)]
    models: dict[str, _Model]


def _book(page: _Book) -> PriceBook:
    if ANY_MODEL not in page.models:
        raise ValueError(f'there is no [models."{ANY_MODEL}"]: it prices the models that have no table of their own')
    rates = {}
    for name, model in page.models.items():
        for tier in _Model.__struct_fields__:
            rates[name, tier] = _rates(getattr(model, tier), f'models."{name}".{tier}')
    return PriceBook(version=page.version, rates=rates)


def _rates(tier: _Tier, where: str) -> Rates:
    return Rates(**{name: _per_token(getattr(tier, name), f"{where}.{name}") for name in Rates.__struct_fields__})


def _per_token(amount: str, where: str) -> int:
    """Dollars per million tokens as picodollars per token."""
    try:
        per_million = picodollars(amount)
    except ValueError as error:
        raise ValueError(f'{where}: {error}; write dollars per million tokens, like "0.25"') from error
    if per_million < 0:
        raise ValueError(f"{where}: a price cannot be negative, but it is {amount}")
    if per_million > picodollars(str(DOLLARS_PER_MILLION_MAX)):
        raise ValueError(f"{where}: {amount} is more than {DOLLARS_PER_MILLION_MAX} dollars per million tokens")
    per_token, rest = divmod(per_million, MILLION)
    if rest:
        raise ValueError(f"{where}: {amount} is no whole number of picodollars a token; use at most 6 decimal places")
    return per_token
