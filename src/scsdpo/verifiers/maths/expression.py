r"""One expression: numbers, letters, + - * / ^ !, roots, binomials and the elementary functions.

An expression is read in linear time into a tree of bounded size. A tree without letters and
irrational parts has an exact value, a fraction. Other trees are compared by their values at points,
with as many digits as their sizes need. Equal trees agree at every point; different trees agree at
all points only with negligible probability. Nothing is simplified, so all steps are fast.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from random import Random
from types import ModuleType
from typing import Any

MAX_TOKENS = 300
MAX_DEPTH = 24
_BITS = 40_000
"""Largest size of an exact value in bits, about 12,000 decimal digits."""
_DIGITS = 60
_MOST_DIGITS = 1_000
_SIGNS = ((1, 1), (1, 1), (-1, -1), (-1, 1), (1, -1))
"""Signs of the letters, in turn, at each point where trees are compared."""


class Unreadable(ValueError):
    """The text is no expression of this language, or its value cannot be computed."""


@dataclass(frozen=True)
class Number:
    """A number as written, with the number of digits after its point."""

    value: Fraction
    places: int = 0


@dataclass(frozen=True)
class Symbol:
    """A letter, or a name such as AB, x_1 or f(2)."""

    name: str


@dataclass(frozen=True)
class Apply:
    """An operator or a function, and its arguments."""

    what: str
    to: tuple["Node", ...]


Node = Number | Symbol | Apply

_GREEK = [
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta",
    "vartheta", "iota", "kappa", "lambda", "mu", "nu", "xi", "rho", "varrho", "sigma", "tau",
    "upsilon", "phi", "varphi", "chi", "psi", "omega", "Gamma", "Delta", "Theta", "Lambda",
    "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega", "ell", "hbar",
]  # fmt: skip
_FUNCTIONS = [
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh",
    "tanh", "ln", "log", "lg", "exp",
]  # fmt: skip
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
_CALLED = frozenset("fghFGHPQ")
"""Letters that name a function if a bracket follows at once."""
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<repeating>\d*\.\d*\\overline\ *\{\d+\})
    | (?P<number>\d+(?:\.\d+)?|\.\d+)
    | (?P<command>\\(?:[a-zA-Z]+|[|]))
    | (?P<name>[A-Z]{2,}(?![a-z]))
    | (?P<word>[a-zA-Z]{4,})
    | (?P<letter>[a-zA-Z])
    | (?P<sign>[-+*/^_!'()\[\]{}|°])
    )""",
    re.VERBOSE,
)


def read_expression(text: str) -> Node:
    """The tree of a cleaned text.

    Raises:
        Unreadable: if it is no expression, or too large, or can be read in two ways (1/2x).
    """
    return _Reader(_tokens(text)).whole()


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    place, end = 0, len(text.rstrip())
    while place < end:
        match = _TOKEN.match(text, place)
        if match is None or match.lastgroup is None or len(tokens) == MAX_TOKENS:
            raise Unreadable(text)
        if match.lastgroup == "word":
            raise Unreadable(f"{match['word']} is a word")
        tokens.append(_Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)))
        place = match.end()
    return tokens


@dataclass
class _Reader:
    """Reads by recursive descent: sum, product, power, primary."""

    tokens: list[_Token]
    place: int = 0
    depth: int = 0
    in_bars: bool = False
    in_function: bool = False

    def whole(self) -> Node:
        node = self.sum()
        if self.place < len(self.tokens):
            raise Unreadable("something is left over")
        return node

    def sign(self, signs: str) -> bool:
        """True if one of `signs` comes next."""
        return self.peek().kind == "sign" and self.peek().text in signs

    def peek(self, ahead: int = 0) -> _Token:
        there = self.place + ahead < len(self.tokens)
        return self.tokens[self.place + ahead] if there else _Token("end", "", -1)

    def take(self) -> _Token:
        token = self.peek()
        self.place += 1
        return token

    def expect(self, text: str) -> None:
        if self.take().text != text:
            raise Unreadable(f"{text} is missing")

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("it is nested too deeply")
        node = self.product()
        while self.sign("+-"):
            minus = self.take().text == "-"
            term = self.product()
            node = Apply("+", (node, Apply("-", (term,)) if minus else term))
        self.depth -= 1
        return node

    def product(self) -> Node:
        node = self.signed()
        while True:
            if self.sign("*"):
                self.take()
                node = Apply("*", (node, self.signed()))
            elif self.sign("/"):
                self.take()
                node = Apply("/", (node, self.signed()))
                if self.starts():
                    raise Unreadable("a slash, then a product without a sign")
            elif self.starts():
                node = self.joined(node)
            else:
                return node

    def joined(self, node: Node) -> Node:
        """A product without a sign; a whole number before a fraction of numbers is added to it."""
        token, before = self.peek(), self.tokens[self.place - 1]
        if token.kind in ("number", "repeating"):
            raise Unreadable("a number behind something else")
        whole = isinstance(node, Number) and before.kind == "number" and not node.places
        fraction = token.text == r"\frac"
        other = self.power()
        if whole and fraction and isinstance(other, Apply) and other.what == "/":
            top, below = other.to
            if isinstance(top, Number) and isinstance(below, Number):
                if not top.value < below.value:
                    raise Unreadable("neither a mixed number nor a product")
                return Apply("+", (node, other))
        return Apply("*", (node, other))

    def starts(self) -> bool:
        """True if the next token can begin a factor."""
        token = self.peek()
        if token.kind == "sign":
            return token.text in "([{" or (token.text == "|" and not self.in_bars)
        if token.kind == "command":
            return token.text not in (r"\rfloor", r"\rceil", r"\rvert")
        return token.kind != "end"

    def signed(self) -> Node:
        """A factor, or one after a sign: -2 3/4 is -(2 3/4)."""
        if not self.sign("+-"):
            return self.power()
        minus = self.take().text == "-"
        if self.sign("+-"):
            raise Unreadable("two signs")
        node = self.power()
        while minus and self.starts():
            node = self.joined(node)
        return Apply("-", (node,)) if minus else node

    def power(self) -> Node:
        node = self.primary()
        while self.sign("!"):
            if self.peek(1).text == "!":
                raise Unreadable("a double factorial")
            self.take()
            node = Apply("!", (node,))
        if self.sign("°"):
            if not self.in_function:
                raise Unreadable("degrees that are a unit")
            self.take()
            turn = Apply("/", (Apply("pi", ()), Number(Fraction(180))))
            node = Apply("*", (node, turn))
        if self.sign("^"):
            self.take()
            node = Apply("^", (node, self.exponent()))
            if self.sign("^!"):
                raise Unreadable("a power of a power without brackets")
        return node

    def exponent(self) -> Node:
        if self.sign("{"):
            return self.braced()
        if self.sign("+-"):
            minus = self.take().text == "-"
            node = self.primary()
            return Apply("-", (node,)) if minus else node
        return self.primary()

    def braced(self) -> Node:
        self.expect("{")
        node = self.sum()
        self.expect("}")
        return node

    def argument(self) -> Node:
        r"""The argument of \frac or \sqrt: a group, or one digit or letter."""
        if self.sign("{"):
            return self.braced()
        token = self.peek()
        if token.kind == "number" and "." in token.text:
            raise Unreadable("a decimal without braces")
        if token.kind == "number" and len(token.text) > 1:
            self.tokens[self.place] = _Token("number", token.text[1:], token.start + 1)
            return Number(Fraction(token.text[0]))
        return self.primary()

    def primary(self) -> Node:
        token = self.take()
        if token.kind == "number":
            return Number(Fraction(token.text), len(token.text.partition(".")[2]))
        if token.kind == "repeating":
            return Number(_repeating(token.text))
        if token.kind in ("letter", "name"):
            return self.named(token)
        if token.kind == "command":
            return self.command(token)
        if token.text in ("(", "[", "{"):
            node = self.sum()
            self.expect({"(": ")", "[": "]", "{": "}"}[token.text])
            return node
        if token.text == "|" and not self.in_bars:
            self.in_bars = True
            node = self.sum()
            self.expect("|")
            self.in_bars = False
            return Apply("abs", (node,))
        raise Unreadable(f"{token.text!r} is not expected here")

    def named(self, token: _Token) -> Node:
        """A letter with its index, primes and arguments."""
        name, call = token.text, self.peek()
        if name in _CALLED and call.text == "(" and call.start == token.start + len(name):
            return Symbol(name + self.raw_group("(", ")"))
        name += self.subscript()
        while self.sign("'"):
            name += self.take().text
        if name == "e" or name == "i":
            return Apply(name, ())
        return Symbol(name)

    def subscript(self) -> str:
        if not self.sign("_"):
            return ""
        self.take()
        if self.sign("{"):
            return "_" + self.raw_group("{", "}")[1:-1]
        return "_" + self.take().text

    def raw_group(self, opening: str, closing: str) -> str:
        """The text inside a bracket, as written."""
        depth, text = 0, ""
        while True:
            token = self.take()
            if token.kind == "end":
                raise Unreadable("a bracket is open")
            text += token.text
            depth += {opening: 1, closing: -1}.get(token.text, 0)
            if depth == 0:
                return text

    def command(self, token: _Token) -> Node:
        name = token.text[1:]
        if name == "frac":
            return Apply("/", (self.argument(), self.argument()))
        if name == "sqrt":
            index: Node = Number(Fraction(2))
            if self.sign("["):
                self.take()
                index = self.sum()
                self.expect("]")
            return Apply("root", (self.argument(), index))
        if name == "binom":
            return Apply("binom", (self.argument(), self.argument()))
        if name == "pi":
            return Apply("pi", ())
        if name in ("lfloor", "lceil", "lvert"):
            node = self.sum()
            self.expect({"lfloor": r"\rfloor", "lceil": r"\rceil", "lvert": r"\rvert"}[name])
            return Apply({"lfloor": "floor", "lceil": "ceil", "lvert": "abs"}[name], (node,))
        if name in ("Gamma", "zeta") and self.sign("("):
            return Symbol(token.text + self.raw_group("(", ")"))
        if name in _GREEK:
            return Symbol(token.text + self.subscript())
        if name in _FUNCTIONS:
            return self.function(name)
        if name in ("overline", "vec", "hat", "bar", "tilde", "angle", "triangle"):
            group = self.raw_group("{", "}") if self.sign("{") else self.take().text
            return Symbol(f"{token.text}{group}")
        raise Unreadable(f"{token.text} is not known")

    def function(self, name: str) -> Node:
        power: Node | None = None
        base: Node | None = None
        if self.sign("_"):
            self.take()
            base = self.argument()
        if self.sign("^"):
            self.take()
            power = self.exponent()
        if power == Apply("-", (Number(Fraction(1)),)) and name in _INVERSE:
            name, power = _INVERSE[name], None
        outer, self.in_function = self.in_function, True
        if self.sign("([{|") or self.peek().text in (r"\lvert", r"\lfloor"):
            inner = self.primary()
            if self.sign("^!"):
                raise Unreadable("a power of a function or of its argument")
        else:
            inner = self.bare_argument()
        self.in_function = outer
        node: Node
        if name == "log":
            node = Apply("log", (inner, base or Number(Fraction(10))))
        elif base is not None:
            raise Unreadable(f"{name} has no base")
        elif name == "lg":
            node = Apply("log", (inner, Number(Fraction(10))))
        else:
            node = Apply(name, (inner,))
        return node if power is None else Apply("^", (node, power))

    def bare_argument(self) -> Node:
        r"""The argument of \sin 2x: factors without a sign, up to a bracket or a function."""
        node = self.power()
        while self.starts() and not self.sign("([|"):
            token = self.peek()
            if token.kind == "command" and token.text[1:] in _FUNCTIONS:
                break
            node = self.joined(node)
        if self.sign("/"):
            raise Unreadable("a slash behind a function without brackets")
        return node


def _repeating(text: str) -> Fraction:
    whole, _, rest = text.partition(".")
    fixed, _, loop = rest.partition(r"\overline")
    loop = loop.strip(" {}")
    shift = 10 ** len(fixed)
    part = Fraction(int(loop), 10 ** len(loop) - 1)
    return int(whole or 0) + (int(fixed or 0) + part) / shift


# --- values ---------------------------------------------------------------------------------------


def symbols(node: Node) -> frozenset[str]:
    """The names in a tree."""
    if isinstance(node, Symbol):
        return frozenset([node.name])
    if isinstance(node, Apply):
        return frozenset().union(*map(symbols, node.to))
    return frozenset()


def has_decimal(node: Node) -> bool:
    """True if the tree holds a number with digits after a point."""
    if isinstance(node, Apply):
        return any(map(has_decimal, node.to))
    return isinstance(node, Number) and node.places > 0


def exact(node: Node) -> Fraction | None:
    """The value as a fraction; None if it is no fraction, or has too many digits.

    Raises:
        Unreadable: if it divides by zero.
    """
    if isinstance(node, Number):
        return node.value
    if isinstance(node, Symbol):
        return None
    found = [exact(part) for part in node.to]
    if not found or any(part is None for part in found):
        return None
    return _exact(node.what, [part for part in found if part is not None])


def _exact(what: str, parts: Sequence[Fraction]) -> Fraction | None:
    first, last = parts[0], parts[-1]
    if what == "+":
        return first + last
    if what == "-":
        return -first
    if what == "*":
        return first * last if _size(first) + _size(last) < _BITS else None
    if what == "/":
        if last == 0:
            raise Unreadable("it divides by zero")
        return first / last if _size(first) + _size(last) < _BITS else None
    if what == "^":
        return _exact_power(first, last)
    if what == "root":
        return _exact_root(first, last)
    if what == "abs":
        return abs(first)
    if what in ("floor", "ceil"):
        return Fraction(first.__floor__() if what == "floor" else first.__ceil__())
    if what in ("!", "binom"):
        import math

        if any(part.denominator != 1 or not 0 <= part <= 3000 for part in parts):
            return None
        return Fraction(
            math.factorial(int(first)) if what == "!" else math.comb(int(first), int(last))
        )
    return None


def _size(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        root = _exact_root(base, Fraction(exponent.denominator))
        return None if root is None else _exact_power(root, Fraction(exponent.numerator))
    if base == 0 and exponent <= 0:
        raise Unreadable("zero to a power that is not positive")
    if base in (0, 1):
        return base
    if base == -1:
        return Fraction(1 if exponent % 2 == 0 else -1)
    if abs(exponent) * _size(base) >= _BITS:
        return None
    return base ** int(exponent)


def _exact_root(base: Fraction, index: Fraction) -> Fraction | None:
    if index.denominator != 1 or not 1 <= index <= 64 or (base < 0 and index % 2 == 0):
        return None
    roots = [_whole_root(abs(n), int(index)) for n in (base.numerator, base.denominator)]
    if roots[0] is None or roots[1] is None:
        return None
    return Fraction(roots[0], roots[1]) * (-1 if base < 0 else 1)


def _whole_root(number: int, index: int) -> int | None:
    import math

    if index == 2:
        root = math.isqrt(number)
    else:
        root = round(number ** (1 / index)) if number.bit_length() < 1000 else 0
    return root if root**index == number else None


@cache
def _mp() -> ModuleType:
    import mpmath

    return mpmath


@dataclass
class _Sizes:
    """Sizes met in a computation: decimal exponents, and the largest addend."""

    exponent: float = 0.0
    addend: Any = 0
    point: Mapping[str, Any] = field(default_factory=dict)


def value(node: Node) -> Any:
    """The value of a tree without letters, to 40 digits or more.

    Raises:
        Unreadable: if it has no value, or is too large.
    """
    return _values([node], {})[0][0]


def _values(nodes: Sequence[Node], point: Mapping[str, Fraction]) -> list[tuple[Any, Any]]:
    """The values of trees at a point, with bounds on their rounding errors.

    A number of some size may change another by as little as its cube, so all values are computed
    with as many digits as the largest and the smallest number in any of them need.
    """
    mp, digits = _mp(), _DIGITS
    while digits <= _MOST_DIGITS:
        with mp.workdps(digits):
            numbers = {k: mp.mpf(v.numerator) / v.denominator for k, v in point.items()}
            sizes = [_Sizes(point=numbers) for _ in nodes]
            try:
                found = [_value(node, size) for node, size in zip(nodes, sizes, strict=True)]
            except (ArithmeticError, ValueError, TypeError, OverflowError) as error:
                raise Unreadable("it has no value") from error
            need = _DIGITS + int(3 * max(size.exponent for size in sizes))
            if need <= digits:
                noise = mp.mpf(10) ** (20 - digits)
                pairs = zip(found, sizes, strict=True)
                return [(v, max(size.addend, abs(v)) * noise) for v, size in pairs]
        digits = need
    raise Unreadable("its value has too many digits")


def _value(node: Node, sizes: _Sizes) -> Any:
    mp = _mp()
    if isinstance(node, Number):
        result = mp.mpf(node.value.numerator) / node.value.denominator
    elif isinstance(node, Symbol):
        result = sizes.point[node.name]
    else:
        parts = [_value(part, sizes) for part in node.to]
        result = _applied(node, parts)
        if node.what == "+":
            sizes.addend = max(sizes.addend, *map(abs, parts))
    if not mp.isfinite(result):
        raise Unreadable("it is not finite")
    if result != 0:
        size = abs(float(mp.mag(result))) * 0.30103
        if size > 1e6:
            raise Unreadable("it is too large")
        sizes.exponent = max(sizes.exponent, size)
    return result


def _applied(node: Apply, parts: Sequence[Any]) -> Any:
    mp, what = _mp(), node.what
    if what == "+":
        return parts[0] + parts[1]
    if what == "-":
        return -parts[0]
    if what == "*":
        return parts[0] * parts[1]
    if what == "/":
        return parts[0] / parts[1]
    if what == "^":
        return _power(parts[0], parts[1], exact(node.to[1]))
    if what == "root":
        index = exact(node.to[1])
        return _power(parts[0], 1 / parts[1], None if not index else 1 / index)
    if what == "e":
        return mp.e + 0
    if what == "pi":
        return mp.pi + 0
    if what == "i":
        return mp.mpc(0, 1)
    if what == "log":
        return mp.log(parts[0]) / mp.log(parts[1])
    if what in ("!", "binom"):
        if any(mp.mag(part) > 8 for part in parts if part):
            raise Unreadable("a factorial of a large number")
        return mp.factorial(parts[0]) if what == "!" else mp.binomial(*parts)
    if what == "exp" and parts[0] and mp.mag(parts[0]) > 24:
        raise Unreadable("it is too large")
    if what in ("abs", "floor", "ceil") or what in _FUNCTIONS:
        names = {"abs": "fabs", "arcsin": "asin", "arccos": "acos", "arctan": "atan"}
        return getattr(mp, names.get(what, what))(parts[0])
    raise Unreadable(what)


def _power(base: Any, exponent: Any, fraction: Fraction | None) -> Any:
    """A power; an odd root of a negative number is its real root."""
    mp = _mp()
    size = abs(float(mp.mag(base))) if base else 0.0
    if exponent and (mp.mag(exponent) > 40 or abs(exponent) * (size + 1) > 4e6):
        raise Unreadable("a power that is too large")
    odd = fraction is not None and fraction.denominator % 2 == 1 and fraction.denominator > 1
    if odd and mp.im(base) == 0 and mp.re(base) < 0 and fraction is not None:
        size = mp.power(-mp.re(base), exponent)
        return -size if fraction.numerator % 2 else size
    return mp.power(base, exponent)


def points(names: frozenset[str]) -> list[dict[str, Fraction]]:
    """Points at which trees with these names are compared: positive, negative and mixed values."""
    if not names:
        return [{}]
    draw = Random(7)
    return [
        {
            name: Fraction(draw.randint(100, 3000), 997) * signs[place % 2]
            for place, name in enumerate(sorted(names))
        }
        for signs in _SIGNS
    ]


def _close(one: Any, other: Any, noise: Any) -> bool:
    with _mp().workdps(_MOST_DIGITS):
        return bool(abs(one - other) <= noise)


def same_value(one: Node, other: Node) -> bool:
    """True if two trees are equal wherever they have a value."""
    exactly = exact(one), exact(other)
    if exactly[0] is not None and exactly[1] is not None:
        return exactly[0] == exactly[1]
    agreed, where = 0, points(symbols(one) | symbols(other))
    for point in where:
        try:
            (first, noise), (second, more) = _values([one, other], point)
        except Unreadable:
            if _has_value(one, point) or _has_value(other, point):
                return False
            continue
        if not _close(first, second, noise + more):
            return False
        agreed += 1
    return agreed >= min(2, len(where))


def _has_value(node: Node, point: Mapping[str, Fraction]) -> bool:
    try:
        _values([node], point)
    except Unreadable:
        return False
    return True


def ratio(one: Node, other: Node) -> Any:
    """The constant c with one = c * other at every point; None: there is none, or it is 0."""
    agreed, found, noise = 0, None, _mp().mpf(0)
    where = points(symbols(one) | symbols(other))
    for point in where:
        try:
            (top, top_noise), (below, below_noise) = _values([one, other], point)
        except Unreadable:
            continue
        if abs(top) <= top_noise or abs(below) <= below_noise:
            return None
        with _mp().workdps(_MOST_DIGITS):
            quotient = top / below
            moved = 2 * abs(quotient) * (top_noise / abs(top) + below_noise / abs(below))
        if found is not None and not _close(found, quotient, noise + moved):
            return None
        found, noise = quotient, max(noise, moved)
        agreed += 1
    return found if agreed >= min(2, len(where)) else None


def shown(node: Node, point: Mapping[str, Fraction]) -> str:
    """Twelve digits of the value at a point.

    Raises:
        Unreadable: if there is none.
    """
    return str(_mp().nstr(_values([node], point)[0][0], 12))
