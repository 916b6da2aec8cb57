"""What a class keeps of another that stood in its place in an earlier file.

jsonargparse carries arguments of the same name over, wherever a class is swapped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from scsdpo.cli.front import read_config

Tree = Mapping[str, Any]
_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """An argument that was set for a class which a later file or option has replaced."""

    key: str
    value: Any
    origin: str
    """The file, or `the command line`."""
    owner: str
    """The key of the class."""
    before: str
    now: str

    def __str__(self) -> str:
        value = _class(self.value) if isinstance(self.value, Mapping) else repr(self.value)
        return (
            f"{self.key}: still {value}, which {self.origin} sets for {self.before}; "
            f"{self.owner} is now {self.now}. Set {self.key} too if that is not meant"
        )


def kept(args: Sequence[str], config: Tree) -> list[Leftover]:
    """The arguments that are left of replaced classes.

    Args:
        args: of the command, files first.
        config: what was parsed of them.
    """
    layers, origins = [], []
    for origin, layer in _layers(args):
        layers.append(layer)
        origins.append(origin)
    return list(_kept(layers, origins, config, ()))


def _layers(args: Sequence[str]) -> Iterator[tuple[str, Tree]]:
    """What each file and option says, with its origin; the later ones over the earlier ones."""
    for arg, after in pairwise([*args, ""]):
        flag, given, value = arg.partition("=")
        text = value if given else after
        if flag in ("-c", "--config") and "://" not in text:
            yield text, read_config(Path(text))
        elif flag.startswith("--") and not flag.endswith("+"):
            said: Any = yaml.safe_load(text) if text[:1] in "{[" and text else text
            for name in reversed(flag[2:].split(".")):
                said = {name: said}
            yield "the command line", said


def _kept(
    layers: Sequence[Tree], origins: Sequence[str], node: Any, key: tuple[str, ...]
) -> Iterator[Leftover]:
    if not isinstance(node, Mapping):
        return
    given = node.get("init_args") if "class_path" in node else node
    swapped, before = _swapped(layers, key) if "class_path" in node else (0, "")
    for name, value in (given or {}).items():
        inner = (*key, name)
        said = [(place, _at(layer, inner)) for place, layer in enumerate(layers)]
        places = [(place, each) for place, each in said if each is not _ABSENT]
        if places and places[-1][0] < swapped and _agree(places[-1][1], value):
            yield Leftover(
                key=".".join(inner),
                value=value,
                origin=origins[places[-1][0]],
                owner=".".join(key),
                before=before,
                now=_class(node),
            )
        else:
            yield from _kept(layers, origins, value, inner)


def _swapped(layers: Sequence[Tree], key: tuple[str, ...]) -> tuple[int, str]:
    """The last layer that names another class at `key` than those before, and the one before;
    0: none does.
    """
    last, replaced, before = 0, "", ""
    for place, layer in enumerate(layers):
        name = _class(_at(layer, key))
        if name and before and name != before:
            last, replaced = place, before
        before = name or before
    return last, replaced


def _at(tree: Any, key: Sequence[str]) -> Any:
    """What a layer says at a key; arguments stand below `init_args` or, by option, beside it."""
    for name in key:
        if not isinstance(tree, Mapping):
            return _ABSENT
        inner = tree.get("init_args")
        if isinstance(inner, Mapping) and name in inner:
            tree = inner[name]
        else:
            tree = tree.get(name, _ABSENT)
    return tree


def _class(said: Any) -> str:
    """Last part of the class's path; '' if none is named."""
    path = said.get("class_path", "") if isinstance(said, Mapping) else said
    return path.rpartition(".")[2] if isinstance(path, str) else ""


def _agree(said: Any, value: Any) -> bool:
    """Whether what was said is what is there, as far as a text shows it."""
    if isinstance(value, Mapping):
        return not _class(said) or _class(said) == _class(value)
    return isinstance(value, list) or str(said) == str(value) or said == value
