"""Mistakes that can be said at once: files, YAML, sections. Imports nothing heavy."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from scsdpo.cli.catalog import catalog
from scsdpo.errors import ConfigurationError


def check(command: str, args: Sequence[str]) -> None:
    """Check the configuration files, their sections, and those of the options.

    Args:
        command: one that does not take a configuration is not checked.
        args: what follows it.

    Raises:
        ConfigurationError: for the first mistake.
    """
    known = catalog()
    if command not in known.commands or not known.has_sections(command):
        return
    sections, others = known.section_arguments(), known.options(command)
    for path in _files(args):
        for key, value in read_config(path).items():
            if key not in sections and key not in others:
                key = ".".join([str(key), *_first_keys(value)])
                raise ConfigurationError(f"{no_such_key(key, sections, others)} (in {path})")
    for arg in args:
        key = arg.removeprefix("--").split("=")[0].rstrip("+")
        if arg.startswith("--") and key.split(".")[0] not in {*sections, *others}:
            raise ConfigurationError(no_such_key(key, sections, others))


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a configuration file.

    Raises:
        ConfigurationError: if there is none, or it is not YAML with keys.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigurationError(f"config: {path} does not exist") from error
    except OSError as error:
        raise ConfigurationError(f"config: {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise ConfigurationError(f"{path}: not a text file") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigurationError(f"{path}, line {line}: not YAML: {error.problem}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"{path}: must hold keys such as `model:` and `data:`, got {content!r}"
        )
    return content


def no_such_key(key: str, sections: Mapping[str, Collection[str]], others: Collection[str]) -> str:
    """What to say of a key whose first part is no section.

    Args:
        key: dotted.
        sections: names of the arguments of each.
        others: keys beside the sections.
    """
    top, _, rest = key.partition(".")
    homes = [f"{home}.{top}" for home, names in sections.items() if top in names]
    homes += [rest] if rest.partition(".")[0] in sections else []  # under a command's name
    hint = f"; did you mean `{homes[0]}`?" if homes else did_you_mean(top, [*sections, *others])
    return f"{key}: no such key{hint}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _files(args: Sequence[str]) -> list[Path]:
    """The configuration files on this machine that a command line names."""
    after = [value for flag, value in pairwise(args) if flag in ("-c", "--config")]
    named = [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
    return [Path(name) for name in (*after, *named) if "://" not in name]


def _first_keys(value: Any) -> Iterator[str]:
    """The way down to the first plain value."""
    while isinstance(value, dict) and value:
        key, value = next(iter(value.items()))
        yield str(key)
