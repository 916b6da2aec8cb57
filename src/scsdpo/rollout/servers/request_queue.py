"""The requests of one sampling, which servers take one after another."""

import asyncio
import math
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.rollout.servers.server import START, Unreachable
from scsdpo.rollout.servers.watched_server import PAUSE, WatchedServer
from scsdpo.rollout.vllm.rollout import EngineAnswer, Request, check_length

_FILLED = 2
"""Ratio of the sequences that a server gets to those that it runs at a time; it is never idle."""


def no_usable_server(servers: Sequence[WatchedServer], seconds: float) -> TrainingStopped:
    """The error of a run that could use no server for `seconds` seconds."""
    said = "; ".join(f"{each.server.url}: {each.problem or 'no answer yet'}" for each in servers)
    return TrainingStopped(
        f"no vLLM server could be used for {seconds:.3g} s ({said}); no step was taken on this "
        f"batch: check that they run (start them with `{START}`), and resume with --ckpt_path"
    )


def agreed_dtype(servers: Sequence[WatchedServer]) -> str:
    """The dtype of the servers' weights; '' if no server has answered yet.

    Raises:
        ConfigurationError: if they differ, or a server can never be used.
    """
    for server in servers:
        if server.refusal is not None:
            raise server.refusal
    dtypes = sorted({server.described["dtype"] for server in servers if server.described})
    if len(dtypes) > 1:
        raise ConfigurationError(
            "model.rollout.engine: the vLLM servers have weights of different dtypes "
            f"({', '.join(dtypes)}): start them with the same --dtype"
        )
    return dtypes[0] if dtypes else ""


class Stranded(Exception):
    """No server can be used, but one could if the weights were published again."""


class RequestQueue:
    """Each server takes the next request when it has room; a request that fails goes back.

    Args:
        requests: the requests, in the order of the answers.
        version: label of the weights that must answer.
        servers: all servers, whether they work or not.
        published: labels of all published weights, which grows: those after `version` may answer
            too. Empty: only `version` may.
        before: earlier queues, whose requests go first.
        patience: seconds without a usable server after which the run stops.
        timeout: seconds for one request.
        changed: set whenever a server's state has changed.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        version: str,
        servers: Sequence[WatchedServer],
        *,
        published: Sequence[str] = (),
        before: Sequence["RequestQueue"] = (),
        patience: float,
        timeout: float,
        changed: asyncio.Event,
    ) -> None:
        self.requests, self.version, self.servers = requests, version, servers
        self.published, self.before = published, before
        self._tasks: dict[WatchedServer, set[asyncio.Task[None]]] = defaultdict(set)
        """Server -> its running requests from this queue."""
        self.patience, self.timeout, self.changed = patience, timeout, changed
        self._todo = deque(range(len(requests)))
        self._answers: dict[int, list[EngineAnswer]] = {}
        self._refusal: Exception | None = None
        self._idle = 0.0
        """Seconds since the last answer in which no server had a request or loaded weights."""
        self._runs = False
        self._failing: float | None = None
        """Time of the first failure since the last answer; None: there was none."""

    async def run(self) -> list[list[EngineAnswer]]:
        """Wait for answers to all requests; a second call goes on where the first was interrupted.

        Raises:
            Stranded: if the weights must be published again.
            ConfigurationError: at once, if a server cannot serve the requests.
            TrainingStopped: if no server can be used for `patience` seconds.
        """
        last, self._runs = time.monotonic(), True
        try:
            while len(self._answers) < len(self.requests):
                self._hand_out()
                busy = any(server.underway or server.loading for server in self.servers)
                self.changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(PAUSE):
                        await self.changed.wait()
                now = time.monotonic()
                self._judge(now, 0.0 if busy else now - last)
                last = now
        finally:
            self._runs = False
            left = [task for tasks in self._tasks.values() for task in tasks]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        self.before = ()  # of which each remembers those before it, with all their answers
        return [self._answers[q] for q in range(len(self.requests))]

    def forgive(self) -> None:
        """Start `patience` anew."""
        self._idle, self._failing = 0.0, None

    @property
    def waits(self) -> bool:
        """True if it runs and has requests that no server has taken."""
        return self._runs and bool(self._todo)

    @property
    def accepted(self) -> Sequence[str]:
        """Labels of the weights that may answer."""
        versions = [*self.published]
        if self.version not in versions:
            return [self.version]
        return versions[versions.index(self.version) :]

    def _hand_out(self) -> None:
        while self._todo and not any(each.waits for each in self.before):
            free = [each for each in self.servers if each.ready and self._room(each) > 0]
            if not free:
                return
            server = max(free, key=self._room)
            q = self._todo.popleft()
            assert server.described is not None
            task = asyncio.create_task(self._ask(server, q, server.described))
            server.underway.add(task)
            self._tasks[server].add(task)
            task.add_done_callback(partial(self._ended, server, q))

    def _room(self, server: WatchedServer) -> int:
        """Number of requests that `server` can take; a share is left for servers that get ready."""
        assert server.described is not None
        holds = _FILLED * server.described["max_num_seqs"] // self.requests[0].parameters["n"]
        left = len(self.requests) - len(self._answers)
        sharers = sum(each.ready or not each.problem for each in self.servers)
        return min(
            max(1, holds) - len(server.underway),
            math.ceil(left / sharers) - len(self._tasks[server]),
        )

    async def _ask(self, server: WatchedServer, q: int, seen: dict[str, Any]) -> None:
        remedy = f"start the server {server.server.url} with a larger --max-model-len"
        try:
            check_length([self.requests[q]], seen["max_model_len"], remedy)
            answers = await server.server.generate(self.requests[q], self.timeout, seen["adapter"])
            for answer in answers:
                if why := answer.fault(*self.accepted):
                    raise Unreachable(why)
            server.answered()
            self._answers[q] = answers
            self._idle, self._failing = 0.0, None
        except Unreachable as error:
            server.fail(str(error))
        except Exception as error:  # `run` raises it
            self._refusal = error

    def _ended(self, server: WatchedServer, q: int, task: asyncio.Task[None]) -> None:
        server.underway.discard(task)
        self._tasks[server].discard(task)
        if q not in self._answers:
            self._todo.appendleft(q)
        self.changed.set()

    def _judge(self, now: float, idle: float) -> None:
        if self._refusal is not None:
            raise self._refusal
        agreed_dtype(self.servers)
        if self._failing is None and any(server.problem for server in self.servers):
            self._failing = now
        self._idle += idle
        # `failing` counts servers that fail slowly: after a load of weights and a request.
        failing = 0.0 if self._failing is None else now - self._failing
        if self._idle > self.patience or failing > self.patience + 2 * self.timeout:
            raise no_usable_server(self.servers, max(self._idle, failing))
        works = any(each.ready or each.loading or each.underway for each in self.servers)
        if not works and any(each.waits for each in self.servers):
            raise Stranded
