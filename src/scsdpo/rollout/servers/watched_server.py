"""A server that is kept at the weights that the run samples from."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from scsdpo.rollout.servers.server import NotNow, Server, Silent, Unreachable

PAUSE = 0.5
"""Seconds between two tries."""
_LOOK = 5.0
"""Seconds between two looks at a server that has the weights."""

Bring = Callable[[Server], Awaitable[None]]


@dataclass(kw_only=True, eq=False)
class WatchedServer:
    """Looks after one server, in the event loop, from the first sampling to the last.

    Rank 0 brings it the weights whenever it has others: at a new version, and after it was
    restarted. Other ranks wait for that.
    """

    server: Server
    bring: Bring | None
    """Lets it load the wanted weights; None: rank 0 does."""
    patience: float
    timeout: float
    changed: asyncio.Event
    """Set whenever something here is new."""

    wanted: str = ""
    """Label of the weights that it should have; '': none yet."""
    ready: bool = False
    """It has them, and answers."""
    loading: bool = False
    """It gets them, or rank 0 may be bringing them."""
    problem: str = ""
    """Why it was of no use when it was asked last; '': it answered, or was not asked."""
    refusal: Exception | None = None
    """It is none that can be used."""
    described: dict[str, Any] | None = None
    """Its last `describe`, asked anew after it was away: it may be another one."""
    looked: bool = False
    """At least once."""
    waits: bool = False
    """For its weights to be published again."""
    there: bool = False
    """It answered when it was looked at last, whatever weights it has."""
    underway: set[asyncio.Task[None]] = field(default_factory=set)
    draws_behind: bool = False
    """It may be drawing when it gets other weights: of any rank, for batches whose turn comes."""
    within: bool = False
    """Its responses then go on with those; False: it ends them first."""
    _brought: bool = False
    """Weights were brought to it at least once."""
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _silent: float | None = None
    """Since when it is silent, or waits for rank 0."""

    def want(self, version: str) -> None:
        """From now on these weights; '': leave it alone for a while."""
        if version != self.wanted:
            self.wanted, self.ready, self.waits, self._silent = version, False, False, None
            self._wake.set()

    def fail(self, problem: str) -> None:
        """It is of no use until the next look finds it well."""
        if not self.problem and self.bring is not None:
            rank_zero_info(
                f"the vLLM server {self.server.url} is not used until it is well again: {problem}"
            )
        self.ready = self.loading = False
        self.described = None
        self.problem = problem
        self.changed.set()
        self._wake.set()

    def answered(self) -> None:
        """It is of use."""
        if self.problem and self.bring is not None:
            rank_zero_info(f"the vLLM server {self.server.url} is used again")
        self.problem = ""

    async def keep(self) -> None:
        """Look after it until cancelled, or until it turns out to be none that can be used."""
        while self.refusal is None:
            try:
                await self._look()
            except Unreachable as error:
                self.waits = isinstance(error, NotNow)
                self._doubt(error)
            except Exception as error:  # raised where it is waited for
                self.refusal = error
            self.looked = True
            self.changed.set()
            await self._pause()

    async def _pause(self) -> None:
        """Until the next look: after a failure soon, but never at once."""
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
                        return  # the files went: newer weights are being published
                    raise
                label = await self.server.version()
        if self.described is None:
            self.described = await self.server.describe()
            self.there = True
        if wanted and label == wanted == self.wanted:
            self.ready, self.waits, self.loading, self._silent = True, False, False, None

    async def _get(self, label: str) -> None:
        """Have the weights brought."""
        if self.bring is None:
            raise Silent(f"has the weights {label!r}, and not yet these from rank 0")
        self.described = await self.server.describe()
        self.loading = True
        try:
            # Requests that name an adapter cannot go on with another one.
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
        self.described = await self.server.describe()  # another adapter is there

    def _doubt(self, error: Unreachable) -> None:
        """It failed, unless it may merely be busy: a server that loads does not answer."""
        now = time.monotonic()
        self._silent = self._silent or now
        others_load = self.bring is None and not self.ready
        grace = self.timeout if others_load else self.patience if self.ready else 0.0
        if isinstance(error, Silent) and now - self._silent < grace:
            self.loading = others_load
            return
        self.fail(str(error))
        for task in self.underway:  # hangs: others may do what it has begun
            task.cancel()
