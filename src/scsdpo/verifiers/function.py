"""A verifier that calls a function of the user."""

import importlib
from collections.abc import Callable as Function
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from scsdpo.prompt import Prompt, Verdict, Verifier


@dataclass(frozen=True, kw_only=True)
class Callable(Verifier):
    """Calls a function: `function(prompt, response)` returns a `Verdict` or a reward.

    Args:
        function: `module:function`; the module is in the folder in which the command runs, or on
            the import path.
        strip_thinking: give the function only the text after the thinking (see `Verifier`); False:
            the whole response.

    Raises:
        ValueError: if there is no such function.
    """

    reads_json: ClassVar[bool] = True
    function: str
    strip_thinking: bool = True

    def __post_init__(self) -> None:
        imported(self.function, _OWNER)

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """The function's verdict; a bare reward becomes a verdict without an answer."""
        result = imported(self.function, _OWNER)(prompt, response)
        return Verdict(reward=float(result)) if isinstance(result, int | float) else result


_OWNER = "Callable(function={!r})"


@lru_cache
def imported(name: str, owner: str) -> Function[..., Any]:
    """The function or class `module:name`.

    Args:
        name: `module:name`.
        owner: the argument that names it, for errors, with {!r} in the place of the name.

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
            f"{told}: {error}; the module must be in the folder in which the command runs, or "
            "on PYTHONPATH"
        ) from error
    if not callable(function):
        raise ValueError(f"{told} must name a function, got {function!r}")
    return function
