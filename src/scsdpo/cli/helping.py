"""Help from the catalog, within a second: `--help [KEY]`, `--KEY.help`, `--KEY.help=NAME`."""

import json
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from scsdpo.cli.catalog import Argument, Catalog, catalog
from scsdpo.cli.front import did_you_mean, no_such_key
from scsdpo.errors import ConfigurationError

_WIDTH = 100
_FEW = {
    "trainer": (
        *("max_epochs", "max_steps", "limit_train_batches", "accelerator", "devices", "strategy"),
        *("precision", "logger", "callbacks", "val_check_interval", "num_sanity_val_steps"),
        *("default_root_dir",),
    ),
    "checkpoint": ("every_minutes", "monitor", "mode", "save_top_k", "dirpath"),
}
"""Keys that `--help` shows of sections that are mostly Lightning's."""

_HINTS = """\
  scsdpo {command} --help model.sampling            all of a section, of a part of it, or of a key
  scsdpo {command} --model.weighting.help           the strategies that a key can name
  scsdpo {command} --model.weighting.help=PassRate  formula, arguments and source of one
  scsdpo {command} ... --print_config               the whole configuration; nothing is run"""


def help_for(command: str, args: Sequence[str]) -> str | None:
    """The help that a command line asks for; None: it asks for none, or for an unknown class.

    Raises:
        ConfigurationError: if there is no such key or class.
    """
    known = catalog()
    if command not in known.commands:
        return None
    for arg, after in pairwise([*args, "-"]):
        flag, given, value = arg.partition("=")
        topic = value if given else after if not after.startswith("-") else ""
        if flag in ("-h", "--help"):
            takes = known.has_sections(command)
            return on_key(known, topic) if topic and takes else on_command(known, command)
        if flag.startswith("--") and flag.endswith(".help") and known.has_sections(command):
            return on_class(known, flag[2:].removesuffix(".help"), topic)
    return None


def on_command(known: Catalog, command: str) -> str:
    """The text of `scsdpo COMMAND --help`."""
    one = known.commands[command]
    places = "".join(f" {name}" for name in one.options if name.isupper())
    keys = " [--config FILE ...] [--KEY=VALUE ...]" if known.has_sections(command) else ""
    options = " [--OPTION VALUE ...]" if one.options and not places and one.like else ""
    blocks = [
        f"usage: scsdpo {command}{places}{options or ''}{keys or ' [--OPTION VALUE ...]'}",
        textwrap.fill(one.about, _WIDTH),
        _rows(
            (_option(name, each), f"{each.help} (needed)" if each.needed else each.help)
            for name, each in one.options.items()
        ),
    ]
    if one.like:
        blocks.append(f"Everything else is as in `scsdpo {one.like}` (scsdpo {one.like} --help).")
    elif keys:
        for section, path in known.sections.items():
            arguments = known.classes[path].arguments
            few = _FEW.get(section)
            shown = {name: arguments[name] for name in few} if few else arguments
            rest = f" --help {section} shows all {len(arguments)}." if few else ""
            head = textwrap.fill(f"{section}: {_first_line(known, path)}{rest}", _WIDTH)
            brief = {name: _brief(one) for name, one in shown.items()}
            blocks.append(f"{head}\n\n{_keys(brief, section)}")
        blocks.append(f"More:\n\n{_HINTS.format(command=command)}")
    return "\n\n".join(blocks)


def on_key(known: Catalog, key: str) -> str:
    """The text of `--help KEY`: all keys of a section; for another key that of `--KEY.help`."""
    if key in known.sections:
        path = known.sections[key]
        return f"{_first_line(known, path)}\n\n{_keys(known.classes[path].arguments, key)}"
    return on_class(known, key, "") or ""


def on_class(known: Catalog, key: str, name: str) -> str | None:
    """The text of `--KEY.help=NAME`; without a name, the classes that the key can name."""
    argument = _argument(known, key)
    choices = {_name(path): path for path in _choices(known, argument)}
    if not name and len(choices) == 1 and next(iter(choices.values())) in argument.kinds:
        name = next(iter(choices))  # there is no choice
    if not name:
        return _on_argument(known, key, argument, sorted(choices.values()))
    path = name if name in choices.values() else choices.get(name, "")
    if not path and "." not in name:
        kinds = " or ".join(_name(kind) for kind in argument.kinds) or "class"
        listed = f" (choices: {', '.join(sorted(choices))})" if choices else ""
        raise ConfigurationError(
            f"{key}.help: {name} is not a known {kinds}{did_you_mean(name, choices)}{listed}"
        )
    if path not in known.classes:
        return None
    one = known.classes[path]
    if not one.arguments:
        return f"{one.doc}\n\n{path}, as {key}, takes no arguments."
    given = {name: _with_default(value, argument, name) for name, value in one.arguments.items()}
    return f"{one.doc}\n\n{path}, as {key}, takes:\n\n{_keys(given, f'--{key}')}"


def _with_default(inner: Argument, outer: Argument, name: str) -> Argument:
    """An argument of a class, with the default that the outer argument gives it."""
    defaults = outer.default if isinstance(outer.default, dict) else {}
    if "class_path" in defaults or name not in defaults:
        return inner
    return Argument(**vars(inner) | {"default": defaults[name]})


def _on_argument(known: Catalog, key: str, one: Argument, choices: Sequence[str]) -> str:
    state = "needed" if one.needed else f"default: {_value(one.default)}"
    head = textwrap.fill(f"{key}: {one.help} ({one.type}; {state})", _WIDTH)
    described = [path for path in choices if path in known.classes]
    others = sorted({path.rpartition(".")[2] for path in choices} - set(map(_name, described)))
    blocks = [head]
    if described:
        blocks.append(_rows((_name(path), _first_line(known, path)) for path in described))
    if others:
        listed = f"of torch and Lightning: {', '.join(others)}"
        blocks.append(textwrap.fill(listed, _WIDTH, initial_indent="  ", subsequent_indent=" " * 4))
    if choices:
        blocks.append(
            f"--{key}.help=NAME explains one. A class of your own goes by its import path."
        )
    return "\n\n".join(blocks)


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _first_line(known: Catalog, path: str) -> str:
    return known.classes[path].doc.split("\n")[0] or f"{path}."


def _choices(known: Catalog, argument: Argument) -> list[str]:
    return [path for kind in argument.kinds for path in known.classes[kind].choices]


def _argument(known: Catalog, key: str) -> Argument:
    """The argument at a dotted key; a strategy's arguments are those of all its classes."""
    top, *rest = key.split(".")
    if top not in known.sections:
        raise ConfigurationError(no_such_key(key, known.section_arguments(), ()))
    kinds: Iterable[str] = [known.sections[top]]
    place = top
    found = Argument(type="", default=None, needed=False, help="", kinds=tuple(kinds))
    for name in rest:
        paths = dict.fromkeys([*found.kinds, *_choices(known, found)])
        owners = [known.classes[path].arguments for path in paths if path in known.classes]
        named = [owner[name] for owner in owners if name in owner]
        if not named:
            hint = did_you_mean(name, {name for owner in owners for name in owner})
            raise ConfigurationError(f"{place}.{name}: no such key{hint}")
        kinds = dict.fromkeys(kind for one in named for kind in one.kinds)
        found = Argument(**vars(named[0]) | {"kinds": tuple(kinds)})
        place = f"{place}.{name}"
    return found


def _keys(arguments: Mapping[str, Argument], under: str) -> str:
    return _rows((f"{under}.{name}", _default(one), one.help) for name, one in arguments.items())


def _default(one: Argument) -> str:
    if one.needed:
        return "needed"
    value = _value(one.default)
    return value if len(value) <= 20 else one.type


def _value(default: Any) -> str:
    """A default in a few characters; an object is shown by its class."""
    if isinstance(default, dict) and "class_path" in default:
        return _name(default["class_path"])
    return default if isinstance(default, str) else json.dumps(default)


def _option(name: str, one: Argument) -> str:
    return name if name.isupper() else f"--{name} {one.type}".rstrip()


def _brief(one: Argument) -> Argument:
    """The argument with the first clause of its help; `--help KEY` shows the rest."""
    first = re.split(r"(?<=\.)\s|; ", one.help)[0]
    return Argument(**vars(one) | {"help": first})


def _rows(rows: Iterable[Sequence[str]]) -> str:
    """A table of left-aligned columns; the last one is wrapped."""
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)][:-1]
    lines = []
    for row in table:
        left = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        hang = " " * (sum(widths) + 2 * len(widths) + 2)
        room = max(_WIDTH - len(hang), 30)
        wrapped = textwrap.wrap(row[-1], room) or [""]
        lines.append(f"  {left}  {wrapped[0]}".rstrip())
        lines += [hang + line for line in wrapped[1:]]
    return "\n".join(lines)
