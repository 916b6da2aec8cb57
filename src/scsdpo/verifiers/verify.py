"""From response texts to verdicts, in this very process."""

import errno
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from scsdpo.errors import ConfigurationError, TrainingStopped
from scsdpo.prompt import Environment, Prompt, Verdict, Verifier
from scsdpo.verifiers.text import capped, capped_distinct

MAX_FEEDBACK = 4000
"""Characters, unless told otherwise."""
MAX_ANSWER, MAX_ERROR = 20_000, 500
NO_ROOM = (errno.EAGAIN, errno.ENOMEM)
"""Numbers of an OSError with which the machine refuses a process, a thread or memory."""
ENOUGH = 8
"""Verdicts of a verifier from which on it is known that it fails."""

_log = logging.getLogger(__name__)

T = TypeVar("T")


def verify_all(
    prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], *, max_feedback: int = MAX_FEEDBACK
) -> tuple[tuple[Verdict, ...], ...]:
    """Verdicts [Q][G] on the responses `texts` [Q][G] to `prompts` [Q].

    A verifier that raises, exits or returns something else than a verdict with a finite reward
    costs its own rollout only: reward 0, and the reason in `error`. One that hangs, hangs:
    `VerifierPool` has deadlines.
    """
    prepare_all(prompt.verifier for prompt in prompts)

    def judged(prompt: Prompt, text: str) -> Verdict:
        try:
            return contained(prompt, text, max_feedback)
        except NoRoom as fault:
            return fault.verdict

    return tuple(
        tuple(judged(prompt, text) for text in group)
        for prompt, group in zip(prompts, texts, strict=True)
    )


class NoRoom(Exception):
    """The machine had no room for what a verifier wanted to start: it may have later.

    Args:
        verdict: if it never has.
    """

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.error)
        self.verdict = verdict


def contained(prompt: Prompt, response: str, max_feedback: int) -> Verdict:
    """The verdict, or one with an `error` if the verifier did not give any.

    Its texts are valid, and cut where they are longer than `MAX_ANSWER`, `max_feedback` and
    `MAX_ERROR` characters.

    Raises:
        NoRoom: if a process or thread could not be started (EAGAIN), or got no memory (ENOMEM).
    """
    verifier = prompt.verifier
    assert isinstance(verifier, Verifier)
    return attempted(
        type(verifier).__name__,
        lambda: verifier.verify(prompt, response),
        lambda verdict: tidy_verdict(verdict, max_feedback),
    )


def attempted(
    name: str, act: Callable[[], object], tidy: Callable[[object], T | None]
) -> T | Verdict:
    """What `tidy` makes of the result of `act`, or a verdict with an `error` if that is none.

    Args:
        name: of whoever acts, for the error.
        act: may raise anything, or exit.
        tidy: valid texts of a bounded length; None of an unsound result.

    Raises:
        NoRoom: if a process or thread could not be started (EAGAIN), or got no memory (ENOMEM).
    """
    home = os.getpid()
    try:
        return _attempted(name, act, tidy)
    finally:
        _end_copy(home)


def _attempted(
    name: str, act: Callable[[], object], tidy: Callable[[object], T | None]
) -> T | Verdict:
    try:
        result = act()
        if (sound := tidy(result)) is not None:
            return sound
        why = f"{name} returned {_shown(result)}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        why = f"{name}: {_shown(error)}"
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise NoRoom(failed(why)) from error
    return failed(why)


def failed(why: str) -> Verdict:
    """The verdict of an environment that did not give any."""
    return Verdict(reward=0.0, error=capped(why, MAX_ERROR))


def _end_copy(home: int) -> None:
    """Where a verifier has forked and let the child return, the child ends here."""
    if os.getpid() != home:
        os._exit(0)


def tidy_verdict(verdict: object, max_feedback: int) -> Verdict | None:
    """The verdict with valid texts of a bounded length; None if it is none, or not a sound one."""
    if not isinstance(verdict, Verdict) or not _is_sound(verdict):
        return None
    return Verdict(
        reward=float(verdict.reward),
        answer=None if verdict.answer is None else capped_distinct(verdict.answer, MAX_ANSWER),
        feedback=capped(verdict.feedback, max_feedback),
        error=capped(verdict.error, MAX_ERROR),
        earned=float(verdict.earned),
        stopped=verdict.stopped,
    )


def is_number(thing: object) -> bool:
    """Whether it can be a reward."""
    return isinstance(thing, int | float) and math.isfinite(thing)


def _shown(thing: object) -> str:
    """Its `repr`, which may do anything."""
    try:
        return repr(thing)
    except Exception:
        return f"a {type(thing).__name__} that cannot be shown"


def _is_sound(verdict: Verdict) -> bool:
    return (
        is_number(verdict.reward)
        and is_number(verdict.earned)
        and verdict.stopped in ("", "turns", "time")
        and isinstance(verdict.answer, str | None)
        and isinstance(verdict.feedback, str)
        and isinstance(verdict.error, str)
    )


def prepare_all(verifiers: Iterable[Environment]) -> None:
    """`prepare` each kind of verifier once.

    Raises:
        ConfigurationError: if one cannot.
    """
    for verifier in {id(verifier): verifier for verifier in verifiers}.values():
        home = os.getpid()
        try:
            verifier.prepare()
        except Exception as error:
            raise ConfigurationError(f"{type(verifier).__name__} cannot work: {error}") from error
        finally:
            _end_copy(home)


class Failures:
    """Verdicts that failed, of each kind of verifier: said of a few, and a stop at many.

    Their reward of 0 says nothing of a response, so a run learns nothing right from them.
    """

    def __init__(self) -> None:
        self._in_a_row: Counter[str] = Counter()

    def count(self, prompts: Sequence[Prompt], verdicts: Sequence[Sequence[Verdict]]) -> None:
        """Log, in one line, how many verdicts [Q][G] of a batch failed, and why.

        Raises:
            TrainingStopped: if of one kind of verifier more than half of the batch's verdicts
                failed, or all those of the last batches, out of at least `ENOUGH`.
        """
        kinds: dict[str, list[Verdict]] = {}
        for prompt, group in zip(prompts, verdicts, strict=True):
            kinds.setdefault(type(prompt.verifier).__name__, []).extend(group)
        for kind, judged in kinds.items():
            failed = [verdict.error for verdict in judged if verdict.error]
            if not failed:
                self._in_a_row[kind] = 0
                continue
            all_failed = len(failed) == len(judged)
            self._in_a_row[kind] = all_failed * (self._in_a_row[kind] + len(failed))
            reasons = "; ".join(f"{count} x {why}" for why, count in Counter(failed).most_common(3))
            said = f"{len(failed)} of {len(judged)} verdicts failed: {reasons}"
            most_failed = len(failed) > len(judged) / 2 and len(judged) >= ENOUGH
            if most_failed or self._in_a_row[kind] >= ENOUGH:
                raise TrainingStopped(
                    f"the verifier {kind} fails too often: {said}. Correct the verifier or its "
                    "data, then go on with --ckpt_path last"
                )
            _log.warning("%s", said)
