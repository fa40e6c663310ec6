"""How many drafts are worth their work, and which of them are kept: numbers alone.

Owns what is learned of drafts, the rates at which they are kept and what they cost, and the choice that follows. Where
drafts come from is a drafter's affair (`drafting.py`). Drafts are pending tokens like any other, and the model's own
choice behind each of them decides.

Every position is sampled with that position's own random number whether a draft stands there or not, and a draft is
kept as long as it equals what was sampled. So the output is that of plain decoding, token for token, under greedy and
under seeded sampling alike. Nothing is lost against rejection sampling (Leviathan et al., arXiv 2211.17192): a
proposal with all its probability on one token is kept there with the target's probability p(draft), and here too, for
that is how often the sample equals it.
"""

from dataclasses import dataclass

import numpy as np

RATE_AT_START = 0.5  # expected share of drafts kept before anything is measured
START_WEIGHT = 4.0  # in drafts: some steps' outcomes count for more than this guess
PRIOR_WEIGHT = 1.0  # in drafts: what other sequences kept, against a sequence's own outcomes
SEQUENCE_MEMORY = 0.9  # weight of the past at each verification: a change of text shows within about ten
ENGINE_MEMORY = 0.98  # the same of all sequences together: about fifty

COST_AT_START = 0.3  # of a token more for every sequence; int8 weights ask for 0.1 with one and for 0.35 with eight
TIMES_MEMORY = 0.98  # weight of the past at each step: fifty steps, some seconds
SLOPE_WEIGHT = 2.0  # in tokens^2, as if so much spread spoke for COST_AT_START: step times stray by a fifth or more
OUTLIER = 3.0  # a step that took so many times as long as expected was disturbed, and counts as if it took that

TRIAL_SHARE = 0.01  # of the time: what drafts may cost that are only tried to learn whether they have come to pay
TRIAL_SAVED_MAX = 1.0  # in steps: what may be saved up for trials


class Acceptance:
    """The rate at which drafts are kept: of one sequence, with that of all as its prior, or of all."""

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self._kept = self._judged = 0.0

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """Account for one verification of at least one draft."""
        # The drafts behind the first wrong one were never judged.
        self._kept = self._memory * self._kept + num_accepted
        self._judged = self._memory * self._judged + min(num_drafted, num_accepted + 1)

    def rate(self, prior: float, weight: float) -> float:
        """The chance of the next draft, the prior counting for as many drafts as `weight` says."""
        return (self._kept + weight * prior) / (self._judged + weight)


class StepTimes:
    """How long a step of T tokens takes, a + b T: a straight line through steps as they come, the newer the more."""

    def __init__(self) -> None:
        self._weight = self._tokens = self._times = self._squares = self._products = 0.0

    @property
    def is_known(self) -> bool:
        """Something was learned."""
        return self._weight > 0

    def learn(self, num_tokens: float, time_ns: float) -> None:
        """Account for one step."""
        if self.is_known:
            time_ns = min(time_ns, OUTLIER * self.at(num_tokens))
        new = (1.0, num_tokens, time_ns, num_tokens**2, num_tokens * time_ns)
        old = (self._weight, self._tokens, self._times, self._squares, self._products)
        self._weight, self._tokens, self._times, self._squares, self._products = (
            TIMES_MEMORY * past + now for past, now in zip(old, new, strict=True)
        )

    def at(self, num_tokens: float) -> float:
        """The time of a step of so many tokens, ns; 0 where nothing is known."""
        if not self._weight:
            return 0.0
        slope = self.slope()
        at_none = max(0.0, (self._times - slope * self._tokens) / self._weight)
        return at_none + slope * num_tokens

    def slope(self) -> float:
        """The time of one token more, ns. Where steps were all alike, a guess."""
        if not self._weight:
            return 0.0
        tokens, time = self._tokens / self._weight, self._times / self._weight
        spread = self._squares / self._weight - tokens**2
        guess = COST_AT_START * time / tokens
        return max(
            0.0, (self._products / self._weight - tokens * time + SLOPE_WEIGHT * guess) / (spread + SLOPE_WEIGHT)
        )


@dataclass(frozen=True)
class Cost:
    """Of drafts, in steps without any."""

    per_draft: float  # a token more to verify
    per_pass: float = 0.0  # a drafter's pass: the next draft of every sequence


class DraftCosts:
    """What drafts cost here, from the times of the steps themselves."""

    def __init__(self, fixed: float | None) -> None:
        """`fixed`: nothing is measured; so much is a draft for every sequence, and drafting itself is free."""
        self._fixed = fixed
        self.steps = StepTimes()  # of those that drafts may be a part of: without prompts
        self.passes = StepTimes()  # of the drafter

    def of(self, num_sampling: int, num_drafting: int) -> Cost:
        """In a step of so many sequences that sample, so many of which draft."""
        step_ns = self.steps.at(num_sampling)
        if self._fixed is not None:
            return Cost(self._fixed / num_sampling)
        if not step_ns:
            return Cost(COST_AT_START / num_sampling)
        return Cost(self.steps.slope() / step_ns, self.passes.at(num_drafting) / step_ns)


class Trials:
    """A small part of the time for drafts that should lose: what is not tried is not learned, and texts change."""

    def __init__(self) -> None:
        self._saved = TRIAL_SAVED_MAX  # in steps; a new engine may try at once

    def may(self, cost: float) -> bool:
        """Whether a trial that costs so much, in steps, is due now; asked once a step."""
        self._saved = min(self._saved + TRIAL_SHARE, TRIAL_SAVED_MAX)
        if self._saved < min(cost, TRIAL_SAVED_MAX):
            return False
        self._saved -= cost
        return True


def nums_worth(rates: list[float], nums_max: list[int], num_sampling: int, budget: int, cost: Cost) -> list[int]:
    """For each sequence the number of drafts that together bring the most tokens for the time; 0 for all if none do.

    A draft counts with the chance that it is kept with all before it. The likeliest `n` of all are drafted, for the n
    that is best: `num_sampling` sequences bring a token each in one step's time, and drafts bring more in more.
    """
    depths = np.arange(1, max(nums_max) + 1)  # (K,)
    chances = np.array(rates)[:, None] ** depths  # (S, K)
    chances[depths > np.array(nums_max)[:, None]] = 0
    order = np.argsort(-chances, axis=None, kind="stable")[: max(0, budget)]
    order = order[chances.ravel()[order] > 0]
    owners, places = np.divmod(order, len(depths))
    tokens = num_sampling + chances.ravel()[order].cumsum()
    passes = np.maximum.accumulate(places + 1) if len(order) else places
    gains = tokens / (1 + cost.per_draft * np.arange(1, len(order) + 1) + cost.per_pass * passes)
    num = int(gains.argmax()) + 1 if len(order) and gains.max() > num_sampling else 0
    return [int(count) for count in np.bincount(owners[:num], minlength=len(rates))]


def verify(drafts: list[int], sampled: list[int]) -> list[int]:
    """The sampled tokens up to and with the first that is not as drafted; there is one more than drafted, or none."""
    num_kept = 0
    while num_kept < len(drafts) and drafts[num_kept] == sampled[num_kept]:
        num_kept += 1
    return sampled[: num_kept + 1]
