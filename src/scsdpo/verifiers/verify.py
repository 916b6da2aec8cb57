"""Judge response texts in this process."""

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
"""Default number of characters of feedback that are kept."""
MAX_ANSWER, MAX_ERROR = 20_000, 500
NO_ROOM = (errno.EAGAIN, errno.ENOMEM)
"""Error numbers of an OSError that mean: no room for a process, a thread or memory."""
ENOUGH = 8
"""Least number of verdicts of a verifier after which its failures stop the run."""

_log = logging.getLogger(__name__)

T = TypeVar("T")


def verify_all(
    prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], *, max_feedback: int = MAX_FEEDBACK
) -> tuple[tuple[Verdict, ...], ...]:
    """Verdicts [Q][G] on the responses `texts` [Q][G] to `prompts` [Q].

    A verifier that raises, exits or returns anything but a verdict with a finite reward costs its
    own rollout only: reward 0, and the reason in `error`. There is no time limit here;
    `VerifierPool` has one.
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
    """The machine had no room for a process or memory of a verifier; later it may have.

    Args:
        verdict: the verdict if it never has.
    """

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.error)
        self.verdict = verdict


def contained(prompt: Prompt, response: str, max_feedback: int) -> Verdict:
    """The verifier's verdict, or one with an `error` if it gave none.

    Its texts are valid, and cut to `MAX_ANSWER`, `max_feedback` and `MAX_ERROR` characters.

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
    """The result of `act` after `tidy`, or a verdict with an `error` if there is none.

    Args:
        name: of the environment, for the error.
        act: may raise anything, or exit.
        tidy: makes texts valid and bounds their length; gives None for an invalid result.

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
    """The verdict for an environment that gave none."""
    return Verdict(reward=0.0, error=capped(why, MAX_ERROR))


def _end_copy(home: int) -> None:
    """End this process if it is a forked child that a verifier let return."""
    if os.getpid() != home:
        os._exit(0)


def tidy_verdict(verdict: object, max_feedback: int) -> Verdict | None:
    """The verdict with valid texts of bounded length; None if it is no valid verdict."""
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
    """True for a finite number, as a reward must be."""
    return isinstance(thing, int | float) and math.isfinite(thing)


def _shown(thing: object) -> str:
    """Its `repr`, guarded: the method may do anything."""
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
    """Call `prepare` once for each class of verifier.

    Raises:
        ConfigurationError: if one raises.
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
    """Counts failed verdicts by class of verifier: logs a few, and stops the run at many.

    Their reward of 0 says nothing about a response, so a run would learn from wrong rewards.
    """

    def __init__(self) -> None:
        self._in_a_row: Counter[str] = Counter()

    def count(self, prompts: Sequence[Prompt], verdicts: Sequence[Sequence[Verdict]]) -> None:
        """Log, in one line, how many verdicts [Q][G] of a batch failed, and why.

        Raises:
            TrainingStopped: if, for one class of verifier with at least `ENOUGH` verdicts, more
                than half of the batch's failed, or all those of the last batches.
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
