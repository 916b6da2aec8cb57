"""Private names of jsonargparse, and of argparse, on which its parser is built."""

from argparse import Action, ArgumentParser
from collections.abc import Sequence
from typing import Any

from jsonargparse import _typehints
from jsonargparse._util import resolved_import_paths

CHECKED = ">=4.53,<4.54"


def spell_as(thing: object, path: str) -> None:
    """Have configurations name a class by this path; by itself it writes the shortest one."""
    resolved_import_paths.add(thing, path)


def yields_names(library: str) -> None:
    """Let a class of `library` be named by its path alone where another has its short name.

    jsonargparse refuses a short name that several imported classes have, and what is imported
    depends on what is installed.
    """
    every = _typehints.get_all_subclass_paths

    def without(*args: Any, **kwargs: Any) -> list[str]:
        paths = every(*args, **kwargs)
        others = [path for path in paths if not path.startswith(f"{library}.")]
        taken = {path.rpartition(".")[2] for path in others}
        return [path for path in paths if path in others or path.rpartition(".")[2] not in taken]

    _typehints.get_all_subclass_paths = without


def options_of(parser: ArgumentParser) -> Sequence[Action]:
    """The options that a parser knows, in order; no public function lists them."""
    return parser._actions
