"""A slice of the fault campaign (`make chaos`), and what its report makes of what a trial shows."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.campaign import Campaign, request, scripted_model
from tests.chaos.__main__ import controlled, trials_of
from tests.chaos.fault import Control, Fault, Finding, Stack, Trial
from tests.chaos.faults import FAULTS
from tests.chaos.report import Run, line_of, markdown, p99, update
from tests.worker_process import POINTS
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

    own: dict[str, Any] = {"id": "F0", "title": "none", "unit": "kills", "pr": 10, "nightly": 25, "run": harmless}
    return Fault(**own | changes)


def test_the_trials_of_a_fault_add_up_to_its_size():
    assert trials_of(fault(per_trial=4), "pr", None) == [4, 4, 2]
    assert trials_of(fault(per_trial=10), "nightly", None) == [10, 10, 5]
    assert trials_of(fault(per_trial=4), "nightly", 2) == [4, 4]


def run(fault: Fault, **results: Any) -> Run:
    return Run(fault=fault, first_seed=3, num_strikes=2, **results)


def test_the_report_names_what_went_wrong_and_how_to_see_it_again():
    findings = {3: Finding(recoveries_s=[1.0]), 4: Finding(violations=["lost"], recoveries_s=[3.0])}
    line = line_of(run(fault(), findings=findings), "the command")
    assert line.problems == ["seed 4: lost"]
    table = markdown([line])
    assert "| F0 | none | 2 kills | 1 | 2.0 s | 3.0 s | 0 |" in table
    assert "`--faults F0 --seed 4 --trials 1`" in table
    assert "`the command`: F0" in table
    assert "confidence" not in table


def test_a_report_made_in_parts_has_the_last_run_of_each_fault(tmp_path):
    file = tmp_path / "report.json"
    first, second = fault(id="F1"), fault(id="F2", unit="cuts")
    update(file, [line_of(run(second), "late"), line_of(run(first), "early")])
    lines = update(file, [line_of(Run(fault=first, first_seed=0, num_strikes=300), "again")])
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
