"""Drafts get what a step has left, pay or are given up, and come from models that know just what the target knows."""

import random
from collections.abc import Mapping
from typing import Any

import pytest

from engine.drafting import Drafter
from engine.model_drafter import OwnCache
from engine.sequence import Proposed, Sequence, Share, block_table
from engine.types import Finished, Request, Sampling, Work
from tests.scripted_model import (
    Erring,
    Script,
    ScriptedEngine,
    heads_drafter,
    own_drafter,
    scripted_engine,
    sequence_of,
    shared_drafter,
)

EACH = pytest.mark.parametrize("drafter", [own_drafter, shared_drafter, heads_drafter])


class Clock:
    """Time that passes as it is told."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


class Following:
    """A drafter that is right with a chance, and takes its time."""

    num_seen_behind = 0

    def __init__(self, script: Script, clock: Clock, dice, chance_right: float, pass_ns: int = 0) -> None:
        self.script, self.clock, self.dice, self.chance_right, self.pass_ns = script, clock, dice, chance_right, pass_ns
        self.num_passes = 0

    def can_draft(self, sequence: Sequence) -> bool:
        return True

    def propose(self, wanted: Mapping[Sequence, int]) -> Proposed:
        num_passes = max(wanted.values())
        self.num_passes += num_passes
        self.clock.now_ns += num_passes * self.pass_ns
        computed = dict(wanted) if self.pass_ns else {}
        return Proposed({s: self._drafts(s, num) for s, num in wanted.items()}, computed, num_passes)

    def _drafts(self, sequence: Sequence, num: int) -> list[int]:
        drafts: list[int] = []
        for _ in range(num):
            right = int(self.script.logits_after([*sequence.tokens, *drafts]).argmax())
            is_right = self.dice.random() < self.chance_right
            drafts.append(right if is_right else (right + 1) % self.script.vocab_size)
        return drafts


class Timed:
    """An engine whose steps take a + b T, by its clock."""

    def __init__(self, monkeypatch, chance_right: float, a_ns: int, b_ns: int, pass_ns: int = 0, **settings) -> None:
        self.clock = Clock()
        script = Script()
        self.drafter = Following(script, self.clock, random.Random(3), chance_right, pass_ns)
        self.engine = scripted_engine(
            script, clock=self.clock, drafter=lambda *_: self.drafter, cache_tokens=1 << 16, drafts_max=8, **settings
        )
        forward = self.engine.model.forward

        def timed_forward(batch):
            self.clock.now_ns += a_ns + b_ns * len(batch.token_ids)
            return forward(batch)

        monkeypatch.setattr(self.engine.core._runner, "_forward", timed_forward)

    def seconds(self, num_sequences: int, num_tokens: int) -> float:
        for number in range(num_sequences):
            sampling = Sampling(tokens_max=num_tokens)
            self.engine.core.submit(Request(id=number, prompt=(number,), sampling=sampling))
        run(self.engine)
        return self.clock.now_ns / 1e9


def run(engine: ScriptedEngine) -> tuple[dict[tuple[int, int], list[int]], list[Finished], dict[Work, int]]:
    outputs: dict[tuple[int, int], list[int]] = {}
    finished: list[Finished] = []
    work = dict.fromkeys(Work, 0)
    while engine.core.has_work:
        result = engine.core.step()
        finished += result.finished
        for token in result.tokens:
            outputs.setdefault((token.request, token.choice), []).append(token.token)
        for charge in result.charges:
            work[charge.work] += charge.num_tokens
    return outputs, finished, work


@pytest.mark.parametrize("num_sequences", [1, 8])
@pytest.mark.parametrize(("a_ns", "b_ns"), [(10_000_000, 1_000_000), (3_000_000, 3_000_000)])
@pytest.mark.parametrize("pass_ns", [0, 5_000_000])
def test_drafts_that_are_never_kept_cost_next_to_nothing(monkeypatch, num_sequences, a_ns, b_ns, pass_ns):
    step_s = (a_ns + b_ns * num_sequences) / 1e9
    timed = Timed(monkeypatch, 0.0, a_ns, b_ns, pass_ns)
    # A hundredth of the time for trials, and at the start as much as ten steps until it is known.
    assert timed.seconds(num_sequences, 400) < (1.01 * 400 + 10) * step_s
    assert timed.drafter.num_passes > 3


@pytest.mark.parametrize(("num_sequences", "faster"), [(1, 2.5), (8, 1.3)])
def test_drafts_that_are_mostly_kept_pay(monkeypatch, num_sequences, faster):
    """Also where the engine begins with eight sequences, at which drafts seem dear."""
    timed = Timed(monkeypatch, 0.9, 10_000_000, 1_000_000)
    assert timed.seconds(num_sequences, 400) < 400 * (10 + num_sequences) / 1e3 / faster


def test_a_text_that_comes_to_repeat_itself_is_found_out(monkeypatch):
    timed = Timed(monkeypatch, 0.0, 8_000_000, 1_000_000)
    timed.seconds(4, 300)
    timed.drafter.chance_right = 1.0
    timed.clock.now_ns = 0
    timed.engine.core.meter.start()
    assert timed.seconds(4, 300) < 300 * 0.012 / 1.5


def test_a_drafter_that_takes_its_time_is_let_be_where_its_drafts_do_not_pay(monkeypatch):
    """Two drafts of three kept; but a pass takes nearly a step."""
    timed = Timed(monkeypatch, 0.67, 10_000_000, 1_000_000, pass_ns=9_000_000)
    assert timed.seconds(2, 400) < 1.03 * 400 * 0.012


def test_a_drafters_time_is_its_own_charge_to_the_nanosecond(monkeypatch):
    timed = Timed(monkeypatch, 1.0, 10_000_000, 1_000_000, pass_ns=1_234_567)
    timed.engine.core.submit(Request(id=0, prompt=(1, 2), sampling=Sampling(tokens_max=60)))
    charges = []
    while timed.engine.core.has_work:
        charges += timed.engine.core.step().charges
    drafted = [charge for charge in charges if charge.work is Work.DRAFTED]
    assert sum(charge.device_ns for charge in drafted) == timed.drafter.num_passes * 1_234_567
    assert sum(charge.num_tokens for charge in drafted) == timed.drafter.num_passes
    assert sum(charge.device_ns for charge in charges) == timed.clock.now_ns


# ------------------------------------------------------------------------------------------------ what a step has left


def test_drafts_get_no_tokens_that_a_prompt_could_have():
    engine = scripted_engine(drafts_max=4, draft_cost=0.0, drafter=own_drafter(Script()), tokens_per_step_max=40)
    engine.core.submit(Request(id=0, prompt=(1,), sampling=Sampling(tokens_max=40)))
    engine.core.step()
    engine.core.submit(Request(id=1, prompt=tuple(range(2, 39)), sampling=Sampling(tokens_max=1)))
    charges = engine.core.step().charges
    assert sum(charge.num_tokens for charge in charges if charge.work is Work.PROMPT) == 37
    assert sum(charge.num_tokens for charge in charges if charge.request == 0 and charge.work is not Work.DRAFTED) == 3


def test_nobody_gives_way_to_a_draft():
    """Two sequences fill the cache to its last block, and are never preempted for drafts."""
    engine = scripted_engine(
        block_size=4, cache_tokens=32, drafts_max=6, draft_cost=0.0, drafter=own_drafter(Script()), sequences_max=2
    )
    for number in range(2):
        engine.core.submit(Request(id=number, prompt=(number,), sampling=Sampling(tokens_max=15)))
    _, finished, _ = run(engine)
    assert sum(end.usage.num_preemptions for end in finished) == 0
    assert sum(end.usage.num_drafted for end in finished) > 0


def test_no_draft_stands_where_its_successor_could_not():
    engine = scripted_engine(drafts_max=8, draft_cost=0.0, drafter=shared_drafter(Script()))
    engine.core.submit(Request(id=0, prompt=(1, 2), sampling=Sampling(tokens_max=4)))
    _, finished, _ = run(engine)
    assert finished[0].usage.num_drafted == 2  # the prompt's step brings one, and the drafts' step one more


def test_a_looping_text_takes_fewer_steps_and_is_the_same_text():
    script = Script(vocab_size=5, memory=1)
    asked = Request(id=0, prompt=(1, 2, 3), sampling=Sampling(tokens_max=100))
    plain, drafting = scripted_engine(script), scripted_engine(script, drafts_max=4)
    for engine in (plain, drafting):
        engine.core.submit(asked)
        assert run(engine)[0][0, 0] == script.tokens_of(asked)
    assert drafting.core.stats().num_steps < plain.core.stats().num_steps / 3


# ---------------------------------------------------------------------------------------------------- models that draft

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 5},
    "penalties": {"temperature": 0.8, "frequency_penalty": 0.5, "repetition_penalty": 1.3, "seed": 6},
    "three choices": {"temperature": 1.0, "num_choices": 3, "seed": 7},
}


@EACH
@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_draft_model_that_is_the_target_is_never_wrong(drafter, name):
    """Under sampling too: it draws with the target's random numbers. So whatever it should know, it knows."""
    script = Script()
    settings: dict[str, Any] = {
        "block_size": 4,
        "drafts_max": 3,
        "draft_cost": 0.0,
        "sequences_max": 3,
        "tokens_per_step_max": 24,
    }
    engine = scripted_engine(script, drafter=drafter(script), cache_tokens=120, **settings)
    shared = tuple(range(20))
    asked = [
        Request(id=number, prompt=(*shared, number), sampling=Sampling(tokens_max=40, **SAMPLINGS[name]))
        for number in range(4)
    ]
    for one in asked:
        engine.core.submit(one)
    outputs, finished, _ = run(engine)
    assert sum(end.usage.num_preemptions for end in finished) > 0
    assert sum(end.usage.num_cached for end in finished) > 0
    assert sum(end.usage.num_drafted for end in finished) > 100
    assert all(end.usage.num_accepted == end.usage.num_drafted for end in finished)
    for one in asked:
        for choice in range(one.sampling.num_choices):
            assert outputs[one.id, choice] == script.tokens_of(one, choice)


class Checked:
    """A drafter whose greedy proposals are those of its script behind the sequence's tokens, and of nothing else."""

    def __init__(self, drafter: Drafter, script: Script) -> None:
        self.drafter, self.script, self.num_checked = drafter, script, 0
        self.num_seen_behind = drafter.num_seen_behind

    def can_draft(self, sequence: Sequence) -> bool:
        return self.drafter.can_draft(sequence)

    def propose(self, wanted: Mapping[Sequence, int]) -> Proposed:
        proposed = self.drafter.propose(wanted)
        for sequence, drafts in proposed.drafts.items():
            context = list(sequence.tokens)
            for draft in drafts:
                context.append(int(self.script.logits_after(context).argmax()))
                assert draft == context[-1], "it drafted behind other tokens than the sequence has"
                self.num_checked += 1
        return proposed


@EACH
def test_what_was_rejected_leaves_no_trace_in_what_is_drafted_next(drafter):
    script, erring = Script(), Erring()
    checked: list[Checked] = []

    def make(model, config) -> Checked:
        checked.append(Checked(drafter(erring)(model, config), erring))
        return checked[0]

    settings: dict[str, Any] = {
        "block_size": 4,
        "drafts_max": 4,
        "sequences_max": 3,
        "tokens_per_step_max": 30,
        "cache_tokens": 160,
    }
    # The cost is measured by a clock that means nothing, so that some steps draft and others do not.
    engine = scripted_engine(script, drafter=make, **settings)
    asked = [Request(id=n, prompt=(*range(9), n), sampling=Sampling(tokens_max=90)) for n in range(5)]
    for one in asked:
        engine.core.submit(one)
    outputs, finished, work = run(engine)
    assert all(outputs[one.id, 0] == script.tokens_of(one) for one in asked)
    assert checked[0].num_checked > 50
    assert 0 < sum(end.usage.num_accepted for end in finished) < sum(end.usage.num_drafted for end in finished)
    assert work[Work.DRAFTED] > 0


def test_a_rejected_draft_does_not_count_as_computed_however_long_nobody_drafts():
    sequence, cache = sequence_of([1, 2, 3]), OwnCache(block_size=4)
    sequence.blocks = block_table([0, 1, 2])
    assert cache.num_computed(sequence) == 0
    for start, tokens in ((0, [1, 2, 3]), (3, [7]), (4, [8])):
        cache.write(Share(sequence, start, tokens, num_rows=1))
    sequence.tokens += [7, 9, 5, 6]
    assert cache.num_computed(sequence) == 4


def test_a_draft_model_computes_a_prefix_once_for_all_who_share_it():
    script = Script()
    engine = scripted_engine(
        script, block_size=4, drafts_max=1, draft_cost=0.0, drafter=own_drafter(script), sequences_max=1
    )
    for number in range(2):
        engine.core.submit(Request(id=number, prompt=(*range(40), number), sampling=Sampling(tokens_max=3)))
    computed: dict[int, int] = {}
    while engine.core.has_work:
        for charge in engine.core.step().charges:
            if charge.work is Work.DRAFTED:
                computed[charge.request] = computed.get(charge.request, 0) + charge.num_tokens
    assert computed == {0: 42, 1: 1}  # the second finds forty, and drafts behind its own token at once


def test_a_long_prompt_is_caught_up_with_in_passes_no_larger_than_a_step():
    engine = scripted_engine(drafts_max=2, draft_cost=0.0, drafter=own_drafter(Script()), tokens_per_step_max=32)
    engine.core.submit(Request(id=0, prompt=tuple(range(45)) * 3, sampling=Sampling(tokens_max=20)))
    most = 0
    while engine.core.has_work:
        drafted = [charge.num_tokens for charge in engine.core.step().charges if charge.work is Work.DRAFTED]
        most = max(most, *drafted, 0)
    assert 16 < most <= 32 + 1  # and one for the second draft
    assert engine.core.stats().num_accepted > 0


def test_drafts_are_counted_where_there_is_one_at_a_time():
    engine = scripted_engine(Script(memory=1), drafts_max=1, draft_cost=0.0)
    engine.core.submit(Request(id=0, prompt=(3, 4, 5), sampling=Sampling(tokens_max=60)))
    results = []
    while engine.core.has_work:
        results.append(engine.core.step())
    usage, stats = results[-1].finished[0].usage, engine.core.stats()
    num_rejected = sum(c.num_tokens for r in results for c in r.charges if c.work is Work.REJECTED)
    assert usage.num_accepted == usage.num_output - stats.num_steps > 0
    assert usage.num_drafted == usage.num_accepted + num_rejected == stats.num_drafted
