"""Every nanosecond is idle or charged, and the shares follow the work."""

from hypothesis import given
from hypothesis import strategies as st

from engine.metering import Meter, apportion, work_in_vain, work_of
from engine.sequence import Sequence
from engine.types import Charge, Request, Sampling, StepResult, Work


class Clock:
    """Stands still until moved."""

    def __init__(self) -> None:
        self.now_ns = 500

    def __call__(self) -> int:
        return self.now_ns


def output(num_tokens: int, request: int = 0) -> Charge:
    return Charge(request=request, choice=0, work=Work.OUTPUT, num_tokens=num_tokens, index=1)


def drafted(num_tokens: int, request: int = 0) -> Charge:
    return Charge(request=request, choice=0, work=Work.DRAFTED, num_tokens=num_tokens)


def settled(meter: Meter, *charges: Charge, drafting_ns: int = 0) -> tuple[int, list[int]]:
    """The idle time, and what each was charged."""
    result = StepResult(charges=list(charges))
    meter.settle(result, drafting_ns)
    return result.idle_ns, [charge.device_ns for charge in result.charges]


@given(st.integers(0, 10**15), st.lists(st.integers(0, 10**6), max_size=50))
def test_the_parts_make_up_the_whole_and_none_is_off_by_one(total, weights):
    parts = apportion(total, weights)
    assert sum(parts) == (total if sum(weights) else 0)
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part * sum(weights) - total * weight) < max(1, sum(weights))


def test_what_rounding_leaves_goes_to_whoever_comes_next():
    assert apportion(10, [1, 1, 4]) == [1, 2, 7]
    assert apportion(100, [1, 0, 2, 4]) == [14, 0, 28, 58]


def test_idle_time_and_charges_are_the_time_that_passed():
    clock = Clock()
    meter = Meter(clock)
    clock.now_ns += 1_000  # before the loop: nobody's
    meter.start()
    clock.now_ns += 30
    meter.wake()
    clock.now_ns += 100
    assert settled(meter, output(3), output(1, request=1)) == (30, [75, 25])
    clock.now_ns += 7
    assert settled(meter, output(1)) == (0, [7])


def test_a_step_that_computes_nothing_is_idle():
    clock = Clock()
    meter = Meter(clock)
    clock.now_ns += 40
    assert settled(meter) == (40, [])


def test_a_models_drafting_shares_its_own_time_and_no_other():
    clock = Clock()
    meter = Meter(clock)
    clock.now_ns += 100
    charges = [output(1), output(4, request=1), drafted(1), drafted(2, request=1)]
    assert settled(meter, *charges, drafting_ns=30) == (0, [14, 56, 10, 20])


def test_drafting_that_computed_nothing_is_a_part_of_the_step():
    clock = Clock()
    meter = Meter(clock)
    clock.now_ns += 100
    assert settled(meter, output(1), drafting_ns=30) == (0, [100])


def share_of(prompt: list[int], output: list[int], drafts: list[int], num_computed: int, num_reached: int, budget: int):
    sequence = Sequence(
        request=Request(id=3, prompt=tuple(prompt), sampling=Sampling(tokens_max=100)),
        choice=1,
        rank=(0, 0, 0),
        length_max=1000,
    )
    sequence.tokens += output
    sequence.drafts = drafts
    sequence.num_computed, sequence.num_reached = num_computed, num_reached
    return sequence.share(budget)


def spent(work: Work, num_tokens: int, index: int | None = None) -> Charge:
    return Charge(request=3, choice=1, work=work, num_tokens=num_tokens, index=index)


def test_a_part_of_a_prompt_is_prompt():
    assert work_of(share_of([1] * 9, [], [], 2, 2, 4), 0) == [spent(Work.PROMPT, 4)]


def test_the_first_token_comes_of_the_prompts_last_and_costs_nothing_more():
    assert work_of(share_of([1] * 9, [], [], 2, 2, 99), 1) == [spent(Work.PROMPT, 7), spent(Work.OUTPUT, 0, 0)]


def test_a_decode_is_its_token():
    assert work_of(share_of([1] * 9, [2, 3], [], 10, 10, 99), 1) == [spent(Work.OUTPUT, 1, 2)]


def test_drafts_are_output_or_rejected():
    share = share_of([1] * 9, [2, 3], [4, 5, 6], 10, 10, 99)
    assert work_of(share, 3) == [spent(Work.REJECTED, 1), *(spent(Work.OUTPUT, 1, index) for index in (2, 3, 4))]


def test_what_was_computed_before_is_recomputed():
    share = share_of([1] * 9, [2, 3], [], 0, 10, 99)
    assert work_of(share, 1) == [spent(Work.RECOMPUTED, 10), spent(Work.OUTPUT, 1, 2)]


def test_a_preempted_prompt_is_part_recomputed_part_prompt():
    share = share_of([1] * 9, [], [], 0, 4, 99)
    assert work_of(share, 1) == [spent(Work.RECOMPUTED, 4), spent(Work.PROMPT, 5), spent(Work.OUTPUT, 0, 0)]


def test_work_that_brought_nothing_was_rejected():
    assert work_of(share_of([1] * 9, [2, 3], [], 10, 10, 99), 0) == [spent(Work.REJECTED, 1)]


def test_a_share_whose_sequence_had_ended_was_rejected_whatever_it_was():
    assert work_in_vain(share_of([1] * 9, [], [], 2, 5, 99)) == spent(Work.REJECTED, 7)
