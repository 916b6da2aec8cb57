"""Private names of jsonargparse, and of argparse, from which its parser is derived."""

from argparse import Action, ArgumentParser
from collections.abc import Sequence
from typing import Any

from jsonargparse import _typehints
from jsonargparse._util import resolved_import_paths

CHECKED = ">=4.53,<4.54"


def spell_as(thing: object, path: str) -> None:
    """Let configurations name a class by this path; by default jsonargparse writes the shortest."""
    resolved_import_paths.add(thing, path)


def yields_names(library: str) -> None:
    """Let another class have a short name that a class of `library` has too.

    jsonargparse refuses a short name that several imported classes have, and imports depend on what
    is installed. The class of `library` is then named by its full path.
    """
    every = _typehints.get_all_subclass_paths

    def without(*args: Any, **kwargs: Any) -> list[str]:
        paths = every(*args, **kwargs)
        others = [path for path in paths if not path.startswith(f"{library}.")]
        taken = {path.rpartition(".")[2] for path in others}
        return [path for path in paths if path in others or path.rpartition(".")[2] not in taken]

    _typehints.get_all_subclass_paths = without


def options_of(parser: ArgumentParser) -> Sequence[Action]:
    """The options of a parser, in order; no public function lists them."""
    return parser._actions
