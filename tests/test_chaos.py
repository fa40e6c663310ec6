"""A slice of the fault campaign (`make chaos`), and what its report makes of what a trial shows."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from tests.campaign import Campaign, in_nursery, request, scripted_model
from tests.chaos.__main__ import trials_of
from tests.chaos.driver import Room, complete, controlled
from tests.chaos.fault import Control, Fault, Finding, Stack, Trial
from tests.chaos.faults import FAULTS
from tests.chaos.report import Run, line_of, markdown, p99, update
from tests.worker_process import POINTS
from worker.brokers.kafka_client import count_partitions
from worker.config import Kafka

# Those that find most for their time: all are run by `make chaos`.
SLICES = {"F1": 2, "F2": 1, "F8": 2, "F11": 1000, "F16": 40}
END_SENT = POINTS.index("end sent")  # the seed that has a worker die there


@pytest.fixture(scope="module")
def stack(kafka, tmp_path_factory):
    return Stack(brokers=kafka.brokers, model=scripted_model(tmp_path_factory.mktemp("model")))


def trial(stack: Stack, folder: Path, size: int, seed: int = END_SENT) -> Trial:
    return Trial(seed=seed, size=size, folder=folder, stack=stack)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLICES)
async def test_a_fault_loses_repeats_and_bills_nothing_twice(stack, tmp_path, name):
    finding = await FAULTS[name].run(trial(stack, tmp_path / name, SLICES[name]))
    assert finding.violations == []


@pytest.mark.slow
async def test_a_zombie_is_fenced_and_without_the_generation_in_the_commit_it_answers_and_bills_twice(stack, tmp_path):
    """The negative control: what the frozen worker held is there again."""
    fault = FAULTS["F4"]
    assert (await fault.run(trial(stack, tmp_path / "F4", 1))).violations == []
    assert fault.control
    finding = await controlled(
        fault, fault.control, [trial(stack, tmp_path / f"{seed}", 1, seed) for seed in range(3)], tmp_path / "control"
    )
    assert any("was answered 2 times" in one for one in finding.violations), finding
    assert any("cost event" in one and "came 2 times" in one for one in finding.violations), finding


async def test_a_group_that_left_something_undone_is_told_from_one_that_did_not(kafka, stack, tmp_path, monkeypatch):
    monkeypatch.setattr("tests.campaign.SETTLED_S", 5.0)  # it will wait for that long, in vain
    async with Campaign(Kafka(brokers=kafka.brokers), f"undone_{tmp_path.name}", stack.model, tmp_path).opened() as one:
        await one.ask([request(stack.model.name, "hello", tokens=1)])
        found = await one.judge()
    assert any("was never answered" in violation for violation in found)
    assert any("is committed up to 0 of 1" in violation for violation in found)


# ----------------------------------------------------------------------------------------------------------- the driver


def fault(**changes) -> Fault:
    async def harmless(_trial: Trial) -> Finding:
        return Finding()

    own: dict[str, Any] = {"id": "F0", "title": "none", "unit": "kills", "pr": 10, "nightly": 25}
    return Fault(**own | {"percent": 100, "run": harmless} | changes)


def test_the_trials_of_a_fault_add_up_to_its_size():
    assert trials_of(fault(per_trial=4), "pr", None) == [4, 4, 2]
    assert trials_of(fault(per_trial=10), "nightly", None) == [10, 10, 5]
    assert trials_of(fault(per_trial=4), "nightly", 2) == [4, 4]


def run(fault: Fault, **results: Any) -> Run:
    return Run(fault=fault, first_seed=3, sizes=[1, 1], **results)


def test_the_report_names_what_went_wrong_and_how_to_see_it_again():
    findings = {3: Finding(recoveries_s=[1.0]), 4: Finding(violations=["lost"], recoveries_s=[3.0])}
    line = line_of(run(fault(), findings=findings), "the command", 61.2)
    assert line.problems == ["seed 4: lost"]
    table = markdown([line])
    assert "| F0 | none | 2 kills | 1 | 2.0 s | 3.0 s | 0 |" in table
    assert "`--faults F0 --seed 4 --trials 1`" in table
    assert "`the command`: F0, in 61 s" in table
    assert "confidence" not in table


def test_a_report_made_in_parts_has_the_last_run_of_each_fault(tmp_path):
    file = tmp_path / "report.json"
    first, second = fault(id="F1"), fault(id="F2", unit="cuts")
    update(file, [line_of(run(second), "late", 1.0), line_of(run(first), "early", 1.0)])
    lines = update(file, [line_of(Run(fault=first, first_seed=0, sizes=[300]), "again", 1.0)])
    assert [(line.id, line.command) for line in lines] == [("F1", "again"), ("F2", "late")]
    assert "No violation in 300 kills: with 95 % confidence fewer than 1.0% of kills do harm." in markdown(lines)


def test_slow_recovery_and_a_control_that_shows_nothing_are_problems():
    made = run(fault(recovery_max_s=2.0, control=Control(job={}, shows="twice")))
    made.findings, made.control = {0: Finding(recoveries_s=[2.5])}, Finding(violations=["once"])
    slow, idle = made.problems
    assert "recovery takes 2.5 s" in slow
    assert "prove nothing" in idle
    made.control = Finding(violations=["answered twice"])
    assert made.problems == [slow]


def test_the_99th_percentile_of_few_values_is_the_largest():
    assert p99([1.0, 5.0, 2.0]) == 5.0
    assert p99([1.0] * 98 + [7.0] * 2) == pytest.approx(7.0)


def test_every_fault_has_a_size_in_both_columns_or_runs_at_night_only():
    assert all(one.nightly >= one.pr >= 0 and one.nightly > 0 for one in FAULTS.values())


async def test_a_trial_that_breaks_off_is_a_violation(tmp_path, stack):
    async def broken(_trial: Trial) -> Finding:
        await asyncio.sleep(0)
        raise RuntimeError("broken")

    shows = Control(job={}, shows="broke off")
    finding = await controlled(fault(run=broken), shows, [trial(stack, tmp_path / "one", 1)], tmp_path / "control")
    assert finding.violations == ["the trial broke off: RuntimeError('broken')"]


async def test_a_trial_that_hangs_is_a_violation_that_shows_where(tmp_path, stack):
    async def hanging(_trial: Trial) -> Finding:
        await asyncio.sleep(3600)
        return Finding()

    one = run(fault(run=hanging, trial_s_max=0.05))
    await complete(one, stack, Room(200), tmp_path, lambda _: None)
    assert one.problems == [f"seed {seed}: the trial broke off: TimeoutError()" for seed in (3, 4)]
    assert "await asyncio.sleep(3600)" in (tmp_path / "F0-3" / "traceback.txt").read_text()


def test_a_call_that_hangs_in_a_process_of_its_own_has_failed(monkeypatch):
    monkeypatch.setattr("tests.campaign.CALL_S_MAX", 0.05)
    assert in_nursery(sleep, "3600", "failed") == "failed"


def sleep(seconds: str) -> str:
    time.sleep(float(seconds))
    return "awake"


async def test_a_group_leaves_no_topics_on_brokers_that_are_others_too(stack, tmp_path):
    async with trial(stack, tmp_path / "F0", 1).group(partitions=1) as campaign:
        topics = list(campaign.topics.by_setting.values())
        assert set((await count_partitions(campaign.client, topics)).values()) == {1}
    async with asyncio.timeout(10):
        while any((await count_partitions(campaign.client, topics)).values()):
            await asyncio.sleep(0.05)


# --------------------------------------------------------------------------------------------------------- side by side


class Trials:
    """Trials that last until they are told to end, and what runs now."""

    def __init__(self, room: Room) -> None:
        self.now: list[str] = []
        self._room = room
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self, name: str, percent: int) -> None:
        """The trial is in line."""
        self._ends[name] = asyncio.Event()
        self._tasks.append(asyncio.create_task(self._run(name, percent)))
        await settled()

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await settled()

    async def _run(self, name: str, percent: int) -> None:
        async with self._room.of(percent):
            self.now.append(name)
            await self._ends[name].wait()
            self.now.remove(name)


async def settled() -> None:
    for _ in range(10):  # each wakes another
        await asyncio.sleep(0)


async def test_trials_run_side_by_side_as_far_as_there_is_room():
    trials = Trials(Room(200))
    for name, percent in (("first", 120), ("heavy", 100), ("light", 80), ("late", 60)):
        await trials.begin(name, percent)
    assert trials.now == ["first", "light"]  # the heavy one waits, and holds nobody up
    await trials.end("first")
    assert trials.now == ["light", "heavy"]
    await trials.end("light")
    assert trials.now == ["heavy", "late"]


async def test_who_wants_more_than_there_is_runs_alone():
    trials = Trials(Room(100))
    for name in ("greedy", "other"):
        await trials.begin(name, 150)
    assert trials.now == ["greedy"]
    await trials.end("greedy")
    assert trials.now == ["other"]


async def test_every_fault_is_reported_when_its_last_trial_is_over(tmp_path, stack):
    order: list[str] = []

    async def short(trial: Trial) -> Finding:
        await asyncio.sleep(0.05 * (trial.seed - 2))
        order.append(trial.folder.name)
        return Finding(recoveries_s=[1.0])

    one = run(fault(run=short, percent=50))
    await complete(one, stack, Room(100), tmp_path, lambda done: order.append(done.fault.id))
    assert order == ["F0-3", "F0-4", "F0"]
    assert 0.1 <= one.duration_s < 0.14  # beside each other
    assert not any(tmp_path.iterdir())  # nothing is kept of trials that were right
