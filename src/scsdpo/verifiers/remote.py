"""Call a response's functions from the process of the tests, over a pair of pipes.

Two processes run this file. The process of the response (`Response`) runs the untrusted code and
executes requests: call this function, read that attribute. The process of the tests (`Tests`) runs
the tests, in which each name of the response is a `Remote`. Only the inputs of calls go to the
response. Results come back as plain data, from which the tests' process builds its own values. So
comparisons are between values of the tests' process, and no method of the response takes part.

Everything from the response is treated as hostile: a message that is invalid, too long, too deep or
cut off makes the tests fail, and no test can catch that.

This file imports nothing of the package, so that the sandbox can run it.
"""

import ast
import builtins
import collections
import importlib
import io
import json
import math
import operator
import os
import re
import symtable
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from typing import Any, NoReturn

MESSAGE = 200
"""Number of characters of a failure that are kept."""
_SHORT_INT = 1 << 60
"""Integers from this on are written in hexadecimal, whose length Python does not limit."""
_PLAIN = (bool, str, float)
_ITEMS: dict[type, str] = {
    list: "list",
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    collections.deque: "deque",
}
# Subclasses that equal a value of their base class and are mostly used like it.
_MAPPINGS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
_TEXTUAL: dict[type, tuple[str, Callable[[Any], str], Callable[[str], object]]] = {
    bytes: ("bytes", bytes.hex, bytes.fromhex),
    bytearray: ("bytearray", bytearray.hex, bytearray.fromhex),
    Fraction: ("fraction", str, Fraction),
    Decimal: ("decimal", str, Decimal),
}
_READ_TEXT = {tag: read for tag, _, read in _TEXTUAL.values()}
_READ_ITEMS: dict[str, Callable[[list[Any]], object]] = {
    tag: kind for kind, tag in _ITEMS.items()
} | {"complex": lambda parts: complex(*parts), "range": lambda parts: range(*parts)}
_NUMBERS = re.compile(r"[<>|=][biufc]\d{1,2}")
"""numpy's type codes of booleans, integers, floats and complex numbers."""
_BUILTINS = frozenset(
    {name for name, kind in vars(builtins).items() if isinstance(kind, type)}
    | {"abs", "all", "any", "bin", "chr", "divmod", "hex", "len", "max", "min", "oct", "ord"}
    | {"pow", "repr", "round", "sorted", "sum"}
)
"""Built-ins that are passed by name; each process uses its own."""
MOST_BYTES = 32 << 20
"""Largest size of a message from the response, in bytes."""


def pack(value: Any, other: Callable[[Any], list[Any]]) -> Any:
    """Encode a value for JSON, with its type.

    Args:
        value: None, a number, text, bytes, a container of these, a numpy number or array.
        other: makes a reference to any other value.
    """
    kind = type(value)
    if value is None or kind in _PLAIN:
        return value
    if kind is int:
        return value if -_SHORT_INT < value < _SHORT_INT else ["int", hex(value)]
    if kind in _ITEMS:
        return [_ITEMS[kind], *[pack(item, other) for item in value]]
    if kind in _MAPPINGS:
        return ["dict", *[pack(thing, other) for pair in value.items() for thing in pair]]
    if kind in _TEXTUAL:
        tag, write, _ = _TEXTUAL[kind]
        return [tag, write(value)]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind is range:
        return ["range", *[pack(n, other) for n in (value.start, value.stop, value.step)]]
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return pack(tuple(value), other)
    if kind.__module__ == "numpy":
        if kind.__name__ == "ndarray" and _NUMBERS.fullmatch(value.dtype.str):
            return ["array", value.dtype.str, pack(value.tolist(), other)]
        if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
            return pack(value.item(), other)
    return other(value)


def unpack(data: Any, other: Callable[[str, list[Any]], object]) -> Any:
    """Decode a value that `pack` encoded.

    Args:
        data: the value that JSON held.
        other: resolves a reference, given its tag and the rest.

    Raises:
        ValueError, TypeError, ArithmeticError, RecursionError: if `pack` cannot have written it.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    if not isinstance(data, list) or not data or not isinstance(data[0], str):
        raise ValueError("no value")
    tag, *rest = data
    if tag in _READ_ITEMS:
        return _READ_ITEMS[tag]([unpack(item, other) for item in rest])
    if tag == "dict":
        things = [unpack(thing, other) for thing in rest]
        return dict(zip(things[::2], things[1::2], strict=True))
    if tag in _READ_TEXT or tag == "int":
        (text,) = rest
        if not isinstance(text, str):
            raise TypeError("no text")
        return int(text, 16) if tag == "int" else _READ_TEXT[tag](text)
    if tag == "array":
        kind, items = rest
        if not isinstance(kind, str) or not _NUMBERS.fullmatch(kind):
            raise ValueError("no array of numbers")
        return importlib.import_module("numpy").array(unpack(items, other), dtype=kind)
    return other(tag, rest)


def _is_builtin(thing: Any) -> bool:
    name = getattr(thing, "__name__", None)
    return isinstance(name, str) and name in _BUILTINS and getattr(builtins, name) is thing


class Line:
    """Messages to and from the other process, each one line of JSON."""

    def __init__(self, source: int, sink: int, most: float = math.inf) -> None:
        self._source, self._sink, self._most = source, sink, most
        self._rest = b""

    def send(self, message: list[Any]) -> None:
        """Write one message."""
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._sink, data) :]

    def receive(self) -> list[Any]:
        """The next message.

        Raises:
            EOFError: if the other process has closed the pipe.
            ValueError: if it is too long, or no message.
        """
        parts = [self._rest]
        size = len(self._rest)
        while b"\n" not in parts[-1]:
            part = os.read(self._source, 1 << 16)
            size += len(part)
            if not part:
                raise EOFError
            if size > self._most:
                raise ValueError("too long a message")
            parts.append(part)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, list) or not message or not isinstance(message[0], str):
            raise ValueError("no message")
        return message


def described(error: BaseException) -> str:
    """The exception in a few words; its own `__str__` may do anything."""
    try:
        is_one_text = len(error.args) == 1 and type(error.args[0]) is str
        words = f"{type(error).__name__}: {error.args[0] if is_one_text else error}"
    except BaseException:
        words = "an exception that cannot be shown"
    return words[:MESSAGE]


# --- the process of the response ------------------------------------------------------------------


class Response:
    """Runs the untrusted code, and executes the tests' requests.

    Nothing here is a defence: the code can take the process over and send any message.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._module = types.ModuleType("solution")
        self._things: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._operations: dict[str, Callable[..., Any]] = {
            "run": self._run,
            "program": self._program,
            "names": self._named,
            "call": lambda function, args, options: function(*args, **options),
            "call_and_show": lambda function, args, options: (function(*args, **options), args),
            "get": getattr,
            "set": setattr,
            "item": operator.getitem,
            "set_item": operator.setitem,
            "len": len,
            "bool": bool,
            "str": str,
            "repr": repr,
            "iter": iter,
            "next": next,
            "isinstance": isinstance,
        }

    def serve(self) -> NoReturn:
        """Answer until the tests are over."""
        self._line.send(["value", "ready"])
        with suppress(EOFError, OSError):
            while True:
                self._answer(self._line.receive())
        os._exit(0)

    def _answer(self, request: list[Any]) -> None:
        name, *arguments = request
        try:
            result = self._operations[name](*[self._read(argument) for argument in arguments])
            answer = ["value", pack(result, self._reference)]
        except StopIteration:
            answer = ["end"]
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            words = described(error).partition(": ")[2]
            answer = ["raise", kinds, words]
        self._line.send(answer)

    def _reference(self, thing: Any) -> list[Any]:
        if _is_builtin(thing):
            return ["builtin", thing.__name__]
        if id(thing) not in self._numbers:
            self._numbers[id(thing)] = len(self._things)
            self._things.append(thing)
        return ["thing", self._numbers[id(thing)]]

    def _read(self, data: Any) -> Any:
        return unpack(data, self._referred)

    def _referred(self, tag: str, rest: list[Any]) -> object:
        if tag == "builtin":
            return getattr(builtins, rest[0])
        if tag == "thing":
            return self._things[rest[0]]

        def call_back(*args: Any, **options: Any) -> Any:
            packed = [pack(part, self._reference) for part in (args, options)]
            self._line.send(["call_back", rest[0], *packed])
            while (reply := self._line.receive())[0] not in ("value", "raise"):
                self._answer(reply)
            if reply[0] == "raise":
                raise raised(reply[1], reply[2])
            return self._read(reply[1])

        return call_back

    def _run(self, code: str) -> str | None:
        """Run the code; the reason why it failed, or None."""
        sys.modules["solution"] = self._module
        try:
            exec(compile(code, "<solution>", "exec"), vars(self._module))
        except BaseException as error:
            return described(error)
        return None

    def _program(self, code: str, text: str) -> tuple[str, str | None]:
        """The output of the code when it reads `text`, and the reason if it failed."""
        sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode(errors="replace")), "utf-8")
        sys.stdout = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="replace", write_through=True)
        failure = None
        try:
            exec(compile(code, "<solution>", "exec"), {"__name__": "__main__"})
        except SystemExit as ending:
            failure = described(ending) if ending.code not in (None, 0) else None
        except BaseException as error:
            failure = described(error)
        sys.stdout.flush()
        return sys.stdout.buffer.getvalue().decode(errors="replace"), failure

    def _named(self, names: list[str]) -> dict[str, Any]:
        return {name: vars(self._module)[name] for name in names if name in vars(self._module)}


# --- the process of the tests ---------------------------------------------------------------------


class Broken(BaseException):
    """The response's process has ended, or sent an invalid message."""


class Remote:
    """A function, class or object of the response that is no plain data.

    It equals only itself, because only the response could tell whether two of them are one object.
    It has no arithmetic, order or `in`: these would show the response the values it is compared
    with.
    """

    __slots__ = ("_ask", "_number", "_origin", "_shows")
    __contains__ = None

    def __init__(
        self, ask: Callable[..., Any], number: int, origin: str, shows: bool = False
    ) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_origin", origin)
        object.__setattr__(self, "_shows", shows)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not self._shows:
            return self._ask("call", self, args, options)
        value, after = self._ask("call_and_show", self, args, options)
        for mine, shown in zip(args, after, strict=True):
            if type(mine) is type(shown):
                _become(mine, shown)
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # libraries look for protocols, such as addresses of arrays
            raise AttributeError(name)
        if name in _PREDICATES and not self._origin[:1].isupper():
            raise AttributeError(f"{name}, which would let the response judge itself")
        return self._ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("set_item", self, key, value)

    def __len__(self) -> int:
        return int(self._ask("len", self))

    def __bool__(self) -> bool:
        return self._ask("bool", self) is True

    def __str__(self) -> str:
        return str(self._ask("str", self))

    def __repr__(self) -> str:
        return str(self._ask("repr", self))

    def __iter__(self) -> Iterator[Any]:
        iterator = self._ask("iter", self)
        while (item := self._ask("next", iterator)) is not _END:
            yield item

    def __next__(self) -> Any:
        if (item := self._ask("next", self)) is _END:
            raise StopIteration
        return item

    def __instancecheck__(self, thing: object) -> bool:
        return self._ask("isinstance", thing, self) is True


_END = object()
_PREDICATES = frozenset(
    name for kind in (str, set, float) for name in dir(kind) if name[:2] == "is"
)
_PREDICATES |= {"startswith", "endswith", "equals", "all", "any"}
"""Methods of plain data that give a truth value. The tests refuse to call them on a result that is
no plain data; on an object of a class that the tests name, such as Trie(), they may."""


def _become(mine: Any, shown: Any) -> None:
    """Change a container in place to its state in the other process."""
    if isinstance(mine, list | bytearray):
        mine[:] = shown
    elif isinstance(mine, dict | set):
        mine.clear()
        mine.update(shown)
    elif isinstance(mine, collections.deque):
        mine.clear()
        mine.extend(shown)


def shown(function: Any) -> Any:
    """A function of the response whose call also updates its arguments here."""
    if type(function) is not Remote:
        return function
    return Remote(function._ask, function._number, function._origin, True)


def raised(kinds: Any, words: Any) -> Exception:
    """The exception that the other process has raised, as the nearest built-in class.

    Exceptions that control loops and exits (StopIteration, SystemExit) become a RuntimeError, so
    that the response cannot end a test's loop before everything is compared.
    """
    names = [name for name in kinds if isinstance(name, str)] if isinstance(kinds, list) else []
    base: type[Exception] = RuntimeError
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            if not issubclass(kind, StopIteration | StopAsyncIteration):
                base = kind
            break
    if names and names[0] != base.__name__ and names[0].isidentifier():
        base = type(names[0], (base,), {})
    try:
        return base(str(words))
    except Exception:
        return RuntimeError(str(words))


class Tests:
    """Runs tests on a response in another process.

    Args:
        line: the connection to that process.
        own: names in the tests that belong to the response, from `subjects`.
        libraries: names in the tests that belong to libraries, which the tests do not import.
        cases: test functions that nothing calls.
    """

    def __init__(
        self,
        line: Line,
        own: list[str],
        libraries: dict[str, tuple[str, str]],
        cases: list[str],
    ) -> None:
        self._line, self._own, self._cases = line, own, cases
        self._callbacks: list[Callable[..., Any]] = []
        self._broken = self._origin = ""
        self._bound: dict[str, Any] = {}
        self._names: dict[str, Any] = {"__name__": "tests", _SHOWN: shown}
        for name, (module, attribute) in libraries.items():
            with suppress(ImportError):
                library = importlib.import_module(module)
                self._names[name] = getattr(library, attribute) if attribute else library

    def begin(self) -> None:
        """Wait until the other process is restricted.

        Raises:
            Broken: if it ends before that.
        """
        if self._receive() != ["value", "ready"]:
            raise self._break("it does not start")

    def run(self, code: str) -> str | None:
        """Run the response's code; the reason why it failed, or None."""
        return self._said(lambda: self.ask("run", code))

    def program(self, code: str, text: str, expected: str) -> str | None:
        """Run the response's code as a program that reads `text`; why its output is wrong."""

        def judged() -> object:
            output, failure = self.ask("program", code, text)
            if failure is not None:
                return failure
            if not isinstance(output, str) or _lines(output) != _lines(expected):
                return f"the output is {output!r}"[:MESSAGE]
            return None

        return self._said(judged)

    def _said(self, work: Callable[[], object]) -> str | None:
        try:
            failure = work()
        except Broken:
            return self._broken
        except BaseException as error:
            return described(error)
        return None if failure is None else str(failure)[:MESSAGE]

    def test(self, source: str) -> str | None:
        """Run one test; the reason why it failed, or None."""
        tree = ast.parse(source)
        try:
            self._refresh()
            exec(compile(_Prepared().visit(tree), "<test>", "exec"), self._names)
            for node in tree.body:
                if isinstance(node, ast.FunctionDef) and node.name in self._cases:
                    self._names[node.name]()
        except Broken:
            return self._broken
        except BaseException as error:
            failure = described(error)
            if type(error) is AssertionError and not error.args:
                failure = f"AssertionError{self._instead(source)}"
            return self._broken or failure
        return self._broken or None

    def _refresh(self) -> None:
        """Bind the response's names to their present values, unless the tests have bound them."""
        values = self.ask("names", self._own)
        if not isinstance(values, dict):
            raise self._break("it names nothing")
        for name in self._own:
            if name not in self._names or self._names[name] is self._bound.get(name, _END):
                self._names.pop(name, None)
                if name in values:
                    value = values[name]
                    if type(value) is Remote:
                        value = Remote(self.ask, value._number, name)
                    self._names[name] = self._bound[name] = value

    def _instead(self, source: str) -> str:
        """The actual value of the response's side of a failed `assert left == right`."""
        try:
            last = ast.parse(source).body[-1]
            if isinstance(last, ast.Assert) and isinstance(last.test, ast.Compare):
                for side in (last.test.left, *last.test.comparators):
                    if any(isinstance(n, ast.Name) and n.id in self._own for n in ast.walk(side)):
                        value = eval(compile(ast.Expression(side), "<test>", "eval"), self._names)
                        return f": got {value!r}"[:MESSAGE]
        except BaseException:
            return ""
        return ""

    def ask(self, operation: str, *arguments: Any) -> Any:
        """The other process's answer, as a value of this process."""
        if self._broken:
            raise Broken
        packed = [pack(argument, self._reference) for argument in arguments]
        origin = arguments[0]._origin if arguments and type(arguments[0]) is Remote else ""
        self._send([operation, *packed])
        while True:
            try:
                match self._receive():
                    case ["value", data]:
                        self._origin = origin
                        return unpack(data, self._referred)
                    case ["end"] if operation == "next":
                        return _END
                    case ["raise", kinds, words]:
                        error = raised(kinds, words)
                    case ["call_back", int(number), args, options]:
                        args, options = (unpack(p, self._referred) for p in (args, options))
                        self._call_back(self._callbacks[number], args, options)
                        continue
                    case _:
                        raise ValueError("no answer")
            except _NONSENSE as why:
                raise self._break(f"its answer is none: {why}") from None
            raise error

    def _call_back(self, function: Callable[..., Any], args: Any, options: Any) -> None:
        try:
            reply = ["value", pack(function(*args, **options), self._reference)]
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            reply = ["raise", kinds, described(error).partition(": ")[2]]
        self._send(reply)

    def _send(self, message: list[Any]) -> None:
        try:
            self._line.send(message)
        except OSError:
            raise self._break(_ENDED) from None

    def _receive(self) -> list[Any]:
        try:
            return self._line.receive()
        except EOFError:
            raise self._break(_ENDED) from None
        except _NONSENSE as why:
            raise self._break(f"its answer is none: {why}") from None

    def _break(self, why: str) -> Broken:
        self._broken = self._broken or why[:MESSAGE]
        return Broken(why)

    def _reference(self, thing: Any) -> list[Any]:
        if type(thing) is Remote:
            return ["thing", thing._number]
        if _is_builtin(thing):
            return ["builtin", thing.__name__]
        if callable(thing):
            self._callbacks.append(thing)
            return ["call_back", len(self._callbacks) - 1]
        raise TypeError(
            f"a {type(thing).__name__} is no plain data, and cannot be given to the response"
        )

    def _referred(self, tag: str, rest: list[Any]) -> object:
        match tag, rest:
            case "thing", [int(number)]:
                return Remote(self.ask, number, self._origin)
            case "builtin", [str(name)] if name in _BUILTINS:
                return getattr(builtins, name)
            case "call_back", [int(number)]:
                return self._callbacks[number]
        raise ValueError("no value")


_NONSENSE = (
    *(ValueError, TypeError, ArithmeticError, LookupError),
    *(RecursionError, MemoryError, AttributeError),
)
_ENDED = "the process ended: too much time or memory, or an exit"
_SHOWN = "__shown__"
_SOLUTION = "solution"


def _lines(text: str) -> list[str]:
    """Lines without trailing blanks, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


class _Prepared(ast.NodeTransformer):
    """Rewrites tests: a call whose value is not used updates its arguments here (`shown`), because
    it is made for its effect on them; imports from the response are dropped.
    """

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        return ast.copy_location(ast.Pass(), node) if node.module == _SOLUTION else node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if isinstance(node.value, ast.Call):
            call = node.value
            name = ast.copy_location(ast.Name(_SHOWN, ast.Load()), call)
            call.func = ast.copy_location(ast.Call(name, [call.func], []), call)
        return node


# --- which names in the tests belong to the response ----------------------------------------------

_COMMON = {
    "math": "isclose isnan isinf sqrt ceil floor pi inf nan fabs gcd lcm comb factorial prod log",
    "collections": "Counter defaultdict deque OrderedDict namedtuple",
    "fractions": "Fraction",
    "decimal": "Decimal",
    "itertools": "permutations combinations product chain islice zip_longest accumulate",
    "functools": "reduce partial cmp_to_key",
    "datetime": "date timedelta",
    "copy": "deepcopy",
    "typing": "List Dict Tuple Set Optional Any Union Callable Iterable",
}
_IMPORTED = {name: module for module, names in _COMMON.items() for name in names.split()}
_SHORT = {"np": "numpy", "numpy": "numpy", "pd": "pandas", "pytest": "pytest"}
_RUNS_TEXT = frozenset({"eval", "exec", "compile", "__import__", "pickle", "marshal", "dill"})


def subjects(tests: list[str]) -> tuple[list[str], dict[str, tuple[str, str]], list[str]]:
    """Names in the tests that belong to the response, and those that belong to a library.

    A global name that the tests use and do not bind belongs to the response, unless it is a
    built-in, a common name of the standard library, or a module of which only attributes are used.
    If no other name is left, the response's is the only such name of the standard library, or else
    the only name that is called.

    Returns:
        The response's names; each library name with its module and attribute, which is empty for
        the module itself; and functions named `test...` that nothing calls.

    Raises:
        ValueError: if the tests cannot be separated from the response; with the reason.
    """
    top: list[ast.stmt] = []
    nodes: list[ast.AST] = []
    used: set[str] = set()
    bound: set[str] = set()
    for test in tests:
        try:
            tree = ast.parse(test)
            top += tree.body
            nodes += ast.walk(tree)
            tables = [symtable.symtable(test, "<test>", "exec")]
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"`{test[:MESSAGE]}` is no Python: {error}") from error
        for table in tables:  # the loop appends to it
            tables += table.get_children()
            outer = table.get_type() == "module"
            for symbol in table.get_symbols():
                if outer or symbol.is_global():
                    used |= {symbol.get_name()} if symbol.is_referenced() else set()
                    binds = symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
                    bound |= {symbol.get_name()} if binds else set()
    names = [node for node in nodes if isinstance(node, ast.Name)]
    mentioned = {name.id for name in names}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            mentioned |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            mentioned.add(node.module or "")
    if runs := mentioned & _RUNS_TEXT:
        raise ValueError(
            f"a test uses `{min(runs)}`, which could run the response's text among the tests; "
            "compare its value instead"
        )
    from_solution = {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module == _SOLUTION
        for alias in node.names
    }
    free = used - bound | from_solution - {"*"}
    bases = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    as_values = {name.id for name in names if id(name) not in bases}
    modules = {
        name: (_SHORT.get(name, name), "")
        for name in free - as_values
        if name in _SHORT or name in sys.stdlib_module_names
    }
    common = {name: (_IMPORTED[name], name) for name in free & _IMPORTED.keys()}
    own = free - modules.keys() - common.keys() - vars(builtins).keys() | from_solution - {"*"}
    if not own:
        called = {
            node.func.id
            for node in nodes
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        candidates = set(common) or free & called - modules.keys()
        if len(candidates) > 1:
            raise ValueError(
                f"the tests do not say which of {', '.join(sorted(candidates))} the response "
                "defines; import the others in a test"
            )
        own = candidates
        common = {name: place for name, place in common.items() if name not in own}
    _refuse_own_judge(nodes, own)
    cases = _cases(top, used)
    return (
        sorted(own),
        {name: place for name, place in (modules | common).items() if name not in own},
        cases,
    )


def _cases(top: list[ast.stmt], used: set[str]) -> list[str]:
    """Functions that pytest would call. Functions and classes that need more of pytest are refused,
    and uncalled functions too, because every response would pass them.
    """
    cases = []
    for node in top:
        if isinstance(node, ast.ClassDef) and "TestCase" in map(_last_name, node.bases):
            raise ValueError(f"class {node.name} would need unittest: write plain functions")
        if isinstance(node, ast.FunctionDef) and node.name not in used:
            if node.name.startswith("test"):
                if len(node.args.args) > len(node.args.defaults):
                    raise ValueError(f"{node.name} would need pytest, which gives it arguments")
                cases.append(node.name)
            elif any(isinstance(part, ast.Assert) for part in ast.walk(node)):
                raise ValueError(
                    f"no test calls {node.name}: add one that does, such as `{node.name}(add)`"
                )
    return cases


def _last_name(node: ast.AST) -> str:
    return ast.unparse(node).rpartition(".")[2]


def _refuse_own_judge(nodes: list[ast.AST], own: set[str]) -> None:
    def calls(node: ast.AST) -> bool:
        return (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in own
        )

    for node in nodes:
        if isinstance(node, ast.Assert) and calls(node.test):
            inner = [part for part in ast.walk(node.test) if part is not node.test]
            if any(map(calls, inner)):
                raise ValueError(
                    f"`{ast.unparse(node)}` lets one function of the response judge another; "
                    "define that which judges in a test"
                )
