"""Gold answers that no response could meet, found before training."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning.pytorch.utilities import rank_zero_info

from scsdpo.types import Prompt
from scsdpo.verifiers.text import capped
from scsdpo.verifiers.verify import MAX_FEEDBACK, contained, prepare_all

SECONDS = 60.0
"""That the proofs of one source may take; then those that were proved are a sample of it."""
_SHOWN = 120


def refuse_unmet(name: str, prompts: Sequence[Prompt], where: Callable[[int], str]) -> None:
    """Prove of each gold answer that a response could be right, by a response that gives it.

    Each is written in the form that its verifier asks for (`Verifier.written`), and judged. They
    are proved in an order that a seed fixes: what is left after `SECONDS` is a sample, and a line
    says how large it was.

    Args:
        name: of the source.
        prompts: its questions.
        where: what the prompt at an index is called in errors.

    Raises:
        ValueError: if there are any that no response could meet; with the place of the first of
            those that were found, and the reason.
    """
    end = time.monotonic() + SECONDS
    order = random.Random(0).sample(range(len(prompts)), len(prompts))
    unmet: dict[int, ValueError] = {}
    for proved, index in enumerate(order):
        if time.monotonic() > end:
            rank_zero_info(
                f"{name}: of {len(prompts)} gold answers {proved} were proved to be within reach "
                f"in {SECONDS:g} s, a sample drawn with seed 0"
            )
            break
        try:
            _prove(prompts[index])
        except ValueError as error:
            unmet[index] = error
    if unmet:
        first = min(unmet)
        others = f" (and {len(unmet) - 1} more like it)" if len(unmet) > 1 else ""
        raise ValueError(
            f"{where(first)}: {unmet[first]}; no response could be right: mend the answer, or "
            f"remove the row{others}"
        ) from unmet[first]


def _prove(prompt: Prompt) -> None:
    """Raise a ValueError, with the reason, if no response could be right."""
    verifier, gold = prompt.verifier, repr(capped(prompt.answer, _SHOWN))
    verifier.check(prompt)
    response = verifier.written(prompt)
    if not response:
        return
    prepare_all([verifier])
    verdict = contained(replace(prompt, thinking=""), response, MAX_FEEDBACK)
    if verdict.error:
        raise ValueError(f"the gold answer {gold} cannot be judged: {verdict.error}")
    if verdict.reward <= 0:
        raise ValueError(
            f"the gold answer {gold} is judged wrong where a response gives it as "
            f"{capped(response, _SHOWN)!r}: {verdict.feedback or 'without a reason'}"
        )
