"""Private names of jsonargparse, and of argparse, on which its parser is built."""

from argparse import Action, ArgumentParser
from collections.abc import Sequence

from jsonargparse._util import resolved_import_paths

CHECKED = ">=4.53,<4.54"


def spell_as(thing: object, path: str) -> None:
    """Have configurations name a class by this path; by itself it writes the shortest one."""
    resolved_import_paths.add(thing, path)


def options_of(parser: ArgumentParser) -> Sequence[Action]:
    """The options that a parser knows, in order; no public function lists them."""
    return parser._actions
