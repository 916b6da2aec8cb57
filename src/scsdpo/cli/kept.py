"""What a class keeps of another that stood in its place in an earlier file.

jsonargparse carries arguments of the same name over, wherever a class is swapped.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from scsdpo.cli.front import read_config

Tree = Mapping[str, Any]
_ABSENT = object()


def kept(args: Sequence[str], config: Tree) -> list[str]:
    """Keys of the arguments that were set for a class which a later file or option has replaced.

    Args:
        args: of the command, files first.
        config: what was parsed of them.
    """
    layers = list(_layers(args))
    return list(_kept(layers, config, ()))


def _layers(args: Sequence[str]) -> Iterator[Tree]:
    """What each file and option says, the later ones over the earlier ones."""
    for arg, after in pairwise([*args, ""]):
        flag, given, value = arg.partition("=")
        text = value if given else after
        if flag in ("-c", "--config") and "://" not in text:
            yield read_config(Path(text))
        elif flag.startswith("--") and not flag.endswith("+"):
            said: Any = yaml.safe_load(text) if text[:1] in "{[" and text else text
            for name in reversed(flag[2:].split(".")):
                said = {name: said}
            yield said


def _kept(layers: Sequence[Tree], node: Any, key: tuple[str, ...]) -> Iterator[str]:
    if not isinstance(node, Mapping):
        return
    given = node.get("init_args") if "class_path" in node else node
    swapped = _swapped(layers, key) if "class_path" in node else 0
    for name, value in (given or {}).items():
        inner = (*key, name)
        said = [(place, _at(layer, inner)) for place, layer in enumerate(layers)]
        places = [(place, each) for place, each in said if each is not _ABSENT]
        if places and places[-1][0] < swapped and _agree(places[-1][1], value):
            yield ".".join(inner)
        else:
            yield from _kept(layers, value, inner)


def _swapped(layers: Sequence[Tree], key: tuple[str, ...]) -> int:
    """The last layer that names another class at `key` than those before; 0: none does."""
    last, before = 0, ""
    for place, layer in enumerate(layers):
        name = _class(_at(layer, key))
        if name and before and name != before:
            last = place
        before = name or before
    return last


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
