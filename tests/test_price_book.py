"""The price book: prices are whole picodollars a token, and what cannot be is refused with its place in the file."""

from pathlib import Path

import pytest

from worker.errors import Misconfigured
from worker.price_book import PriceBook, load_price_book

BOOK = """
version = "test-1"
[models."*".realtime]
input = "1"
cached_input = "0.5"
output = "4.000001"
[models."*".batch]
input = "0.5"
cached_input = "0.25"
output = "2"
[models.large.realtime]
input = "10"
cached_input = "1"
output = "40"
[models.large.batch]
input = "5"
cached_input = "0.5"
output = "20"
"""


def load(tmp_path: Path, text: str) -> PriceBook:
    path = tmp_path / "prices.toml"
    path.write_text(text)
    return load_price_book(path)


def test_dollars_per_million_tokens_are_picodollars_per_token_times_a_million(tmp_path: Path):
    book = load(tmp_path, BOOK)
    assert book.version == "test-1"
    assert book.price("any", "realtime", "prompt", 1) == 1_000_000
    assert book.price("any", "realtime", "prompt_cached", 3) == 1_500_000
    assert book.price("any", "realtime", "output", 1_000_000) == 4_000_001_000_000


def test_a_model_with_a_table_of_its_own_is_priced_by_it_in_each_tier(tmp_path: Path):
    book = load(tmp_path, BOOK)
    assert book.price("large", "realtime", "output", 1) == 40_000_000
    assert book.price("large", "batch", "output", 1) == 20_000_000


@pytest.mark.parametrize("kind", ["draft_rejected", "drafted", "recomputed", "discarded"])
def test_what_nobody_owes_has_a_price_of_zero(tmp_path: Path, kind):
    assert load(tmp_path, BOOK).price("any", "realtime", kind, 100) == 0


def test_the_ceiling_is_the_price_with_nothing_cached_and_everything_generated(tmp_path: Path):
    assert load(tmp_path, BOOK).ceiling(10, 20, "batch", "large") == 10 * 5_000_000 + 20 * 20_000_000


def test_the_shipped_book_prices_batch_at_half():
    book = load_price_book()
    for kind in ("prompt", "prompt_cached", "output"):
        realtime = book.price("any", "realtime", kind, 1)
        assert realtime > 0
        assert 2 * book.price("any", "batch", kind, 1) == realtime


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('output = "4.000001"', 'output = "4.0000001"', r'models\."\*"\.realtime\.output: .* at most 6 decimal places'),
        ('output = "4.000001"', 'output = "-4"', r'models\."\*"\.realtime\.output: .* negative'),
        ('output = "4.000001"', 'output = "4e2"', r"realtime\.output: not an amount of dollars.*like \"0.25\""),
        ('output = "4.000001"', 'output = "4\\n"', r"realtime\.output: not an amount of dollars"),
        ('output = "4.000001"', 'output = "100000.01"', "more than 100000 dollars"),
        ('output = "4.000001"', "output = 4.0", r"Expected `str`, got `float` - at `.*\.realtime\.output`"),
        ('output = "4.000001"', "", "missing required field `output`"),
        ('output = "4.000001"', 'outptu = "4"\noutput = "4"', "unknown field `outptu`"),
        ("[models.large.batch]", "[models.large.bulk]", "missing required field `batch`|unknown field `bulk`"),
        ('"*"', "small", r'no \[models\."\*"\]'),
        ('version = "test-1"', "", "missing required field `version`"),
        ('version = "test-1"', 'version = "', "prices.toml is not valid"),
    ],
)  # fmt: skip
def test_a_book_that_is_not_exact_is_refused_with_its_place(tmp_path: Path, old: str, new: str, complaint: str):
    with pytest.raises(Misconfigured, match=complaint) as refusal:
        load(tmp_path, BOOK.replace(old, new))
    assert "prices.toml" in str(refusal.value)


def test_a_book_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(Misconfigured, match=r"nowhere\.toml cannot be read"):
        load_price_book(tmp_path / "nowhere.toml")
