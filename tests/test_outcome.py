"""From the engine's events to the records that are sent: completions, failures, chunks, dead letters."""

import json
from typing import Any

import pytest

from engine.types import Capacity, Finished, FinishReason, Logprob, Scored, Token
from engine.types import Usage as EngineUsage
from schemas.codec import decode_result, encode, header_text
from schemas.cost import MeterReading
from schemas.results import Bill, ChatResult, Completion, ErrorCode, TextResult
from tests.hostile import MODEL, chat, line, record, text
from tests.test_schemas import MESSAGES
from tests.tiny_tokenizer import save_byte_level
from worker import envelope, outcome
from worker.config import Limits, Topics
from worker.envelope import Envelope
from worker.errors import RequestError
from worker.intake import RECORD_BYTES_MAX, Intake, Refused
from worker.outcome import Answer, failure
from worker.stream import Preview
from worker.text import load_tokenizer

BILL = Bill(price="0.000001000000", cost="0.000000500000", price_book="test")
HEADERS = (("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), ("other", b"\xff"))


class Clock:
    """Seconds since 1970, moved by hand. The records of `tests.hostile` were made at its start."""

    def __init__(self) -> None:
        self.now_s = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def stopwatch():
    return Clock()


@pytest.fixture
def ask(tokenizer, clock, stopwatch):
    """Admits a request, and returns the answer that waits for its tokens."""
    intake = Intake(
        models=(MODEL,),
        tokenizer=tokenizer,
        capacity=Capacity(cache_tokens=1 << 20, context_max=1 << 20, vocab_size=400, eos_token_ids=(1,)),
        limits=Limits(output_tokens_max=1 << 20, record_bytes_max=64 << 20),
        price_ceiling=lambda *_: 0,
        clock=clock,
    )

    def asked(request: dict[str, Any]) -> Answer:
        admitted = intake.admit(record(line(request), HEADERS, offset=9), "realtime", id=1)
        return Answer(admitted, tokenizer, "worker-1", stopwatch)

    return asked


@pytest.fixture
def mail(clock):
    return Envelope(Topics(), "group", "worker 1", clock)


def say(answer: Answer, tokenizer, words: str, choice: int = 0, **logprobs: Any) -> list[str]:
    """The engine's tokens for these words; returns the pieces of text that became final."""
    tokens = tokenizer.encode(words, 1 << 20)
    return [
        answer.take(Token(request=1, choice=choice, index=index, token=token, **logprobs))
        for index, token in enumerate(tokens)
    ]


def end(
    answer: Answer, reason: FinishReason = FinishReason.STOP, choice: int = 0, error: str = "", **usage: int
) -> str:
    counts = {"num_prompt": len(answer.admitted.request.prompt), "num_cached": 0, "num_output": 1} | usage
    return answer.finish(Finished(request=1, choice=choice, reason=reason, usage=EngineUsage(**counts), error=error))


def body_of(answer: Answer) -> ChatResult | TextResult:
    """The body of the completion, after a trip over the wire."""
    sent = decode_result(Completion, encode(answer.completion(BILL)))
    assert sent.response is not None
    return sent.response.body


# --------------------------------------------------------------------------------------------------------- completions


def test_a_chat_is_answered_in_openais_form(ask, tokenizer):
    answer = ask(chat())
    say(answer, tokenizer, "the lazy dog")
    end(answer)
    completion = json.loads(encode(answer.completion(BILL)))
    assert completion["id"] == "tokenmill.requests-3-9"
    assert completion["custom_id"] == "mine"
    assert completion["input"] == {"topic": "tokenmill.requests", "partition": 3, "offset": 9}
    assert completion["error"] is None
    assert completion["bill"]["price"] == BILL.price
    response = completion["response"]
    assert (response["status_code"], response["body"]["object"]) == (200, "chat.completion")
    choice = response["body"]["choices"][0]
    assert choice["message"] == {"content": "the lazy dog", "role": "assistant", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)


def test_a_text_is_answered_in_openais_form(ask, tokenizer):
    answer = ask(text())
    say(answer, tokenizer, " world")
    end(answer, FinishReason.LENGTH)
    body = body_of(answer)
    assert isinstance(body, TextResult)
    assert (body.choices[0].text, body.choices[0].finish_reason) == (" world", "length")


def test_choices_are_told_apart_however_their_tokens_are_mixed(ask, tokenizer):
    answer = ask(chat({"n": 3}))
    for choice in (2, 0, 1, 0, 2):
        say(answer, tokenizer, f"<{choice}>", choice)
    for choice in (1, 2):
        end(answer, choice=choice)
    assert not answer.done
    end(answer, choice=0)
    assert answer.done
    body = body_of(answer)
    assert isinstance(body, ChatResult)
    assert [choice.message.content for choice in body.choices] == ["<0><0>", "<1>", "<2><2>"]


def test_the_prompt_counts_once_as_the_first_choice_found_it(ask, tokenizer):
    answer = ask(text({"prompt": [5, 6, 7], "n": 2}))
    for choice, cached in ((0, 1), (1, 0)):
        say(answer, tokenizer, "@#", choice)
        end(answer, choice=choice, num_cached=cached, num_drafted=5, num_accepted=2)
    usage = body_of(answer).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 4, 7)
    assert usage.prompt_tokens_details.cached_tokens == 1
    details = usage.completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (4, 6)


def test_tokens_past_a_stop_string_are_neither_shown_nor_counted(ask, tokenizer):
    answer = ask(chat({"stop": "#"}))
    say(answer, tokenizer, "@#")
    assert answer.is_stopped(0)
    assert say(answer, tokenizer, "@@") == ["", ""]
    end(answer, FinishReason.LENGTH, num_output=4)
    body = body_of(answer)
    assert isinstance(body, ChatResult)
    assert (body.choices[0].message.content, body.choices[0].finish_reason) == ("@", "stop")
    assert (body.usage.completion_tokens, answer.owed[0].num_output) == (2, 2)


def test_what_a_stop_string_held_back_is_in_the_answer(ask, tokenizer):
    answer = ask(chat({"stop": "##!"}))
    assert say(answer, tokenizer, "@##") == ["@", "", ""]
    assert end(answer) == "##"
    body = body_of(answer)
    assert isinstance(body, ChatResult)
    assert body.choices[0].message.content == "@##"


def test_the_time_is_split_without_a_rest(ask, tokenizer, clock, stopwatch):
    clock.now_s += 0.5
    answer = ask(chat())
    stopwatch.now_s += 0.25
    say(answer, tokenizer, "@")
    stopwatch.now_s += 2
    end(answer)
    timing = answer.timing
    assert (timing.queue_time_ms, timing.time_to_first_token_ms, timing.generation_time_ms) == (500, 250, 2000)


@pytest.mark.parametrize("step_s", [3600, -3600])
def test_a_clock_that_is_set_while_a_request_runs_does_not_show(ask, tokenizer, clock, stopwatch, step_s):
    answer = ask(chat())
    clock.now_s += step_s
    stopwatch.now_s += 0.25
    say(answer, tokenizer, "@")
    clock.now_s -= 2 * step_s
    stopwatch.now_s += 2
    end(answer)
    assert (answer.timing.time_to_first_token_ms, answer.timing.generation_time_ms) == (250, 2000)


def test_a_clock_that_is_behind_the_producers_shows_as_no_time(ask, tokenizer, clock):
    clock.now_s -= 100
    answer = ask(chat())
    say(answer, tokenizer, "@")
    end(answer)
    assert answer.timing.queue_time_ms == 0


# ------------------------------------------------------------------------------------------------------------ logprobs


def test_a_chats_logprobs_name_each_token_with_its_bytes(ask, tokenizer):
    answer = ask(chat({"logprobs": True, "top_logprobs": 2}))
    half = tokenizer._inner.token_to_id("Ã")  # the first byte of an é
    say(answer, tokenizer, "@", logprob=Logprob(5, -0.5), top_logprobs=(Logprob(half, -0.25), Logprob(1, -2.0)))
    end(answer)
    body = body_of(answer)
    assert isinstance(body, ChatResult)
    assert body.choices[0].logprobs is not None
    (token,) = body.choices[0].logprobs.content
    assert (token.token, token.logprob, token.bytes) == ("@", -0.5, [64])
    assert [(top.token, top.bytes) for top in token.top_logprobs] == [("\ufffd", [0xC3]), ("<|end|>", list(b"<|end|>"))]


def test_a_texts_logprobs_are_parallel_lists_with_places_in_the_text(ask, tokenizer):
    answer = ask(text({"logprobs": 1}))
    say(answer, tokenizer, "é@#", logprob=Logprob(5, -0.5), top_logprobs=(Logprob(6, -0.5),))
    end(answer)
    body = body_of(answer)
    assert isinstance(body, TextResult)
    logprobs = body.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 4
    assert (logprobs.tokens[2:], logprobs.text_offset) == (["@", "#"], [0, 0, 1, 2])


def test_an_echoed_prompt_is_the_beginning_of_each_choice_and_of_its_logprobs(ask, tokenizer):
    prompt = list(tokenizer.encode("é@", 99))
    answer = ask(text({"logprobs": 1, "echo": True, "n": 2, "prompt": prompt}))
    lines = [(Logprob(token, -1.0 - index), (Logprob(5, -0.5),)) for index, token in enumerate(prompt[1:])]
    for one in lines:
        answer.score(Scored(request=1, logprobs=[one]))
    for choice in (0, 1):
        pieces = say(answer, tokenizer, "#!", choice, logprob=Logprob(5, -0.25))
        assert pieces == ["é@#", "!"]
        end(answer, choice=choice)
    body = body_of(answer)
    assert isinstance(body, TextResult)
    for each in body.choices:
        assert each.text == "é@#!"
        logprobs = each.logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs == [None, -1.0, -2.0, -0.25, -0.25]
        assert logprobs.top_logprobs[:2] == [None, {tokenizer.token_bytes(5).decode(): -0.5}]
        assert logprobs.tokens[2:] == ["@", "#", "!"]
        assert logprobs.text_offset == [0, 0, 1, 2, 3]
    assert body.usage.completion_tokens == 4


def test_a_prompt_is_echoed_without_logprobs_too(ask, tokenizer):
    answer = ask(text({"echo": True, "prompt": "one "}))
    say(answer, tokenizer, "two")
    end(answer)
    body = body_of(answer)
    assert isinstance(body, TextResult)
    assert (body.choices[0].text, body.choices[0].logprobs) == ("one two", None)


def test_of_two_likely_tokens_of_one_name_the_likelier_is_named(ask, tokenizer):
    answer = ask(text({"logprobs": 2}))
    first, second = (tokenizer._inner.token_to_id(name) for name in "ÃÄ")  # both show as U+FFFD
    say(answer, tokenizer, "@", logprob=Logprob(5, -0.5), top_logprobs=(Logprob(first, -0.5), Logprob(second, -3.0)))
    end(answer)
    body = body_of(answer)
    assert isinstance(body, TextResult)
    assert body.choices[0].logprobs is not None
    assert body.choices[0].logprobs.top_logprobs == [{"\ufffd": -0.5}]


@pytest.mark.parametrize("logprob", [float("-inf"), float("nan")])
def test_a_logprob_that_json_cannot_say_is_openais_least(ask, tokenizer, logprob):
    answer = ask(chat({"logprobs": True}))
    say(answer, tokenizer, "@", logprob=Logprob(5, logprob))
    end(answer)
    assert b'"logprob":-9999.0' in encode(answer.completion(BILL))


# ------------------------------------------------------------------------------------------------------------ failures


def test_one_failed_choice_fails_the_request(ask, tokenizer):
    answer = ask(chat({"n": 2}, tenant="acme"))
    say(answer, tokenizer, "@")
    end(answer)
    end(answer, FinishReason.FAILED, choice=1, error="a logit was not finite")
    completion = answer.completion(None)
    assert completion.response is None
    assert completion.error is not None
    assert (completion.error.code, completion.error.message) == (ErrorCode.INFERENCE_ERROR, "a logit was not finite")
    assert (completion.custom_id, completion.tenant) == ("mine", "acme")


def test_an_answer_larger_than_a_record_is_a_failure_that_can_be_sent(ask, tokenizer, mail):
    answer = ask(chat({"max_tokens": 1 << 16}))
    say(answer, tokenizer, "\x00" * (RECORD_BYTES_MAX // 6))  # six bytes each in JSON
    end(answer)
    assert answer.fault is not None
    assert answer.fault.code == ErrorCode.RESULT_TOO_LARGE
    sent = mail.completion(answer.completion(BILL), answer.admitted.record)
    assert len(sent.value) < 2000


def test_an_answer_that_just_fits_is_sent_whole(ask, tokenizer, mail, monkeypatch):
    limit = 50_000
    monkeypatch.setattr(outcome, "RECORD_BYTES_MAX", limit)
    answer = ask(chat({"max_tokens": limit}))
    say(answer, tokenizer, "@" * (limit - outcome.FRAME_BYTES - 1000))  # ids and names take the rest
    end(answer)
    assert answer.fault is None
    sent = mail.completion(answer.completion(BILL), answer.admitted.record)
    assert limit - outcome.FRAME_BYTES - 1000 < envelope._size(sent.key, sent.value, sent.headers) < limit


def test_a_request_can_be_given_up_before_its_end(ask, tokenizer):
    answer = ask(chat())
    say(answer, tokenizer, "@")
    completion = answer.give_up(RequestError(ErrorCode.DEADLINE_EXCEEDED, "too late"), BILL)
    assert completion.error is not None
    assert (completion.error.code, completion.bill) == (ErrorCode.DEADLINE_EXCEEDED, BILL)


def test_a_record_that_could_not_be_read_has_an_answer_all_the_same():
    completion = failure(record(b"\xff", offset=4), Refused(ErrorCode.INVALID_REQUEST, "no"), "worker-1")
    assert (completion.id, completion.custom_id) == ("tokenmill.requests-3-4", None)


# ------------------------------------------------------------------------------------------------------------- records


def test_an_answer_goes_out_under_the_requests_key_and_trace(ask, tokenizer, mail):
    answer = ask(chat())
    say(answer, tokenizer, "@")
    end(answer)
    sent = mail.completion(answer.completion(BILL), answer.admitted.record)
    assert (sent.topic, sent.key) == ("tokenmill.completions", b"key")
    assert header_text(sent.headers, "traceparent") == HEADERS[0][1].decode()
    assert header_text(sent.headers, "ce_source") == "/tokenmill/group/worker%201"
    assert header_text(sent.headers, "ce_subject") == "mine"
    assert "other" not in dict(sent.headers)
    for _, value in sent.headers:
        value.decode()


def test_costs_and_readings_share_the_costs_topic(mail):
    cost, meter = MESSAGES["cost"], MESSAGES["meter"]
    assert isinstance(meter, MeterReading)
    (sent,) = mail.costs([cost], record(b""))
    assert sent.topic == mail.meter(meter).topic == "tokenmill.costs"
    assert mail.meter(meter).key == meter.life.encode()


def test_a_dead_letter_is_the_record_byte_for_byte_with_reasons_beside_it(mail):
    bad = record(b"\xff\x00{", HEADERS, key=b"k\xff", offset=4)
    sent = mail.dead_letter(bad, Refused(ErrorCode.INVALID_REQUEST, "the value holds text that is not UTF-8"))
    assert (sent.topic, sent.key, sent.value) == ("tokenmill.dead-letters", b"k\xff", bad.value)
    assert sent.headers[: len(HEADERS)] == HEADERS
    assert {name: value.decode() for name, value in sent.headers[len(HEADERS) :]} == {
        "tokenmill.error.code": "INVALID_REQUEST",
        "tokenmill.error.message": "the value holds text that is not UTF-8",
        "tokenmill.error.topic": "tokenmill.requests",
        "tokenmill.error.partition": "3",
        "tokenmill.error.offset": "4",
        "tokenmill.error.timestamp": "1700000000000",
        "tokenmill.error.group": "group",
        "tokenmill.error.worker": "worker 1",
    }


@pytest.mark.parametrize(
    ("bad", "left_out"),
    [
        (record(b"x" * RECORD_BYTES_MAX), "value"),
        (record(b"x", (("a", b"b" * RECORD_BYTES_MAX),)), "value,headers"),
        (record(b"x", key=b"k" * 5000), "key"),
        (
            record(b"x" * RECORD_BYTES_MAX, (("a", b"b" * RECORD_BYTES_MAX),), key=b"k" * RECORD_BYTES_MAX),
            "value,headers,key",
        ),
    ],
)
def test_a_dead_letter_too_large_to_send_says_what_it_leaves_out(mail, bad, left_out):
    sent = mail.dead_letter(bad, Refused(ErrorCode.INVALID_REQUEST, "too large"))
    assert header_text(sent.headers, "tokenmill.error.left_out") == left_out
    assert envelope._size(sent.key, sent.value, sent.headers) < RECORD_BYTES_MAX + 1000


# -------------------------------------------------------------------------------------------------------------- chunks


def test_chunks_put_together_are_the_completions_text(ask, tokenizer):
    answer = ask(chat({"stream": True, "stop": "##"}))
    preview = Preview(answer)
    previews = [preview.chunk(0, piece) for piece in say(answer, tokenizer, "hello 😀 #")]
    previews.append(preview.chunk(0, end(answer)))
    chunks = [chunk for chunk in previews if chunk]
    assert "".join(chunk.text for chunk in chunks) == "hello 😀 #"
    assert [chunk.sequence for chunk in chunks] == list(range(len(chunks)))
    assert all(chunk.text for chunk in chunks)
    assert chunks[-1].finish_reason == "stop"


def test_there_is_no_chunk_where_there_is_nothing_to_say(ask):
    answer = ask(chat({"stream": True}))
    preview = Preview(answer)
    assert preview.chunk(0, "") is None
    end(answer)
    ended = preview.chunk(0, "")
    assert ended is not None
    assert (ended.text, ended.finish_reason, ended.sequence) == ("", "stop", 0)


@pytest.mark.parametrize("asked_for", [True, False])
def test_usage_comes_with_the_last_chunk_if_it_is_asked_for(ask, tokenizer, asked_for):
    answer = ask(chat({"stream": True, "n": 2, "stream_options": {"include_usage": asked_for}}))
    preview, usages = Preview(answer), []
    for choice in (0, 1):
        (piece,) = say(answer, tokenizer, "@", choice)
        chunks = [preview.chunk(choice, piece)]
        chunks.append(preview.chunk(choice, end(answer, choice=choice)))
        usages += [chunk and chunk.usage for chunk in chunks]
    assert usages == [None, None, None, answer.usage if asked_for else None]
