"""Turn jsonargparse's message on a mistake into one line that begins with the configuration key.

jsonargparse nests its messages: `Parser key "..."` and `Problem with given class_path '...'` lead
to the place, and the first line of another form says what is wrong there. A message without
these forms is shown as it is, in one line.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from scsdpo.cli.config_types import argument, arguments, choices, classes, find, spell
from scsdpo.cli.front import did_you_mean, no_such_key
from scsdpo.cli.other_words import our_key
from scsdpo.data import Records
from scsdpo.errors import first_line

Sections = Mapping[str, type]

_OTHER_KEYS = {"config": str, "seed_everything": bool | int, "ckpt_path": str, "print_config": str}
_MANY = 16
"""Lists of choices longer than this are not shown."""

_REMOVED = {
    ("Overlong", "cap"): (
        "remove it. The class now sees for each response whether it reached its length limit"
    ),
}
"""Removed arguments of version 0.1, by class, with what to write instead."""

_UNKNOWN = re.compile(r"unrecognized arguments: (\S+)|.*does not accept option '(.+)'$")
_REQUIRED = re.compile(r"the following arguments are required: (.+?)(?:\. Got value|$)")
_OPTION = re.compile(r"argument (?:\S+/)?--(\S+): (.+)")
_HELP = re.compile(r"--(\S+)\.help: .*?: (\S+)$")

_KEY = re.compile(r'Parser key "(.+?)"[^:]*:\s*(.*)')
_CLASS = re.compile(r"Problem with given class_path '(.+?)':")
_FACTORY = re.compile(r"Type .* expects a function or a callable class: (.*)")
_NOISE = re.compile(
    "Expected a path but|Does not validate|Subtypes:|Errors:|Unable to load config"
    r"|Not a valid subclass of \w+$|Subclass types expect|a class path \(str\)|a dict with"
)
"""Lines that do not say what is wrong; the second row speaks of one of several accepted forms."""

_NO_OPTION = re.compile(r"(?:Group '(.+)' does not accept option|Option) '(.+?)'")
_NO_CLASS = re.compile(
    r"Expected a dot import path string: (.+?)(?:\. Got|$)"
    r"|Import path (\S+) does not correspond"
    r"|Not a valid subclass of \S+ Got value: (.+)"
    r"|Expected an instantiatable class, but (\S+) is abstract"
)
_TAKEN = re.compile(r"Unable to add parameter '(.+?)' from <class '(.+?)'>")
_MANY_OF_A_NAME = re.compile(r"Multiple subclasses with name (\S+)\. .*?ambiguity: (.+?)\.?$")
_GOT = re.compile(
    r"(?:Got value:|Given value:|Unable to load config) '?(.*?)'?(?:\. Got value: .*)?$",
    re.MULTILINE,
)


def in_one_sentence(message: str, sections: Sections) -> str:
    """`message` in one line that begins with the key.

    Args:
        message: jsonargparse's.
        sections: class of each top-level key.
    """
    message = message.strip()
    if match := _UNKNOWN.match(message):
        said = _unknown_key(match[1] or match[2], sections)
    elif match := _REQUIRED.match(message):
        said = _missing(match[1].split(", "), sections)
    elif match := _HELP.match(message):
        hint = _expected(match[1], sections)
        said = f"{match[1]}.help: {match[2]} is not a known {_kinds(hint)}{_offer(hint, match[2])}"
    elif match := _OPTION.match(message):
        said = f"{match[1]}: {match[2]}"
    else:
        said = _fault(message, sections)
    return " ".join(said.split())


def _unknown_key(option: str, sections: Sections) -> str:
    key = option.lstrip("-").split("=")[0].rstrip("+")
    if not option.startswith("-") and "." not in option:
        return f"{option}: not an option; write options as --key=value"
    top, *rest = key.split(".")
    if top not in sections:
        named = {section: arguments(kind) for section, kind in sections.items()}
        return no_such_key(key, named, _OTHER_KEYS)
    where, kind = top, sections[top]
    for name in rest:
        if name not in arguments(kind):
            return _no_argument(where, name, kind)
        kind = next(iter(classes(arguments(kind)[name])), object)
        where = f"{where}.{name}"
    return f"{key}: no such key"


def _no_argument(where: str, name: str, kind: type, skip: int = 0) -> str:
    if name == "class_path" and where != "records":
        return f"{where}: write the arguments of a class under `init_args:`, beside `class_path:`"
    if instead := _REMOVED.get((kind.__name__, name)):
        return f"{where}.{name}: {kind.__name__} has no such argument any more: {instead}"
    known = list(arguments(kind))[skip:]
    hint = did_you_mean(name, known)
    if (ours := our_key(name)) and not ("." in where and hint):
        return f"{where}.{name}: {ours}"
    if "." not in where and where != "records":
        return f"{where}.{name}: no such key{hint.replace('`', f'`{where}.', 1)}"
    takes = f" (it takes: {', '.join(known) or 'none'})" if len(known) <= _MANY else ""
    if where == "records" and name in (*arguments(Records), "class_path"):
        hint = "; `records` sets what a run writes. To read questions, set `data.train: Records`"
        takes = ""
    return f"{where}.{name}: {kind.__name__} has no such argument{hint}{takes}"


def _missing(keys: Sequence[str], sections: Sections) -> str:
    """`keys` begin with the name of the command."""
    names = [key.partition(".")[2] for key in keys]
    if len(names) > 1:
        return f"{', '.join(names)}: not set; give a --config that sets them (configs/tiny.yaml)"
    return f"{names[0]}: not set{_offer(_expected(names[0], sections))}"


def _expected(key: str, sections: Sections) -> Any:
    """The type at a key; `Any`: not known."""
    top, _, rest = key.partition(".")
    known = {**_OTHER_KEYS, **sections}.get(top, Any)
    return argument(known, rest) if rest else known


@dataclass(frozen=True, kw_only=True)
class _Place:
    """The place to which a nested message leads."""

    key: str
    hint: Any
    """The type that is expected there."""
    owner: type
    """The innermost class on the way; `object`: none."""
    factory: bool
    """True if the code supplies the owner's first argument later, as an optimizer's parameters."""
    wrong: str
    """The line that says what is wrong."""


def _follow(message: str, sections: Sections) -> _Place:
    key, hint, owner, factory = "", Any, object, False
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if match := _FACTORY.match(line):
            path = re.search(r"class_path='(.+?)'", message)
            owner, factory = (path and find(path[1])) or object, True
            line = match[1]
        if match := _KEY.match(line):
            inner, line = match.groups()
            hint = argument(owner, inner) if owner is not object else _expected(inner, sections)
            key = f"{key}.{inner}" if owner is not object else inner
        if match := _CLASS.match(line):
            if find(match[1]) is None:
                line = f"Expected a dot import path string: {match[1]}"
            else:
                owner, line = find(match[1]), ""
        if line and not _NOISE.match(line):
            return _Place(key=key, hint=hint, owner=owner, factory=factory, wrong=line)
    return _Place(key=key, hint=hint, owner=owner, factory=factory, wrong=message)


def _fault(message: str, sections: Sections) -> str:
    place = _follow(message, sections)
    key, wrong = place.key, place.wrong
    if not key:
        return message
    if match := _NO_OPTION.match(wrong):
        group, name = match.groups()
        kind = argument(place.owner, group) if group else place.owner
        where = f"{key}.{group}" if group else key
        return _no_argument(where, name, kind, skip=int(place.factory))
    if match := _REQUIRED.match(wrong):
        inner = f"{key}.{match[1]}"
        several = len(classes(argument(place.owner, match[1]))) > 0
        hint = f" (--{inner}.help lists what there is)" if several else ""
        return f"{inner}: not set, and {place.owner.__name__} needs it{hint}"
    if match := _NO_CLASS.match(wrong):
        name = next(filter(None, match.groups()))
        return f"{key}: {name} is {_flaw(name, place.hint, abstract=bool(match[4]))}"
    if match := _TAKEN.match(wrong):
        return (
            f"{key}: {match[2]} has an argument `{match[1]}`, and --{key}.{match[1]} is the "
            "command line's own: give the argument another name"
        )
    if match := _MANY_OF_A_NAME.match(wrong):
        paths = match[2].split(", ")
        # Torch and Lightning have a schedule of this name; Lightning's names what it monitors.
        fit = [path for path in paths if path.startswith("lightning.")] or paths
        return f"{key}: {match[1]} is the name of several classes; write {' or '.join(fit)}"
    got = _GOT.search(message)
    if got and place.hint is not Any:
        return f"{key}: must be {spell(place.hint)}, got {got[1]}{_quotes(place.hint, got[1])}"
    return f"{key}: {wrong}"


def _flaw(name: str, hint: Any, *, abstract: bool) -> str:
    """Say why the class `name` does not fit here, and offer those that do."""
    if abstract:
        return f"abstract{_offer(hint, name)}"
    found = None if _not_there(name) else find(name.strip("'\""))
    if found is None or not classes(hint):
        return f"not a known {_kinds(hint)}{_offer(hint, name)}"
    if isinstance(found, type):
        return f"a class, but not a subclass of {_kinds(hint)}{_offer(hint)}"
    return f"not a class but a {type(found).__name__}{_offer(hint)}"


def _quotes(hint: Any, got: str) -> str:
    """The remedy where YAML read a word or number that was meant as a string."""
    if "str" not in spell(hint).split():
        return ""
    if got in ("True", "False"):
        return "; YAML reads yes, no, on and off as booleans: write the word in quotes"
    is_number = re.fullmatch(r"[-+]?[\d.][\d._]*(e[-+]?\d+)?", got)
    return "; write it in quotes" if is_number else ""


def _kinds(hint: Any) -> str:
    return " or ".join(kind.__name__ for kind in classes(hint)) or "class"


def _offer(hint: Any, name: str = "") -> str:
    if missing := _not_there(name):
        return missing
    known = choices(classes(hint))
    listed = f" (choices: {', '.join(known)})" if 0 < len(known) <= _MANY else ""
    return did_you_mean(name.rpartition(".")[2], known) + listed


def _not_there(path: str) -> str:
    """Say why an import path cannot be imported; '': it can, or it is a bare name."""
    name, _, attribute = path.strip("'\"").rpartition(".")
    if not name:
        return ""
    try:
        module = import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            return f": importing {name} fails: {first_line(error)}"
        where = f"{name.replace('.', '/')}.py"
        return f": there is neither {where} in this folder nor a module {name} on PYTHONPATH"
    except Exception as error:  # whatever the user's module does
        return f": importing {name} fails: {type(error).__name__}: {first_line(error)}"
    if hasattr(module, attribute):
        return ""
    named = [each for each, held in vars(module).items() if isinstance(held, type)]
    return f": module {name} has no {attribute!r}{did_you_mean(attribute, named)}"
