"""The arguments that the parser takes, read from a file: help and checks need not build the parser.

`scsdpo.cli.cataloging` makes `catalog.json` from the parser; a test checks that it is current.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("catalog.json")


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One argument of a class, or one option of a command."""

    type: str
    """The type in words, as `spell` writes it."""
    default: Any
    """The default value as YAML holds it."""
    needed: bool
    """The argument has no default."""
    help: str
    kinds: tuple[str, ...]
    """Import paths of the classes whose objects the argument takes."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """A class that a configuration may name."""

    doc: str
    """Its docstring; the first line of one that is not ours."""
    arguments: Mapping[str, Argument]
    choices: tuple[str, ...]
    """Import paths of its concrete subclasses; its own path is among them if it is concrete."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of `scsdpo`."""

    about: str
    like: str
    """Name of the command whose keys it takes too; empty: none."""
    options: Mapping[str, Argument]
    """Its own options by name; a name in capitals is a positional argument."""


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Everything that a command line may say."""

    commands: Mapping[str, Command]
    sections: Mapping[str, str]
    """Import path of the class of each section."""
    classes: Mapping[str, Described]

    def options(self, command: str) -> dict[str, Argument]:
        """Options of a command that belong to no section."""
        one = self.commands[command]
        return {**(self.options(one.like) if one.like else {}), **one.options}

    def has_sections(self, command: str) -> bool:
        """True if the command takes `--model...`, `--data...` and so on."""
        return "config" in self.options(command)

    def section_arguments(self) -> dict[str, Mapping[str, Argument]]:
        """The arguments of each section."""
        return {name: self.classes[path].arguments for name, path in self.sections.items()}


@cache
def catalog() -> Catalog:
    """The catalog that ships with the package."""
    return read(json.loads(FILE.read_text(encoding="utf-8")))


def read(content: Mapping[str, Any]) -> Catalog:
    """Build a catalog from the dictionary that `dataclasses.asdict` made of one."""
    return Catalog(
        commands={
            name: Command(**one | {"options": _arguments(one["options"])})
            for name, one in content["commands"].items()
        },
        sections=content["sections"],
        classes={
            path: Described(
                doc=one["doc"],
                arguments=_arguments(one["arguments"]),
                choices=tuple(one["choices"]),
            )
            for path, one in content["classes"].items()
        },
    )


def _arguments(content: Mapping[str, Any]) -> dict[str, Argument]:
    return {name: Argument(**one | {"kinds": tuple(one["kinds"])}) for name, one in content.items()}
