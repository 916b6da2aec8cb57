"""`python -m scsdpo.cli.cataloging` writes `catalog.json` from the parser."""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import import_module
from typing import Any
from unittest.mock import patch

import docstring_parser
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from scsdpo.cli.catalog import FILE, Argument, Catalog, Command, Described
from scsdpo.cli.commands import COMMANDS, module
from scsdpo.cli.config_types import arguments, classes, concrete, spell
from scsdpo.cli.lightning_cli import CLI, run_cli
from scsdpo.cli.parser import SECTIONS
from scsdpo.private.jsonargparse import options_of

_KEYS = {
    "config": "YAML with keys such as `model:`; of several files the later ones win",
    "print_config": "print the whole configuration instead of running it",
    "seed_everything": "the run's seed: order of the questions, draws, adapters",
    "ckpt_path": "a checkpoint, or `last`: fit resumes from it, others take its policy only",
    "weights_only": "as in `torch.load`",
}
"""Help texts of keys that belong to no section, where Lightning's own say less."""


def build() -> Catalog:
    """Build the catalog from the installed packages."""
    parsers = _parsers()
    fit = parsers["fit"]
    found: dict[str, Described] = {}
    for section, kind in SECTIONS.items():
        own = _arguments(kind, fit, f"{section}.")
        found[_path(kind)] = Described(doc=_doc(kind), arguments=own, choices=(_path(kind),))
        _describe(arguments(kind).values(), found)
    return Catalog(
        commands={name: _command(name, parsers.get(name)) for name in COMMANDS},
        sections={section: _path(kind) for section, kind in SECTIONS.items()},
        classes=dict(sorted(found.items())),
    )


class _Built(Exception):
    """Raised to leave LightningCLI once the parsers are built; no error."""


class _Parsers(CLI):
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        raise _Built(self.subcommand_parsers())


def _parsers() -> dict[str, LightningArgumentParser]:
    with patch.object(sys, "argv", ["scsdpo"]):
        try:
            run_cli(_Parsers)
        except _Built as built:
            return built.args[0]
    raise AssertionError("LightningCLI did not parse")


def _describe(hints: Any, found: dict[str, Described]) -> None:
    """Add to `found` the classes that types name, their concrete subclasses, and so on."""
    for kind in (kind for hint in hints for kind in classes(hint)):
        if _path(kind) in found:
            continue
        homes = {"scsdpo", kind.__module__.split(".")[0]}  # packages that belong into the catalog
        known = [one for one in concrete([kind]) if one.__module__.split(".")[0] in homes]
        ours = [one for one in known if _is_ours(one) or one is not kind]
        found[_path(kind)] = Described(
            doc=_doc(kind), arguments={}, choices=tuple(sorted(map(_path, ours)))
        )
        for one in (one for one in ours if _is_ours(one)):
            parser = LightningArgumentParser()
            parser.add_class_arguments(one)
            mine = found.get(_path(one))
            found[_path(one)] = Described(
                doc=_doc(one),
                arguments=_arguments(one, parser, ""),
                choices=mine.choices if mine else (_path(one),),
            )
            _describe(arguments(one).values(), found)


def _arguments(kind: type, parser: LightningArgumentParser, prefix: str) -> dict[str, Argument]:
    """Arguments of a class that a parser takes under a prefix."""
    actions = {action.dest: action for action in options_of(parser)}
    defaults, said = parser.get_defaults(), _said(kind)
    found = {}
    for name, hint in arguments(kind).items():
        action = actions.get(prefix + name)
        if action is None:
            continue
        needed = action.default is None and _is_needed(kind, name)
        found[name] = Argument(
            type=spell(hint),
            default=None if needed else _plain(defaults.get(prefix + name)),
            needed=needed,
            help=said.get(name, ""),
            kinds=tuple(_path(one) for one in classes(hint)),
        )
    return found


def _command(name: str, parser: LightningArgumentParser | None) -> Command:
    """The entry of a command; of one that Lightning knows, the keys of its parser too."""
    keys = {} if parser is None else dict(_keys(parser))
    if name == "fit":
        return Command(about="Train a policy.", like="", options=keys)
    own = import_module(module(name)).options()
    like = "" if parser else own.get_default("like") or ""
    about = " ".join(own.description.split())
    return Command(about=about, like=like, options={**dict(_options(own)), **keys})


def _keys(parser: LightningArgumentParser) -> Iterator[tuple[str, Argument]]:
    for action in options_of(parser):
        if action.dest != "help" and action.dest.split(".")[0] not in SECTIONS:
            suppressed = action.default == argparse.SUPPRESS
            yield (
                action.dest,
                Argument(
                    type="FILE" if action.dest == "config" else "",
                    default=None if suppressed else _plain(action.default),
                    needed=False,
                    help=_KEYS.get(action.dest) or _sentence(action.help or "", whole=False),
                    kinds=(),
                ),
            )


def _options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, Argument]]:
    for action in options_of(parser):
        if action.dest == "help":
            continue
        values = "|".join(map(str, action.choices)) if action.choices else ""
        kind = "" if action.nargs == 0 else action.metavar or values or action.dest.upper()
        name = action.option_strings[-1].removeprefix("--") if action.option_strings else str(kind)
        yield (
            name,
            Argument(
                type=str(kind),
                default=_plain(action.default) or None,
                needed=action.required,
                help=action.help or "",
                kinds=(),
            ),
        )


def _is_ours(kind: type) -> bool:
    return kind.__module__.startswith("scsdpo.")


def _path(kind: type) -> str:
    """The import path that a printed configuration shows."""
    modules = kind.__module__.split(".")
    return ".".join([*(modules[:2] if _is_ours(kind) else modules), kind.__qualname__])


def _doc(kind: type) -> str:
    doc = inspect.getdoc(kind) or ""
    return doc if _is_ours(kind) else _sentence(doc, whole=False)


def _said(kind: type) -> Mapping[str, str]:
    """Help text of each argument, from the docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        for doc in (base.__doc__, vars(base).get("__init__", kind).__doc__):
            params = docstring_parser.parse(doc or "").params
            found |= {
                p.arg_name: _sentence(p.description, whole=_is_ours(base))
                for p in params
                if p.description
            }
    return found


def _sentence(text: str, *, whole: bool) -> str:
    """`text` in one line: all of it if `whole`, else its first sentence."""
    text = " ".join(text.split())
    if whole:
        return text
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    text = re.split(r"(?<=[.!?])(?:\s|(?=[A-Z]))|\.\.\s| Default:| Example:", text)[0]
    return text.removesuffix(".") + "." if text else ""


def _is_needed(kind: type, name: str) -> bool:
    parameter = inspect.signature(kind).parameters.get(name)
    return parameter is not None and parameter.default is parameter.empty


def _plain(value: Any) -> Any:
    """`value` made of dictionaries, lists, numbers and strings, as YAML holds it."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    return json.loads(json.dumps(value, default=str))


if __name__ == "__main__":
    FILE.write_text(
        json.dumps(asdict(build()), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
