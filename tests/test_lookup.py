"""What followed when the last tokens were last seen is proposed."""

from engine.lookup import Index, PromptLookup
from tests.scripted_model import sequence_of


def proposed(tokens: list[int], num: int) -> list[int]:
    return Index().propose(tokens, num)


def test_what_followed_the_last_tokens_is_proposed():
    assert proposed([1, 2, 3, 4, 5, 6, 9, 2, 3], 4) == [4, 5, 6, 9]


def test_the_latest_sequel_wins():
    assert proposed([1, 2, 7, 7, 1, 2, 8, 8, 1, 2], 2) == [8, 8]


def test_a_longer_match_goes_before_a_later_one():
    assert proposed([5, 1, 2, 7, 9, 1, 2, 8, 5, 1, 2], 1) == [7]


def test_a_sequel_that_reaches_the_end_goes_on_as_a_loop():
    assert proposed([9, 1, 2, 1, 2], 4) == [1, 2, 1, 2]


def test_nothing_is_proposed_where_nothing_repeats():
    assert proposed([1, 2, 3, 4, 5], 4) == []
    assert proposed([1], 4) == []


def test_tokens_may_come_a_few_at_a_time():
    grown = Index()
    tokens = [1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2]
    for length in (1, 2, 6, 7):
        grown.propose(tokens[:length], 4)
    assert grown.propose(tokens, 4) == proposed(tokens, 4)


def test_each_sequence_has_its_own_past():
    lookup = PromptLookup()
    one, other, new = sequence_of([1, 2, 3, 1, 2]), sequence_of([1, 2, 4, 1, 2]), sequence_of([1, 2])
    assert [lookup.can_draft(sequence) for sequence in (one, other, new)] == [True, True, False]
    assert lookup.propose({one: 1, other: 1}).drafts == {one: [3], other: [4]}
