"""An asyncio event loop in a thread of its own."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from scsdpo import interrupt

T = TypeVar("T")

_LOOK = 0.1
"""Seconds between two looks whether the run was asked to stop."""


class EventLoop:
    """Runs coroutines beside the thread that trains, until `close`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` and return its result; a run that is asked to stop does not wait for it."""
        future = self.start(work)
        try:
            return self.result(future)
        finally:
            future.cancel()

    def result(self, future: Future[T]) -> T:
        """What was started, once it is done; a run that is asked to stop does not wait for it."""
        while wait([future], _LOOK).not_done:
            interrupt.check()
        return future.result()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Let `work` run until it ends or the loop is closed; from any thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, action: Callable[[], None]) -> None:
        """Do something in the loop's thread, and wait until it is done."""

        async def act() -> None:
            action()

        self.start(act()).result()

    def close(self) -> None:
        """Cancel all that runs, and end the thread."""
        self.start(_cancel_others()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
