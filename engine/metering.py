"""Where the device's time went: every nanosecond is idle or charged to a sequence, and no nanosecond twice.

Owns the clock and the sharing out. Never knows a price: the worker turns device time into cost. Work comes from the
scheduler's commit, charges go out with the step's result.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from operator import add

from engine.sequence import Proposed, Share
from engine.types import Charge, Work


@dataclass(frozen=True, slots=True)
class Spent:
    """Work that a step did for one choice, in tokens computed. The one token of an OUTPUT has its `index`."""

    request: int
    choice: int
    work: Work
    num_tokens: int
    index: int | None = None


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

    def settle(self, spent: list[Spent], drafting_ns: int = 0) -> tuple[int, list[Charge]]:
        """A step is over: (idle_ns, charges), together exactly the time since the one before ended.

        The step's time is shared out by the tokens computed; one that computed nothing was idle. `drafting_ns` of it
        belong to the drafting alone, if a model drafted: one of its tokens costs less.
        """
        step_ns, idle_ns = self._lap(), self._idle_ns
        self._idle_ns = 0
        if not any(work.num_tokens for work in spent):
            idle_ns, step_ns = idle_ns + step_ns, 0
        is_drafted = [work.work is Work.DRAFTED for work in spent]
        drafting_ns = min(step_ns, drafting_ns) if any(is_drafted) else 0
        by_draft = apportion(drafting_ns, [work.num_tokens * own for work, own in zip(spent, is_drafted, strict=True)])
        by_step = apportion(
            step_ns - drafting_ns, [work.num_tokens * (not own) for work, own in zip(spent, is_drafted, strict=True)]
        )
        parts = map(add, by_draft, by_step)
        return idle_ns, [
            Charge(
                request=work.request,
                choice=work.choice,
                work=work.work,
                num_tokens=work.num_tokens,
                device_ns=device_ns,
                index=work.index,
            )
            for work, device_ns in zip(spent, parts, strict=True)
        ]

    def _lap(self) -> int:
        now_ns = self._clock()
        lap_ns, self._mark_ns = now_ns - self._mark_ns, now_ns
        return lap_ns


def apportion(total: int, weights: list[int]) -> list[int]:
    """Integers in the ratio of `weights` whose sum is `total`: the largest remainders get what rounding down leaves."""
    whole = sum(weights)
    if not whole:
        return [0] * len(weights)
    parts = [total * weight // whole for weight in weights]
    left = total - sum(parts)
    by_remainder = sorted(range(len(weights)), key=lambda place: total * weights[place] % whole, reverse=True)
    for place in by_remainder[:left]:
        parts[place] += 1
    return parts


def work_of(share: Share, num_accepted: int) -> list[Spent]:
    """What a share's tokens were computed for, before its sequence accepts `num_accepted` tokens.

    A token's charge is the computation that it was sampled behind. For the first output token that is the prompt's last
    token, which is prompt: its own charge has no tokens and no time. Rows that brought nothing were rejected.
    """
    sequence = share.sequence
    if sequence.num_output and num_accepted == len(share.tokens) == 1 and share.start >= sequence.num_reached:
        # A decode, as most are: what is below says the same in three times the time.
        return [Spent(sequence.request.id, sequence.choice, Work.OUTPUT, 1, sequence.num_output)]
    num_again = share.num_again
    num_prompt = max(0, min(share.stop, sequence.num_prompt) - share.start - num_again)
    num_rejected = len(share.tokens) - num_again - num_prompt

    def spent(work: Work, num_tokens: int, index: int | None = None) -> Spent:
        return Spent(sequence.request.id, sequence.choice, work, num_tokens, index)

    outputs = []
    for index in range(sequence.num_output, sequence.num_output + num_accepted):
        outputs.append(spent(Work.OUTPUT, min(index, 1), index))
        num_rejected -= min(index, 1)
    others = ((Work.RECOMPUTED, num_again), (Work.PROMPT, num_prompt), (Work.REJECTED, num_rejected))
    return [spent(work, num_tokens) for work, num_tokens in others if num_tokens] + outputs


def work_in_vain(share: Share) -> Spent:
    """What a share was computed for whose sequence ended while the step was underway: all of it was on trial."""
    return Spent(share.sequence.request.id, share.sequence.choice, Work.REJECTED, len(share.tokens))


def drafting_of(proposed: Proposed) -> list[Spent]:
    """The work of the model that drafted, if one did."""
    return [
        Spent(sequence.request.id, sequence.choice, Work.DRAFTED, num_tokens)
        for sequence, num_tokens in proposed.nums_computed.items()
    ]
