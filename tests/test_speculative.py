"""Drafts are found, judged and given up; what is kept is what would have been sampled anyway."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.sampler import uniform
from engine.sequence import Sequence
from engine.speculative import COST_AT_START, DraftCost, Drafting, verify
from engine.types import Request, Sampling
from tests.scripted_model import Script, scripted_engine


def learned(fixed_ns: int, token_ns: int, nums_tokens: list[int]) -> DraftCost:
    cost = DraftCost(None)
    for num_tokens in nums_tokens:
        cost.learn(num_tokens, fixed_ns + token_ns * num_tokens)
    return cost


def test_a_draft_costs_what_steps_of_several_sizes_have_shown():
    cost = learned(9_000_000, 1_000_000, [1, 3, 1, 5, 2] * 20)
    assert cost.share(1) == pytest.approx(1 / 10)
    assert cost.share(9) == pytest.approx(9 / 18), "nine sequences with a draft each are nine tokens more"


def test_steps_of_one_size_say_nothing_of_drafts():
    assert learned(9_000_000, 1_000_000, [4] * 50).share(4) == COST_AT_START
    assert DraftCost(None).share(4) == COST_AT_START


def test_the_cost_follows_a_machine_that_changes():
    cost = learned(9_000_000, 100_000, [1, 5] * 50)
    for num_tokens in [1, 5] * 200:
        cost.learn(num_tokens, 5_000_000 * num_tokens)
    assert cost.share(1) == pytest.approx(1.0, abs=0.05)


def test_a_fixed_cost_is_not_measured():
    cost = DraftCost(0.25)
    cost.learn(1, 1)
    cost.learn(9, 1_000_000)
    assert cost.share(3) == 0.25


def test_what_followed_the_last_tokens_is_proposed():
    assert Drafting(4).propose([1, 2, 3, 4, 5, 6, 9, 2, 3], 4, 0.0) == [4, 5, 6, 9]


def test_the_latest_sequel_wins():
    assert Drafting(4).propose([1, 2, 7, 7, 1, 2, 8, 8, 1, 2], 2, 0.0) == [8, 8]


def test_a_longer_match_goes_before_a_later_one():
    assert Drafting(4).propose([5, 1, 2, 7, 9, 1, 2, 8, 5, 1, 2], 1, 0.0) == [7]


def test_a_sequel_that_reaches_the_end_goes_on_as_a_loop():
    assert Drafting(4).propose([9, 1, 2, 1, 2], 4, 0.0) == [1, 2, 1, 2]


def test_nothing_is_proposed_where_nothing_repeats():
    assert Drafting(4).propose([1, 2, 3, 4, 5], 4, 0.0) == []
    assert Drafting(4).propose([1], 4, 0.0) == []


def test_never_more_than_there_is_room_for():
    assert Drafting(4).propose([1, 2, 1, 2], 1, 0.0) == [1]
    assert Drafting(4).propose([1, 2, 1, 2], 0, 0.0) == []
    assert Drafting(4).propose([1, 2, 1, 2], -1, 0.0) == []


def test_tokens_may_come_a_few_at_a_time():
    grown, whole = Drafting(4), Drafting(4)
    tokens = [1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2]
    for length in (1, 2, 6, 7):
        grown.propose(tokens[:length], 4, 0.0)
    assert grown.propose(tokens, 4, 0.0) == whole.propose(tokens, 4, 0.0)


def test_drafts_that_lose_are_given_up_and_tried_again_later():
    tokens, drafted = [1, 2] * 10, Drafting(4)
    assert drafted.propose(tokens, 4, 0.3)
    for _ in range(20):
        drafted.learn(num_drafted=2, num_accepted=0)
    assert drafted.propose(tokens, 4, 0.3) == []
    assert any(drafted.propose(tokens, 4, 0.3) for _ in range(200))


def test_drafts_that_win_grow_to_the_most_allowed():
    drafted = Drafting(6)
    for _ in range(20):
        drafted.learn(num_drafted=2, num_accepted=2)
    assert len(drafted.propose([1, 2] * 10, 100, 0.1)) == 6


def test_no_draft_stands_where_its_successor_could_not():
    asked = Request(id=0, prompt=(1, 2, 1, 2), sampling=Sampling(tokens_max=3))
    sequence = Sequence(request=asked, choice=0, rank=(0, 0, 0), length_max=7, drafting=Drafting(4))
    sequence.reach(3)
    sequence.draft(0.0)
    assert sequence.drafts == [1, 2]  # and the step's own token makes three


def test_drafts_behind_the_first_wrong_one_are_not_held_against_it():
    many, few = Drafting(4), Drafting(4)
    many.learn(num_drafted=4, num_accepted=1)
    few.learn(num_drafted=2, num_accepted=1)
    assert many._rate == few._rate


@given(st.lists(st.integers(0, 2), max_size=6), st.data())
def test_the_kept_are_the_sampled_up_to_the_first_that_was_not_drafted(drafts, data):
    sampled = data.draw(st.lists(st.integers(0, 2), min_size=len(drafts) + 1, max_size=len(drafts) + 1))
    kept = verify(drafts, sampled)
    assert kept == sampled[: len(kept)]
    assert kept[:-1] == drafts[: len(kept) - 1]
    assert len(kept) == len(sampled) or kept[-1] != drafts[len(kept) - 1]


def test_a_looping_text_takes_fewer_steps_and_is_the_same_text():
    script = Script(vocab_size=5, memory=1)
    asked = Request(id=0, prompt=(1, 2, 3), sampling=Sampling(tokens_max=100))
    plain, drafting = scripted_engine(script), scripted_engine(script, drafts_max=4)
    outputs = []
    for engine in (plain, drafting):
        engine.core.submit(asked)
        output: list[int] = []
        while engine.core.has_work:
            output += [token.token for token in engine.core.step().tokens]
        outputs.append(output)
    assert outputs[0] == outputs[1] == script.tokens_of(asked)
    assert drafting.core.stats().num_steps < plain.core.stats().num_steps / 3


def test_uniforms_are_uniform_and_each_of_seed_choice_and_position_counts():
    places = itertools.product(range(20), range(5), range(50))
    draws = np.array([uniform(*place) for place in places])
    assert len(set(draws)) == len(draws)
    # 5000 draws: a share strays from a tenth by 0.0042 (one standard deviation); 0.02 is nearly five.
    shares = np.histogram(draws, bins=10, range=(0, 1))[0] / len(draws)
    assert abs(shares - 0.1).max() < 0.02
