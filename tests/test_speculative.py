"""How many drafts are worth their work is learned; what is kept is what would have been sampled anyway."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.sampler import uniform
from engine.speculative import (
    COST_AT_START,
    OUTLIER,
    TRIAL_SAVED_MAX,
    TRIAL_SHARE,
    Acceptance,
    Cost,
    DraftCosts,
    StepTimes,
    Trials,
    nums_worth,
    verify,
)


def learned(fixed_ns: float, token_ns: float, nums_tokens: list[int]) -> StepTimes:
    times = StepTimes()
    for num_tokens in nums_tokens:
        times.learn(num_tokens, fixed_ns + token_ns * num_tokens)
    return times


def test_a_token_more_costs_what_steps_of_several_sizes_have_shown():
    times = learned(9e6, 1e6, [1, 9, 2, 17, 4] * 20)
    assert times.slope() == pytest.approx(1e6, rel=0.05)
    assert times.at(1) == pytest.approx(10e6, rel=0.05)


def test_of_steps_of_one_size_a_guess_is_made():
    assert learned(9e6, 1e6, [4] * 50).slope() == pytest.approx(COST_AT_START * 13e6 / 4)


def test_steps_that_hardly_differ_in_size_do_not_overrule_the_guess_by_their_noise():
    """Times stray by a fifth, and few steps have a token more: by least squares alone the cost would be anything."""
    dice, slopes = random.Random(1), []
    for _ in range(200):
        times = StepTimes()
        for number in range(50):
            times.learn(8 + (number % 12 == 0), 13e6 * dice.uniform(0.8, 1.2))
        slopes.append(8 * times.slope() / 13e6)
    assert 0.5 * COST_AT_START < min(slopes) < max(slopes) < 1.5 * COST_AT_START


def test_the_times_follow_a_machine_that_changes():
    times = learned(9e6, 1e5, [1, 17] * 50)
    for num_tokens in [1, 17] * 300:
        times.learn(num_tokens, 5e6 * num_tokens)
    assert times.slope() == pytest.approx(5e6, rel=0.05)
    assert times.at(17) == pytest.approx(85e6, rel=0.05)


def test_a_step_that_was_held_up_counts_no_more_than_an_outlier_may():
    times = learned(9e6, 1e6, [1, 5] * 50)
    before = times.at(1)
    times.learn(1, 1e12)
    assert times.at(1) < before * (1 + OUTLIER / 20)


def test_a_fixed_cost_is_not_measured():
    costs = DraftCosts(0.25)
    costs.steps.learn(1, 1)
    costs.passes.learn(9, 1_000_000)
    assert costs.of(num_sampling=5, num_drafting=2) == Cost(0.05, 0.0)


def test_what_is_measured_is_told_in_steps():
    costs = DraftCosts(None)
    assert costs.of(4, 4) == Cost(COST_AT_START / 4)
    for num_tokens in [4, 12] * 100:
        costs.steps.learn(num_tokens, 8e6 + 1e6 * num_tokens)
        costs.passes.learn(num_tokens, 2e6 + 0.5e6 * num_tokens)
    cost = costs.of(num_sampling=4, num_drafting=2)
    assert cost.per_draft == pytest.approx(1 / 12, rel=0.1)
    assert cost.per_pass == pytest.approx(3 / 12, rel=0.1)


def test_a_sequences_rate_begins_with_the_others_and_becomes_its_own():
    own = Acceptance(memory=0.9)
    assert own.rate(prior=0.8, weight=2.0) == 0.8
    for _ in range(50):
        own.learn(num_drafted=2, num_accepted=0)
    assert own.rate(prior=0.8, weight=2.0) < 0.2


def test_drafts_behind_the_first_wrong_one_are_not_held_against_it():
    many, few = Acceptance(0.9), Acceptance(0.9)
    many.learn(num_drafted=4, num_accepted=1)
    few.learn(num_drafted=2, num_accepted=1)
    assert many.rate(0.5, 1.0) == few.rate(0.5, 1.0)


def test_drafts_that_cost_nothing_are_all_worth_it():
    assert nums_worth([0.1, 0.9], [4, 2], 2, budget=100, cost=Cost(0.0)) == [4, 2]


def test_drafts_that_cost_more_than_they_bring_are_not():
    assert nums_worth([0.2], [8], 1, budget=100, cost=Cost(0.3)) == [0]


def test_the_likelier_sequence_drafts_further():
    nums = nums_worth([0.95, 0.7, 0.01], [8, 8, 8], 3, budget=100, cost=Cost(0.1))
    assert nums[0] > nums[1] > nums[2] == 0


def test_a_pass_pays_where_many_draft_in_it():
    """A pass costs the same whether one or eight sequences draft, and a step brings the others a token each."""
    alone = nums_worth([0.8] + [0.0] * 7, [4] * 8, 8, budget=100, cost=Cost(0.02, per_pass=0.3))
    together = nums_worth([0.8] * 8, [4] * 8, 8, budget=100, cost=Cost(0.02, per_pass=0.3))
    assert sum(alone) == 0
    assert all(together)


def test_never_more_than_there_is_budget_for():
    assert sum(nums_worth([0.9] * 4, [8] * 4, 4, budget=5, cost=Cost(0.0))) == 5
    assert nums_worth([0.9], [8], 1, budget=0, cost=Cost(0.0)) == [0]


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3)), min_size=1, max_size=3),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
)
def test_no_other_choice_of_as_many_drafts_would_bring_more(sequences, per_draft, per_pass):
    """Against all choices there are, by the definition."""
    rates, nums_max = [rate for rate, _ in sequences], [num for _, num in sequences]
    if not max(nums_max):
        return

    def gain(nums: tuple[int, ...] | list[int]) -> float:
        tokens = len(rates) + sum(
            rate**depth for rate, num in zip(rates, nums, strict=True) for depth in range(1, num + 1)
        )
        return tokens / (1 + per_draft * sum(nums) + per_pass * max(nums))

    best = max(gain(nums) for nums in itertools.product(*(range(num + 1) for num in nums_max)))
    chosen = nums_worth(rates, nums_max, len(rates), budget=100, cost=Cost(per_draft, per_pass))
    # With passes that cost, the likeliest are not always the best: a deep draft may ask for a pass of its own.
    assert gain(chosen) >= (best * (1 - 1e-9) if per_pass == 0 else len(rates) * (1 - 1e-9))


def test_trials_cost_no_more_than_their_share_of_the_time():
    trials, cost = Trials(), 0.4
    num_trials = sum(trials.may(cost) for _ in range(10_000))
    assert num_trials == pytest.approx((TRIAL_SAVED_MAX + 10_000 * TRIAL_SHARE) / cost, abs=1)


def test_what_costs_more_than_may_be_saved_is_tried_all_the_same_and_paid_for_later():
    trials, cost = Trials(), 5 * TRIAL_SAVED_MAX
    num_trials = sum(trials.may(cost) for _ in range(10_000))
    assert 0 < num_trials <= (TRIAL_SAVED_MAX + 10_000 * TRIAL_SHARE) / cost + 1


@given(st.lists(st.integers(0, 2), max_size=6), st.data())
def test_the_kept_are_the_sampled_up_to_the_first_that_was_not_drafted(drafts, data):
    sampled = data.draw(st.lists(st.integers(0, 2), min_size=len(drafts) + 1, max_size=len(drafts) + 1))
    kept = verify(drafts, sampled)
    assert kept == sampled[: len(kept)]
    assert kept[:-1] == drafts[: len(kept) - 1]
    assert len(kept) == len(sampled) or kept[-1] != drafts[len(kept) - 1]


def test_uniforms_are_uniform_and_each_of_seed_choice_and_position_counts():
    places = itertools.product(range(20), range(5), range(50))
    draws = np.array([uniform(*place) for place in places])
    assert len(set(draws)) == len(draws)
    # 5000 draws: a share strays from a tenth by 0.0042 (one standard deviation); 0.02 is nearly five.
    shares = np.histogram(draws, bins=10, range=(0, 1))[0] / len(draws)
    assert abs(shares - 0.1).max() < 0.02
