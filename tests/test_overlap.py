"""A step is launched while the one before runs: what that may not change, what waits, what is computed in vain."""

from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.config import EngineConfig
from engine.errors import EngineMisconfigured
from engine.runner import Pending
from engine.types import FinishReason, Request, Work
from tests.scripted_model import Script, ScriptedEngine, scripted_engine
from tests.test_scheduler import VOCABULARY, Journal, request, requests, run, step


@dataclass
class Watched:
    """A runner that notes what it is told, by the numbers of the steps."""

    engine: ScriptedEngine
    events: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        launch, numbers = self.engine.core._runner.launch, count(1)

        def noting(plan):
            pending, number = launch(plan), next(numbers)
            self.events.append(f"launch {number}")
            return _Noting(pending, lambda: self.events.append(f"collect {number}"))

        self.engine.core._runner.launch = noting  # type: ignore[method-assign]


class _Noting:
    def __init__(self, pending: Pending, note) -> None:
        self.plan, self._pending, self._note = pending.plan, pending, note

    def collect(self):
        self._note()
        return self._pending.collect()


def overlapped(script: Script | None = None, **settings) -> ScriptedEngine:
    return scripted_engine(script, overlap="on", **settings)


def test_each_step_but_the_first_is_launched_before_the_one_before_it_is_collected():
    watched = Watched(overlapped())
    watched.engine.core.submit(request(tokens_max=4))
    run(watched.engine)
    assert watched.events == [
        *("launch 1", "launch 2", "collect 1", "launch 3", "collect 2", "launch 4", "collect 3", "collect 4"),
    ]


@pytest.mark.parametrize("asked", [{"frequency_penalty": 0.5}, {"logit_bias": ((2, 1.0),)}])
def test_what_a_request_does_to_its_logits_waits_for_its_tokens(asked):
    watched = Watched(overlapped())
    watched.engine.core.submit(request(0, tokens_max=3, **asked))
    watched.engine.core.submit(request(1, tokens_max=3))
    run(watched.engine)
    assert watched.events == [f"{what} {number}" for number in (1, 2, 3) for what in ("launch", "collect")]


def test_its_last_token_need_not_be_seen():
    """Nothing of the sequence follows, so the others need not wait for it."""
    watched = Watched(overlapped())
    watched.engine.core.submit(request(0, tokens_max=1, frequency_penalty=0.5))
    watched.engine.core.submit(request(1, tokens_max=2))
    run(watched.engine)
    assert watched.events == ["launch 1", "launch 2", "collect 1", "collect 2"]


def test_nobody_gives_way_while_a_step_is_underway():
    watched = Watched(overlapped(block_size=4, cache_tokens=32, sequences_max=4))
    for number in range(2):
        watched.engine.core.submit(request(number, prompt=range(20 * number, 20 * number + 12), tokens_max=16))
    journal = run(watched.engine)
    assert sum(finished.usage.num_preemptions for finished in journal.finished.values()) > 0
    for number in range(2):
        assert journal.outputs[number, 0] == Script().tokens_of(
            request(number, prompt=range(20 * number, 20 * number + 12), tokens_max=16)
        )


def test_what_is_computed_behind_a_last_token_is_thrown_away_and_charged_as_rejected():
    plain = Script().tokens_of(request(tokens_max=20))
    asked = request(tokens_max=20, stop_token_ids=(plain[5],))
    length = plain.index(plain[5]) + 1
    engine, journal = overlapped(), Journal()
    engine.core.submit(asked)
    run(engine, journal)
    assert journal.outputs[0, 0] == plain[:length]
    assert journal.finished[0, 0].reason is FinishReason.STOP
    assert journal.charged(0, 0, Work.OUTPUT) == length - 1
    assert journal.charged(0, 0, Work.REJECTED) == 1
    (last,) = journal.results[-1].charges
    assert (last.work, last.num_tokens, journal.results[-1].idle_ns) == (Work.REJECTED, 1, 0)


def test_whoever_is_cancelled_while_its_step_is_underway_hears_of_no_further_token():
    engine, journal = overlapped(), Journal()
    engine.core.submit(request(tokens_max=50))
    for _ in range(3):
        step(engine, journal)
    engine.core.cancel(0)
    step(engine, journal)
    assert (journal.finished[0, 0].reason, journal.finished[0, 0].usage.num_output) == (FinishReason.STOP, 3)
    assert len(journal.outputs[0, 0]) == 3
    assert journal.charged(0, 0, Work.REJECTED) == 1
    assert not engine.core.has_work


def test_a_block_that_is_freed_while_its_step_is_underway_may_be_anothers_at_once():
    engine, journal = overlapped(block_size=4, cache_tokens=16), Journal()
    engine.core.submit(request(0, prompt=range(12), tokens_max=50))
    step(engine, journal)
    engine.core.cancel(0)
    engine.core.submit(request(1, prompt=range(20, 30), tokens_max=4))
    run(engine, journal)
    assert journal.outputs[1, 0] == Script().tokens_of(request(1, prompt=range(20, 30), tokens_max=4))


@given(asked=st.lists(requests, min_size=1, max_size=6), script=st.builds(Script, st.just(VOCABULARY)))
@settings(max_examples=40, deadline=None)
def test_with_room_for_all_tokens_reasons_and_counts_are_those_of_steps_in_turn(asked, script):
    def told(overlap: str) -> tuple[dict, dict]:
        engine = scripted_engine(script, overlap=overlap, block_size=4, sequences_max=32, tokens_per_step_max=512)
        for number, drawn in enumerate(asked):
            engine.core.submit(_without_a_leader(replace(drawn, id=number)))
        journal = run(engine)
        return journal.outputs, journal.finished

    assert told("on") == told("off")


def _without_a_leader(asked: Request) -> Request:
    """With one choice: another one may begin a step later, and then shares blocks that were full by then."""
    return replace(asked, sampling=replace(asked.sampling, num_choices=1))


def test_drafts_and_steps_ahead_exclude_each_other():
    with pytest.raises(EngineMisconfigured, match="drafts_max"):
        EngineConfig(overlap="on", drafts_max=2)
