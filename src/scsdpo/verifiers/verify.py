"""From response texts to verdicts, in this very process."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence

from scsdpo.errors import ConfigurationError
from scsdpo.prompt import Prompt, Verdict, Verifier

_log = logging.getLogger(__name__)


def verify_all(
    prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]
) -> tuple[tuple[Verdict, ...], ...]:
    """Verdicts [Q][G] on the responses `texts` [Q][G] to `prompts` [Q].

    A verifier that raises, exits or returns something else than a verdict with a finite reward
    costs its own rollout only: reward 0, and the reason in `error`. One that hangs, hangs:
    `VerifierPool` has deadlines.
    """
    prepare_all(prompt.verifier for prompt in prompts)
    return tuple(
        tuple(contained(prompt, text) for text in group)
        for prompt, group in zip(prompts, texts, strict=True)
    )


def contained(prompt: Prompt, response: str) -> Verdict:
    """The verdict, or one with an `error` if the verifier did not give any."""
    name = type(prompt.verifier).__name__
    try:
        verdict = prompt.verifier.verify(prompt, response)
        if _is_sound(verdict):
            return verdict
        return Verdict(reward=0.0, error=f"{name} returned {verdict!r}"[:500])
    except (Exception, SystemExit) as error:
        return Verdict(reward=0.0, error=f"{name}: {error!r}"[:500])


def _is_sound(verdict: object) -> bool:
    return (
        isinstance(verdict, Verdict)
        and isinstance(verdict.reward, int | float)
        and math.isfinite(verdict.reward)
        and isinstance(verdict.answer, str | None)
        and isinstance(verdict.feedback, str)
        and isinstance(verdict.error, str)
    )


def prepare_all(verifiers: Iterable[Verifier]) -> None:
    """`prepare` each kind of verifier once.

    Raises:
        ConfigurationError: if one cannot.
    """
    for verifier in {id(verifier): verifier for verifier in verifiers}.values():
        try:
            verifier.prepare()
        except Exception as error:
            raise ConfigurationError(f"{type(verifier).__name__} cannot work: {error}") from error


def report_errors(verdicts: Sequence[Sequence[Verdict]]) -> None:
    """Log, in one line, how many verdicts are none and why: their reward of 0 says nothing."""
    errors = Counter(verdict.error for group in verdicts for verdict in group if verdict.error)
    if errors:
        reasons = "; ".join(f"{count} x {why}" for why, count in errors.most_common(3))
        total = sum(map(len, verdicts))
        _log.warning("%d of %d verdicts failed: %s", errors.total(), total, reasons)
