"""The one rule, held to what a script dictates: whatever is asked and however small the cache, every choice gets
exactly its tokens, no block is lost and no nanosecond is unaccounted for.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import RequestRefused
from engine.scheduler import SCORES_PER_STEP_MAX
from engine.types import Finished, FinishReason, Logprob, Request, Sampling, StepResult, Work
from tests.scripted_model import (
    Erring,
    Script,
    ScriptedEngine,
    Ticks,
    both_loops,  # noqa: F401
    own_drafter,
    scripted_engine,
    sequence_of,
    shared_drafter,
)

Line = tuple[Logprob, tuple[Logprob, ...]]

STEPS_MAX = 3000  # no drawn case needs 1000; an engine that stands still must fail, not hang


@dataclass
class Journal:
    """All that an engine told."""

    outputs: dict[tuple[int, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    finished: dict[tuple[int, int], Finished] = field(default_factory=dict)
    results: list[StepResult] = field(default_factory=list)
    scored: dict[int, list[Line]] = field(default_factory=lambda: defaultdict(list))

    def note(self, result: StepResult) -> None:
        self.results.append(result)
        for scored in result.scored:
            assert not self.outputs[scored.request, 0], "a prompt was scored behind its end"
            self.scored[scored.request] += scored.logprobs
        for token in result.tokens:
            output = self.outputs[token.request, token.choice]
            assert token.index == len(output), "a token came out of order"
            output.append(token.token)
        for finished in result.finished:
            choice = finished.request, finished.choice
            assert choice not in self.finished, "a choice finished twice"
            self.finished[choice] = finished

    def charged(self, request: int, choice: int, work: Work) -> int:
        charges = [charge for result in self.results for charge in result.charges]
        return sum(c.num_tokens for c in charges if (c.request, c.choice, c.work) == (request, choice, work))


def step(engine: ScriptedEngine, journal: Journal) -> None:
    """One step, with the books checked after it."""
    journal.note(engine.core.step())
    sequences = engine.scheduler.sequences
    engine.blocks.check(sequences)
    for sequence in sequences:
        assert sequence.num_computed <= len(sequence.blocks) * engine.blocks.block_size
        assert sequence.num_computed <= sequence.num_reached < len(sequence.tokens)
        assert not sequence.drafts


def run(engine: ScriptedEngine, journal: Journal | None = None) -> Journal:
    """Step until nothing is left."""
    journal = journal or Journal()
    for _ in range(STEPS_MAX):
        if not engine.core.has_work:
            return journal
        step(engine, journal)
    raise AssertionError("the engine stands still")


def request(number: int = 0, prompt: range | list[int] = range(8), tokens_max: int = 8, priority: int = 0, **sampling):
    return Request(
        id=number, prompt=tuple(prompt), sampling=Sampling(tokens_max=tokens_max, **sampling), priority=priority
    )


# ----------------------------------------------------------------------------------------------- whatever is asked

VOCABULARY = 13  # small, so that prompts share prefixes, stop tokens are met and drafts find repetitions

samplings = st.builds(
    Sampling,
    tokens_max=st.integers(1, 24),
    tokens_min=st.just(0) | st.integers(0, 24),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    seed=st.integers(-(2**63), 2**64 - 1),
    stop_token_ids=st.just(()) | st.tuples(st.integers(0, VOCABULARY - 1)),
    num_logprobs=st.none() | st.integers(0, 3),
    num_prompt_logprobs=st.none() | st.integers(0, 2),
    # Exact in binary, so that what ties in the script's 64 bits ties in the engine's 32.
    frequency_penalty=st.just(0.0) | st.sampled_from([-0.75, 0.5]),
    presence_penalty=st.just(0.0) | st.sampled_from([-0.25, 1.25]),
    repetition_penalty=st.just(1.0) | st.sampled_from([0.5, 2.0]),
    logit_bias=st.just(()) | st.just(((2, 33.0), (5, -100.0))),
    num_choices=st.integers(1, 3),
).filter(lambda sampling: sampling.tokens_min <= sampling.tokens_max)

requests = st.builds(
    lambda shared, own, sampling, priority, salt: Request(
        id=0,
        prompt=(*([1, 2, 3] * 10)[:shared], *own),
        sampling=sampling,
        priority=priority,
        cache_salt=salt,
    ),
    st.integers(0, 24),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12),
    samplings,
    st.integers(0, 2),
    st.sampled_from(["", "tenant"]),
)


@given(
    script=st.builds(Script, st.just(VOCABULARY), st.sampled_from([None, 1, 2])),
    block_size=st.sampled_from([1, 4, 5]),
    num_blocks=st.integers(12, 40),
    sequences_max=st.integers(1, 6),
    drafts_max=st.sampled_from([0, 0, 3]),
    drafter=st.sampled_from([None, own_drafter, shared_drafter]),
    budget=st.integers(0, 40),
    arrivals=st.lists(st.tuples(st.integers(0, 20), requests), min_size=1, max_size=10),
    cancellations=st.dictionaries(st.integers(0, 9), st.integers(0, 30), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_every_choice_gets_exactly_its_tokens_whatever_runs_beside_it(
    script, block_size, num_blocks, sequences_max, drafts_max, drafter, budget, arrivals, cancellations
):
    clock = Ticks()
    engine = scripted_engine(
        script,
        clock=clock,
        block_size=block_size,
        cache_tokens=num_blocks * block_size,
        sequences_max=sequences_max,
        drafts_max=drafts_max,
        draft_cost=0.0,  # drafting wherever an n-gram repeats, worth it or not
        drafter=drafter and drafter(Erring(script.vocab_size, script.memory)),
        tokens_per_step_max=sequences_max + budget,
    )
    started_ns = clock.now_ns
    engine.core.meter._mark_ns = started_ns
    journal, submitted = Journal(), {}
    for now in range(31):
        for number, (at, drawn) in enumerate(arrivals):
            asked = Request(
                id=number,
                prompt=drawn.prompt,
                sampling=drawn.sampling,
                priority=drawn.priority,
                cache_salt=drawn.cache_salt,
            )
            if at == now and len(asked.prompt) < engine.core.capacity.context_max:
                engine.core.submit(asked)
                submitted[number] = asked
        for number, at in cancellations.items():
            if at == now:
                engine.core.cancel(number)
        step(engine, journal)
    run(engine, journal)

    for number, asked in submitted.items():
        for choice in range(asked.sampling.num_choices):
            finished, output = journal.finished.pop((number, choice)), journal.outputs[number, choice]
            expected = script.tokens_of(asked, choice, engine.core.capacity.context_max)
            assert output == expected[: len(output)]
            assert len(output) == len(expected) or (number in cancellations and finished.reason is FinishReason.STOP)
            _check_usage(journal, finished, output)
        _check_scores(script, asked, journal.scored[number], is_cut=number in cancellations)
    assert not journal.finished
    assert engine.blocks.num_held == 0
    told_ns = sum(result.idle_ns + sum(c.device_ns for c in result.charges) for result in journal.results)
    assert told_ns == clock.now_ns - started_ns


def _check_scores(script: Script, asked: Request, scored: list[Line], is_cut: bool) -> None:
    """Each prompt token but the first has its logprobs once, in order, by the script's own logits."""
    num_top, prompt = asked.sampling.num_prompt_logprobs, list(asked.prompt)
    num_scored = 0 if num_top is None else len(prompt) - 1
    assert len(scored) == num_scored or (is_cut and len(scored) < num_scored)
    for position, (own, top) in enumerate(scored):
        logits = torch.from_numpy(script.logits_after(prompt[: position + 1]).astype(np.float64))
        logprobs = logits.log_softmax(-1).tolist()
        assert own.token == prompt[position + 1]
        assert own.logprob == pytest.approx(logprobs[own.token], abs=1e-4)
        assert [one.logprob for one in top] == pytest.approx(sorted(logprobs, reverse=True)[:num_top], abs=1e-4)


def _check_usage(journal: Journal, finished: Finished, output: list[int]) -> None:
    usage, choice = finished.usage, (finished.request, finished.choice)
    num_computed = journal.charged(*choice, Work.PROMPT)
    assert usage.num_output == len(output)
    assert usage.num_cached + num_computed == usage.num_prompt or (
        not output and usage.num_cached + num_computed < usage.num_prompt  # cancelled amid the prompt
    )
    assert journal.charged(*choice, Work.OUTPUT) == max(0, len(output) - 1)
    assert journal.charged(*choice, Work.RECOMPUTED) == usage.num_recomputed
    assert usage.num_recomputed == 0 or usage.num_preemptions > 0
    indexes = [
        charge.index
        for result in journal.results
        for charge in result.charges
        if charge.work is Work.OUTPUT and (charge.request, charge.choice) == choice
    ]
    assert indexes == list(range(len(output)))


# ------------------------------------------------------------------------------------------------------ one by one


def test_a_long_prompt_is_computed_in_chunks_while_others_go_on():
    engine = scripted_engine(tokens_per_step_max=10, sequences_max=4)
    engine.core.submit(request(0, tokens_max=30))
    engine.core.step()
    engine.core.submit(request(1, prompt=[7] * 40))
    journal = Journal()
    for _ in range(6):
        journal.results.append(engine.core.step())
    chunks = [(c.num_tokens, len(r.tokens)) for r in journal.results for c in r.charges if c.work is Work.PROMPT]
    assert chunks == [(9, 1), (9, 1), (9, 1), (9, 1), (4, 2)]


def test_no_step_scores_more_of_prompts_than_it_may():
    """Their rows of logits are large. Others' prompts are computed as ever."""
    engine = scripted_engine(sequences_max=4, cache_tokens=4096)
    engine.core.submit(request(0, prompt=[1] * 300, tokens_max=2, num_prompt_logprobs=0))
    engine.core.submit(request(1, prompt=[2] * 300, tokens_max=2, num_prompt_logprobs=0))
    engine.core.submit(request(2, prompt=[3] * 200, tokens_max=2))
    results = run(engine).results
    per_step = [sum(len(scored.logprobs) for scored in result.scored) for result in results]
    assert max(per_step) == SCORES_PER_STEP_MAX
    assert sum(per_step) == 2 * 299
    first = [charge.num_tokens for charge in results[0].charges]
    assert first[:2] == [SCORES_PER_STEP_MAX, 200]


def test_what_was_scored_is_not_scored_again_when_it_is_computed_again():
    sequence = sequence_of(list(range(20)), num_prompt_logprobs=0)
    sequence.num_scored = 12
    assert sequence.num_reusable == 12
    first, whole = sequence.share(15), sequence.share(99)
    assert (first.num_scored, first.scored_tokens) == (3, (13, 14, 15))
    assert (whole.num_scored, whole.num_rows, whole.scored_tokens) == (7, 1, tuple(range(13, 20)))


def test_a_prompt_that_is_scored_is_computed_and_others_find_it_cached():
    engine = scripted_engine(block_size=4)
    for number, num_top in enumerate((None, 0, None)):
        engine.core.submit(request(number, prompt=range(20), tokens_max=1, num_prompt_logprobs=num_top))
        journal = run(engine)
        assert journal.finished[number, 0].usage.num_cached == (0, 0, 16)[number]
    engine.core.submit(request(3, prompt=range(20), tokens_max=1, num_prompt_logprobs=0, num_choices=2))
    journal = run(engine)
    assert [journal.finished[3, choice].usage.num_cached for choice in (0, 1)] == [0, 16]
    assert len(journal.scored[3]) == 19


def test_no_step_computes_more_than_the_budget():
    engine = scripted_engine(tokens_per_step_max=7, sequences_max=5)
    for number in range(5):
        engine.core.submit(request(number, prompt=[number] * 11))
    for result in run(engine).results:
        assert sum(charge.num_tokens for charge in result.charges) <= 7


def test_no_more_sequences_run_than_allowed():
    engine = scripted_engine(sequences_max=2)
    for number in range(5):
        engine.core.submit(request(number))
    engine.core.step()
    assert (engine.core.stats().num_running, engine.core.stats().num_waiting) == (2, 3)


def test_a_lower_priority_number_runs_first():
    engine = scripted_engine(sequences_max=1)
    engine.core.submit(request(0, priority=1))
    engine.core.submit(request(1, priority=0))
    assert list(run(engine).finished) == [(1, 0), (0, 0)]


def test_nothing_is_overtaken_more_often_than_ageing_allows():
    engine = scripted_engine(sequences_max=1, ageing=3)
    engine.core.submit(request(99, priority=1, tokens_max=1))
    for number in range(6):
        engine.core.submit(request(number, tokens_max=1))
    assert [number for number, _ in run(engine).finished] == [0, 1, 2, 99, 3, 4, 5]


def test_the_latest_gives_way_when_blocks_run_out():
    engine = scripted_engine(block_size=4, cache_tokens=48, sequences_max=4)
    engine.core.submit(request(0, prompt=range(12), tokens_max=30))
    engine.core.submit(request(1, prompt=range(20, 32), tokens_max=30))
    journal = run(engine)
    assert journal.finished[0, 0].usage.num_preemptions == 0
    assert journal.finished[1, 0].usage.num_preemptions > 0
    assert list(journal.finished) == [(0, 0), (1, 0)]


def test_a_preempted_sequence_finds_what_nobody_evicted():
    engine = scripted_engine(block_size=4, cache_tokens=48, sequences_max=4)
    engine.core.submit(request(0, prompt=range(12), tokens_max=16))
    engine.core.submit(request(1, prompt=range(20, 32), tokens_max=30))
    usage = run(engine).finished[1, 0].usage
    assert usage.num_preemptions == 1
    assert 0 < usage.num_recomputed < 12


def test_a_newcomer_leaves_each_running_sequence_a_block_to_grow_into():
    engine = scripted_engine(block_size=4, cache_tokens=24, sequences_max=4)  # 6 blocks
    engine.core.submit(request(0, prompt=range(12), tokens_max=4))  # 3 blocks, 3 left
    engine.core.submit(request(1, prompt=range(20, 32), tokens_max=4))  # 3 blocks would leave none
    engine.core.step()
    assert engine.core.stats().num_running == 1


def test_a_small_request_does_not_overtake_a_large_one_that_lacks_room():
    engine = scripted_engine(block_size=4, cache_tokens=48, sequences_max=4)  # 12 blocks
    engine.core.submit(request(0, prompt=range(12), tokens_max=20))
    engine.core.submit(request(1, prompt=[20] * 40, tokens_max=4))  # 10 blocks, and one to spare
    engine.core.submit(request(2, prompt=[30] * 4, tokens_max=4))  # would fit at once
    assert [number for number, _ in run(engine).finished] == [0, 1, 2]


def test_choices_wait_for_the_prompt_and_share_its_full_blocks():
    engine = scripted_engine(block_size=4, sequences_max=4)
    engine.core.submit(request(0, prompt=range(18), temperature=1.0, num_choices=3))
    journal = Journal()
    journal.note(engine.core.step())
    assert engine.core.stats().blocks_used == 5
    journal.note(engine.core.step())
    # 4 full blocks in common, and for each choice its own fifth.
    assert engine.core.stats().blocks_used == 4 + 3
    run(engine, journal)
    assert [journal.finished[0, choice].usage.num_cached for choice in range(3)] == [0, 16, 16]


def test_a_salt_keeps_prefixes_apart():
    engine = scripted_engine(block_size=4, sequences_max=1)
    for number, salt in enumerate(["red", "red", "blue", ""]):
        engine.core.submit(Request(id=number, prompt=tuple(range(9)), sampling=Sampling(tokens_max=1), cache_salt=salt))
    finished = run(engine).finished
    assert [finished[number, 0].usage.num_cached for number in range(4)] == [0, 8, 0, 0]


def test_a_cancelled_request_stops_wherever_it_is():
    engine = scripted_engine(sequences_max=1)
    engine.core.submit(request(0, tokens_max=100, num_choices=2))
    engine.core.submit(request(1, tokens_max=100))
    engine.core.step()
    engine.core.cancel(0)
    engine.core.cancel(1)
    engine.core.cancel(2)  # never heard of
    result = engine.core.step()
    assert {(f.request, f.choice, f.reason, f.usage.num_output) for f in result.finished} == {
        (0, 0, FinishReason.STOP, 1),
        (0, 1, FinishReason.STOP, 0),
        (1, 0, FinishReason.STOP, 0),
    }
    assert not engine.core.has_work
    assert engine.blocks.num_held == 0


def test_a_sequence_whose_logits_are_not_numbers_fails_alone():
    script = Script(vocab_size=50, poison=49)
    engine, alone = scripted_engine(script), scripted_engine(script)
    engine.core.submit(request(0, prompt=[1, 49]))
    engine.core.submit(request(1))
    alone.core.submit(request(1))
    journal = run(engine)
    assert journal.finished[0, 0].reason is FinishReason.FAILED
    assert "not finite" in journal.finished[0, 0].error
    assert journal.outputs[0, 0] == []
    assert journal.outputs[1, 0] == run(alone).outputs[1, 0]


def test_the_choices_of_a_prompt_that_fails_all_fail():
    engine = scripted_engine(Script(poison=49))
    engine.core.submit(request(0, prompt=[1, 49], num_choices=3))
    assert [finished.reason for finished in run(engine).finished.values()] == [FinishReason.FAILED] * 3


def test_nobody_finds_the_blocks_of_a_sequence_that_failed():
    engine = scripted_engine(Script(poison=49), block_size=2)
    engine.core.submit(request(0, prompt=[1, 2, 3, 4, 49]))
    run(engine)
    engine.core.submit(request(1, prompt=[1, 2, 3, 4, 5]))
    assert run(engine).finished[1, 0].usage.num_cached == 0


def test_a_stop_token_ends_a_sequence_and_is_its_last():
    prompt = list(range(8))
    plain = Script().tokens_of(request(prompt=prompt, tokens_max=20))
    engine = scripted_engine()
    engine.core.submit(request(0, prompt=prompt, tokens_max=20, stop_token_ids=(plain[5],)))
    journal = run(engine)
    assert journal.outputs[0, 0] == plain[: plain.index(plain[5]) + 1]
    assert journal.finished[0, 0].reason is FinishReason.STOP


def test_tokens_min_forbids_stop_tokens_until_then():
    prompt = list(range(8))
    first = Script().tokens_of(request(prompt=prompt))[0]
    engine = scripted_engine()
    engine.core.submit(request(0, prompt=prompt, tokens_max=20, tokens_min=3, stop_token_ids=(first,)))
    output = run(engine).outputs[0, 0]
    assert first not in output[:3]


def test_the_context_ends_a_sequence_as_its_length():
    engine = scripted_engine(context_max=20)
    engine.core.submit(request(0, prompt=range(15), tokens_max=100))
    journal = run(engine)
    assert len(journal.outputs[0, 0]) == 5
    assert journal.finished[0, 0].reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (request(prompt=[]), "no tokens"),
        (request(prompt=[1] * 1024), "1024 tokens"),
        (request(prompt=[50]), "0 .. 49"),
        (request(prompt=[-1]), "0 .. 49"),
        (request(tokens_max=0), "tokens_max"),
        (request(tokens_min=9), "tokens_min"),
        (request(num_choices=0), "num_choices"),
        (request(num_choices=10**6), "num_choices"),
        (request(temperature=float("nan")), "temperature"),
        (request(temperature=float("inf")), "temperature"),
        (request(temperature=-0.1), "temperature"),
        (request(top_p=0.0), "top_p"),
        (request(top_p=float("nan")), "top_p"),
        (request(min_p=1.1), "min_p"),
        (request(top_k=-1), "top_k"),
        (request(seed=2**64), "seed"),
        (request(num_logprobs=-1), "num_logprobs"),
        (request(num_logprobs=21), "num_logprobs"),
        (request(frequency_penalty=2.1), "frequency_penalty"),
        (request(frequency_penalty=float("nan")), "frequency_penalty"),
        (request(presence_penalty=-2.1), "presence_penalty"),
        (request(repetition_penalty=0.0), "repetition_penalty"),
        (request(repetition_penalty=float("inf")), "repetition_penalty"),
        (request(logit_bias=((50, 1.0),)), "logit_bias"),
        (request(logit_bias=((-1, 1.0),)), "logit_bias"),
        (request(logit_bias=((1, 1.0), (1, 2.0))), "token twice"),
        (request(logit_bias=((1, 100.1),)), "value of logit_bias"),
        (request(logit_bias=((1, float("nan")),)), "value of logit_bias"),
        (request(stop_token_ids=(50,)), "stop token"),
        (request(stop_token_ids=(1,) * 65), "stop tokens"),
    ],
)
def test_what_could_never_run_is_refused_with_the_reason(asked, why):
    engine = scripted_engine()
    with pytest.raises(RequestRefused, match=why):
        engine.core.submit(asked)
    assert not engine.core.has_work


def test_an_id_in_use_is_refused():
    engine = scripted_engine()
    engine.core.submit(request(7))
    with pytest.raises(RequestRefused, match="7"):
        engine.core.submit(request(7))
