"""Verifier that is a function of the user's."""

import importlib
from collections.abc import Callable as Function
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

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
        imported(self.function, _OWNER)

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """The function's verdict; of a bare reward, one without an answer."""
        result = imported(self.function, _OWNER)(prompt, response)
        return Verdict(reward=float(result)) if isinstance(result, int | float) else result


_OWNER = "Callable(function={!r})"


@lru_cache
def imported(name: str, owner: str) -> Function[..., Any]:
    """The function or class `module:name`.

    Args:
        name: as that.
        owner: who names it, for errors, with {!r} in the place of the name.

    Raises:
        ValueError: if there is none.
    """
    module, _, attribute = name.partition(":")
    told = f"`{owner.format(name)}`"
    if not module or not attribute:
        raise ValueError(f"{told} must read `module:function`, got {name!r}")
    try:
        function: Any = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{told}: {error}; the module must stand in the folder in which the command runs, or "
            "on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ValueError(f"{told} must name a function, got {function!r}")
    return function
