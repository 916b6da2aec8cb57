"""Verifier that is a function of the user's."""

import importlib
from collections.abc import Callable as Function
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from scsdpo.prompt import Prompt, Verdict, Verifier


@dataclass(frozen=True, kw_only=True)
class Callable(Verifier):
    """Whatever a function says: `function(prompt, response)` gives a `Verdict`, or a reward.

    Args:
        function: as `module:function`, with the module in the folder in which the command runs, or
            on the import path.
        strip_thinking: give the function only what stands behind the thinking, as `Verifier` says;
            False: all of the response.

    Raises:
        ValueError: if there is no such function.
    """

    reads_json: ClassVar[bool] = True
    function: str
    strip_thinking: bool = True

    def __post_init__(self) -> None:
        _found(self.function)

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """The function's verdict; of a bare reward, one without an answer."""
        result = _found(self.function)(prompt, response)
        return Verdict(reward=float(result)) if isinstance(result, int | float) else result


@lru_cache
def _found(name: str) -> Function[[Prompt, str], Verdict | float]:
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"`Callable(function=...)` must read `module:function`, got {name!r}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"`Callable(function={name!r})`: {error}; the module must stand in the folder in "
            "which the command runs, or on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ValueError(f"`Callable(function={name!r})` must name a function, got {function!r}")
    return function
