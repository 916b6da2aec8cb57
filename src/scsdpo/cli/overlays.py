"""Values that an earlier configuration file leaves behind when a later one is laid over it.

jsonargparse carries arguments of the same name over, wherever a class is swapped. A method file
replaces the learning rate of the base file.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from scsdpo.cli.front import configuration_files, read_config

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
            f"{self.key}: keeps the value {value}, which {self.origin} sets for {self.before}, "
            f"although {self.owner} is now {self.now}. To change it, set {self.key} too"
        )


def kept(args: Sequence[str], config: Tree) -> list[Leftover]:
    """The arguments that are left of replaced classes.

    Args:
        args: of the command, files first.
        config: the configuration that was parsed of them.
    """
    layers, origins = [], []
    for origin, layer in _layers(args):
        layers.append(layer)
        origins.append(origin)
    return list(_kept(layers, origins, config, ()))


def _layers(args: Sequence[str]) -> Iterator[tuple[str, Tree]]:
    """Yield the tree of each file and option with its origin; later ones win."""
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
    """A layer's value at a key; arguments are below `init_args` or, in an option, beside it."""
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
    """Last part of the class's path; '': no class is named."""
    path = said.get("class_path", "") if isinstance(said, Mapping) else said
    return path.rpartition(".")[2] if isinstance(path, str) else ""


def _agree(said: Any, value: Any) -> bool:
    """True if a layer's value is that of the configuration, as far as its text shows."""
    if isinstance(value, Mapping):
        return not _class(said) or _class(said) == _class(value)
    return isinstance(value, list) or str(said) == str(value) or said == value


def replaced_rate(args: Sequence[str], now: object) -> str:
    """One line that names the learning rate in use and the one it replaced; '': none was replaced.

    A method file carries the rate of its paper, which suits the paper's model: over a base file of
    another model the user should know.

    Args:
        args: of the command line, with the configuration files in order.
        now: `model.optimizer.init_args.lr` in use. If an option set it, nothing is said.
    """
    rates = [(path, rate) for path in configuration_files(args) if (rate := _rate(path))]
    if len(rates) < 2 or rates[-1][1] != now:
        return ""
    (*_, (below, before), (above, after)) = rates
    if before == after:
        return ""
    return (
        f"model.optimizer.lr: {after:g} from {above} replaces {before:g} from {below}. It may be "
        f"meant for another model; to keep {before:g}, add --model.optimizer.lr={before:g}"
    )


def _rate(path: Path) -> float:
    """The learning rate that a file states; 0: none."""
    inside: Any = read_config(path)
    for key in ("model", "optimizer", "init_args", "lr"):
        inside = inside.get(key) if isinstance(inside, dict) else None
    return float(inside) if isinstance(inside, int | float) else 0.0
