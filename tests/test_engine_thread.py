"""The engine on its own thread: everything asked is delivered, idle time moves, and a failure is told."""

import time
from threading import Event

import pytest

from engine.errors import RequestRefused
from engine.thread import EngineThread
from engine.types import FinishReason, Request, Sampling, StepResult
from tests.scripted_model import Script, both_loops, scripted_engine  # noqa: F401

TIMEOUT_S = 10  # for what takes milliseconds, on a machine that may be busy


class Desk:
    """Where the thread delivers to."""

    def __init__(self) -> None:
        self.results: list[StepResult] = []
        self.failure: BaseException | None = None
        self.is_finished = Event()
        self.has_failed = Event()

    def deliver(self, result: StepResult) -> None:
        self.results.append(result)
        if result.finished:
            self.is_finished.set()

    def fail(self, error: BaseException) -> None:
        self.failure = error
        self.has_failed.set()

    @property
    def told_ns(self) -> int:
        return sum(result.idle_ns + sum(charge.device_ns for charge in result.charges) for result in self.results)


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def thread(desk):
    thread = EngineThread(scripted_engine(clock=time.monotonic_ns).core, desk.deliver, desk.fail)
    thread.start()
    yield thread
    assert thread.stop(TIMEOUT_S)


def request(id: int, tokens_max: int = 5) -> Request:
    return Request(id=id, prompt=(1, 2, 3), sampling=Sampling(tokens_max=tokens_max))


def test_what_is_submitted_is_delivered(thread, desk):
    thread.submit(request(1))
    assert desk.is_finished.wait(TIMEOUT_S)
    tokens = [token.token for result in desk.results for token in result.tokens]
    assert tokens == Script().tokens_of(request(1))


def test_what_is_cancelled_stops(thread, desk):
    thread.submit(request(1, tokens_max=1000))
    thread.cancel(1)
    assert desk.is_finished.wait(TIMEOUT_S)
    finished = [finished for result in desk.results for finished in result.finished]
    assert [f.reason for f in finished] == [FinishReason.STOP]
    assert finished[0].usage.num_output < 1000


def test_who_stops_hears_how_far_each_choice_has_come(desk):
    thread = EngineThread(scripted_engine(clock=time.monotonic_ns).core, desk.deliver, desk.fail)
    thread.start()
    thread.submit(request(1, tokens_max=1000))
    assert thread.stop(TIMEOUT_S)
    (end,) = desk.results[-1].finished
    assert end.reason is FinishReason.INTERRUPTED
    assert end.usage.num_output == sum(len(result.tokens) for result in desk.results) < 1000


def test_a_refusal_reaches_the_caller_and_the_engine_goes_on(thread, desk):
    with pytest.raises(RequestRefused):
        thread.submit(Request(id=1, prompt=(), sampling=Sampling(tokens_max=1)))
    thread.submit(request(2))
    assert desk.is_finished.wait(TIMEOUT_S)


def test_every_nanosecond_from_start_to_stop_is_told(desk):
    thread = EngineThread(scripted_engine(clock=time.monotonic_ns).core, desk.deliver, desk.fail)
    time.sleep(0.2)  # before the start: nobody's
    started_ns = time.monotonic_ns()
    thread.start()
    time.sleep(0.1)
    thread.submit(request(1))
    assert desk.is_finished.wait(TIMEOUT_S)
    assert thread.stop(TIMEOUT_S)
    elapsed_ns = time.monotonic_ns() - started_ns
    # The thread's start and end are outside; 50 ms for them on a busy machine, a quarter of what was slept before.
    assert 0 <= elapsed_ns - desk.told_ns < 50_000_000


def test_waiting_for_work_is_charged_to_nobody(thread, desk):
    time.sleep(0.3)  # less than until the next report, so that the wait ends with the work
    thread.submit(request(1))
    assert desk.is_finished.wait(TIMEOUT_S)
    assert sum(result.idle_ns for result in desk.results) > 250_000_000  # the rest: the thread starting


def test_an_idle_engine_reports_its_idleness_every_second(thread, desk):
    time.sleep(1.3)
    assert desk.results
    assert desk.told_ns > 900_000_000
    assert time.monotonic_ns() - thread.heartbeat_ns < 1_200_000_000


def test_the_loops_failure_is_told(desk):
    engine = scripted_engine()
    engine.core._runner = None  # type: ignore[assignment]
    thread = EngineThread(engine.core, desk.deliver, desk.fail)
    thread.start()
    thread.submit(request(1))
    assert desk.has_failed.wait(TIMEOUT_S)
    assert isinstance(desk.failure, AttributeError)
    assert thread.stop(TIMEOUT_S)


def test_stats_are_those_of_the_last_step(thread, desk):
    thread.submit(request(1))
    assert desk.is_finished.wait(TIMEOUT_S)
    thread.stop(TIMEOUT_S)
    assert thread.stats().num_steps == 5
    assert thread.stats().blocks_used == 0
