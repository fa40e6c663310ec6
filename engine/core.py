"""The engine: requests in, what each step changed out.

Owns the loop's body and how the parts are put together. Blocking, and one thread's: `thread.py` turns it.
"""

from engine.config import check_request
from engine.drafting import Drafting
from engine.followers import Followers
from engine.metering import Meter
from engine.ranks import ALONE
from engine.runner import Pending, Runner
from engine.scheduler import Plan, Scheduler
from engine.types import Capacity, EngineStats, Request, StepResult


class Core:
    """Scheduler, drafting, runner and meter, working as one engine. `build` makes one of a checkpoint."""

    def __init__(
        self,
        scheduler: Scheduler,
        drafting: Drafting,
        runner: Runner,
        meter: Meter,
        capacity: Capacity,
        followers: Followers | None = None,
        *,
        overlap: bool = False,
    ) -> None:
        """`overlap`: a step is planned and launched while the one before runs, wherever it can be foreseen."""
        self.capacity = capacity
        self.followers = followers or Followers((), ALONE)
        self.meter = meter
        self._scheduler = scheduler
        self._drafting = drafting
        self._runner = runner
        self._overlap = overlap
        self._underway: Pending | None = None  # launched by the step before

    def step(self) -> StepResult:
        """Every sequence in the plan has caught up by its share. With nothing to do, all that passes is idle time."""
        step = self._underway or self._runner.launch(self._plan())
        self._underway = self._launch_ahead() if self._overlap else None
        accepted = step.collect()
        result = self._scheduler.commit(step.plan, accepted)
        charged_ns = self.meter.settle(result, step.plan.drafting_ns)
        self._drafting.learn(step.plan, accepted, charged_ns)
        return result

    def submit(self, request: Request) -> None:
        """The request waits for its turn. Raises RequestRefused if it could never run, or its id is in use."""
        check_request(request, self.capacity)
        self._scheduler.submit(request)

    def cancel(self, request_id: int, choice: int | None = None) -> None:
        """The next step tells that the request's choices, or the one named, have stopped; unknown ones are ignored."""
        self._scheduler.cancel(request_id, choice)

    def interrupt(self) -> None:
        """The next step, which begins nothing, tells how far each choice has come."""
        self._scheduler.interrupt()

    @property
    def has_work(self) -> bool:
        """A step would compute or tell something."""
        return self._underway is not None or self._scheduler.has_work

    def stats(self) -> EngineStats:
        """Counts since the start, and how full the engine is now."""
        return self._scheduler.stats()

    def _plan(self) -> Plan:
        plan = self._scheduler.plan()
        began_ns = self.meter.now_ns()
        self._drafting.extend(plan)
        plan.drafting_ns = self.meter.now_ns() - began_ns
        return plan

    def _launch_ahead(self) -> Pending | None:
        plan = self._scheduler.plan_ahead()
        return self._runner.launch(plan) if plan.shares else None
