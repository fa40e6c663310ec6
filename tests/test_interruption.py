"""An engine that is interrupted, and another one that goes on: the tokens and the counts of an engine that was not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.errors import RequestRefused
from engine.types import FinishReason, Progress, Request, Usage, Work
from tests.scripted_model import Script, both_loops, scripted_engine  # noqa: F401
from tests.test_scheduler import VOCABULARY, Journal, request, requests, run, step

NOTHING = Usage(num_prompt=0, num_cached=0, num_output=0)
FOR_EVER = 10**6  # more steps than any request takes


def journal_of(asked: Request) -> Journal:
    """Knows the tokens that are there already: the first to come has the index behind them."""
    journal = Journal()
    for choice, progress in enumerate(asked.progress):
        journal.outputs[asked.id, choice] = list(progress.tokens)
    return journal


def live(asked: Request, num_steps: int, script: Script | None = None, **settings) -> tuple[Request, Journal]:
    """After so many steps of an engine of its own, the request as the next engine is asked to go on with it."""
    engine, journal = scripted_engine(script, **settings), journal_of(asked)
    engine.core.submit(asked)
    while num_steps and engine.core.has_work:
        step(engine, journal)
        num_steps -= 1
    engine.core.interrupt()
    step(engine, journal)
    assert not engine.core.has_work
    assert engine.blocks.num_held == 0
    progress = list(asked.progress) or [Progress(tokens=(), usage=NOTHING)] * asked.sampling.num_choices
    for (_, choice), end in journal.finished.items():
        tokens, is_over = tuple(journal.outputs[asked.id, choice]), end.reason is not FinishReason.INTERRUPTED
        progress[choice] = Progress(tokens=tokens, usage=end.usage if tokens else NOTHING, is_over=is_over)
    return replace(asked, progress=tuple(progress)), journal


@given(
    asked=requests,
    script=st.builds(Script, st.just(VOCABULARY), st.sampled_from([None, 1, 2])),
    lives=st.lists(st.tuples(st.integers(0, 12), st.sampled_from([1, 4, 5]), st.sampled_from([0, 3])), max_size=3),
)
@settings(max_examples=80, deadline=None)
def test_whoever_goes_on_brings_the_tokens_that_would_have_come(asked, script, lives):
    """Wherever it is interrupted, however often, and however each engine cuts its work."""
    going, journals = asked, []
    for num_steps, block_size, drafts_max in [*lives, (FOR_EVER, 4, 0)]:
        going, journal = live(
            going, num_steps, script, block_size=block_size, cache_tokens=160 * block_size, drafts_max=drafts_max,
            draft_cost=0.0, tokens_per_step_max=40, sequences_max=4,
        )  # fmt: skip
        journals.append(journal)
        if all(progress.is_over for progress in going.progress):
            break
    for choice, progress in enumerate(going.progress):
        assert list(progress.tokens) == script.tokens_of(asked, choice)
        assert progress.usage.num_output == len(progress.tokens)
        # Every token is sampled once: none that was there is computed as an output again.
        charged = [charge for one in journals for result in one.results for charge in result.charges]
        outputs = [one.index for one in charged if one.choice == choice and one.work is Work.OUTPUT]
        assert outputs == list(range(len(progress.tokens)))


def test_the_prompt_is_computed_once_for_its_bill_and_what_was_there_is_computed_again():
    going, _ = live(request(prompt=range(20), tokens_max=30), 6)
    _, rest = live(going, FOR_EVER)
    assert rest.charged(0, 0, Work.PROMPT) == 0
    assert rest.charged(0, 0, Work.RECOMPUTED) == 20 + 6 - 1  # the newest token was never computed
    usage = rest.finished[0, 0].usage
    assert (usage.num_prompt, usage.num_cached, usage.num_output, usage.num_recomputed) == (20, 0, 30, 25)


def test_the_counts_of_all_engines_add_up():
    asked = request(prompt=[1, 2] * 8, tokens_max=30)
    script = Script(vocab_size=3, memory=1)
    settings = {"drafts_max": 3, "draft_cost": 0.0}
    going, first = live(asked, 5, script, **settings)
    _, rest = live(going, FOR_EVER, script, **settings)
    before, after = going.progress[0].usage, rest.finished[0, 0].usage
    assert 0 < before.num_accepted < after.num_accepted
    assert after.num_drafted - after.num_accepted == sum(
        journal.charged(0, 0, Work.REJECTED) for journal in (first, rest)
    )


def test_choices_that_go_on_wait_for_the_prompt_and_share_its_blocks():
    going, _ = live(request(prompt=range(18), tokens_max=20, temperature=1.0, num_choices=3), 5, block_size=4)
    later, rest = scripted_engine(block_size=4), journal_of(going)
    later.core.submit(going)
    step(later, rest)
    assert later.core.stats().num_running == 1
    run(later, rest)
    again = [rest.charged(0, choice, Work.RECOMPUTED) for choice in range(3)]
    there = [18 + len(progress.tokens) - 1 for progress in going.progress]  # the newest token was never computed
    assert again[0] == there[0] == 18 + 5 - 1
    assert again[1:] == [there[1] - 16, there[2] - 16]  # all but the prompt's four full blocks


def test_a_choice_that_is_over_does_not_run_again():
    asked = request(tokens_max=6, num_choices=2)
    over = Progress(tokens=(1, 2, 3, 4, 5, 6), usage=NOTHING, is_over=True)
    begun = Progress(tokens=tuple(Script().tokens_of(asked, 1)[:2]), usage=NOTHING)
    _, journal = live(replace(asked, progress=(over, begun)), FOR_EVER)
    assert list(journal.finished) == [(0, 1)]
    assert journal.outputs[0, 1] == Script().tokens_of(asked, 1)


def test_a_choice_without_a_token_begins_anew():
    asked = request(prompt=range(20))
    going, _ = live(asked, 1, tokens_per_step_max=8, sequences_max=4)
    assert going.progress[0].tokens == ()
    _, rest = live(going, FOR_EVER)
    assert rest.charged(0, 0, Work.PROMPT) == 20
    assert rest.outputs[0, 0] == Script().tokens_of(asked)


def progress_of(*lengths: int, is_over: bool = False, token: int = 1) -> tuple[Progress, ...]:
    return tuple(Progress(tokens=(token,) * length, usage=NOTHING, is_over=is_over) for length in lengths)


@pytest.mark.parametrize(
    ("progress", "why"),
    [
        (progress_of(1, 1), "of 2 choices"),
        (progress_of(8, is_over=True), "nothing is left"),
        (progress_of(8), "as many as it may have"),
        (progress_of(2, token=50), "0 .. 49"),
        (progress_of(2, token=-1), "0 .. 49"),
    ],
)
def test_progress_that_cannot_be_is_refused_with_the_reason(progress, why):
    with pytest.raises(RequestRefused, match=why):
        scripted_engine().core.submit(replace(request(tokens_max=8), progress=progress))
