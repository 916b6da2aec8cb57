"""Types of a configuration: constructors' arguments, and the classes that may stand for them."""

import inspect
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning.fabric.utilities.exceptions import MisconfigurationException

from scsdpo.errors import MISTAKES, ConfigurationError

_CALL = re.compile(r"`(\w+)\((\w+)=\.\.\.\)`:? (.*)", re.DOTALL)
"""How a constructor begins what it says of an argument, for those who call it in Python."""


def arguments(kind: type) -> dict[str, Any]:
    """Name -> type of the arguments of `kind`'s constructor, and of those it passes to bases."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        hints = _hints(vars(base)["__init__"])
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        found = {p.name: hints.get(p.name, Any) for p in named} | found
        if all(p.kind != p.VAR_KEYWORD for p in parameters):
            break
    return found


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except NameError:  # an annotation that exists for type checkers only
        return {}


def argument(kind: Any, path: str) -> Any:
    """The type of a dotted argument of `kind`; `Any` where it is not known."""
    for name in path.split("."):
        kind = arguments(kind).get(name, Any) if isinstance(kind, type) else Any
    return kind


def classes(hint: Any) -> list[type]:
    """The classes whose objects a type hint asks for, also in a list or as a factory's result."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return []
    if origin is not None:
        found = [classes(each) for each in (inner[-1:] if origin in _MAPS else inner)]
        return list(dict.fromkeys(kind for each in found for kind in each))
    own = isinstance(hint, type) and hint.__module__ not in ("builtins", "pathlib", "typing")
    return [hint] if own else []


_MAPS = (dict, Mapping, Callable)
"""Types whose last argument is the value that they hold or return."""


def concrete(kinds: Sequence[type]) -> list[type]:
    """The public concrete classes among `kinds` and their known subclasses."""
    found, pending = [], list(kinds)
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if not inspect.isabstract(kind) and not kind.__name__.startswith("_"):
            found.append(kind)
    return list(dict.fromkeys(found))


def choices(kinds: Sequence[type]) -> list[str]:
    """Names of the public concrete classes among `kinds` and their known subclasses."""
    return sorted({kind.__name__ for kind in concrete(kinds)})


def spell(hint: Any) -> str:
    """A type in words, e.g. `float`, `one of first, shortest`, `list of Source or null`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        values = [
            value for each in inner if get_origin(each) is Literal for value in get_args(each)
        ]
        literal = [spell(Literal[tuple(dict.fromkeys(map(str, values)))])] if values else []
        others = [spell(each) for each in inner if get_origin(each) is not Literal]
        return " or ".join([*literal, *dict.fromkeys(others)])
    if origin in _MAPS:
        return spell(inner[-1]) if origin is Callable else "a mapping"
    if inner and isinstance(origin, type):
        return f"{origin.__name__.lower()} of {spell(inner[0])}"
    if hint in (None, types.NoneType):
        return "null"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def find(path: str) -> Any:
    """The object at an import path; None: its module is not imported."""
    module, _, name = path.rpartition(".")
    return vars(sys.modules[module]).get(name) if module in sys.modules else None


Node = tuple[str, type, Mapping[str, Any]]
"""Key, class and arguments of an object in a configuration."""


def objects(value: Any, hint: Any, key: str) -> Iterator[Node]:
    """The objects that a parsed configuration describes, inner ones first."""
    if isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from objects(item, hint, f"{key}[{place}]")
    if not isinstance(value, Mapping):
        return
    kind, given = next(iter(classes(hint)), None), value
    if "class_path" in value:
        kind, given = find(value["class_path"]), value.get("init_args") or {}
    hints = arguments(kind) if isinstance(kind, type) else {}
    for name, item in given.items():
        yield from objects(item, hints.get(name, Any), f"{key}.{name}")
    if isinstance(kind, type):
        yield key, kind, given


@dataclass
class Builder:
    """Constructs the configuration's objects; an error of a constructor names the object's key.

    Args:
        config: the parsed configuration of the command.
        sections: class of each top-level key.
        mistake: the last error, also a constructor's bug. jsonargparse swallows errors at an
            argument of several types, so they are kept here.

    Raises:
        ConfigurationError: if `config` holds a null where none is allowed, or a list or
            number where an object's keys belong; jsonargparse accepts both.
    """

    config: Mapping[str, Any]
    sections: Mapping[str, type]
    mistake: Exception | None = None

    def __post_init__(self) -> None:
        for key, kind, given in self._objects():
            for name in _wrong_nulls(kind, given):
                expected = spell(arguments(kind)[name])
                raise ConfigurationError(f"{key}.{name}: must be {expected}, got null")
            for name, value in given.items():
                hint = arguments(kind).get(name, Any)
                if isinstance(value, list | int | float) and _is_described(hint):
                    raise ConfigurationError(f"{key}.{name}: must be {spell(hint)}, got {value}")

    def _objects(self) -> Iterator[Node]:
        for section, root in self.sections.items():
            yield from objects(self.config.get(section), root, section)

    def __call__(self, kind: type, /, *args: Any, **given: Any) -> Any:
        # `kind` is positional-only, because a class may have an argument of that name.
        try:
            return kind(*args, **given)
        except ConfigurationError as error:  # it names its key already
            self.mistake = error
            raise
        except (*MISTAKES, MisconfigurationException) as error:
            self.mistake = ConfigurationError(_by_key(self._key(kind, given), kind, str(error)))
            raise self.mistake from error
        except Exception as error:
            self.mistake = error
            raise

    def _key(self, kind: type, given: Mapping[str, Any]) -> str:
        """The key of an object; of equal objects the first, which is constructed first."""
        found = [(key, described) for key, one, described in self._objects() if one is kind]
        same = [key for key, described in found if _agree(described, given)]
        return next(iter(same or [key for key, _ in found]), kind.__name__)


def _by_key(key: str, kind: type, said: str) -> str:
    """`said` with the key of the argument in the place of the Python call, if it names one."""
    match = _CALL.fullmatch(said)
    if match and match[1] == kind.__name__ and match[2] in arguments(kind):
        return f"{key}.{match[2]}: {match[3]}"
    return f"{key}: {said}"


def _agree(described: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """True if plain values are equal; nested objects are already constructed, so not compared."""
    plain = (bool, int, float, str)
    return all(given.get(k) == value for k, value in described.items() if isinstance(value, plain))


def _is_described(hint: Any) -> bool:
    """True if the hint takes an object only, which a configuration describes by its keys."""
    return isinstance(hint, type) and bool(classes(hint)) and not issubclass(hint, int | float)


def _wrong_nulls(kind: type, given: Mapping[str, Any]) -> list[str]:
    """Names of arguments that are null although neither their type nor their default allows it."""
    hints, parameters = arguments(kind), inspect.signature(kind).parameters
    nulls = [name for name, value in given.items() if value is None and name in hints]
    return [
        name
        for name in nulls
        if hints[name] is not Any
        and types.NoneType not in get_args(hints[name])
        and name in parameters
        and parameters[name].default is not None
    ]
