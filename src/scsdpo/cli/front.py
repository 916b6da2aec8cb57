"""Find mistakes in files, YAML and section names within a second. Imports nothing heavy."""

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from scsdpo.cli.catalog import catalog
from scsdpo.cli.other_words import our_key
from scsdpo.errors import ConfigurationError


def check(command: str, args: Sequence[str]) -> None:
    """Check the configuration files, their sections, and those of the options.

    Args:
        command: a command that takes no configuration is not checked.
        args: the rest of the command line.

    Raises:
        ConfigurationError: for the first mistake.
    """
    if not _takes_configuration(command):
        return
    known = catalog()
    sections, others = known.section_arguments(), known.options(command)
    for path in configuration_files(args):
        for key, value in read_config(path).items():
            if key not in sections and key not in others:
                key = ".".join([str(key), *_first_keys(value)])
                raise ConfigurationError(f"{no_such_key(key, sections, others)} (in {path})")
            if key in sections and not isinstance(value, dict | str):
                raise ConfigurationError(f"{key}: {_no_keys(key, value)} (in {path})")
    for arg in args:
        section, _, part = arg.removeprefix("--").partition("=")
        if section in sections and Path(part).is_file():  # a file of one section
            read_config(Path(part))
        key = arg.removeprefix("--").split("=")[0].rstrip("+")
        if arg.startswith("--") and key.split(".")[0] not in {*sections, *others}:
            raise ConfigurationError(no_such_key(key, sections, others))


def in_order(command: str, args: Sequence[str]) -> list[str]:
    """`args` with the configuration files first, so that an option wins wherever it stands.

    Args:
        command: for a command that takes no configuration nothing is moved.
        args: the rest of the command line. Files keep their order, and so do options.
    """
    if not _takes_configuration(command):
        return [*args]
    files, options, left = list[str](), list[str](), list(args)
    while left:
        follows = left[0] in _CONFIG and len(left) > 1 and not left[1].startswith("-")
        take = 2 if follows else 1
        is_file = follows or left[0].startswith("--config=")
        (files if is_file else options).extend(left[:take])
        left = left[take:]
    return files + options


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a configuration file.

    Raises:
        ConfigurationError: if the file does not exist, is not YAML with keys, has a key twice, or a
            word or number in it does not mean what it looks like.
    """
    try:
        text = path.read_text(encoding="utf-8")
        loader = _Loader(text)
        node = loader.get_single_node()
        _check_node(path, node, "", {})
        content = None if node is None else loader.construct_document(node)
    except FileNotFoundError as error:
        raise ConfigurationError(f"config: {path} does not exist") from error
    except OSError as error:
        raise ConfigurationError(f"config: {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise ConfigurationError(f"{path}: not a text file") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        has_tab = bool(line and re.match(r"\s*\t", [*text.splitlines(), ""][line - 1]))
        remedy = "; indent with spaces and not with tabs" if has_tab else ""
        raise ConfigurationError(
            f"{path}, line {line or '?'}: not YAML: {error.problem}{remedy}"
        ) from error
    if content is None:
        raise ConfigurationError(f"{path}: is empty; it must hold keys such as `model:`")
    if not isinstance(content, dict):
        raise ConfigurationError(
            f"{path}: must hold keys such as `model:` and `data:`, got {content!r}"
        )
    return content


class _Loader(yaml.SafeLoader):
    """Reads numbers and dates as jsonargparse does: `1e-5` is a number, 2024-01-05 a string."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in each if not tag.endswith((":float", ":timestamp"))]
    for first, each in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_CONFIG = ("-c", "--config")
_TAG = "tag:yaml.org,2002:"
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(
        r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?$|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
        r"|\.[0-9_]+(?:[eE][-+][0-9]+)?$|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+\.[0-9_]*$"
        r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _check_node(path: Path, node: Any, key: str, seen: dict[int, bool]) -> None:
    """Refuse what YAML 1.1 accepts silently and the user cannot have meant.

    Args:
        path: of the file.
        node: a part of it.
        key: dotted, of the part.
        seen: by id of a node, True once it is checked to its end. An alias has its anchor's node.
    """
    if node is None or seen.get(id(node)):
        return
    if id(node) in seen:
        line = node.start_mark.line + 1
        raise ConfigurationError(
            f"{path}, line {line}: {key}: this YAML alias names a mapping that contains the alias; "
            "write the keys out instead"
        )
    seen[id(node)] = False
    if isinstance(node, yaml.ScalarNode):
        _check_number(path, node, key)
    elif isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            _check_node(path, item, f"{key}[{place}]", seen)
    else:
        lines: dict[str, int] = {}
        for name, value in node.value:
            inner = f"{key}.{name.value}" if key else str(name.value)
            line = name.start_mark.line + 1
            kind = name.tag.removeprefix(_TAG)
            # A mapping deeper inside may have numbers as keys.
            if kind in ("bool", "null") or (kind in ("int", "float") and inner.count(".") < 2):
                raise ConfigurationError(
                    f"{path}, line {line}: {inner}: YAML reads {name.value or 'an empty key'} as "
                    f"{kind}, where a name must stand; write it in quotes"
                )
            if inner in lines:
                raise ConfigurationError(
                    f"{path}, line {line}: {inner} is in line {lines[inner]} too; YAML keeps "
                    "the last one only: join them, or remove one"
                )
            lines[inner] = line
            _check_node(path, value, inner, seen)
    seen[id(node)] = True


def _check_number(path: Path, node: Any, key: str) -> None:
    """Refuse numbers that YAML reads otherwise: `010` is 8, and `12:30:00` is 45000."""
    text = node.value
    if node.tag not in (f"{_TAG}int", f"{_TAG}float"):
        return
    if ":" in text or _OCTAL.fullmatch(text):
        number = yaml.safe_load(text)
        raise ConfigurationError(
            f"{path}, line {node.start_mark.line + 1}: {key}: YAML reads {text} as {number}; write "
            f"that number, or the text in quotes"
        )


def _no_keys(section: str, value: Any) -> str:
    if value is None:
        return "is empty; give it keys, or leave it out (its keys in other files stay)"
    return f"must hold keys, such as `{section}: {{...}}`, got {value!r}"


def _takes_configuration(command: str) -> bool:
    known = catalog()
    return command in known.commands and known.has_sections(command)


def no_such_key(key: str, sections: Mapping[str, Collection[str]], others: Collection[str]) -> str:
    """The message on a key whose first part is no section.

    Args:
        key: dotted.
        sections: names of the arguments of each.
        others: keys beside the sections.
    """
    if ours := our_key(key.rpartition(".")[2]):
        return f"{key}: {ours}"
    top, _, rest = key.partition(".")
    homes = [f"{home}.{top}" for home, names in sections.items() if top in names]
    homes += [rest] if rest.partition(".")[0] in sections else []  # under a command's name
    hint = f"; did you mean `{homes[0]}`?" if homes else did_you_mean(top, [*sections, *others])
    return f"{key}: no such key{hint}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with the closest of `known`; '': none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def configuration_files(args: Sequence[str]) -> list[Path]:
    """The configuration files on this machine that a command line names, in its order."""
    names = [
        arg.removeprefix("--config=") if arg.startswith("--config=") else after
        for arg, after in pairwise([*args, ""])
        if arg in _CONFIG or arg.startswith("--config=")
    ]
    return [Path(name) for name in names if name and "://" not in name]


def _first_keys(value: Any) -> Iterator[str]:
    """The keys on the way down to the first plain value."""
    while isinstance(value, dict) and value:
        key, value = next(iter(value.items()))
        yield str(key)
