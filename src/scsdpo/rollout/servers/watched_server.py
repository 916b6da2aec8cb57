"""Watching a vLLM server: it gets the run's weights, and is set aside while it does not answer."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from scsdpo.rollout.servers.server import NotNow, Server, Silent, Unreachable

PAUSE = 0.5
"""Seconds between two tries after a failure."""
_LOOK = 5.0
"""Seconds between two checks of a server that has the weights."""

Bring = Callable[[Server], Awaitable[None]]


@dataclass(kw_only=True, eq=False)
class WatchedServer:
    """Watches one server, in the event loop, from the first sampling to the last.

    Rank 0 sends it the weights whenever it has others: at a new version, and after a restart. The
    other ranks wait for that.
    """

    server: Server
    bring: Bring | None
    """Sends it the wanted weights; None: rank 0 does."""
    patience: float
    """Seconds without an answer before a server that had the weights is set aside."""
    timeout: float
    """Seconds for one load of weights."""
    changed: asyncio.Event
    """Set whenever an attribute has changed."""

    wanted: str = ""
    """Label of the weights that it should have; '': none yet."""
    ready: bool = False
    """It has the wanted weights and answers."""
    loading: bool = False
    """It is loading weights, or rank 0 may be sending them."""
    problem: str = ""
    """Why the last call failed; '': it succeeded, or there was none."""
    refusal: Exception | None = None
    """Error that shows that this server can never be used."""
    described: dict[str, Any] | None = None
    """Its last `describe`. It is asked again after a failure, because it may have been restarted
    with other settings."""
    looked: bool = False
    """It was checked at least once."""
    waits: bool = False
    """It can get weights only when they are published again."""
    there: bool = False
    """It answered at the last check, with whatever weights."""
    underway: set[asyncio.Task[None]] = field(default_factory=set)
    """Requests that it is answering."""
    draws_behind: bool = False
    """It may be drawing for later batches, of any rank, when its weights change."""
    within: bool = False
    """True: such responses go on with the new weights. False: it completes them first."""
    _brought: bool = False
    """Weights were sent to it at least once."""
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _silent: float | None = None
    """Time since which it has not answered, or waits for rank 0."""

    def want(self, version: str) -> None:
        """Set the label of the weights that it should have; '': do not touch it for a while."""
        if version != self.wanted:
            self.wanted, self.ready, self.waits, self._silent = version, False, False, None
            self._wake.set()

    def fail(self, problem: str) -> None:
        """Set the server aside until a later check succeeds."""
        if not self.problem and self.bring is not None:
            rank_zero_info(
                f"the vLLM server {self.server.url} is not used until it works again: {problem}"
            )
        self.ready = self.loading = False
        self.described = None
        self.problem = problem
        self.changed.set()
        self._wake.set()

    def answered(self) -> None:
        """Note that it answered a request."""
        if self.problem and self.bring is not None:
            rank_zero_info(f"the vLLM server {self.server.url} is used again")
        self.problem = ""

    async def keep(self) -> None:
        """Watch the server until cancelled, or until an error shows that it can never be used."""
        while self.refusal is None:
            try:
                await self._look()
            except Unreachable as error:
                self.waits = isinstance(error, NotNow)
                self._doubt(error)
            except Exception as error:  # raised in the thread that waits for the server
                self.refusal = error
            self.looked = True
            self.changed.set()
            await self._pause()

    async def _pause(self) -> None:
        """Wait for the next check; after a failure for `PAUSE` seconds."""
        if self.ready or not self.problem:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK if self.ready else PAUSE):
                    await self._wake.wait()
        if self.problem and not self.ready:
            await asyncio.sleep(PAUSE)
        self._wake.clear()

    async def _look(self) -> None:
        wanted = self.wanted
        if wanted:
            self.there = False
            label = await self.server.version()
            self.there = True
            if label != wanted:
                self.ready, self.described = False, None
                try:
                    await self._get(label)
                except Unreachable:
                    if self.draws_behind and wanted != self.wanted:
                        return  # newer weights are being published, so the files are gone
                    raise
                label = await self.server.version()
        if self.described is None:
            self.described = await self.server.describe()
            self.there = True
        if wanted and label == wanted == self.wanted:
            self.ready, self.waits, self.loading, self._silent = True, False, False, None

    async def _get(self, label: str) -> None:
        """Send the wanted weights to the server, or wait for rank 0 to do it."""
        if self.bring is None:
            raise Silent(f"has the weights {label!r} and not yet those of rank 0")
        self.described = await self.server.describe()
        self.loading = True
        try:
            # A request names its adapter, so it cannot go on with another one.
            freezes = self.within and not self.described["adapter"]
            server = replace(self.server, freezes=freezes)
            if self.draws_behind:
                await server.pause(self.timeout)
            await self.bring(server)
        finally:
            self.loading = False
            if self.draws_behind or not self._brought:  # a run that was killed may have paused it
                with suppress(Unreachable):
                    await self.server.resume()
        self._brought = True
        self.described = await self.server.describe()  # it has another adapter now

    def _doubt(self, error: Unreachable) -> None:
        """Set the server aside, unless it may be busy: a server that loads does not answer."""
        now = time.monotonic()
        self._silent = self._silent or now
        others_load = self.bring is None and not self.ready
        grace = self.timeout if others_load else self.patience if self.ready else 0.0
        if isinstance(error, Silent) and now - self._silent < grace:
            self.loading = others_load
            return
        self.fail(str(error))
        for task in self.underway:  # other servers answer these requests
            task.cancel()
