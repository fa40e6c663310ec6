"""Faults of what is sent to us: hostile records, records beyond every size, records sent twice."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from statistics import median

from schemas.codec import header_text
from schemas.results import Completion, ErrorCode, Input
from tests.campaign import LOOK_S, PATIENCE_S, Campaign, some_requests
from tests.chaos.fault import Fault, Finding, Trial, judged
from tests.chaos.report import p99
from tests.hostile import ADMITTED, REFUSED, chat, fuzz, line, record, text
from tests.invariants import place
from worker.brokers.base import Outgoing, Record
from worker.brokers.kafka_client import read_all
from worker.commands.answers import texts

GROWTH_BYTES_MAX = 50 << 20  # of a worker's memory, from its first answers to its last
FED_AT_ONCE = 1000  # what waits in the log is the client's buffers', and not what is looked for here
GOOD_SHARE = 0.1  # of the hostile records, so many good ones between them
VALUE_BYTES_MAX = 64 << 20
TOPIC_BYTES_MAX = {"max.message.bytes": str(4 << 20)}  # compressed: 64 MiB of one letter are 260 KiB

EVERY_REFUSAL = {value for name, value in vars(ErrorCode).items() if name.isupper()} - {ErrorCode.POISONED}


async def hostile(trial: Trial) -> Finding:
    """One worker reads everything hostile that we know of and much that chance made, good requests between them."""
    dice = trial.dice
    fuzzed = list(fuzz(trial.seed, trial.size))
    good = as_records(some_requests(dice, trial.stack.model, round(trial.size * GOOD_SHARE), tokens_max=16))
    known = [(code, one) for code, one in REFUSED.values()]
    known += [("completed", one) for one in (*ADMITTED.values(), *good)]
    records = [one for _, one in known] + fuzzed
    order = dice.sample(range(len(records)), len(records))
    async with trial.group(partitions=4) as campaign:
        worker = campaign.hire("a")
        warm = await campaign.put([sent(one, campaign) for _, one in known])  # the largest make room in its memory
        await campaign.until_answered()
        num_bytes = worker.memory_bytes
        asked: dict[int, Input] = {}
        for start in range(0, len(order), FED_AT_ONCE):
            part = order[start : start + FED_AT_ONCE]
            asked |= zip(part, await campaign.put([sent(records[at], campaign) for at in part]), strict=True)
            await campaign.until_answered()
        grown = worker.memory_bytes - num_bytes
        answers = {place(one.input): outcome(one) for one in campaign.live.completions}
        wrong = [
            f"{place(asked[at])} was answered {answers.get(place(asked[at]))} instead of {code}"
            for at, (code, _) in enumerate(known)
            if answers.get(place(asked[at])) != code
        ]
        letters = await read_all(campaign.client, [campaign.topics.dead_letters])
        originals = {place(where): one.value for where, (_, one) in zip(warm, known, strict=True)}
        originals |= {place(where): records[at].value for at, where in asked.items()}
        wrong += [f"a dead letter is no copy of {origin(one)}" for one in letters if not is_copy(one, originals)]
        if grown > GROWTH_BYTES_MAX:
            wrong.append(f"the worker's memory grew by {grown >> 20} MiB")
        codes = Counter(answers.get(place(asked[at])) for at in range(len(known), len(records)))
        finding = await judged(campaign, violations=wrong, failures=EVERY_REFUSAL)
        finding.expect(len(campaign.lives) == 1, "the worker had to be started anew")
        finding.expect(len(codes) > 2, f"chance has made too little: {codes}")
        finding.notes.append(f"seed {trial.seed}: memory grew by {max(0, grown) >> 20} MiB over {len(records)} records")
        for unit, times_s in zip(("ms", "ms of the processor"), zip(*worker.refusals_s, strict=True), strict=True):
            finding.notes.append(
                f"seed {trial.seed}: from the poll to the outbox a refusal took {median(times_s) * 1000:.1f} {unit} at "
                f"the median, {p99(times_s) * 1000:.1f} at p99"
            )
        return finding


async def oversize(trial: Trial) -> Finding:
    """Records of one byte to 64 MiB, prompts beyond the context, answers beyond a record, a thousand headers."""
    dice = trial.dice
    records = [dice.choice(OVERSIZE)(dice) for _ in range(trial.size)]
    async with trial.group(partitions=4, topics=TOPIC_BYTES_MAX) as campaign:
        worker = campaign.hire("a")
        for start in range(0, len(records), 10):  # a few at a time: it is the worker that is tried, not our own memory
            await campaign.put([sent(one, campaign) for one in records[start : start + 10]])
            await campaign.until_answered()
        finding = await judged(campaign, failures=EVERY_REFUSAL)
        finding.expect(len(campaign.lives) == 1, "the worker had to be started anew")
        finding.notes.append(f"answers: {dict(sorted(Counter(map(outcome, campaign.live.completions)).items()))}")
        assert worker.process.exitcode == 0
        return finding


def large_value(dice: random.Random) -> Record:
    """Letters, as many at small sizes as at large ones."""
    return record(b"x" * round(VALUE_BYTES_MAX ** dice.random()))


def long_prompt(dice: random.Random) -> Record:
    """A request that would be good but for its length."""
    return record(line(text({"prompt": "the quick brown fox " * round(50_000 ** dice.random()), "max_tokens": 1})))


def large_answer(dice: random.Random) -> Record:
    """Log probabilities of twenty alternatives for each token of sixteen choices."""
    wanted = {"logprobs": True, "top_logprobs": 20, "n": dice.randint(1, 16), "max_tokens": dice.choice((10, 100, 900))}
    return record(line(chat({"temperature": 1.0, **wanted})))


def many_headers(dice: random.Random) -> Record:
    """Up to a thousand headers, of up to a kilobyte each."""
    value = b"v" * dice.choice((1, 100, 1000))
    return record(line(chat()), [(f"h{number}", value) for number in range(dice.choice((10, 64, 65, 1000)))])


OVERSIZE = (large_value, long_prompt, large_answer, many_headers)


async def twice(trial: Trial) -> Finding:
    """Producers send each request twice, and then the topic is read again from its start by another group.

    The promise is one answer for each record and group. A record read again has the same answer, under the same id.
    """
    dice = trial.dice
    requests = some_requests(dice, trial.stack.model, trial.size // 2)
    async with trial.group() as campaign:
        for name in "ab":
            campaign.hire(name)
        await campaign.ask(requests)
        await campaign.ask(requests)
        finding = await judged(campaign)
        first = {one.id: texts(one) for one in campaign.live.completions}
        async with campaign.replayed() as again:
            again.hire("c")
            async with asyncio.timeout(PATIENCE_S):
                while len(again.live.completions) < 2 * len(campaign.asked):
                    await asyncio.sleep(LOOK_S)
            await again.dismiss()
            late = await again.late()
        ids = Counter(one.id for one in late.completions)
        finding.expect(set(ids.values()) == {2}, f"answers by two groups, by id: {Counter(ids.values())}")
        changed = [one.id for one in late.completions if texts(one) != first[one.id]]
        finding.expect(not changed, f"the second answer is another one: {changed}")
        return finding


def as_records(values: Sequence[bytes]) -> list[Record]:
    """Good requests, as what is hostile comes."""
    return [record(value) for value in values]


def outcome(completion: Completion) -> str:
    """The code of a failure, or that it is none."""
    return completion.error.code if completion.error else "completed"


def sent(one: Record, campaign: Campaign) -> Outgoing:
    """The record, on its way to the campaign's workers."""
    return Outgoing(topic=campaign.topics.requests, key=one.key, value=one.value, headers=one.headers)


def origin(letter: Record) -> str:
    """Where the record of a dead letter is."""
    topic, partition, offset = (
        header_text(letter.headers, f"tokenmill.error.{part}") or "" for part in ("topic", "partition", "offset")
    )
    return place(Input(topic=topic, partition=int(partition), offset=int(offset)))


def is_copy(letter: Record, originals: "dict[str, bytes | None]") -> bool:
    """Whether the dead letter is the record byte for byte, or says that it had no room for it."""
    return origin(letter) in originals and letter.value in (originals[origin(letter)], None)


FAULTS = (
    Fault(
        id="F11",
        title=f"{len(REFUSED)} records that have killed others, and fuzzed ones; one good request to ten of them",
        unit="fuzzed records",
        pr=10_000,
        nightly=1_000_000,
        per_trial=10_000,
        percent=70,
        run=hostile,
    ),
    Fault(
        id="F12",
        title="oversize: values to 64 MiB, prompts beyond the context, answers beyond a record, 1,000 headers",
        unit="records",
        pr=200,
        nightly=2000,
        per_trial=100,
        percent=40,
        run=oversize,
    ),
    Fault(
        id="F16",
        title="each request sent twice, and the whole topic read again by another group",
        unit="records",
        pr=500,
        nightly=5000,
        per_trial=500,
        percent=65,
        run=twice,
    ),
)
