"""A worker leaves with requests half done, and another one goes on: answer and price are those of one that stayed."""

import asyncio
import json
from typing import Any

import pytest
from msgspec import structs

from engine.types import Request
from schemas.codec import KINDS
from schemas.cost import picodollars
from schemas.handoff import Handoff
from schemas.results import Completion, ErrorCode, TextResult
from tests.simulation import HANDOVER_TOKENS_MIN, TOPICS
from tests.test_service import SOON_S, Stage, Worker, error_of, text_of
from tests.tiny_tokenizer import save_byte_level
from tests.virtual_time import virtually
from worker import service
from worker.brokers.base import Headers
from worker.brokers.memory import Crash
from worker.intake import PRIORITY_HANDED_OVER
from worker.text import load_tokenizer

ASKED: dict[str, Any] = {"max_tokens": 64, "logprobs": 1, "n": 2, "stop": ["END"], "stream": True}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_byte_level(tmp_path_factory.mktemp("tokenizer")))


async def leave(worker: Worker) -> None:
    """The worker leaves at once, with all that it has."""
    worker.drain.budget_s = 0.0
    worker.drain.ask()
    await asyncio.wait_for(worker.over, SOON_S)


def play(worker: Worker, request: Request, *says: tuple[int, str]) -> None:
    for choice, text in says:
        worker.engine.says(request, text, choice)


async def uninterrupted(tokenizer, *says: tuple[int, str], **asked: Any) -> tuple[Completion, Stage]:
    """What a worker that stays makes of these choices' texts."""
    stage = Stage(tokenizer)
    worker = stage.hire()
    stage.ask(**asked)
    request = await worker.request()
    play(worker, request, *says)
    worker.engine.answers(request, "")
    (answer,) = await stage.answers()
    return answer, stage


def bill_of(answer: Completion, stage: Stage) -> Any:
    """The price, and all events that owe, without what they cost and who made them."""
    assert answer.bill
    owed = [
        structs.replace(one, cost="", device_ns=0, worker="", life="") for one in stage.costs if picodollars(one.price)
    ]
    return answer.bill.price, sorted(owed, key=lambda one: one.id)


@virtually
async def test_an_answer_that_was_handed_over_is_that_of_a_worker_that_stayed(tokenizer):
    """With two choices, logprobs, a stop string and a character across the seam, and chunks that go on."""
    stays, its_stage = await uninterrupted(
        tokenizer, (0, "Grüße and more E"), (1, "one "), (0, "ND never shown"), (1, "two"), **ASKED
    )
    stage = Stage(tokenizer)
    leaving = stage.hire("leaving")
    stage.ask(**ASKED)
    request = await leaving.request()
    play(leaving, request, (0, "Grüße and more E"), (1, "one "))
    await asyncio.sleep(SOON_S)
    await leave(leaving)
    heir = stage.hire("heir")
    resumed = await heir.request()
    play(heir, resumed, (0, "ND never shown"), (1, "two"))
    heir.engine.answers(resumed, "")
    (answer,) = await stage.answers()

    assert text_of(answer, 0) == "Grüße and more "
    same = {"worker": "", "bill": None, "timing": None, "handovers": 0}
    assert structs.replace(answer, **same) == structs.replace(stays, **same)
    assert bill_of(answer, stage) == bill_of(stays, its_stage)
    assert (answer.worker, answer.handovers, stays.handovers) == ("heir", 1, 0)
    pieces = {choice: [one for one in stage.chunks if one.choice == choice] for choice in (0, 1)}
    for choice, chunks in pieces.items():
        assert [chunk.sequence for chunk in chunks] == list(range(len(chunks)))
        assert "".join(chunk.text for chunk in chunks) == text_of(stays, choice)
    assert stage.violations() == []


@virtually
@pytest.mark.parametrize("logprobs", [0, None])
async def test_an_echoed_prompt_goes_along_with_its_logprobs_and_is_not_sent_again(tokenizer, logprobs):
    stage = Stage(tokenizer)
    leaving = stage.hire("leaving")
    stage.ask(prompt="before", echo=True, logprobs=logprobs, stream=True, n=2)
    request = await leaving.request()
    if logprobs is not None:
        leaving.engine.scores(request)
    play(leaving, request, (0, " and"), (1, " or"))
    await asyncio.sleep(SOON_S)
    await leave(leaving)
    assert len(stage.handoffs[0].prompt_logprobs or ()) == (0 if logprobs is None else len(request.prompt) - 1)
    heir = stage.hire("heir")
    resumed = await heir.request()
    assert resumed.progress
    heir.engine.answers(resumed, " after")
    (answer,) = await stage.answers()
    assert [text_of(answer, choice) for choice in (0, 1)] == ["before and after", "before or after"]
    for choice in (0, 1):
        assert "".join(chunk.text for chunk in stage.chunks if chunk.choice == choice) == text_of(answer, choice)
    assert answer.response
    assert isinstance(answer.response.body, TextResult)
    own = answer.response.body.choices[0].logprobs
    assert (own is None) == (logprobs is None)
    if own:
        assert own.token_logprobs[:3] == [None, -1.0, -2.0]
        assert len(own.tokens) == len(own.token_logprobs) == len(own.text_offset)


def without_scores(handoff: Handoff) -> Handoff:
    return structs.replace(handoff, prompt_logprobs=None)


def without_a_token(handoff: Handoff) -> Handoff:
    return structs.replace(handoff, choices=[structs.replace(handoff.choices[0], tokens=[], logprobs=[])])


@virtually
@pytest.mark.parametrize("other", [without_scores, without_a_token])
async def test_a_prompt_whose_logprobs_did_not_come_along_is_scored_anew(tokenizer, other):
    stage = Stage(tokenizer)
    leaving = stage.hire("leaving")
    stage.ask(echo=True, logprobs=0)
    request = await leaving.request()
    leaving.engine.scores(request)
    play(leaving, request, (0, "abc"))
    await leave(leaving)
    stage.rewrite_handoff(other(stage.handoffs[0]))
    heir = stage.hire("heir")
    assert (await heir.request()).progress == ()


@virtually
async def test_a_grammar_is_made_again_where_the_request_goes_on(tokenizer):
    stage = Stage(tokenizer)
    leaving = stage.hire("leaving")
    stage.ask(response_format={"type": "json_object"}, max_tokens=64)
    begun = await leaving.request()
    assert begun.constraint
    leaving.engine.says(begun, '{"hello": "world", "how are you": "')
    await asyncio.sleep(SOON_S)
    await leave(leaving)
    heir = stage.hire("heir")
    going = await heir.request()
    assert going.constraint
    assert going.constraint is not begun.constraint
    assert tokenizer.decode(going.progress[0].tokens) == '{"hello": "world", "how are you": "'
    heir.engine.answers(going, '"}')
    (answer,) = await stage.answers()
    assert text_of(answer) == '{"hello": "world", "how are you": ""}'
    assert stage.violations() == []


@virtually
async def test_the_next_engine_is_asked_to_go_on_and_never_for_a_token_that_was_there(tokenizer):
    stage = Stage(tokenizer)
    leaving = stage.hire("leaving")
    stage.ask(n=2, temperature=0.5)
    request = await leaving.request()
    play(leaving, request, (0, "abc"), (1, "de"))
    leaving.engine.ends(request, 1)
    await leave(leaving)
    resumed = await stage.hire("heir").request()
    assert resumed.sampling == request.sampling  # the seed is that of the record which was asked with
    assert (resumed.prompt, resumed.cache_salt) == (request.prompt, request.cache_salt)
    assert [(tokenizer.decode(one.tokens), one.is_over) for one in resumed.progress] == [("abc", False), ("de", True)]
    assert [one.usage.num_output for one in resumed.progress] == [3, 2]


@virtually
async def test_what_was_handed_over_runs_before_fresh_work(tokenizer):
    stage = Stage(tokenizer)
    leaving = stage.hire("leaving")
    stage.ask()
    play(leaving, await leaving.request(), (0, "abc"))
    await leave(leaving)
    for _ in range(3):
        stage.ask()
    asked = await stage.hire("heir").requests(4)
    assert [bool(one.progress) for one in asked] == [True, False, False, False]
    assert asked[0].priority == PRIORITY_HANDED_OVER < asked[1].priority


@virtually
async def test_what_is_cheaper_to_compute_again_is_not_handed_over(tokenizer):
    stage = Stage(tokenizer)
    leaving = stage.hire("leaving")
    stage.ask()
    stage.ask()
    short, long = await leaving.requests(2)
    play(leaving, short, (0, "x" * (HANDOVER_TOKENS_MIN - 1)))
    play(leaving, long, (0, "x" * HANDOVER_TOKENS_MIN))
    await leave(leaving)
    assert [handoff.input.offset for handoff in stage.handoffs] == [1]
    heir = stage.hire("heir")
    begun = await heir.requests(2)
    for request in begun:
        heir.engine.answers(request, "whole")
    assert sorted(map(text_of, await stage.answers(2))) == ["whole", "xxwhole"]
    assert stage.violations() == []


@virtually
async def test_a_request_can_be_handed_over_again_and_only_for_what_is_new(tokenizer):
    stage = Stage(tokenizer)
    for name, says in (("first", "abc"), ("second", ""), ("third", "de")):
        worker = stage.hire(name)
        if name == "first":
            stage.ask()
        play(worker, await worker.request(), (0, says))
        await leave(worker)
    assert [tokenizer.decode(one.choices[0].tokens) for one in stage.handoffs] == ["abc", "abcde"]
    last = stage.hire("last")
    last.engine.answers(await last.request(), "f")
    (answer,) = await stage.answers()
    assert (text_of(answer), answer.handovers) == ("abcdef", 2)
    assert stage.violations() == []


@virtually
async def test_a_choice_that_a_stop_string_has_ended_is_over_though_the_engine_has_not_heard_of_it(tokenizer):
    stage = Stage(tokenizer)
    leaving = stage.hire("leaving")
    stage.ask(stop="END", n=2)
    request = await leaving.request()
    play(leaving, request, (0, "all END"), (1, "goes on"))
    await leave(leaving)
    (handoff,) = stage.handoffs
    assert [choice.finish_reason for choice in handoff.choices] == ["stop", None]
    heir = stage.hire("heir")
    heir.engine.answers(await heir.request(), "!")
    (answer,) = await stage.answers()
    assert [text_of(answer, choice) for choice in (0, 1)] == ["all ", "goes on!"]
    assert stage.violations() == []


@virtually
async def test_a_request_that_ends_with_the_engine_is_answered_and_not_handed_over(tokenizer):
    stage = Stage(tokenizer)
    leaving = stage.hire("leaving")
    stage.ask(stop="END")
    play(leaving, await leaving.request(), (0, "all END"))
    await leave(leaving)
    assert stage.handoffs == []
    assert [text_of(answer) for answer in stage.completions] == ["all "]
    assert stage.violations() == []


@virtually
async def test_a_handoff_too_large_for_a_record_is_begun_anew(tokenizer):
    stage = Stage(tokenizer)
    leaving = stage.hire("leaving")
    stage.ask(metadata={"large": "x" * 800_000})  # in base64 a third more
    play(leaving, await leaving.request(), (0, "abc"))
    await leave(leaving)
    assert stage.handoffs == []
    assert picodollars(stage.readings[-1].wasted["lost"]) > 0
    heir = stage.hire("heir")
    heir.engine.answers(await heir.request(), "anew")
    assert [text_of(answer) for answer in await stage.answers()] == ["anew"]
    assert stage.violations() == []


@virtually
async def test_a_deadline_that_passes_on_the_way_is_answered_with_what_was_spent_and_owes_nothing(tokenizer):
    stage = Stage(tokenizer)
    leaving = stage.hire("leaving")
    stage.ask(deadline=4e9)
    play(leaving, await leaving.request(), (0, "abc"))
    await leave(leaving)
    (handoff,) = stage.handoffs
    late = structs.replace(handoff, value=handoff.value.replace(b"4000000000.0", b"0"))  # it is 1970
    stage.rewrite_handoff(late)
    stage.hire("heir")
    (answer,) = await stage.answers()
    assert error_of(answer) == ErrorCode.DEADLINE_EXCEEDED
    assert answer.bill
    assert (picodollars(answer.bill.price), answer.bill.cost) == (0, handoff.spent)
    assert (answer.input, answer.handovers) == (handoff.input, 1)
    assert stage.violations() == []


# ------------------------------------------------------------------------------------------- what others have written


OURS: Headers = (("ce_type", KINDS[Handoff].encode()),)


@virtually
@pytest.mark.parametrize(
    ("value", "headers"),
    [(b"{}", OURS), (None, OURS), (b"\xff", OURS), (json.dumps({"url": "/v1/completions"}).encode(), ())],
)
async def test_what_is_no_handoff_is_answered_under_its_own_name_and_kept_as_a_dead_letter(tokenizer, value, headers):
    stage = Stage(tokenizer)
    record = stage.put(value, TOPICS.handoff, headers=headers)
    worker = stage.hire()
    stage.ask()
    worker.engine.answers(await worker.request())
    refusal, answer = sorted(await stage.answers(2), key=lambda one: one.input.topic)
    assert error_of(refusal) == ErrorCode.INVALID_REQUEST
    assert (refusal.input.topic, refusal.input.offset) == (TOPICS.handoff, 0)
    assert answer.response
    (letter,) = stage.cluster.committed(TOPICS.dead_letters)
    assert letter.value == record.value


def with_a_token_that_is_none(handoff: Handoff) -> Handoff:
    choice = structs.replace(handoff.choices[0], tokens=[1, 10**6])
    return structs.replace(handoff, choices=[choice])


def with_choices_that_nobody_asked_for(handoff: Handoff) -> Handoff:
    return structs.replace(handoff, choices=handoff.choices * 2)


def of_another_tokenizer(handoff: Handoff) -> Handoff:
    usage = structs.replace(handoff.choices[0].usage, num_prompt=99)
    return structs.replace(handoff, choices=[structs.replace(handoff.choices[0], usage=usage)])


def without_logprobs(handoff: Handoff) -> Handoff:
    return structs.replace(handoff, choices=[structs.replace(handoff.choices[0], logprobs=None)])


@virtually
@pytest.mark.parametrize(
    "other",
    [with_a_token_that_is_none, with_choices_that_nobody_asked_for, of_another_tokenizer, without_logprobs],
)
async def test_progress_that_is_not_this_models_is_left_aside_and_the_request_begins_anew(tokenizer, other):
    stage = Stage(tokenizer)
    leaving = stage.hire("leaving")
    stage.ask(logprobs=0)
    play(leaving, await leaving.request(), (0, "abc"))
    await leave(leaving)
    stage.rewrite_handoff(other(stage.handoffs[0]))
    heir = stage.hire("heir")
    request = await heir.request()
    assert request.progress == ()
    heir.engine.answers(request, "anew")
    (answer,) = await stage.answers()
    assert (text_of(answer), answer.handovers) == ("anew", 1)
    assert answer.bill
    assert picodollars(answer.bill.cost) == sum(picodollars(event.cost) for event in stage.costs)


# ------------------------------------------------------------------------------------------------- amid other trouble


@virtually
async def test_who_leaves_amid_a_rebalance_waits_for_it_and_hands_over_then(tokenizer):
    stage = Stage(tokenizer)
    held, gone = asyncio.Event(), asyncio.Event()

    async def hold_up_positions(call, moment):
        if call == "ends" and moment == "before" and gone.is_set():
            held.set()
            await asyncio.sleep(service.REBALANCE_S_MAX / 2)

    leaving = stage.hire("leaving", fault=hold_up_positions)
    stage.ask()
    play(leaving, await leaving.request(), (0, "abc"))
    await asyncio.sleep(SOON_S)
    gone.set()
    rebalance = asyncio.create_task(leaving.broker.group.rebalance())
    await asyncio.wait_for(held.wait(), SOON_S)
    await leave(leaving)
    await rebalance
    assert len(stage.handoffs) == 1


@virtually
async def test_an_engine_that_hangs_hands_nothing_over_and_holds_nobody_up(tokenizer):
    stage = Stage(tokenizer)
    leaving = stage.hire("leaving")
    stage.ask()
    play(leaving, await leaving.request(), (0, "abc"))
    await asyncio.sleep(SOON_S)
    leaving.engine._running.clear()  # it says nothing when it is stopped
    await leave(leaving)
    assert stage.handoffs == []
    heir = stage.hire("heir")
    heir.engine.answers(await heir.request(), "anew")
    assert [text_of(answer) for answer in await stage.answers()] == ["anew"]
    assert stage.violations() == []


@virtually
async def test_a_request_that_was_handed_over_and_then_kills_its_workers_is_given_up_under_its_own_name(tokenizer):
    stage = Stage(tokenizer)
    leaving = stage.hire("leaving")
    stage.ask()
    play(leaving, await leaving.request(), (0, "abc"))
    await leave(leaving)
    for number in range(10):
        victim = stage.hire(f"victim{number}")
        while not stage.completions and not victim.engine.submitted:
            await asyncio.sleep(0.01)
        if stage.completions:
            break
        victim.broker.die()
        await stage.cluster.expire(victim.broker)
        with pytest.raises(Crash):
            await victim.over
    (answer,) = await stage.answers()
    assert error_of(answer) == ErrorCode.POISONED
    assert (answer.input.topic, answer.handovers) == (TOPICS.requests, 1)
    (letter,) = stage.cluster.committed(TOPICS.dead_letters)
    assert letter.value == stage.handoffs[0].value
    assert stage.violations() == []
