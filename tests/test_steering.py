"""Penalties, biases and bans, held to their formula in 64 bits; who asks for none pays nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.sampler import draw
from engine.sequence import Sequence
from engine.steering import Steering, steer, steering_of
from engine.types import Request, Sampling
from kernels import reference

V = 8


def defined(logits: np.ndarray, sampling: Sampling, prompt: list[int], output: list[int]) -> np.ndarray:
    """The words of OpenAI's and vLLM's documentation, on dense vectors in 64 bits."""
    counts = np.bincount(output, minlength=len(logits))
    seen = (counts > 0) | np.isin(np.arange(len(logits)), prompt)
    repeated = np.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    steered = np.where(seen, repeated, logits)
    steered = steered - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0)
    for token, bias in sampling.logit_bias:
        steered[token] += bias
    if len(output) < sampling.tokens_min:
        steered[list(sampling.stop_token_ids)] = -np.inf
    return steered


def asked(sampling: Sampling, prompt: list[int]) -> Request:
    return Request(id=0, prompt=tuple(prompt), sampling=sampling)


def steered(logits: torch.Tensor, steering: Steering | None, tokens: list[int], drafts: list[int]) -> torch.Tensor:
    return steer(logits, enumerate(steering.edits(tokens, drafts)) if steering else ())


ids = st.integers(0, V - 1)
samplings = st.builds(
    Sampling,
    tokens_max=st.just(20),
    tokens_min=st.integers(0, 4),
    stop_token_ids=st.lists(ids, max_size=2).map(tuple),
    frequency_penalty=st.sampled_from([0.0, 0.0, -2.0, 0.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, -0.4, 2.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.1, 1.2]),
    logit_bias=st.dictionaries(ids, st.floats(-100, 100), max_size=3).map(lambda bias: tuple(bias.items())),
)


@given(samplings, st.lists(ids, min_size=1, max_size=6), st.lists(st.lists(ids, max_size=4), min_size=1, max_size=4))
def test_each_row_is_steered_by_the_formula_and_drafts_leave_no_trace(sampling, prompt, pieces):
    """Each piece is first tried as drafts, then appended."""
    steering, tokens = steering_of(asked(sampling, prompt)), list(prompt)
    for piece in pieces:
        logits = torch.randn(len(piece) + 1, V) * 5
        got = steered(logits, steering, tokens, piece)
        for place, row in enumerate(logits.double().numpy()):
            expected = defined(row, sampling, prompt, [*tokens, *piece[:place]][len(prompt) :])
            np.testing.assert_allclose(got[place].double().numpy(), expected, rtol=1e-6, atol=1e-5)  # of fp32
        tokens += piece


def test_taken_up_from_its_tokens_alone_a_sequence_steers_as_it_would_have():
    sampling = Sampling(tokens_max=9, frequency_penalty=0.5, presence_penalty=1.0, repetition_penalty=1.3)
    prompt, output = [1, 2], [3, 3, 4]
    grown, taken_up = Steering(asked(sampling, prompt)), Steering(asked(sampling, prompt))
    for length in range(len(output)):
        grown.edits([*prompt, *output[:length]], [5, 5])
    logits = torch.randn(1, V)
    tokens = [*prompt, *output]
    assert torch.equal(steered(logits, grown, tokens, []), steered(logits, taken_up, tokens, []))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(tokens_max=4),
        Sampling(tokens_max=4, stop_token_ids=(1,)),
        Sampling(tokens_max=4, tokens_min=3),
        Sampling(tokens_max=4, temperature=1.0, top_k=3, top_p=0.5, min_p=0.1, num_logprobs=2),
    ],
)
def test_who_asks_for_nothing_has_no_steering_and_its_logits_are_not_even_copied(sampling):
    assert steering_of(asked(sampling, [1, 2])) is None
    logits = torch.randn(2, V)
    assert steer(logits, ()) is logits


def test_only_the_rows_of_those_who_ask_change_and_the_models_own_stay():
    logits = torch.randn(3, V)
    before = logits.clone()
    steering = Steering(asked(Sampling(tokens_max=4, logit_bias=((2, 7.0),)), [0]))
    got = steer(logits, [(1, steering.edits([0], [])[0])])
    assert torch.equal(logits, before)
    assert torch.equal(got[[0, 2]], before[[0, 2]])
    assert got[1, 2] == before[1, 2] + 7


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_not_hidden_by_a_ban_or_a_penalty(value):
    bias = ((3, -9.0),)
    sampling = Sampling(tokens_max=4, tokens_min=4, stop_token_ids=(3,), repetition_penalty=2.0, logit_bias=bias)
    logits = torch.randn(1, V)
    logits[0, 3] = value
    share = sequence(sampling, [3]).share(1)
    assert draw(reference.OPS, logits, [share]).accepted()[0].error


def test_logprobs_are_the_models_own_whatever_is_biased():
    logits = torch.randn(1, V)
    likeliest, other = int(logits.argmax()), int(logits.argmin())
    share = sequence(Sampling(tokens_max=4, logit_bias=((other, 100.0),), num_logprobs=1), [1]).share(1)
    brought = draw(reference.OPS, logits, [share]).accepted()[0]
    assert brought.tokens == [other]
    assert brought.logprobs is not None
    own, (top,) = brought.logprobs[0]
    scores = logits.log_softmax(-1)[0].tolist()
    assert (own.logprob, top.token, top.logprob) == (scores[other], likeliest, scores[likeliest])


def test_a_token_costs_the_same_however_long_the_sequence_is():
    steering = Steering(asked(Sampling(tokens_max=9, frequency_penalty=1.0), [1]))
    steering.edits([1, *[2, 3] * 50_000], [])

    class Tokens(list):
        """Tells what is read of it."""

        def __getitem__(self, place):
            assert place.start == 100_001, "what has been counted is read again"
            return super().__getitem__(place)

        def __iter__(self):
            raise AssertionError("all of it is read")

    (edit,) = steering.edits(Tokens([1, *[2, 3] * 50_000, 4]), [])
    assert dict(zip(edit.ids.tolist(), (-edit.offsets).tolist(), strict=True)) == {2: 50_000, 3: 50_000, 4: 1}


def sequence(sampling: Sampling, prompt: list[int]) -> Sequence:
    return Sequence(
        request=asked(sampling, prompt),
        choice=0,
        rank=(0, 0, 0),
        length_max=100,
    )
