"""A grammar under the engine: it composes with drafts, choices, preemption and all that cuts and shares work."""

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from engine.build import build
from engine.config import EngineConfig
from engine.constraint import Constraint, ConstraintFailed
from engine.types import FinishReason, Request, Sampling
from schemas.requests import Regex
from tests.scripted_model import Script, both_loops, scripted_engine  # noqa: F401
from tests.test_grammar import DATE, END, PERSON, schema
from tests.test_interruption import FOR_EVER, live
from tests.test_scheduler import request, run
from tests.tiny_models import tiny_mixtral
from tests.tiny_tokenizer import save_byte_level
from worker.grammar import Grammars, source_of
from worker.text import Tokenizer, load_tokenizer

VOCAB = 420  # of models: the tokenizer's own, and some that no token has


FOLLOW: dict[int | None, list[int]] = {0: [], None: [0, 1], 1: [2, 3], 2: [3], 3: [0, 1]}


class Beads:
    """Follows (ab?c)*, on tokens 1, 2, 3; 0 ends. A matcher in Python that says when it is used wrongly."""

    def __init__(self, length_max: int, dead_end: int | None = None) -> None:
        self.read: list[int] = []
        self.length_max = length_max  # complete by then at the latest
        self.dead_end = dead_end

    def start(self) -> "Beads":
        return Beads(self.length_max, self.dead_end)

    def mask(self) -> bytes:
        if len(self.read) == self.dead_end:
            raise ConstraintFailed("a dead end")
        assert not self.is_complete, "nothing can follow"
        return bytes([sum(1 << token for token in self.follow), 0])  # of models of up to 16 tokens

    def advance(self, token: int) -> bool:
        assert token in self.follow, f"{token} after {self.read}"
        self.read.append(token)
        return self.is_complete

    def rewind(self, num_tokens: int) -> None:
        assert num_tokens <= len(self.read)
        del self.read[len(self.read) - num_tokens :]

    def num_allowed(self, tokens: list[int]) -> int:
        there = len(self.read)
        for token in tokens:
            if token not in self.follow:
                break
            self.read.append(token)
        num = len(self.read) - there
        self.rewind(num)
        return num

    @property
    def follow(self) -> list[int]:
        return [] if self.is_complete else FOLLOW[self.read[-1] if self.read else None]

    @property
    def is_complete(self) -> bool:
        return self.read[-1:] == [0] or (len(self.read) >= self.length_max and self.read[-1] == 3)


samplings = st.builds(
    Sampling,
    tokens_max=st.integers(1, 24),
    temperature=st.sampled_from([0.0, 1.0, 3.0]),
    top_k=st.sampled_from([0, 2]),
    seed=st.integers(0, 2**32),
    stop_token_ids=st.sampled_from([(0,), (0, 1)]),  # with both, the grammar may allow nothing else
    num_logprobs=st.none() | st.integers(0, 2),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([(), ((2, 20.0),)]),
    num_choices=st.integers(1, 3),
)


@given(
    sampling=samplings,
    num_requests=st.integers(1, 4),
    tokens_min=st.integers(0, 8),
    length_max=st.integers(3, 30),
    script=st.builds(Script, st.just(7), st.sampled_from([None, 1, 2])),
    lives=st.lists(st.tuples(st.integers(0, 12), st.sampled_from([0, 3])), max_size=2),
)
@settings(max_examples=100, deadline=None)
def test_every_choice_gets_exactly_its_tokens_whatever_cuts_and_shares_its_work(
    sampling, num_requests, tokens_min, length_max, script, lives
):
    sampling = replace(sampling, tokens_min=min(tokens_min, sampling.tokens_max))
    asked = [
        Request(id=number, prompt=(1, 2, 3, 1, 2, number), sampling=sampling, constraint=Beads(length_max))
        for number in range(num_requests)
    ]
    expected = [script.tokens_of(one, choice) for one in asked for choice in range(sampling.num_choices)]
    tight = scripted_engine(script, block_size=4, cache_tokens=48, sequences_max=4, drafts_max=3, draft_cost=0.0)
    for one in asked:
        tight.core.submit(one)
    outputs = run(tight).outputs
    assert [outputs[one.id, choice] for one in asked for choice in range(sampling.num_choices)] == expected

    going = asked[0]
    for num_steps, drafts_max in [*lives, (FOR_EVER, 0)]:
        going, _ = live(going, num_steps, script, drafts_max=drafts_max, draft_cost=0.0)
        if all(progress.is_over for progress in going.progress):
            break
    assert [list(progress.tokens) for progress in going.progress] == expected[: sampling.num_choices]


def test_drafts_that_the_grammar_forbids_are_never_computed():
    """The prompt says that 1 2 is followed by 1; the grammar, that it is followed by 3."""
    engine = scripted_engine(Script(vocab_size=9), drafts_max=3, draft_cost=0.0)
    engine.core.submit(
        replace(
            request(prompt=[1, 2, 1, 2, 1, 2, 1, 2], tokens_max=20, logit_bias=((0, -100.0), (2, 100.0))),
            constraint=Beads(30),
        )
    )
    journal = run(engine)
    assert journal.outputs[0, 0][:6] == [1, 2, 3, 1, 2, 3]
    usage = journal.finished[0, 0].usage
    assert usage.num_drafted == usage.num_accepted > 0


def test_an_answer_that_is_complete_ends_at_once_with_no_end_token_and_below_tokens_min():
    engine = scripted_engine(Script(vocab_size=9))
    asked = request(tokens_max=20, tokens_min=20, stop_token_ids=(0,))
    engine.core.submit(replace(asked, constraint=Beads(length_max=5)))
    journal = run(engine)
    assert journal.finished[0, 0].reason is FinishReason.STOP
    assert journal.outputs[0, 0][-1] == 3
    assert 5 <= len(journal.outputs[0, 0]) <= 7


def test_below_tokens_min_an_answer_goes_on_where_the_grammar_lets_it():
    ended = replace(request(tokens_max=20, stop_token_ids=(0,), logit_bias=((0, 100.0),)), constraint=Beads(12))
    for tokens_min, length in (0, 1), (6, 7):
        engine = scripted_engine(Script(vocab_size=9))
        engine.core.submit(replace(ended, sampling=replace(ended.sampling, tokens_min=tokens_min)))
        output = run(engine).outputs[0, 0]
        assert output[-1] == 0
        assert length <= len(output) <= length + 2


def test_an_answer_that_ends_by_length_is_what_it_is():
    engine = scripted_engine(Script(vocab_size=9))
    engine.core.submit(replace(request(tokens_max=5, logit_bias=((1, 50.0), (0, -100.0))), constraint=Beads(30)))
    journal = run(engine)
    assert journal.finished[0, 0].reason is FinishReason.LENGTH
    assert len(journal.outputs[0, 0]) == 5


@pytest.mark.parametrize("drafts_max", [0, 3])
def test_a_dead_end_fails_its_request_alone_and_says_so(drafts_max):
    script = Script(vocab_size=9, memory=1)
    engine = scripted_engine(script, drafts_max=drafts_max, draft_cost=0.0)
    for number, dead_end in (0, 6), (1, None):
        asked = request(number, tokens_max=20, logit_bias=((0, -100.0),))
        engine.core.submit(replace(asked, constraint=Beads(30, dead_end)))
    engine.core.submit(request(2, tokens_max=20))
    journal = run(engine)
    assert journal.finished[0, 0].reason is FinishReason.FAILED
    assert journal.finished[0, 0].error == "a dead end"
    assert len(journal.outputs[0, 0]) <= 6
    for number in 1, 2:
        assert journal.finished[number, 0].reason is FinishReason.LENGTH
    assert journal.outputs[2, 0] == script.tokens_of(request(2, tokens_max=20))


# --------------------------------------------------------------------------------------- real grammars, a random model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(save_byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_mixtral(tmp_path_factory.mktemp("model"), seed=7, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def grammars(tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCAB, (END,))


def answers(checkpoint: Path, asked: list[Request], **engine) -> Iterator[tuple[FinishReason, list[int]]]:
    torch.set_num_threads(1)
    core = build(
        EngineConfig(**{"block_size": 4, "cache_tokens": 2048, "weights": "fp32", "drafts_max": 0, **engine}),
        checkpoint,
    )
    for one in asked:
        core.submit(one)
    outputs: dict[tuple[int, int], list[int]] = {}
    while core.has_work:
        result = core.step()
        for token in result.tokens:
            outputs.setdefault((token.request, token.choice), []).append(token.token)
        for end in result.finished:
            yield end.reason, outputs.pop((end.request, end.choice))


async def requests_for(grammars: Grammars, source: str, number: int, tokens_max: int) -> list[Request]:
    grammar: Constraint = await grammars.compile(source)
    return [
        Request(
            id=seed,
            prompt=(5, 6, 7),
            sampling=Sampling(tokens_max=tokens_max, temperature=1.5, seed=seed, stop_token_ids=(END,), num_choices=2),
            constraint=grammar,
        )
        for seed in range(number)
    ]


@pytest.mark.timeout(600)  # importing transformers alone has taken 90 s on two busy cores
async def test_every_answer_of_a_random_model_that_stops_is_of_the_schema(checkpoint, grammars, tokenizer):
    asked = await requests_for(grammars, source_of(schema(PERSON)), 12, tokens_max=300)
    ends = list(answers(checkpoint, asked))
    stopped = [tokenizer.decode(tokens) for reason, tokens in ends if reason is FinishReason.STOP]
    for text in stopped:
        jsonschema.validate(json.loads(text), PERSON)
    assert len(ends) == 24
    assert len(stopped) >= 12
    for reason, tokens in ends:
        assert reason is FinishReason.STOP or len(tokens) == 300


async def test_a_random_models_answers_are_the_same_with_drafts_and_preemption(checkpoint, grammars):
    asked = await requests_for(grammars, source_of(Regex(pattern=f"({DATE}, ){{1,6}}")), 6, tokens_max=80)
    plain = sorted(answers(checkpoint, asked))
    assert sorted(answers(checkpoint, asked, drafts_max=3, cache_tokens=112, sequences_max=5)) == plain
    assert {reason for reason, _ in plain} == {FinishReason.STOP}
