"""Faults of workers: killed, asked to leave, frozen; one after another and in the middle of what they do."""

import asyncio
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass

from tests.campaign import PATIENCE_S, Campaign, Hired, long_requests, said, some_requests
from tests.chaos.fault import SESSION_S, TRIAL_S_MAX, Control, Fault, Finding, Trial, judged
from tests.worker_process import POINTS, Stop

STEP_S = 0.01  # a hundred requests take two seconds so: kills find some under way, some committed, some in the log
REQUESTS_PER_KILL = 100
POINTS_OF_JOINING = ("sync acked", "positions acked")
AGAIN = 0.3  # of kills: the next one comes before the group has recovered
RECOVERY_MAX_S = SESSION_S + 5
LEFT_MAX_S = 12.0
LONG_REQUESTS = 24
DRAIN_S = 0.3  # short: there is to be something left to hand over
STORM_S = 5.0
STEADY = 5  # requests each half second: a third of what two workers can do, so that what is repeated can be made up for
WASTE_MAX = 0.1
SOAK_REQUESTS = 200
SOAK_PAUSE_S = 3.3  # between them: 218,000 in an hour
DRIFT_MAX_S = 1.0  # readings are published with answers, and each sample is taken right after the last of them
SLOPE_BYTES_MAX = 1 << 20  # for 10,000 requests
FILES_MORE_MAX = 2  # a connection that is being made anew
REJOINED_MAX_S = 10.0


async def kill_at_random(trial: Trial) -> Finding:
    """Workers are killed in the middle of the load; often the next while the group still recovers from the last."""
    dice, recoveries_s = trial.dice, []
    async with trial.group(step_s=STEP_S) as campaign:
        names = "abcd"[: dice.choice((3, 4))]
        for name in names:
            campaign.hire(name)
        await campaign.recovery_s()
        for number in range(1, trial.size + 1):
            await campaign.ask(some_requests(dice, campaign.model, REQUESTS_PER_KILL))
            await asyncio.sleep(dice.uniform(0, 1))
            campaign.replace(dice.choice(names))
            if number < trial.size and dice.random() < AGAIN:
                await asyncio.sleep(dice.uniform(0, SESSION_S))
            else:
                recoveries_s.append(await campaign.recovery_s())
        return await judged(campaign, recoveries_s=recoveries_s)


async def kill_at_a_point(trial: Trial) -> Finding:
    """A worker kills itself at one of the named points, which the seed chooses; a new one takes its name."""
    dice = trial.dice
    point = POINTS[trial.seed % len(POINTS)]
    async with trial.group(step_s=STEP_S) as campaign:
        campaign.hire("b")
        campaign.hire("a", Stop(point=point, visit=visit(dice, point)))
        await campaign.ask(some_requests(dice, campaign.model, REQUESTS_PER_KILL // 2))
        await campaign.ask(some_requests(dice, campaign.model, REQUESTS_PER_KILL // 2))
        if point in POINTS_OF_JOINING:
            await deal_out_until_ended(campaign, "a")
        if point == "leave sent":
            await asyncio.sleep(1)
            campaign.signal("a", signal.SIGTERM)
        code = await campaign.until_ended("a")
        campaign.replace("a")
        wrong = [] if code == -signal.SIGKILL else [f"the worker ended with {code} instead of dying at {point!r}"]
        return await judged(campaign, recoveries_s=[await campaign.recovery_s()], violations=wrong)


async def deal_out_until_ended(campaign: Campaign, name: str) -> None:
    """Workers have joined, one after the other, until the one that waits for a rebalance has ended in it."""
    for newcomer in "cdef":
        campaign.hire(newcomer)
        with suppress(TimeoutError):
            await campaign.until_ended(name, SESSION_S)
            return


def visit(dice: random.Random, point: str) -> int:
    """The how-manieth time at the point is the last one."""
    if point == "leave sent":
        return 1
    if point in POINTS_OF_JOINING:
        return dice.randint(1, 2)
    return dice.randint(1, {"submitted": 15, "stepped": 60}.get(point, 8))


async def leave_on_purpose(trial: Trial) -> Finding:
    """Workers are asked to leave under load, one after the other, each replaced by one of another name."""
    dice, names, times_s, wrong = trial.dice, ["a", "b", "c"], [], []
    async with trial.group(step_s=STEP_S) as campaign:
        lives = {name: campaign.hire(name) for name in names}
        for name in names:
            await campaign.until_serving(name)
        for number in range(trial.size):
            await campaign.recovery_s()  # no rebalance is under way: it alone would have work done again
            name = names.pop(dice.randrange(len(names)))
            num_before = lives[name].num_tokens - campaign.tokens_billed(name)
            await campaign.ask(some_requests(dice, campaign.model, REQUESTS_PER_KILL))
            await asyncio.sleep(dice.uniform(0, 1))
            code, time_s = await campaign.gone(name)
            times_s.append(time_s)
            names.append(f"w{number}")
            lives[names[-1]] = campaign.hire(names[-1])
            await campaign.until_serving(names[-1])
            await campaign.until_answered()
            num_repeated = lives[name].num_tokens - campaign.tokens_billed(name) - num_before
            if (code, num_repeated) != (0, 0) or time_s > LEFT_MAX_S:
                wrong.append(f"{name} left after {time_s:.1f} s with {code} and {num_repeated} tokens to do again")
        return await judged(campaign, recoveries_s=times_s, violations=wrong)


async def freeze(trial: Trial) -> Finding:
    """A worker freezes in mid-flush for longer than its session; the others answer what it holds, and it wakes up."""
    dice = trial.dice
    async with trial.group(step_s=STEP_S) as campaign:
        for name in "bc":
            campaign.hire(name)
        zombie = campaign.hire("a", Stop(point="begun", visit=dice.randint(1, 5), number=signal.SIGSTOP))
        await feed_until_frozen(campaign, dice, "a")
        await asyncio.sleep(SESSION_S)
        await campaign.until_answered()
        campaign.signal("a", signal.SIGCONT)
        recovery_s = await at_work_again_s(campaign, "a")
        wrong = [] if any(line["event"] == "fenced" for line in zombie.logged()) else ["the zombie was not fenced"]
        return await judged(campaign, recoveries_s=[recovery_s], violations=wrong)


async def feed_until_frozen(campaign: Campaign, dice: random.Random, name: str) -> None:
    """Requests come in until the worker has frozen, and some after that."""
    frozen = asyncio.create_task(campaign.until_frozen(name))
    while not frozen.done():
        await campaign.ask(some_requests(dice, campaign.model, 10))
        await asyncio.sleep(0.1)
    await frozen
    await campaign.ask(some_requests(dice, campaign.model, REQUESTS_PER_KILL // 2))


async def at_work_again_s(campaign: Campaign, name: str) -> float:
    """How long it takes until the worker has answered something."""
    begun_s, num_before = time.monotonic(), num_answers(campaign, name)
    while num_answers(campaign, name) == num_before and time.monotonic() - begun_s < PATIENCE_S:
        await campaign.recovery_s()
    return time.monotonic() - begun_s


def num_answers(campaign: Campaign, name: str) -> int:
    """How many requests the worker has answered."""
    return sum(completion.worker == name for completion in campaign.live.completions)


async def interrupt(trial: Trial) -> Finding:
    """Workers are asked to leave, or killed, amid long answers. Nobody can tell by the answers, nor by their prices.

    So many kills in a row would make suspects of long requests, and give some up: not what is looked for here.
    """
    requests = long_requests(trial.stack.model, LONG_REQUESTS)
    async with trial.group(partitions=3) as campaign:
        campaign.hire("a")
        await campaign.ask(requests)
        stayed = await judged(campaign)
        expected = said(campaign.live.completions)
    async with trial.group(
        partitions=3, step_s=STEP_S / 2, drain_s=DRAIN_S, drafts_max=3, attempts_max=100
    ) as campaign:
        names = ["a", "b"]
        for name in names:
            campaign.hire(name)
        await campaign.ask(requests)
        for number in range(trial.size):
            name = names[number % len(names)]
            await campaign.until_serving(name)
            await asyncio.sleep(trial.dice.uniform(0.1, 0.6))
            if number // len(names) % 2:
                campaign.replace(name)
            else:
                await campaign.gone(name)
                campaign.hire(name)
        await campaign.until_answered()
        found = said(campaign.live.completions)
        wrong = [f"{name}: {one}, and not {expected[name]}" for name, one in found.items() if one != expected[name]]
        finding = await judged(campaign, violations=[*stayed.violations, *wrong])
        finding.expect(bool(campaign.live.handoffs), "nothing was handed over")
        finding.notes.append(f"seed {trial.seed}: {len(campaign.live.handoffs)} requests were handed over half done")
        return finding


async def storm(trial: Trial) -> Finding:
    """Every five seconds a worker comes or goes, under a steady load."""
    dice, names = trial.dice, ["a", "b"]
    async with trial.group(step_s=STEP_S) as campaign:
        for name in names:
            campaign.hire(name)
        await campaign.recovery_s()
        for number in range(round(trial.size / STORM_S)):
            change_s = time.monotonic() + STORM_S
            if number % 2:
                name = names.pop(dice.randrange(len(names)))
                await campaign.gone(name)
            else:
                names.append(f"w{number}")
                campaign.hire(names[-1])
            while time.monotonic() < change_s:
                await campaign.ask(some_requests(dice, campaign.model, STEADY))
                await asyncio.sleep(0.5)
        finding = await judged(campaign)
        share = finding.tokens_repeated / sum(one.num_tokens for one in campaign.lives)
        finding.expect(share <= WASTE_MAX, f"{share:.0%} of all tokens were computed in vain")
        finding.notes.append(f"seed {trial.seed}: {share:.1%} of all tokens were computed in vain")
        return finding


async def soak(trial: Trial) -> Finding:
    """One worker serves for long: its memory and its open files stay as they are, and its meter keeps time."""
    dice, wrong = trial.dice, []
    async with trial.group(partitions=4, events="request") as campaign:
        life = campaign.hire("a")
        samples: list[Sample] = []
        end_s = time.monotonic() + trial.size
        while (begun_s := time.monotonic()) < end_s:
            await campaign.ask(some_requests(dice, campaign.model, SOAK_REQUESTS, tokens_max=10))
            await campaign.until_answered()
            samples.append(sample(campaign, life))
            await asyncio.sleep(max(0, begun_s + SOAK_PAUSE_S - time.monotonic()))
        first, last = samples[len(samples) // 4], samples[-1]
        slope = (last.memory_bytes - first.memory_bytes) / max(1, last.num_requests - first.num_requests) * 10_000
        drift_s = (last.metered_s - first.metered_s) - (last.clock_s - first.clock_s)
        if slope > SLOPE_BYTES_MAX:
            wrong.append(f"memory grows by {slope / (1 << 20):.2f} MiB for 10,000 requests")
        if last.num_files > first.num_files + FILES_MORE_MAX:
            wrong.append(f"open files have become {last.num_files}, from {first.num_files}")
        if abs(drift_s) > DRIFT_MAX_S:
            wrong.append(f"the ledger is {drift_s:+.1f} s beside the clock")
        finding = await judged(campaign, violations=wrong)
        finding.notes.append(
            f"{last.num_requests} requests: {slope / (1 << 20):.2f} MiB for 10,000, open files {first.num_files} to "
            f"{last.num_files}, the ledger {drift_s:+.2f} s beside the clock after {last.clock_s - first.clock_s:.0f} s"
        )
        return finding


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a worker has come to."""

    num_requests: int
    memory_bytes: int
    num_files: int
    metered_s: float  # by its newest meter reading
    clock_s: float


def sample(campaign: Campaign, life: Hired) -> Sample:
    """How the worker stands now."""
    return Sample(
        num_requests=len(campaign.asked),
        memory_bytes=life.memory_bytes,
        num_files=life.num_files,
        metered_s=campaign.live.readings[-1].wall_ns / 1e9,
        clock_s=time.monotonic(),
    )


FAULTS = (
    Fault(
        id="F1",
        title="kill -9 of random workers (3 or 4, 12 partitions) at random times under load",
        unit="kills",
        pr=20,
        nightly=300,
        per_trial=5,
        percent=90,
        recovery_max_s=RECOVERY_MAX_S,
        run=kill_at_random,
    ),
    Fault(
        id="F2",
        title=f"kill -9 at {len(POINTS)} named points of a worker's life",
        unit="kills",
        pr=3 * len(POINTS),
        nightly=50 * len(POINTS),
        percent=60,
        recovery_max_s=RECOVERY_MAX_S,
        run=kill_at_a_point,
    ),
    Fault(
        id="F3",
        title="SIGTERM under load; recovery is how long leaving takes",
        unit="leavings",
        pr=10,
        nightly=100,
        per_trial=5,
        percent=60,
        recovery_max_s=LEFT_MAX_S,
        run=leave_on_purpose,
    ),
    Fault(
        id="F4",
        title="a worker frozen in mid-flush for longer than its session; recovery is until it answers again",
        unit="freezes",
        pr=5,
        nightly=50,
        percent=50,
        recovery_max_s=REJOINED_MAX_S,
        control=Control(job={"stock_commits": True}, shows="was answered 2 times"),
        run=freeze,
    ),
    Fault(
        id="F14",
        title="SIGTERM with little time, and kill -9, amid long answers: greedy, seeded, drafts, n, logprobs, stops",
        unit="interruptions",
        pr=50,
        nightly=500,
        per_trial=10,
        percent=60,
        run=interrupt,
    ),
    Fault(
        id="F15",
        title="a worker comes or goes every five seconds",
        unit="seconds",
        pr=60,
        nightly=600,
        per_trial=600,
        trial_s_max=600 + TRIAL_S_MAX,
        percent=35,
        run=storm,
    ),
    Fault(
        id="F19",
        title="soak: one worker serves without a pause",
        unit="seconds",
        pr=0,
        nightly=3600,
        per_trial=3600,
        trial_s_max=3600 + TRIAL_S_MAX,
        percent=100,
        run=soak,
    ),
)
