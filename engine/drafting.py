"""Drafts: tokens proposed to follow sequences, so that one step may accept several.

Owns who drafts in a step, and how many: `Drafting` adds drafts to a plan that is otherwise done. They get what is left
of the step's tokens and of the cache, so nothing waits or gives way for a trial. What they are is a `Drafter`'s affair,
which sees all that draft in a step at once.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol
from weakref import WeakKeyDictionary

from engine.blocks import BlockCache
from engine.scheduler import Plan
from engine.sequence import Accepted, Proposed, Sequence
from engine.speculative import (
    ENGINE_MEMORY,
    PRIOR_WEIGHT,
    RATE_AT_START,
    SEQUENCE_MEMORY,
    START_WEIGHT,
    Acceptance,
    DraftCosts,
    Trials,
    nums_worth,
)


class Drafter(Protocol):
    """Proposes what may follow. A proposal can be wrong, never harmful."""

    @property
    def num_seen_behind(self) -> int:
        """On how many tokens behind a block hangs what it keeps in the block."""
        ...

    def can_draft(self, sequence: Sequence) -> bool:
        """Whether it would propose anything for this sequence, all of whose tokens but the newest are computed."""
        ...

    def propose(self, wanted: Mapping[Sequence, int]) -> Proposed:
        """For each sequence as many drafts as wanted, or fewer. It holds blocks for all of them."""
        ...


class Drafting:
    """Adds drafts to plans, as many as pay by what was learned of them. One thread's."""

    def __init__(self, drafter: Drafter, blocks: BlockCache, drafts_max: int, fixed_cost: float | None = None) -> None:
        """`fixed_cost`: as in `DraftCosts`."""
        self._drafter = drafter
        self._blocks = blocks
        self._drafts_max = drafts_max
        self._costs = DraftCosts(fixed_cost)
        self._trials = Trials()
        self._overall = Acceptance(ENGINE_MEMORY)
        self._own: WeakKeyDictionary[Sequence, Acceptance] = WeakKeyDictionary()

    def extend(self, plan: Plan) -> None:
        """Sequences that have caught up in the plan have drafts in it, if they pay."""
        candidates = self._candidates(plan) if self._drafts_max and plan.budget else {}
        if not candidates:
            return
        num_sampling = sum(share.num_rows > 0 for share in plan.shares)
        wanted = self._wanted(candidates, num_sampling, plan.budget)
        # In the order of rank. Blocks that are held and not used in this step are used soon.
        wanted = {s: num for s, num in wanted.items() if self._blocks.extend(s, len(s.tokens) + num)}
        if wanted:
            proposed = self._drafter.propose(wanted)
            plan.propose(replace(proposed, drafts={s: _allowed(s, drafts) for s, drafts in proposed.drafts.items()}))

    def learn(self, plan: Plan, accepted: list[Accepted], step_ns: int) -> None:
        """What became of the plan's drafts, and how long the step took, with the drafting."""
        if not self._drafts_max:
            return
        for share, brought in zip(plan.shares, accepted, strict=True):
            if share.num_drafts and not brought.error:
                for rate in (self._overall, self._own.setdefault(share.sequence, Acceptance(SEQUENCE_MEMORY))):
                    rate.learn(share.num_drafts, len(brought.tokens) - 1)
        if plan.shares and all(share.num_rows == len(share.tokens) for share in plan.shares):
            self._costs.steps.learn(sum(len(share.tokens) for share in plan.shares), step_ns - plan.drafting_ns)
        self._learn_passes(plan.proposed, plan.drafting_ns)

    def _candidates(self, plan: Plan) -> dict[Sequence, int]:
        """Who may draft, and how many at most."""
        # A step accepts one token more than drafts, and none may pass length_max.
        nums_max = {
            share.sequence: min(self._drafts_max, share.sequence.length_max - len(share.sequence.tokens) - 1)
            for share in plan.shares
            if share.num_rows == len(share.tokens) == 1
        }
        return {s: num for s, num in nums_max.items() if num > 0 and self._drafter.can_draft(s)}

    def _wanted(self, candidates: dict[Sequence, int], num_sampling: int, budget: int) -> dict[Sequence, int]:
        """How many drafts each shall have, of those that shall have any."""
        cost = self._costs.of(num_sampling, len(candidates))
        rates = [self._rate(sequence) for sequence in candidates]
        nums = nums_worth(rates, list(candidates.values()), num_sampling, budget, cost)
        if not any(nums) and self._trials.may(cost.per_draft * len(candidates) + cost.per_pass):
            nums = [1] * min(len(candidates), budget)
        return {sequence: num for sequence, num in zip(candidates, nums, strict=False) if num}

    def _rate(self, sequence: Sequence) -> float:
        overall, own = self._overall.rate(RATE_AT_START, START_WEIGHT), self._own.get(sequence)
        return own.rate(overall, PRIOR_WEIGHT) if own else overall

    def _learn_passes(self, proposed: Proposed, drafting_ns: int) -> None:
        num_computed = sum(proposed.nums_computed.values())
        # With two tokens or less for a sequence nobody caught up on a prompt, which is not what a draft costs.
        if num_computed and num_computed <= 2 * proposed.num_passes * len(proposed.nums_computed):
            num_passes = proposed.num_passes
            self._costs.passes.learn(num_computed / num_passes, drafting_ns / num_passes)


def _allowed(sequence: Sequence, drafts: list[int]) -> list[int]:
    return sequence.steering.allowed(sequence.tokens, drafts) if sequence.steering else drafts
