"""Where the device's time went: every nanosecond is idle or charged to a sequence, and no nanosecond twice.

Owns the clock and the sharing out. Never knows a price: the worker turns device time into cost. Work comes from the
scheduler's commit, charges go out with the step's result.
"""

import time
from collections.abc import Callable
from itertools import accumulate
from operator import sub

from engine.sequence import Proposed, Sequence, Share
from engine.types import Charge, StepResult, Work

OUTPUT, DRAFTED = Work.OUTPUT, Work.DRAFTED  # in Python 3.11 to look a member up takes as long as to make a Charge


class Meter:
    """Time from the start of the loop to now, cut into steps without a gap."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._mark_ns = clock()
        self._idle_ns = 0

    def start(self) -> None:
        """The loop begins now; what was before belongs to nobody."""
        self._mark_ns = self._clock()
        self._idle_ns = 0

    def wake(self) -> None:
        """The time since the last step was spent waiting for work."""
        self._idle_ns += self._lap()

    def now_ns(self) -> int:
        """The time by the meter's clock, to measure a part of a step by."""
        return self._clock()

    def settle(self, result: StepResult, drafting_ns: int = 0) -> int:
        """A step is over: its idle time and its charges are together exactly the time since the one before ended.

        The step's time is shared out by the tokens computed; one that computed nothing was idle. `drafting_ns` of it
        belong to the drafting alone, if a model drafted: one of its tokens costs less. Returns the sum of the charges.
        """
        step_ns, charges = self._lap(), result.charges
        drafted = [charge for charge in charges if charge.work is DRAFTED]
        others = [charge for charge in charges if charge.work is not DRAFTED] if drafted else charges
        charged_ns = _share_out(min(step_ns, drafting_ns), drafted)
        charged_ns += _share_out(step_ns - charged_ns, others)
        result.idle_ns, self._idle_ns = self._idle_ns + step_ns - charged_ns, 0
        return charged_ns

    def _lap(self) -> int:
        now_ns = self._clock()
        lap_ns, self._mark_ns = now_ns - self._mark_ns, now_ns
        return lap_ns


def _share_out(total_ns: int, charges: list[Charge]) -> int:
    """Each charge has its part by its tokens. Returns the parts' sum: 0 where there is no token."""
    parts = apportion(total_ns, [charge.num_tokens for charge in charges])
    for charge, device_ns in zip(charges, parts, strict=True):
        charge.device_ns = device_ns
    return sum(parts)


def apportion(total: int, weights: list[int]) -> list[int]:
    """Integers in the ratio of `weights` with the sum `total`: it is their running sum that is rounded, down."""
    whole = sum(weights)
    if not whole:
        return [0] * len(weights)
    marks = [total * weight // whole for weight in accumulate(weights)]
    return list(map(sub, marks, [0, *marks]))


def work_of(share: Share, num_accepted: int) -> list[Charge]:
    """What a share's tokens were computed for, before its sequence accepts `num_accepted` tokens.

    A token's charge is the computation that it was sampled behind. For the first output token that is the prompt's last
    token, which is prompt: its own charge has no tokens and no time. Rows that brought nothing were rejected.
    """
    sequence = share.sequence
    num_output = sequence.num_output
    if num_output and num_accepted == len(share.tokens) == 1 and share.start >= sequence.num_reached:
        # A decode, as most are: what is below says the same in three times the time.
        request, choice = sequence.request.id, sequence.choice
        return [Charge(request=request, choice=choice, work=OUTPUT, num_tokens=1, index=num_output)]
    num_again = share.num_again
    num_prompt = max(0, min(share.stop, sequence.num_prompt) - share.start - num_again)
    num_rejected = len(share.tokens) - num_again - num_prompt
    outputs = []
    for index in range(num_output, num_output + num_accepted):
        outputs.append(_charge(sequence, OUTPUT, min(index, 1), index))
        num_rejected -= min(index, 1)
    others = ((Work.RECOMPUTED, num_again), (Work.PROMPT, num_prompt), (Work.REJECTED, num_rejected))
    return [_charge(sequence, work, num_tokens) for work, num_tokens in others if num_tokens] + outputs


def work_in_vain(share: Share) -> Charge:
    """What a share was computed for whose sequence ended while the step was underway: all of it was on trial."""
    return _charge(share.sequence, Work.REJECTED, len(share.tokens))


def drafting_of(proposed: Proposed) -> list[Charge]:
    """The work of the model that drafted, if one did."""
    return [_charge(sequence, DRAFTED, num_tokens) for sequence, num_tokens in proposed.nums_computed.items()]


def _charge(sequence: Sequence, work: Work, num_tokens: int, index: int | None = None) -> Charge:
    return Charge(request=sequence.request.id, choice=sequence.choice, work=work, num_tokens=num_tokens, index=index)
