"""Judge responses in worker processes, off the training thread, each with an enforced deadline."""

import logging
import math
import os
import pickle
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any

from scsdpo import interrupt
from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.prompt import Prompt, Verdict
from scsdpo.verifiers.own_time import LOOK_SECONDS
from scsdpo.verifiers.process import Worker
from scsdpo.verifiers.verification import Verification
from scsdpo.verifiers.verify import verify_all

CHUNK_SECONDS = 0.05
"""Seconds of work sent to a process at a time, as estimated from past verdicts."""
CHUNK_JOBS = 64
START_SECONDS = 120.0
"""Seconds that a process may take to start, or to prepare a verifier."""
START_FAILURES = 3
ROOM_SECONDS = 0.5
"""Seconds between attempts to start a process for which the machine has no room."""

_log = logging.getLogger(__name__)


class VerifierPool:
    """Judges batches of responses in worker processes, which it starts, kills and replaces.

    A verifier that hangs, raises, exits, exceeds its memory or returns an invalid verdict costs its
    own rollout only. Rollouts are sent in chunks of about 50 ms of work; if one hangs, another
    process judges the rest of its chunk. Processes that a verifier leaves behind are ended, on
    Linux also if they have left its session. The workers end with the pool, and with the process
    that owns it in whatever way it ends, because their standard input closes.

    A verifier whose class is defined in a function or in the main program cannot be sent to another
    process; it judges in this one.

    If the machine has no room for a process that a verifier starts, its verdict is tried again
    after all others.

    Args:
        settings: number of processes, deadline, memory, length of feedback.
    """

    def __init__(self, settings: Verification) -> None:
        self.settings = settings
        self._workers: list[Worker] = []
        self._seconds: defaultdict[type, float] = defaultdict(float)
        self._verdicts: defaultdict[type, int] = defaultdict(int)
        self._portable: dict[type, bool] = {}
        self._failures = 0
        self._room_at, self._full_since = 0.0, math.inf
        weakref.finalize(self, _close, self._workers, os.getpid())

    def __reduce__(self) -> tuple[Any, ...]:
        return VerifierPool, (self.settings,)

    def start(self) -> None:
        """Start the processes that are missing, without waiting for them."""
        for worker in self.workers:
            if worker.idle and worker.process.poll() is not None:  # killed by another program
                self.remove(worker)
        if time.monotonic() < self._room_at:
            return
        try:
            while len(self._workers) < self.settings.workers:
                self._workers.append(Worker(self.settings, START_SECONDS))
        except OSError as error:
            self.no_room(str(error), bool(self._workers))
        else:
            self._full_since = math.inf

    def no_room(self, why: str, some: bool) -> None:
        """Continue with the present processes, if there are `some`, and try again later."""
        now = time.monotonic()
        self._room_at, self._full_since = now + ROOM_SECONDS, min(self._full_since, now)
        if not some and now > self._full_since + START_SECONDS:
            raise TrainingStopped(
                f"the machine has no room for a process that judges responses ({why}); raise its "
                "limits on processes and memory"
            )

    def close(self) -> None:
        """End the processes; the next batch starts new ones."""
        _close(self._workers, os.getpid())

    def verify(
        self, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]
    ) -> tuple[tuple[Verdict, ...], ...]:
        """Verdicts [Q][G] on the responses `texts` [Q][G] to `prompts` [Q].

        Raises:
            ConfigurationError: if a verifier cannot be prepared.
            TrainingStopped: if the processes do not start.
        """
        jobs = [
            (prompt, text)
            for prompt, group in zip(prompts, texts, strict=True)
            for text in group
            if self.is_portable(prompt)
        ]
        try:
            judged = iter(_Batch(self, jobs).verdicts() if jobs else ())
        except BaseException:
            self.close()  # processes still at work have jobs of an abandoned batch
            raise
        return tuple(
            tuple(next(judged) for _ in group)
            if self.is_portable(prompt)
            else verify_all([prompt], [group], max_feedback=self.settings.max_feedback)[0]
            for prompt, group in zip(prompts, texts, strict=True)
        )

    def is_portable(self, prompt: Prompt) -> bool:
        """True if there are worker processes and they can judge responses to `prompt`."""
        kind = type(prompt.verifier)
        if self.settings.workers == 0:
            return False
        if kind not in self._portable:
            self._portable[kind] = _can_travel(prompt)
            if not self._portable[kind]:
                _log.warning(
                    "%s judges in the training process, without a deadline: define its class in a "
                    "module of its own, so that it can be sent to another process",
                    kind.__name__,
                )
        return self._portable[kind]

    def expected(self, prompt: Prompt) -> float:
        """Expected seconds of a verdict on a response to `prompt`, from past verdicts."""
        kind = type(prompt.verifier)
        count = self._verdicts[kind]
        return self._seconds[kind] / count if count else CHUNK_SECONDS

    def took(self, prompt: Prompt, seconds: float) -> None:
        """Record how long a verdict took."""
        kind = type(prompt.verifier)
        self._seconds[kind] += seconds
        self._verdicts[kind] += 1
        self._failures = 0

    def remove(self, worker: Worker, *, why: str = "") -> None:
        """End a process; `why`: the reason why it never became ready, if so."""
        worker.kill()
        if worker in self._workers:  # not the process of a single episode
            self._workers.remove(worker)
        if why:  # the machine may have had no room, so try again later
            self._failures += 1
            self._room_at = time.monotonic() + self._failures * ROOM_SECONDS
        if self._failures >= START_FAILURES:
            raise TrainingStopped(
                f"the processes that judge responses do not start ({why}); see what they print, "
                "or set model.verification.workers=0"
            )

    @property
    def workers(self) -> tuple[Worker, ...]:
        """The processes, also those that are still starting."""
        return tuple(self._workers)


def _can_travel(prompt: Prompt) -> bool:
    """True if another process can unpickle the verifier without importing the main program."""
    if type(prompt.verifier).__module__ == "__main__":
        return False
    try:
        pickle.dumps(prompt.verifier)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def _close(workers: list[Worker], owner: int) -> None:
    if os.getpid() == owner:  # a forked child must not use its copies of the handles
        for worker in workers:
            worker.kill()
    workers.clear()


class _Batch:
    """One batch of responses that the pool judges."""

    def __init__(self, pool: VerifierPool, jobs: Sequence[tuple[Prompt, str]]) -> None:
        self.pool, self.jobs = pool, jobs
        self.todo = deque(range(len(jobs)))
        self.done: dict[int, Verdict] = {}
        self.crowded: deque[int] = deque()
        """Jobs for which the machine had no room; each is tried once more, alone."""
        self.alone: set[int] = set()

    def verdicts(self) -> list[Verdict]:
        """The verdicts, in the order of the jobs."""
        while len(self.done) < len(self.jobs):
            if self.crowded and not self.todo and all(w.idle for w in self.pool.workers):
                self.todo.append(self.crowded.popleft())
                self.alone.add(self.todo[0])
            if self.todo:
                self.pool.start()
            for worker in self.pool.workers:
                if worker.idle and self.todo:
                    self._send(worker)
            self._attend()
        self.pool.start()  # replaces lost processes while the batch is trained on
        return [self.done[number] for number in range(len(self.jobs))]

    def _send(self, worker: Worker) -> None:
        numbers: list[int] = []
        seconds = 0.0
        share = math.ceil(len(self.todo) / self.pool.settings.workers)
        while len(numbers) < min(share, CHUNK_JOBS):
            seconds += self.pool.expected(self.jobs[self.todo[0]][0])
            if numbers and seconds > CHUNK_SECONDS:
                break
            numbers.append(self.todo.popleft())
        chunk = [(number, *self.jobs[number]) for number in numbers]
        worker.send(numbers, pickle.dumps(chunk), START_SECONDS)

    def _attend(self) -> None:
        """Wait for an event of a process, or for the first deadline."""
        at_work = [worker for worker in self.pool.workers if not worker.idle]
        first = min((worker.time_left.left for worker in at_work), default=LOOK_SECONDS)
        heard = wait([worker.out for worker in at_work], min(max(0.001, first), LOOK_SECONDS))
        interrupt.check()
        for worker in at_work:
            if worker.out in heard:
                for event in worker.events():
                    self._note(worker, *event)
            # Also after its events were read: a process that never stops writing always has some.
            if worker.alive and not worker.idle and worker.time_left.over():
                deadline = self.pool.settings.deadline if worker.prepared else START_SECONDS
                self._lost(worker, f"no verdict within {deadline:g} s")

    def _note(self, worker: Worker, kind: str, *rest: Any) -> None:
        if kind == "ready":
            worker.ready(rest[0], self.pool.settings.deadline)
        elif kind in ("verdict", "no room"):
            self._judged(worker, kind == "verdict", *rest)
        elif kind == "broken":
            raise ConfigurationError(
                f"data: a verifier cannot be used in a worker process: {rest[0]}"
            )
        else:
            self._lost(worker, rest[0])

    def _judged(self, worker: Worker, final: bool, number: int, *fields: Any) -> None:
        if not worker.numbers or number != worker.numbers[0]:
            return  # a second verdict on the same job
        reward, answer, feedback, error, seconds = fields
        worker.judged(number, self.pool.settings.deadline)
        if final or number in self.alone:
            verdict = Verdict(reward=reward, answer=answer, feedback=feedback, error=error)
            self.done[number] = verdict
        else:
            self.crowded.append(number)
        self.pool.took(self.jobs[number][0], seconds)
        if worker.idle and worker.resident() > self.pool.settings.memory_mb << 19:
            self.pool.remove(worker)

    def _lost(self, worker: Worker, why: str) -> None:
        """Handle the loss of a process and of its present verdict; its other jobs are still due."""
        blamed = worker.prepared and bool(worker.numbers)
        if blamed:
            number = worker.numbers.popleft()
            name = type(self.jobs[number][0].verifier).__name__
            self.done[number] = Verdict(reward=0.0, error=f"{name}: {why}")
            self.pool.took(self.jobs[number][0], self.pool.settings.deadline)
        self.todo.extendleft(reversed(worker.numbers))
        self.pool.remove(worker, why="" if blamed else why)
