"""The requests of one sampling, which servers take in turn."""

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
from scsdpo.rollout.vllm.rollout import Answer, Request, check_length

_FILLED = 2
"""Sequences that a server is given, over those that it runs at a time: it never waits for us."""


def useless(servers: Sequence[WatchedServer], seconds: float) -> TrainingStopped:
    """The error of a run that no server could be used for."""
    said = "; ".join(f"{each.server.url}: {each.problem or 'no answer yet'}" for each in servers)
    return TrainingStopped(
        f"no vLLM server is of use since {seconds:.3g} s ({said}); no step was taken on this "
        f"batch. Are they running? They start with `{START}`; go on with --ckpt_path"
    )


def agreed_dtype(servers: Sequence[WatchedServer]) -> str:
    """The dtype of their weights; '' if no server has said it yet.

    Raises:
        ConfigurationError: if they differ, or one of them cannot be used.
    """
    for server in servers:
        if server.refusal is not None:
            raise server.refusal
    dtypes = sorted({server.described["dtype"] for server in servers if server.described})
    if len(dtypes) > 1:
        raise ConfigurationError(
            "model.rollout.engine: the vLLM servers hold weights of different dtypes "
            f"({', '.join(dtypes)}): start them with the same --dtype"
        )
    return dtypes[0] if dtypes else ""


class Stranded(Exception):
    """No server works, and one would if the weights were published again."""


class RequestQueue:
    """Each server takes the next request when it has room; what fails goes back, for any of them.

    Args:
        requests: in the order of the answers.
        version: label of the weights that they must be answered with.
        published: labels of all weights so far, while others come: those after `version` will do
            as well. Empty: it alone will do.
        before: queues whose requests go first, those that are still there.
        servers: all that there are, well or not.
        patience: seconds without any server of use before the run stops.
        timeout: seconds for one request.
        changed: set whenever a server's state is new.
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
        """Those of this queue, by server."""
        self.patience, self.timeout, self.changed = patience, timeout, changed
        self._todo = deque(range(len(requests)))
        self._answers: dict[int, list[Answer]] = {}
        self._refusal: Exception | None = None
        self._idle = 0.0
        """Seconds without an answer in which no server had anything to do for us."""
        self._runs = False
        self._failing: float | None = None
        """The first failure since the last answer."""

    async def run(self) -> list[list[Answer]]:
        """Answers to all requests; a second call goes on where the first was interrupted.

        Raises:
            Stranded: if only weights are missing.
            ConfigurationError: at once, if a server cannot do what is asked for.
            TrainingStopped: if no server is of use.
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
        """Let `run` have patience again."""
        self._idle, self._failing = 0.0, None

    @property
    def waits(self) -> bool:
        """Whether it runs, and has requests that no server has taken."""
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
        """Requests that it can take; a share is left to those that are about to be ready."""
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
        except Exception as error:  # raised where it is waited for
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
        # The second is of servers that fail slowly: one is brought the weights, and asked.
        failing = 0.0 if self._failing is None else now - self._failing
        if self._idle > self.patience or failing > self.patience + 2 * self.timeout:
            raise useless(self.servers, max(self._idle, failing))
        works = any(each.ready or each.loading or each.underway for each in self.servers)
        if not works and any(each.waits for each in self.servers):
            raise Stranded
