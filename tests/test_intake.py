"""Every record ends as a request that the engine can take, or as a failure that says what to change."""

import time
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.types import Capacity
from schemas.results import ErrorCode
from tests import hostile
from tests.hostile import MODEL, chat, line, record, text
from tests.tiny_tokenizer import save_byte_level
from worker import intake as intake_module
from worker.config import Limits
from worker.intake import Admitted, Intake, Refused
from worker.text import load_tokenizer

NOW_S = 1_800_000_000.0
CONTEXT = 200
VOCAB = 400

# The slowest here is a megabyte of JSON, in 10 ms on a quiet machine.
SLOWEST_S = 0.25


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_byte_level(tmp_path_factory.mktemp("tokenizer")))


def make_intake(tokenizer, **changes) -> Intake:
    capacity: dict[str, Any] = {
        "cache_tokens": 1024,
        "context_max": CONTEXT,
        "vocab_size": VOCAB,
        "eos_token_ids": (1,),
    }
    for name in capacity.keys() & changes.keys():
        capacity[name] = changes.pop(name)
    settings: dict[str, Any] = {
        "models": (MODEL,),
        "tokenizer": tokenizer,
        "capacity": Capacity(**capacity),
        "limits": Limits(output_tokens_max=190, output_tokens_default=32, choices_max=16),
        "price_ceiling": lambda prompt, output, tier, model: prompt + 1000 * output,
        "clock": lambda: NOW_S,
    }
    return Intake(**settings | changes)


@pytest.fixture(scope="module")
def intake(tokenizer):
    return make_intake(tokenizer)


def admit(intake: Intake, request: dict[str, Any], offset: int = 0, tier="realtime") -> Admitted:
    return intake.admit(record(line(request), offset=offset), tier, id=7)


def refusal(intake: Intake, request: dict[str, Any]) -> Refused:
    with pytest.raises(Refused) as refused:
        admit(intake, request)
    return refused.value


# --------------------------------------------------------------------------------------------------------- what is made


def test_a_chat_becomes_a_request_for_the_engine(intake, tokenizer):
    admitted = admit(intake, chat({"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "n": 2}))
    request, sampling = admitted.request, admitted.request.sampling
    assert request.id == 7
    assert tokenizer.decode(request.prompt) == "user\nhello\nassistant\n"
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.7, 0.9, 5, 0.1)
    assert (sampling.seed, sampling.num_choices, sampling.tokens_max, sampling.num_logprobs) == (3, 2, 8, None)
    assert admitted.tokens_reserved == 2 * (len(request.prompt) + 8)
    assert admitted.input.offset == 0


def test_a_prompt_of_tokens_is_taken_as_it_is(intake):
    assert admit(intake, text({"prompt": [5, 6, 399]})).request.prompt == (5, 6, 399)


def test_the_models_end_tokens_stop_an_answer_unless_they_are_ignored(intake):
    assert admit(intake, chat({"stop_token_ids": [9]})).request.sampling.stop_token_ids == (1, 9)
    assert admit(intake, chat({"ignore_eos": True, "stop_token_ids": [9]})).request.sampling.stop_token_ids == (9,)


def test_stop_strings_are_one_or_several(intake):
    assert [stop.text for stop in admit(intake, chat({"stop": "\n"})).stops] == ["\n"]
    assert [stop.text for stop in admit(intake, chat({"stop": ["a", "b"]})).stops] == ["a", "b"]
    assert admit(intake, chat()).stops == ()


def test_logprobs_are_asked_for_in_openais_two_ways(intake):
    def wanted(request: dict[str, Any]) -> int | None:
        return admit(intake, request).request.sampling.num_logprobs

    assert wanted(chat({"logprobs": True, "top_logprobs": 3})) == 3
    assert wanted(chat({"logprobs": True})) == 0
    assert wanted(text({"logprobs": 0})) == 0
    assert wanted(text({"logprobs": 2})) == 2
    assert wanted(text()) is None


def test_penalties_and_biases_reach_the_engine_as_they_were_asked_for(intake):
    asked = {"frequency_penalty": 0.5, "presence_penalty": -1, "repetition_penalty": 1.25, "logit_bias": {"9": -100}}
    sampling = admit(intake, chat(asked)).request.sampling
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (0.5, -1.0, 1.25)
    assert sampling.logit_bias == ((9, -100.0),)


def test_a_format_becomes_the_text_of_a_grammar(intake):
    assert admit(intake, chat()).grammar is None
    assert admit(intake, chat({"response_format": {"type": "text"}})).grammar is None
    for response_format in ({"type": "json_object"}, {"type": "regex", "pattern": "a"}):
        assert admit(intake, chat({"response_format": response_format})).grammar
        assert admit(intake, text({"response_format": response_format})).grammar


def test_a_model_without_an_end_token_can_follow_no_format(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "eos_token_ids", frozenset())
    intake = make_intake(tokenizer, eos_token_ids=())
    assert "no token to end" in refusal(intake, chat({"response_format": {"type": "json_object"}})).message


def test_an_unnamed_length_is_the_default_as_far_as_the_context_goes(intake):
    def length(prompt: list[int]) -> int:
        request = text({"prompt": prompt})
        del request["body"]["max_tokens"]
        return admit(intake, request).request.sampling.tokens_max

    assert length([5]) == 32
    assert length([5] * (CONTEXT - 10)) == 10


def test_prompt_and_answer_may_fill_the_context_to_the_last_token(intake):
    full = admit(intake, text({"prompt": [5] * (CONTEXT - 8)}))
    assert len(full.request.prompt) + full.request.sampling.tokens_max == CONTEXT
    assert refusal(intake, text({"prompt": [5] * (CONTEXT - 7)})).code == ErrorCode.CONTEXT_EXCEEDED


def test_a_cache_smaller_than_the_context_is_the_limit(tokenizer):
    small = make_intake(tokenizer, cache_tokens=16)
    admit(small, text({"prompt": [5] * 8}))
    assert refusal(small, text({"prompt": [5] * 9})).code == ErrorCode.CONTEXT_EXCEEDED


def test_no_request_reserves_more_than_the_cache_holds(tokenizer):
    small = make_intake(tokenizer, cache_tokens=16)
    assert admit(small, text({"prompt": [5] * 8, "n": 16})).tokens_reserved == 16


def test_the_topic_gives_the_tier_unless_the_request_names_one(intake):
    batch, urgent = admit(intake, chat(), tier="batch"), admit(intake, chat(tier="realtime"), tier="batch")
    assert (batch.tier, urgent.tier) == ("batch", "realtime")
    assert batch.request.priority > urgent.request.priority


def test_a_record_read_again_draws_the_same_random_numbers_and_another_record_others(intake):
    seeds = [admit(intake, chat(), offset=offset).request.sampling.seed for offset in (1, 1, 2)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_tenants_do_not_share_cached_prefixes(intake):
    assert admit(intake, chat(tenant="a")).request.cache_salt != admit(intake, chat(tenant="b")).request.cache_salt


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_refusal_names_whose_request_it_was(intake):
    refused = refusal(intake, chat({"n": 100}, tenant="acme"))
    assert (refused.custom_id, refused.tenant) == ("mine", "acme")


def test_a_malformed_request_is_named_as_far_as_it_can_be_read(intake):
    assert refusal(intake, chat({"n": "many"})).custom_id == "mine"
    with pytest.raises(Refused) as refused:
        intake.admit(record(b"{"), "realtime", 1)
    assert refused.value.custom_id is None


def test_a_deadline_counts_from_the_moment_it_is_reached(intake):
    assert admit(intake, chat(deadline=NOW_S + 0.001)).deadline == NOW_S + 0.001
    assert refusal(intake, chat(deadline=NOW_S)).code == ErrorCode.DEADLINE_EXCEEDED


def test_a_price_that_may_exceed_the_budget_is_refused_to_the_picodollar(intake):
    ceiling = 3 + 1000 * 8 * 2  # of three tokens of prompt and two choices of eight
    request = {"prompt": [5, 6, 7], "n": 2}
    admit(intake, text(request, max_cost=f"0.{ceiling:012d}"))
    refused = refusal(intake, text(request, max_cost=f"0.{ceiling - 1:012d}"))
    assert refused.code == ErrorCode.BUDGET_EXCEEDED
    assert "0.000000016003" in refused.message


def test_a_prompt_is_scored_where_it_is_echoed_with_logprobs(intake):
    def wanted(fields: dict[str, Any]) -> int | None:
        return admit(intake, text(fields)).request.sampling.num_prompt_logprobs

    assert wanted({"echo": True, "logprobs": 2}) == 2
    assert wanted({"echo": True, "logprobs": 0}) == 0
    assert wanted({"echo": True}) is None
    assert wanted({"logprobs": 2}) is None


def test_best_of_is_refused_with_what_to_do_instead(intake):
    assert "it will come with group requests" in refusal(intake, text({"best_of": 4, "n": 2})).message
    admit(intake, text({"best_of": 2, "n": 2}))


def test_an_echoed_prompt_counts_to_the_size_of_the_answer(tokenizer, monkeypatch):
    monkeypatch.setattr(intake_module, "RECORD_BYTES_MAX", 20_000)
    intake = make_intake(tokenizer)
    asked = {"prompt": [5] * 50, "max_tokens": 50, "logprobs": 1}
    admit(intake, text(asked))
    assert "a record holds 20000" in refusal(intake, text({**asked, "echo": True})).message


def test_an_answer_that_no_record_could_hold_is_refused_before_it_is_paid_for(tokenizer, monkeypatch):
    monkeypatch.setattr(intake_module, "RECORD_BYTES_MAX", 100_000)
    intake = make_intake(tokenizer)
    admit(intake, chat({"max_tokens": 100, "logprobs": True, "top_logprobs": 5}))
    assert (
        "a record holds 100000"
        in refusal(intake, chat({"max_tokens": 100, "logprobs": True, "top_logprobs": 20})).message
    )


@pytest.mark.parametrize("name", hostile.REFUSED)
def test_hostile_input_is_refused_at_once(intake, name):
    code, bad = hostile.REFUSED[name]
    start = time.perf_counter()
    with pytest.raises(Refused) as refused:
        intake.admit(bad, "realtime", 1)
    assert time.perf_counter() - start < SLOWEST_S
    assert refused.value.code == code, refused.value


@pytest.mark.parametrize("name", hostile.ADMITTED)
def test_odd_but_honest_input_is_admitted(intake, name):
    intake.admit(hostile.ADMITTED[name], "realtime", 1)


def test_refusals_never_quote_what_was_read(intake):
    secret = "S3CRET"
    for request in (
        chat(tenant={"secret": secret}),
        chat(url=f"{secret}' - at `$.{secret}`"),
        chat({"messages": [{"role": f"{secret}` - at `$.x", "content": secret}]}),
        chat({f"{secret} with spaces": 1}),
        chat({"user": secret + "\n"}),
        chat(max_cost=secret),
    ):
        assert secret not in refusal(intake, request).message


def outcome(intake: Intake, one) -> str:
    try:
        admitted = intake.admit(one, "realtime", 1)
    except Refused as refused:
        return refused.code
    request = admitted.request
    assert 0 < len(request.prompt) + request.sampling.tokens_max <= CONTEXT
    assert all(0 <= token < VOCAB for token in (*request.prompt, *request.sampling.stop_token_ids))
    assert 1 <= request.sampling.num_choices <= 16
    assert 0 < admitted.tokens_reserved <= 1024
    return "ADMITTED"


def test_more_messages_than_tokens_are_refused_before_they_are_rendered(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "_template", object())  # any use of it would raise
    refused = refusal(make_intake(tokenizer), chat({"messages": [{"role": "user", "content": "a"}] * CONTEXT}))
    assert refused.code == ErrorCode.CONTEXT_EXCEEDED


def test_four_thousand_damaged_requests_end_in_one_of_the_two_ways(intake):
    slowest = 0.0
    outcomes: Counter[str] = Counter()
    for one in hostile.fuzz(seed=20, count=4000):
        start = time.perf_counter()
        outcomes[outcome(intake, one)] += 1
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < SLOWEST_S
    # The generator reaches both ends: neither all noise nor all valid.
    assert outcomes["ADMITTED"] > 200
    assert outcomes[ErrorCode.INVALID_REQUEST] > 1000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@given(name=st.sampled_from(hostile.BODY_FIELDS + hostile.OUTER_FIELDS), value=json_values)
@settings(max_examples=300, deadline=None)
def test_any_value_in_any_field_ends_in_one_of_the_two_ways(intake, name, value):
    request = chat({name: value}) if name in hostile.BODY_FIELDS else chat() | {name: value}
    outcome(intake, record(line(request)))


@given(value=st.binary(max_size=200), header=st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_bytes_end_in_one_of_the_two_ways(intake, value, header):
    outcome(intake, record(value, (("content-type", header), ("traceparent", header))))
