"""Run the episodes of a batch in the worker processes."""

import itertools
import pickle
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Self

from scsdpo import interrupt
from scsdpo.errors import ConfigurationError
from scsdpo.prompt import Episode, Message, Observation, Part, Prompt, Verdict
from scsdpo.verifiers.own_time import LOOK_SECONDS
from scsdpo.verifiers.pool import START_SECONDS, VerifierPool
from scsdpo.verifiers.process import Worker
from scsdpo.verifiers.stage import Stage, Turn, digest
from scsdpo.verifiers.verify import NoRoom, failed, prepare_all

MAX_OWN_PROCESSES = 16
"""Most processes for environments that do not replay; further episodes wait for one."""
SOON = 0.005
"""Seconds that a caller waits for the next answer. A process answers one response at a time, so
answers arrive one after the other; without this wait each would cost the caller a decoding step."""
_REBUILDING = 3.0
"""Time limit to rebuild an episode, in multiples of the time of its turns."""

_numbers = itertools.count()


@dataclass(kw_only=True, eq=False)
class _Row:
    """One episode."""

    prompt: Prompt
    number: int = field(default_factory=lambda: next(_numbers))
    """Unique number of this attempt at the episode, which identifies its state in a process."""
    parts: list[Part] = field(default_factory=list)
    past: list[str] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    response: str = ""
    """The response that is being answered."""
    worker: Worker | None = None
    """The process that holds its state."""
    seconds: float = 0.0
    """Seconds that its turns have taken."""
    losses: int = 0
    """Number of processes that died while they answered it."""
    verdict: Verdict | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    row: _Row
    turn: Turn
    seconds: float
    """Time limit."""
    holder: Worker | None = None
    """The process that must drop the episode's state."""


class Episodes:
    """Q x G episodes: takes responses, and gives observations and verdicts in any order.

    Rows are numbered q G + g. The state of an episode stays in the process in which it began; if
    the process is lost, the next turn rebuilds the state in another one. The end of the `with`
    block drops all states.

    Args:
        pool: owns the processes.
        prompts: the questions; rows of a question with a `Verifier` have one turn and are not
            played here.
        n: episodes of each question, G.
    """

    def __init__(self, pool: VerifierPool, prompts: Sequence[Prompt], n: int) -> None:
        self.pool, self.n = pool, n
        bare = [replace(prompt, ids=()) for prompt in prompts]  # less to send
        self._rows = [_Row(prompt=prompt) for prompt in bare for _ in range(n)]
        self._prompts = tuple(prompts)
        self._todo: deque[_Job] = deque()
        self._jobs: dict[int, _Job] = {}
        """Jobs that a process has, by number."""
        self._answers: deque[tuple[_Row, Observation | Verdict]] = deque()
        self._own: list[Worker] = []
        """Processes that each hold one episode of an environment that does not replay."""
        settings = pool.settings
        self._here = Stage(settings.max_feedback, settings.max_observation, alone=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            if error or any(row.prompt.has_turns and not row.verdict for row in self._rows):
                self.pool.close()  # drops the states of unfinished episodes
            else:
                while self._todo or self._jobs:  # drop the states of forgotten attempts
                    self._pump(LOOK_SECONDS)
        finally:
            for worker in self._own:
                worker.kill()
            self._own.clear()

    def plays(self, row: int) -> bool:
        """True if a row's environment plays several turns."""
        return self._rows[row].prompt.has_turns

    def open(self) -> tuple[tuple[Message, ...], ...]:
        """The messages that open each question; a question of one turn has its own."""
        for row in self._rows[:: self.n]:
            if row.prompt.has_turns:
                self._ask(row, "begin")
        openings = [prompt.messages for prompt in self._prompts]
        while self._todo or self._jobs:
            self._pump(LOOK_SECONDS)
            for row, answer in self._taken():
                if row.worker and row.worker in self._own:  # it begins anew at its first response
                    self._remove(row.worker)
                question = self._rows.index(row) // self.n
                group = self._rows[question * self.n : (question + 1) * self.n]
                if isinstance(answer, Verdict):
                    # The opening failed: each of its episodes ends after its first turn.
                    for each in group:
                        each.verdict = answer
                else:
                    openings[question] = answer.messages
                    for each in group:
                        each.seen = [digest(answer.messages)]
        return tuple(openings)

    def submit(self, row: int, response: str, *, last: str = "") -> None:
        """Give the environment a response.

        Args:
            row: number of the episode.
            response: its whole text; empty if all responses were given before.
            last: reason why the episode must end after this response; empty: it need not.
        """
        own = self._rows[row]
        own.response = response
        if response or not last:
            own.parts.append(Part(role="assistant", text=response))
        if own.verdict:  # its opening failed
            self._answers.append((own, own.verdict))
        else:
            self._ask(own, "finish" if last else "step", response=response, why=last)

    def answers(self, *, wait: bool) -> list[tuple[int, Observation | Verdict]]:
        """The answers since the last call, with their rows; a verdict ends the episode.

        It returns once no environment has answered for `SOON` seconds.

        Args:
            wait: wait for at least one answer, if any is due.
        """
        self._pump(0.0)
        until = time.monotonic() + SOON
        while self._todo or self._jobs:
            heard = len(self._answers)
            left = until - time.monotonic()
            self._pump(LOOK_SECONDS if wait and not heard else max(left, 0.0))
            if len(self._answers) > heard:
                until = time.monotonic() + SOON
            elif left <= 0 and (heard or not wait):
                break
        place = {id(row): number for number, row in enumerate(self._rows)}
        return [(place[id(row)], answer) for row, answer in self._taken()]

    def forget(self, row: int) -> None:
        """Discard an episode and begin it anew."""
        own = self._rows[row]
        self._answers = deque(each for each in self._answers if each[0] is not own)
        drop = Turn(episode=own.number, act="drop")
        if own.worker is None:
            self._here.answer(own.prompt, drop)
        elif own.worker in self._own:
            self._remove(own.worker)
        else:
            limit = self.pool.settings.turn_deadline
            self._todo.append(_Job(row=own, turn=drop, seconds=limit, holder=own.worker))
        own.number = next(_numbers)
        own.parts, own.past, own.seen = [], [], own.seen[:1]
        own.worker, own.losses = None, 0

    def record(self, row: int) -> Episode:
        """The record of an episode; empty for a row of one turn."""
        own = self._rows[row]
        return Episode(parts=tuple(own.parts), verdict=own.verdict)

    # --- to and from the processes ----------------------------------------------------------------

    def _ask(self, row: _Row, act: Any, **more: str) -> None:
        turn = Turn(episode=row.number, act=act, past=(*row.past,), seen=(*row.seen,), **more)
        limits = self.pool.settings
        seconds = min(limits.turn_deadline, max(limits.episode_deadline - row.seconds, 0.1))
        self._todo.append(_Job(row=row, turn=turn, seconds=seconds))

    def _taken(self) -> list[tuple[_Row, Observation | Verdict]]:
        """The answers received so far, stored in their rows."""
        taken, self._answers = list(self._answers), deque()
        for row, answer in taken:
            if isinstance(answer, Verdict):
                row.verdict = answer
            elif row.parts:  # and not an opening
                row.past.append(row.response)
                row.seen.append(digest(answer.messages))
                said = [
                    Part(role=m["role"], text=m["content"], name=m.get("name", ""))
                    for m in answer.messages
                ]
                said[0] = replace(
                    said[0],
                    feedback=answer.feedback,
                    reward=answer.reward,
                    calls=answer.calls,
                    failed=answer.failed,
                )
                row.parts += said
        return taken

    def _pump(self, seconds: float) -> None:
        """Send all jobs that can be sent, and handle events for at most `seconds`."""
        waiting, self._todo = self._todo, deque()
        before = len(self._answers)
        for job in waiting:
            if job.turn.act != "drop" and job.turn.episode != job.row.number:
                continue  # the attempt was forgotten meanwhile
            if not self.pool.is_portable(job.row.prompt):
                self._answered_here(job)
            elif not self._sent(job):
                self._todo.append(job)
        interrupt.check()
        busy = [worker for worker in self._workers() if not worker.idle]
        if not busy or len(self._answers) > before:
            seconds = 0.0
        first = min((worker.time_left.left for worker in busy), default=0.0)
        heard = wait([worker.out for worker in busy], max(0.0, min(seconds, max(first, 0.001))))
        for worker in busy:
            if worker.out in heard:
                for event in worker.events():
                    self._note(worker, *event)
            if worker.alive and not worker.idle and worker.time_left.over():
                limit = self._limit(worker) if worker.prepared else START_SECONDS
                self._lost(worker, f"no answer within {limit:g} s", hung=True)

    def _workers(self) -> list[Worker]:
        return [*self.pool.workers, *self._own]

    def _answered_here(self, job: _Job) -> None:
        """Answer in this process, without a time limit."""
        prepare_all([job.row.prompt.verifier])
        try:
            answer = self._here.answer(job.row.prompt, job.turn)
        except NoRoom as fault:
            answer = fault.verdict
        if job.turn.act != "drop" and job.turn.episode == job.row.number:
            self._answers.append((job.row, answer))

    def _sent(self, job: _Job) -> bool:
        """True if a process now has the job, or nobody needs it any more."""
        row, held, seconds = job.row, job.row.worker, job.seconds
        if job.turn.act == "drop":
            held = job.holder
            if held not in self._workers():
                return True  # the process is gone, and the state with it
        elif held is None:
            if row.past and not row.prompt.verifier.replays:
                self._again(job)
                return True
            held = self._free(row)
            seconds += (START_SECONDS + _REBUILDING * row.seconds) * bool(row.past)
        if held is None or not held.idle:
            return False
        if job.turn.act != "drop":
            row.worker = held
        number = next(_numbers)
        self._jobs[number] = replace(job, seconds=seconds)
        chunk = pickle.dumps([(number, row.prompt, job.turn)])
        held.send([number], chunk, START_SECONDS, on_the_clock=True)
        return True

    def _free(self, row: _Row) -> Worker | None:
        """An idle process for an episode that has none: the one with the fewest episodes."""
        if not row.prompt.verifier.replays:
            if len(self._own) >= MAX_OWN_PROCESSES:
                return None
            try:
                self._own.append(Worker(self.pool.settings, START_SECONDS))
            except OSError as error:
                self.pool.no_room(str(error), bool(self._own))
                return None
            row.worker = self._own[-1]
            return row.worker
        self.pool.start()
        held = Counter(id(row.worker) for row in self._rows if row.worker and not row.verdict)
        idle = [worker for worker in self.pool.workers if worker.idle]
        return min(idle, key=lambda worker: held[id(worker)], default=None)

    def _limit(self, worker: Worker) -> float:
        return self._jobs[worker.numbers[0]].seconds

    def _note(self, worker: Worker, kind: str, *rest: Any) -> None:
        if kind == "ready":
            worker.ready(rest[0], self._limit(worker) if worker.numbers else START_SECONDS)
        elif kind in ("turn", "no room"):
            self._answered(worker, kind == "turn", *rest)
        elif kind == "broken":
            raise ConfigurationError(
                f"data: an environment cannot be used in a worker process: {rest[0]}"
            )
        else:
            self._lost(worker, rest[0])

    def _answered(self, worker: Worker, final: bool, number: int, fields: Any, took: float) -> None:
        if not worker.numbers or number != worker.numbers[0]:
            return  # a second answer to the same turn
        worker.judged(number, START_SECONDS)
        job = self._jobs.pop(number)
        row = job.row
        if job.turn.episode != row.number:
            return  # the attempt was forgotten meanwhile
        self.pool.took(row.prompt, took)
        if not final and row.losses == 0 and (row.prompt.verifier.replays or not row.past):
            row.losses += 1
            self._remove(worker)  # a new process begins with little memory
            self._again(job)
            return
        answer: Observation | Verdict
        if "answer" in fields:
            answer = Verdict(**fields)
        else:
            answer = Observation(**(fields | {"messages": tuple(fields["messages"])}))
        row.seconds += took
        most = self.pool.settings.episode_deadline
        if row.seconds > most and isinstance(answer, Observation):
            self._remove(worker)
            answer = _late(f"{_name(row)}: no end within {most:g} s of all its turns")
        self._answers.append((row, answer))
        if isinstance(answer, Verdict):
            row.worker = None
            if worker in self._own:
                self._remove(worker)
        elif (
            row.prompt.verifier.replays
            and worker.idle
            and worker.resident() > self.pool.settings.memory_mb << 19
        ):
            self._remove(worker)

    def _again(self, job: _Job) -> None:
        if job.row.prompt.verifier.replays or not job.turn.past:
            self._todo.appendleft(job)
        else:
            why = (
                f"{_name(job.row)}: its process was lost, and its environment does not replay turns"
            )
            self._answers.append((job.row, failed(why)))

    def _lost(self, worker: Worker, why: str, *, hung: bool = False) -> None:
        """Handle the loss of a process and of the turn that it was answering."""
        prepared = worker.prepared
        numbers = list(worker.numbers)
        self._remove(worker, why="" if prepared and numbers else why)
        for number in numbers:
            job = self._jobs.pop(number)
            if job.turn.episode != job.row.number:
                continue
            job.row.losses += prepared
            if not prepared or (not hung and job.row.losses == 1):
                self._again(job)  # another program may have killed it
            else:
                lost = _late if hung else failed
                self._answers.append((job.row, lost(f"{_name(job.row)}: {why}")))

    def _remove(self, worker: Worker, *, why: str = "") -> None:
        for row in self._rows:
            if row.worker is worker:
                row.worker = None
        if worker in self._own:
            self._own.remove(worker)
        self.pool.remove(worker, why=why)


def _late(why: str) -> Verdict:
    return replace(failed(why), stopped="time")


def _name(row: _Row) -> str:
    return type(row.prompt.verifier).__name__
