"""Find gold answers that no response could match, before training."""

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from weakref import WeakValueDictionary

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch.utils.data import get_worker_info

from scsdpo.data._base import CHECK_AHEAD, Source
from scsdpo.prompt import Environment
from scsdpo.types import Prompt
from scsdpo.verifiers.text import capped
from scsdpo.verifiers.verify import MAX_FEEDBACK, contained, prepare_all

SECONDS = 60.0
"""Time limit in seconds on the checks of one source; those made by then are a random sample."""
_SHOWN = 120
_prepared: WeakValueDictionary[int, Environment] = WeakValueDictionary()
"""Environments that are ready to judge in this process, by `id`."""
_warn = rank_zero_only(logging.getLogger(__name__).warning)


def refuse_unmet(name: str, prompts: Sequence[Prompt], where: Callable[[int], str]) -> None:
    """Check each gold answer by judging a response that gives it.

    The response has the form that the verifier asks for (`Verifier.written`). The order is random
    with a fixed seed; if time runs out after `SECONDS`, the answers checked so far are a sample,
    and a line says how many they were.

    Args:
        name: of the source.
        prompts: its questions.
        where: gives the name of the prompt at an index for errors.

    Raises:
        ValueError: if a gold answer is judged wrong or cannot be judged; names the first such
            prompt and the reason.
    """
    end = time.monotonic() + SECONDS
    order = random.Random(0).sample(range(len(prompts)), len(prompts))
    unmet: dict[int, ValueError] = {}
    for proved, index in enumerate(order):
        if time.monotonic() > end:
            rank_zero_info(
                f"{name}: the verifier checked {proved} of {len(prompts)} gold answers, a random "
                f"sample; the check stops after {SECONDS:g} s"
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
            f"{where(first)}: {unmet[first]}; correct this row's answer or tests, or remove the "
            f"row{others}"
        ) from unmet[first]


def within_reach(
    source: Source, prompts: Iterable[Prompt], *, log: bool = True
) -> Iterator[Prompt]:
    """The prompts of a stream in order, without those whose gold answer no response could match.

    Omitted prompts are counted; the 1st, 2nd, 4th, 8th, ... is logged. The first `CHECK_AHEAD` of a
    pass are checked.

    Args:
        source: the stream; one that checks its gold answers itself is passed through.
        prompts: its prompts, in some order.
        log: whether to log.

    Raises:
        ValueError: if every prompt was omitted.
    """
    if source.proves_golds or not source.sequential:
        yield from prompts
        return
    number, unmet = 0, 0
    for number, prompt in enumerate(prompts, start=1):
        try:
            if number <= CHECK_AHEAD:
                _prove(prompt)
        except ValueError as error:
            fault = error
            unmet += 1
            worker = get_worker_info()
            if log and unmet.bit_count() == 1 and (worker is None or worker.id == 0):
                _warn(
                    "%s: %d of %d prompts left out, because no response to them could be right. "
                    "The last: %s",
                    *(source.name, unmet, number, error),
                )
        else:
            yield prompt
    if unmet and unmet == number:
        raise ValueError(
            f"all {number} prompts of {source.name!r} were left out, because no response to them "
            f"could be right. The last: {fault}"
        )


def _prove(prompt: Prompt) -> None:
    """Raise a ValueError, with the reason, if no response could be right."""
    verifier, gold = prompt.verifier, repr(capped(prompt.answer, _SHOWN))
    verifier.check(prompt)
    response = verifier.written(prompt)
    if not response:
        return
    if _prepared.get(id(verifier)) is not verifier:
        prepare_all([verifier])
        _prepared[id(verifier)] = verifier
    bare = replace(prompt, thinking="") if prompt.thinking else prompt
    verdict = contained(bare, response, MAX_FEEDBACK)
    if verdict.error:
        raise ValueError(f"the gold answer {gold} cannot be judged: {verdict.error}")
    if verdict.reward <= 0:
        raise ValueError(
            f"the gold answer {gold} is judged wrong where a response gives it as "
            f"{capped(response, _SHOWN)!r}: {verdict.feedback or 'without a reason'}"
        )
