"""From response texts to verdicts."""

import math
from collections.abc import Sequence

from scsdpo.types import Prompt, Verdict


def verify_all(
    prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]
) -> tuple[tuple[Verdict, ...], ...]:
    """Verdicts [Q][G] on the responses `texts` [Q][G] to `prompts` [Q].

    A verifier that raises, exits or returns something else than a verdict with a finite reward
    costs its own rollout only: reward 0, and the reason in `error`.
    """
    return tuple(
        tuple(_contained(prompt, text) for text in group)
        for prompt, group in zip(prompts, texts, strict=True)
    )


def _contained(prompt: Prompt, response: str) -> Verdict:
    name = type(prompt.verifier).__name__
    try:
        verdict = prompt.verifier.verify(prompt, response)
        if isinstance(verdict, Verdict) and math.isfinite(verdict.reward):
            return verdict
    except (Exception, SystemExit) as error:
        return Verdict(reward=0.0, error=f"{name}: {error!r}")
    return Verdict(reward=0.0, error=f"{name} returned {verdict!r}")
