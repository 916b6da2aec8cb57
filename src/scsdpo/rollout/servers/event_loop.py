"""An asyncio event loop in a thread of its own."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from scsdpo import interrupt

T = TypeVar("T")

_LOOK = 0.1
"""Seconds between two checks if the run was asked to stop."""


class EventLoop:
    """Runs coroutines beside the thread that trains, until `close`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` and return its result. Raise if the run is asked to stop meanwhile."""
        future = self.start(work)
        try:
            return self.result(future)
        finally:
            future.cancel()

    def result(self, future: Future[T]) -> T:
        """Wait for the result of `future`. Raise if the run is asked to stop meanwhile."""
        while wait([future], _LOOK).not_done:
            interrupt.check()
        return future.result()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `work`, which runs until it ends or the loop is closed. Any thread may call it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, action: Callable[[], None]) -> None:
        """Call `action` in the loop's thread, and wait for it."""

        async def act() -> None:
            action()

        self.start(act()).result()

    def close(self) -> None:
        """Cancel all coroutines, and end the thread."""

        async def cancel() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.start(cancel()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
