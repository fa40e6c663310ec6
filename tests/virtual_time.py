"""An event loop whose clock jumps: a sleep of a minute costs nothing, and things happen in the same order each time."""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only when nothing can run. Work for a thread is done at once, in place: nothing is left to chance."""

    def __init__(self) -> None:
        self._now_s = 0.0
        super().__init__(_Jump(self))

    def time(self) -> float:
        return self._now_s

    def jump(self, seconds: float) -> None:
        self._now_s += seconds

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> "asyncio.Future[T]":
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001  # its waiter's to handle
            done.set_exception(error)
        return done


class _Jump(selectors.SelectSelector):
    """Waits for no event but time's."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everything waits, and nothing will ever happen"
        if timeout > 0:
            self._loop.jump(timeout)
        return []


def run(main: Coroutine[Any, Any, T]) -> T:
    """The result of `main` on a virtual loop of its own."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def virtually(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """The test on a virtual loop of its own."""

    @functools.wraps(test)
    def on_virtual_loop(*args: Any, **kwargs: Any) -> None:
        run(test(*args, **kwargs))

    return on_virtual_loop
