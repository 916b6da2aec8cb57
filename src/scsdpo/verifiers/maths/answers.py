r"""Kinds of answers, and the comparison of two answers.

`read_answer` decides the kind of a text: a number or expression, a quantity with a unit, a number
of a base, a relation, a tuple or interval, a set, a union, a matrix, several answers, or a text.
Anything that is no mathematics is a text; texts are equal only letter for letter.
"""

# ruff: noqa: RUF001

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from scsdpo.verifiers.maths import expression
from scsdpo.verifiers.maths.expression import Apply, Node, Number, Symbol, Unreadable
from scsdpo.verifiers.maths.spelling import clean, closing, flat, split, stripped
from scsdpo.verifiers.maths.units import Unit, read_unit

MAX_CHARACTERS = 1_000
MAX_PARTS = 60
_MAX_DEPTH = 6
_MOST_EXPONENT = 10_000
_SIX_DIGITS = 100_000


@dataclass(frozen=True)
class Rules:
    """Settings of `same`: the tolerance of decimals, and whether units count."""

    tolerance: Fraction = Fraction(0)
    compare_units: bool = True


@dataclass(frozen=True)
class Text:
    """A text that is no mathematics, or mathematics that `expression` cannot read."""

    written: str


@dataclass(frozen=True)
class Value:
    """A number or an expression."""

    written: str
    node: Node


@dataclass(frozen=True)
class Quantity:
    """A number with its unit."""

    written: str
    node: Node
    unit: Unit


@dataclass(frozen=True)
class Based:
    """A number in a base other than ten."""

    written: str
    digits: str
    base: int


@dataclass(frozen=True)
class Relation:
    """Sides, with the signs between them: = ≠ < > ≤ ≥, or a single ∈."""

    written: str
    signs: tuple[str, ...]
    sides: tuple["Answer", ...]


@dataclass(frozen=True)
class Group:
    """A tuple or an interval: parts in order, and the kinds of its brackets."""

    written: str
    brackets: str
    parts: tuple["Answer", ...]


@dataclass(frozen=True)
class Matrix:
    """Rows of entries."""

    written: str
    rows: tuple[tuple["Answer", ...], ...]


@dataclass(frozen=True)
class Many:
    """Parts in any order: a set (braces), a union, or several answers."""

    written: str
    parts: tuple["Answer", ...]
    sort: str
    """ "set", "union" or "several"."""


Answer = Text | Value | Quantity | Based | Relation | Group | Matrix | Many

# --- reading --------------------------------------------------------------------------------------

_COMMA = re.compile(
    r"\s*(?:[,;]\s*(?:«\s*(?:and|or)\s*»|(?:and|or)(?![A-Za-z]))?|«[\s,;]*(?:and|or)[\s,]*»"
    r"|(?<![A-Za-z])(?:and|or)(?![A-Za-z]))\s*"
)
_INNER_COMMA = re.compile(r"\s*[,;]\s*")
_SIGN = re.compile(r"[=<>≤≥≠≈]")
_UNION, _OTHER, _MEMBER = re.compile("∪"), re.compile("[∩∖⇒]"), re.compile("∈")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_SPACED = re.compile(r"[-+]?\s*\d{1,3}(?: \d{3})+(?:\.\d+)?")
_MATRIX = re.compile(
    r"(?:\\left|[\[(|]|\s)*\\begin \{(?P<kind>[pbB]?matrix|smallmatrix|array)\}\s*"
    r"(?P<columns>\{[lcr| ]*\})?(?P<body>.*)\\end \{(?P=kind)\}\s*[\])|]?\s*",
    re.DOTALL,
)
_SYSTEM = re.compile(
    r"⦃?\s*\\begin \{(?:array|cases|aligned)\}\s*(?:\{[lcr| ]*\})?(?P<body>.*)"
    r"\\end \{(?:array|cases|aligned)\}\s*\.?",
    re.DOTALL,
)
_REALS = flat(clean(r"\mathbb{R}"))
_LETTERS = r"[A-Za-z]{1,3}'*"
_INDEX = r"(?:_(?:\{[^{}]*\}|[A-Za-z0-9]))?"
_NAME = re.compile(
    rf"\|?\s*(?:{_LETTERS}|\\[A-Za-z]+ ?)\s*{_INDEX}'*(?:\^\{{-1\}})?(?:\([^()]*\))?\s*\|?"
    r"|m?\\(?:angle|triangle|overline|vec|hat|bar) ?\{?\s*[A-Za-z]{1,4}\s*\}?"
    r"|\\frac ?\{(?:[A-Z]{1,3}|d[a-z])\}\{(?:[A-Z]{1,3}|d[a-z])\}|«[A-Za-z ]{1,30}»|\|[A-Z]+\|"
    r"|[A-Z](?:_\{?\w+\}?)?:[A-Z](?:_\{?\w+\}?)?"
)
_MONTHS = [
    "january", "february", "march", "april", "may", "june", "july", "august", "september",
    "october", "november", "december",
]  # fmt: skip
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?\s*([ap])\.?\s*m\.?")
_ISO = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})")
_MONTH_FIRST = re.compile(r"([A-Za-z]{3,9})\.?\s*(\d{1,2})(?:st|nd|rd|th)?\s*,?\s*(\d{4})")
_DAY_FIRST = re.compile(r"(\d{1,2})(?:st|nd|rd|th)?\s*(?:of\s*)?([A-Za-z]{3,9})\.?\s*,?\s*(\d{4})")
_RATIO = re.compile(r"\d+(?:\s*:\s*\d+)+|\d{1,4}(?:[-/]\d{1,4}){2}")
_RANGE = re.compile(r"(\d+(?:\.\d+)?)\s*-{1,3}\s*(\d+(?:\.\d+)?)")
_BASED = re.compile(
    r"\(?\s*(?P<digits>[0-9A-Fa-f]+)\s*\)?\s*(?:_\s*\{?\s*(?P<base>\d{1,2}|«?[a-z]{3,8}»?)\s*\}?"
    r"|«?\s*\(?\s*base\s*(?P<said>\d{1,2}|[a-z]{3,8})\s*\)?\s*»?)"
)
_BASES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16,
}  # fmt: skip
_POWER_OF_TEN = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+))\s*[eE]\s*([-+]?\d+)")
_MIXED = re.compile(r"([-+]?)\s*(\d+) (\d+)\s*/\s*(\d+)")
_MULTIPLES = {
    "dozen": 12, "hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9,
    "trillion": 10**12,
}  # fmt: skip
_MULTIPLE = re.compile(rf"({'|'.join(_MULTIPLES)})s?\b", re.IGNORECASE)
_CURRENCY = re.compile(r"([-+]?)\s*([$€£¥])\s*(.+)")
_LITERAL = r"[-+]?\s*(?:\d+(?:\.\d+)?|\.\d+)"
_WITH_UNIT = re.compile(
    rf"(?P<number>{_LITERAL}(?:\s*/\s*\d+)?|{_LITERAL} \d+/\d+)\s*"
    r"(?P<unit>[A-Za-z°$€%£¥¢][A-Za-z°$€%£¥¢/*^{}\d\s.-]*)"
)
_UNIT_START = re.compile(r"[A-Za-z]{2}|(?<=\s)[mgLsh](?![A-Za-z])")
_EXPRESSION_WITH_UNIT = re.compile(
    r"(?P<value>.*[\d})\]!a-z])\s*(?:(?<=[\s\d})\]])(?P<words>[A-Za-z]{2,}[A-Za-z/*^{}\d\s]*)"
    r"|(?P<mark>[°%¢€]))"
)


def read_answer(text: str) -> Answer:
    """The answer that a text states, a `Text` if nothing else. Takes bounded time."""
    if len(text) > MAX_CHARACTERS:
        return Text(flat(text))
    if re.fullmatch(r"-?\d+(?:\.\d+)?", text, re.ASCII):  # most answers
        return Value(text, expression.read_expression(text))
    try:
        return _read(clean(text), 0)
    except RecursionError:
        return Text(flat(text))


def _read(text: str, depth: int, brackets: bool = False) -> Answer:
    text = stripped(text)
    written = flat(text)
    if depth > _MAX_DEPTH or not text:
        return Text(written)
    moment = _moment(text.replace("«", " ").replace("»", " "))
    if moment:
        return Text(moment)
    text = text.replace("\x03", "").strip()
    if not text:
        return Text(written)
    if text[0] == "«" and closing(text, 0) == len(text) - 1 and _COMMA.search(text[1:-1]):
        text = text[1:-1].strip()
    if not brackets:
        text = _joined_thousands(text)
        if _SPACED.fullmatch(text):
            text = text.replace(" ", "")
    return (
        _arranged(text, written, depth)
        or _listed(text, written, depth)
        or _both(text, written, depth)
        or _related(text, written, depth)
        or _bracketed(text, written, depth)
        or _single(text, written)
    )


def _joined_thousands(text: str) -> str:
    """Join thousands: 1,234 is one number outside brackets; (1,234) holds two."""

    def joined(match: re.Match[str]) -> str:
        before = text[: match.start()]
        depth = sum(before.count(a) - before.count(b) for a, b in ("()", "[]", "{}", "⦃⦄"))
        return match[0] if depth else match[0].replace(",", "")

    return _THOUSANDS.sub(joined, text)


def _moment(text: str) -> str:
    """Write dates and times in one form, also those that look like a sum or a quotient."""
    text = re.sub(r"\s+", " ", text).strip()
    clock = _CLOCK.fullmatch(text.lower())
    if clock:
        return f"{int(clock[1])}:{clock[2]}{':' + clock[3] if clock[3] else ''} {clock[4]}m"
    iso, first, last = (
        _ISO.fullmatch(text),
        _MONTH_FIRST.fullmatch(text),
        _DAY_FIRST.fullmatch(text),
    )
    year, month, day = "", 0, ""
    if iso:
        year, month, day = iso[1], int(iso[2]), iso[3]
    elif first:
        month, day, year = _month(first[1]), first[2], first[3]
    elif last:
        day, month, year = last[1], _month(last[2]), last[3]
    if month:
        return f"{year}-{month:02}-{int(day):02}"
    if re.fullmatch(r"\d+\s*(?:st|nd|rd|th)", text):
        return text.replace(" ", "")
    span = _RANGE.fullmatch(text)
    if _RATIO.fullmatch(text) or (span and Fraction(span[1]) < Fraction(span[2])):
        return re.sub(r"-+", "-", text.replace(" ", ""))
    return ""


def _month(name: str) -> int:
    found = [n for n, month in enumerate(_MONTHS, 1) if month.startswith(name.lower().rstrip("."))]
    return found[0] if len(name) >= 3 and len(found) == 1 else 0


def _arranged(text: str, written: str, depth: int) -> Answer | None:
    r"""A matrix or a system of equations, from the text between \begin and \end."""
    if r"\begin" not in text:
        return None
    named = re.fullmatch(rf"({_NAME.pattern})\s*=\s*(.*\\begin.*)", text, re.DOTALL)
    matrix = _MATRIX.fullmatch(named[2] if named else text)
    system = _SYSTEM.fullmatch(text)
    if matrix and not text.startswith("⦃") and r"\begin" not in matrix["body"]:
        rows = [row for row in matrix["body"].split(r"\\") if row.strip()]
        entries = [[cell.strip() for cell in row.split("&")] for row in rows]
        if sum(map(len, entries)) > 4 * MAX_PARTS:
            return Text(written)
        return Matrix(written, tuple(tuple(_read(c, depth + 1) for c in row) for row in entries))
    if system:
        lines = [line.replace("&", " ") for line in system["body"].split(r"\\") if line.strip()]
        parts = [_read(line, depth + 1) for line in lines[:MAX_PARTS]]
        if len(lines) <= MAX_PARTS and all(isinstance(part, Relation) for part in parts):
            return Many(written, tuple(parts), "several")
    return Text(written)


def _listed(text: str, written: str, depth: int) -> Answer | None:
    """Several answers."""
    parts = [part.strip() for part in split(text, _COMMA)]
    if len(parts) > 1:
        parts = [part for part in parts if part]
        if not 0 < len(parts) <= MAX_PARTS:
            return Text(written)
        if len(parts) == 1:
            return _read(parts[0], depth + 1)
        return _many(written, [_read(part, depth + 1) for part in _named_alike(parts)])
    return None


def _both(text: str, written: str, depth: int) -> Answer | None:
    """The two answers of a ±, unless it is inside a list."""
    is_list = text[0] in "([⦃" and closing(text, 0) == len(text) - 1
    if not re.search("[±∓]", text) or (is_list and len(split(text[1:-1], _INNER_COMMA)) > 1):
        return None
    pairs = (("+", "-"), ("-", "+"))
    both = [text.replace("±", upper).replace("∓", lower) for upper, lower in pairs]
    return _many(written, [_read(re.sub(r"(^|=)\s*\+", r"\1", t), depth + 1) for t in both])


def _named_alike(parts: Sequence[str]) -> list[str]:
    """Repeat a name: `x = 1, 2` becomes `x = 1, x = 2`."""
    name = re.match(rf"\s*({_NAME.pattern}|\([A-Za-z, ]+\))\s*=", parts[0])
    if name is None or any(_SIGN.search(part) for part in parts[1:]):
        return list(parts)
    return [parts[0], *(f"{name[0]}{part}" for part in parts[1:])]


def _many(written: str, parts: Iterable[Answer], sort: str = "several") -> Many:
    """Several answers; parts that hold several themselves are flattened."""
    found: list[Answer] = []
    for part in parts:
        is_flat = isinstance(part, Many) and part.sort == "several"
        found += part.parts if isinstance(part, Many) and is_flat else [part]
    return Many(written, tuple(found), sort)


def _related(text: str, written: str, depth: int) -> Answer | None:
    """A relation, a membership, a union."""
    sides = [side.strip() for side in split(text, _SIGN)]
    if len(sides) > 1:
        signs = [text[place] for place in _places(text, _SIGN)]
        if not sides[0] and signs[0] in "=≈":
            sides, signs = sides[1:], signs[1:]
        if "≈" in signs:  # the side before it is exact
            place = signs.index("≈")
            if place or not _NAME.fullmatch(sides[0]):
                sides, signs = sides[: place + 1], signs[:place]
            else:
                signs = [sign.replace("≈", "=") for sign in signs]
        if any(not side for side in sides) or len(sides) > 8:
            return Text(written)
        if len(sides) == 1:
            return _read(sides[0], depth + 1)
        read = tuple(_read(side, depth + 1) for side in sides)
        return Relation(written, tuple(signs), read)
    members = [side.strip() for side in split(text, _MEMBER)]
    if len(members) == 2 and _NAME.fullmatch(members[0]):
        return Relation(written, ("∈",), tuple(_read(side, depth + 1) for side in members))
    parts = [part.strip() for part in split(text, _UNION)]
    if len(parts) > 1:
        if len(parts) > MAX_PARTS or not all(parts):
            return Text(written)
        return Many(written, tuple(_read(part, depth + 1) for part in parts), "union")
    if len(members) > 1 or len(split(text, _OTHER)) > 1:
        return Text(written)
    return None


def _places(text: str, separator: re.Pattern[str]) -> list[int]:
    """Positions at which `split` splits."""
    places, place = [], 0
    for part in split(text, separator)[:-1]:
        place += len(part)
        places.append(place)
        place += 1
    return places


def _bracketed(text: str, written: str, depth: int) -> Answer | None:
    """A tuple, an interval or a set."""
    if text[0] not in "([⦃" or closing(text, 0) != len(text) - 1:
        return None
    inner = text[1:-1].strip()
    spaced = bool(re.search(r",\s|;", inner))
    if spaced:
        inner = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), inner)
    parts = [part.strip() for part in split(inner, _INNER_COMMA)]
    if len(parts) > MAX_PARTS:
        return Text(written)
    kinds = text[0] + text[-1]
    if kinds == "⦃⦄":
        if not inner:
            return Text("∅")
        if (re.search(r"[|:]", inner) and _SIGN.search(inner)) or "..." in inner:
            return Text(written)
        read = [_read(part, depth + 1, brackets=True) for part in parts]
        return _many(written, read, "set")
    if len(parts) == 1:
        return _read(inner, depth + 1) if kinds in ("()", "[]") else Text(written)
    if kinds == "()" and [part.replace(" ", "").lstrip("+") for part in parts] == ["-∞", "∞"]:
        return Text(_REALS)
    return Group(written, kinds, tuple(_read(part, depth + 1, brackets=True) for part in parts))


def _single(text: str, written: str) -> Answer:
    """A number, an expression, a quantity, a number of a base, or a text."""
    if re.fullmatch(r"\+?\s*∞", text):
        return Text("∞")
    based = _BASED.fullmatch(text)
    if based and based["digits"][0].isalnum():
        answer = _based(based, written)
        if answer:
            return answer
    if re.fullmatch(r"[A-Za-z]+", text) and text not in ("e", "i"):
        return Text(written)
    plain = _WITH_UNIT.fullmatch(text)
    # 5 cm is no product of c and m, and neither is 5 m, but 5m is.
    if plain and _UNIT_START.match(text, plain.start("unit")):
        quantity = _of(plain["number"], plain["unit"], written, any_words=False)
        if quantity:
            return quantity
    node = _node(text)
    if node is not None:
        return Value(written, node)
    return _quantity(text, written) or Text(written)


def _based(match: re.Match[str], written: str) -> Answer | None:
    said = (match["base"] or match["said"]).strip("«»")
    base = int(said) if said.isdigit() else _BASES.get(said, 0)
    digits = match["digits"].upper()
    if digits in "ABCDEF":
        return None  # a letter with an index
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        return None
    if base == 10:
        return Value(written, Number(Fraction(digits)))
    return Based(written, digits.lstrip("0") or "0", base)


def _node(text: str) -> Node | None:
    """The tree of an expression, or of a number in everyday notation."""
    scientific = _POWER_OF_TEN.fullmatch(text)
    if scientific and abs(int(scientific[2][:9])) <= _MOST_EXPONENT:
        power = int(scientific[2])
        places = len(scientific[1].partition(".")[2])
        return Number(Fraction(scientific[1]) * Fraction(10) ** power, max(0, places - power))
    mixed = _MIXED.fullmatch(text)
    if mixed and int(mixed[4]) > int(mixed[3]):
        number = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return Number(-number if mixed[1] == "-" else number)
    try:
        return expression.read_expression(text)
    except Unreadable:
        return None


def _quantity(text: str, written: str) -> Answer | None:
    currency = _CURRENCY.fullmatch(text)
    if currency:
        counted = _WITH_UNIT.fullmatch(currency[3])
        number, rest = (counted["number"], counted["unit"]) if counted else (currency[3], "")
        node, unit = _node(number), read_unit(f"{currency[2]} {rest}", any_words=True)
        if node is None or unit is None:
            return None
        return Quantity(written, Apply("-", (node,)) if currency[1] == "-" else node, unit)
    before, mark, after = text.partition("«")
    if mark and before.strip():
        return _of(before, after.replace("«", " ").replace("»", " "), written, any_words=True)
    literal = _WITH_UNIT.fullmatch(text)
    if literal:
        is_product = re.match(r"[A-Za-z](?![A-Za-z])", literal["unit"])  # 5x, unless it is 5 x
        if not is_product or text[literal.end("number")] == " ":
            return _of(literal["number"], literal["unit"], written, any_words=True)
    other = _EXPRESSION_WITH_UNIT.fullmatch(text)
    if other:
        return _of(other["value"], other["mark"] or other["words"], written, any_words=False)
    return None


def _of(number: str, unit: str, written: str, *, any_words: bool) -> Answer | None:
    number, unit = number.strip().rstrip("*").strip(), unit.strip()
    multiple = _MULTIPLE.match(unit)
    found = read_unit(unit[multiple.end() :] if multiple else unit, any_words=any_words)
    node = _node(number)
    if found is None or node is None:
        return None
    if multiple:
        node = _times(node, Fraction(_MULTIPLES[multiple[1].lower()]))
    return Quantity(written, node, found) if found.powers else Value(written, node)


# --- comparing ------------------------------------------------------------------------------------


def same(gold: Answer, said: Answer, rules: Rules) -> bool:
    """True if `said` states `gold`. A set of one number equals that number."""
    return _same(_of_one(gold), _of_one(said), rules)


def _of_one(answer: Answer) -> Answer:
    if isinstance(answer, Many) and answer.sort == "set":
        first = answer.parts[0]
        if isinstance(first, Value) and {part.written for part in answer.parts} == {first.written}:
            return first
    return answer


def _same(gold: Answer, said: Answer, rules: Rules) -> bool:
    if gold.written == said.written and gold.written:
        return True
    gold, said = _lone(gold), _lone(said)
    if isinstance(gold, Relation) and isinstance(said, Relation):
        return _same_relation(gold, said, rules)
    if isinstance(gold, Relation):
        return _same_as_relation(gold, said, rules)
    if isinstance(said, Relation):
        return _stated_by(gold, said, rules)
    if isinstance(gold, Many) or isinstance(said, Many):
        return _same_many(gold, said, rules)
    if isinstance(gold, Group) and isinstance(said, Group):
        return gold.brackets == said.brackets and _in_order(gold.parts, said.parts, rules)
    if isinstance(gold, Matrix) and isinstance(said, Matrix):
        return len(gold.rows) == len(said.rows) and all(
            _in_order(a, b, rules) for a, b in zip(gold.rows, said.rows, strict=True)
        )
    if isinstance(gold, Based) and isinstance(said, Based):
        return gold.digits == said.digits and gold.base == said.base
    return _same_number(_as_product(gold, said), _as_product(said, gold), rules)


def _lone(answer: Answer) -> Answer:
    """The part of several answers if there is only one."""
    while isinstance(answer, Many) and len(answer.parts) == 1 and answer.sort != "set":
        answer = answer.parts[0]
    return answer


def _in_order(golds: Sequence[Answer], saids: Sequence[Answer], rules: Rules) -> bool:
    return len(golds) == len(saids) and all(
        _same(a, b, rules) for a, b in zip(golds, saids, strict=True)
    )


def _as_product(answer: Answer, other: Answer) -> Answer:
    """A text of letters as a product, if the other answer is an expression."""
    letters = isinstance(answer, Text) and re.fullmatch(r"[A-Za-z]{1,3}", answer.written)
    if letters and isinstance(other, Value):
        node = _node(answer.written)
        return answer if node is None else Value(answer.written, node)
    return answer


def _same_number(gold: Answer, said: Answer, rules: Rules) -> bool:
    """Compare numbers and expressions; a unit that only one of them has is ignored."""
    if not isinstance(gold, Value | Quantity) or not isinstance(said, Value | Quantity):
        return False
    if isinstance(gold, Quantity) and isinstance(said, Quantity):
        if gold.unit == said.unit or not rules.compare_units:
            return _equal(gold.node, said.node, rules)
        if gold.unit.powers != said.unit.powers:
            return False
        return _equal(_times(gold.node, gold.unit.size), _times(said.node, said.unit.size), rules)
    if _equal(gold.node, said.node, rules):
        return True
    if isinstance(gold, Quantity) and gold.unit.is_percent:
        return _equal(_times(gold.node, Fraction(1, 100)), said.node, rules)
    if isinstance(said, Quantity) and said.unit.is_percent:
        return _equal(gold.node, _times(said.node, Fraction(1, 100)), rules)
    return False


def _times(node: Node, factor: Fraction) -> Node:
    return Apply("*", (node, Number(factor)))


def _equal(gold: Node, said: Node, rules: Rules) -> bool:
    try:
        if expression.same_value(gold, said):
            return True
        constant = not expression.symbols(gold) and not expression.symbols(said)
        return constant and _nearly(gold, said, rules)
    except Unreadable:
        return False


def _nearly(gold: Node, said: Node, rules: Rules) -> bool:
    """True if a decimal is within the tolerance of a number, or is that number rounded.

    Without a tolerance, a decimal of six digits or more equals a number without a finite decimal
    (1/3, √2) if it is that number rounded to the decimal's last digit.
    """
    if not (expression.has_decimal(gold) or expression.has_decimal(said)):
        return False
    wanted, found = expression.value(gold), expression.value(said)
    if rules.tolerance and abs(wanted - found) <= abs(wanted) * float(rules.tolerance):
        return True
    for decimal, number in ((gold, said), (said, gold)):
        literal = decimal.to[0] if isinstance(decimal, Apply) and decimal.what == "-" else decimal
        if not isinstance(literal, Number) or not literal.places or expression.has_decimal(number):
            continue
        value = expression.exact(number)
        if value is not None and 10**400 % value.denominator == 0:
            continue  # a decimal itself
        scale = Fraction(10) ** literal.places
        if literal.value * scale >= _SIX_DIGITS:
            return bool(abs(wanted - found) * 2 * int(scale) <= 1)
    return False


def _same_many(gold: Answer, said: Answer, rules: Rules) -> bool:
    """Compare parts in any order. A set equals several answers; a union equals neither."""
    if isinstance(gold, Many) and isinstance(said, Many):
        if "union" in (gold.sort, said.sort) and gold.sort != said.sort:
            one, two = _as_union(gold), _as_union(said)
            return one is not None and two is not None and _same_many(one, two, rules)
        if {_joint(gold), _joint(said)} == {"and", "or"}:
            return False
        golds, saids = _parts(gold, rules), _parts(said, rules)
        if gold.sort == "several" and said.sort == "several":
            bare = _without_names(golds, saids)
            if bare is not None:
                return _in_order(bare, saids, rules)
        return _matched(golds, saids, rules)
    return False


def _joint(many: Many) -> str:
    """The word ("and", "or") between inequalities; '' without one."""
    if all(isinstance(part, Relation) and "=" not in part.signs for part in many.parts):
        word = re.search(r"and|or", many.written)
        return word[0] if word else ""
    return ""


def _parts(many: Many, rules: Rules) -> list[Answer]:
    """The parts; those of a set without repetitions."""
    if many.sort != "set":
        return list(many.parts)
    kept: list[Answer] = []
    for part in many.parts:
        if not any(_same(part, other, rules) for other in kept):
            kept.append(part)
    return kept


def _matched(golds: Sequence[Answer], saids: Sequence[Answer], rules: Rules) -> bool:
    if len(golds) != len(saids):
        return False
    left = list(saids)
    for gold in golds:
        found = next((n for n, said in enumerate(left) if _same(gold, said, rules)), None)
        if found is None:
            return False
        del left[found]
    return True


def _without_names(golds: Sequence[Answer], saids: Sequence[Answer]) -> list[Answer] | None:
    """Values of `a = 1, b = 2` in order, if the other answer has no names; else None."""
    if any(isinstance(said, Relation) for said in saids):
        return None
    named = [_assigned(gold) if isinstance(gold, Relation) else None for gold in golds]
    found = [pair for pair in named if pair is not None]
    if len(found) != len(golds) or len({name for name, _ in found}) < len(found):
        return None
    return [value for _, value in found]


def _assigned(relation: Relation) -> tuple[str, Answer] | None:
    """Name and value of `x = 5`, `5 = x`, `f(x) = ... = 2x` or `x ∈ S`; None for others."""
    if relation.signs == ("∈",):
        return relation.sides[0].written, relation.sides[1]
    if set(relation.signs) != {"="}:
        return None
    for name, value in ((0, -1), (-1, 0)):
        written = relation.sides[name].written
        if _is_name(relation.sides[name]):
            constants = [side for side in relation.sides if _is_constant(side)]
            if all(_same(constants[0], other, Rules()) for other in constants[1:]):
                return written, relation.sides[value]
            return None
    return None


def _is_name(side: Answer) -> bool:
    if isinstance(side, Group):
        return all(_is_name(part) for part in side.parts)
    if isinstance(side, Value):
        node = side.node
        is_name = not _is_constant(side) and not re.match(r"\\(?!frac)", side.written)
        return isinstance(node, Symbol) or bool(is_name and _NAME.fullmatch(side.written))
    if isinstance(side, Text):
        named = _NAME.fullmatch(side.written) or re.fullmatch("[a-z ]{3,30}", side.written)
        return bool(named or re.match(r"\\(?:sum|prod|int|lim)(?![a-z])", side.written))
    return False


def _is_constant(side: Answer) -> bool:
    return isinstance(side, Value | Quantity) and not expression.symbols(side.node)


def _same_relation(gold: Relation, said: Relation, rules: Rules) -> bool:
    if ("∈",) in (gold.signs, said.signs):
        one, two = _as_set(gold), _as_set(said)
        if one is None or two is None or _variable(gold) != _variable(said):
            return False
        return _same(one, two, rules)
    pairs = _assigned(gold), _assigned(said)
    if pairs[0] is not None and pairs[1] is not None:
        if pairs[0][0] == pairs[1][0]:
            return _same(pairs[0][1], pairs[1][1], rules)
        if _is_constant(pairs[0][1]) or _is_constant(pairs[1][1]):
            return False
    if len(gold.sides) == 2 and len(said.sides) == 2:
        return _same_equation(gold, said)
    one, other = _ascending(gold), _ascending(said)
    return (
        one.signs == other.signs
        and "=" not in one.signs
        and _in_order(one.sides, other.sides, rules)
    )


def _variable(relation: Relation) -> str:
    """The letter that a membership or an inequality restricts."""
    names = [side.written for side in relation.sides if _is_name(side)]
    return names[0] if names else ""


_FLIPPED = {">": "<", "≥": "≤"}


def _ascending(relation: Relation) -> Relation:
    """The relation with its sides reordered to use < and ≤ only, if possible."""
    if all(sign in _FLIPPED for sign in relation.signs):
        signs = tuple(_FLIPPED[sign] for sign in reversed(relation.signs))
        return Relation(relation.written, signs, relation.sides[::-1])
    return relation


def _same_equation(gold: Relation, said: Relation) -> bool:
    """True if left - right of one is a multiple of the other's; a positive multiple for < and ≤.

    A relation that holds for every value, or for none, states nothing and equals no other.
    """
    one, other = _ascending(gold), _ascending(said)
    if one.signs != other.signs:
        return False
    nodes = [_difference(relation) for relation in (one, other)]
    if nodes[0] is None or nodes[1] is None:
        return False
    if not expression.symbols(nodes[0]) or not expression.symbols(nodes[1]):
        return False
    try:
        found = expression.ratio(nodes[0], nodes[1])
    except Unreadable:
        return False
    if found is None or one.signs[0] in "=≠":
        return found is not None
    return not getattr(found, "imag", 0) and found.real > 0


def _difference(relation: Relation) -> Node | None:
    nodes: list[Node] = []
    for side in relation.sides:
        side = _as_product(side, Value("", Symbol("x")))
        if not isinstance(side, Value):
            return None
        nodes.append(side.node)
    return Apply("+", (nodes[0], Apply("-", (nodes[1],))))


def _same_as_relation(gold: Relation, said: Answer, rules: Rules) -> bool:
    """Compare a gold relation with an answer that is none: a name's value, or the set described."""
    pair = _assigned(gold)
    if pair is not None:
        name, value = pair
        is_curve = name in ("x", "y", "z") and isinstance(value, Value) and not _is_constant(value)
        return not is_curve and _same(value, said, rules)
    interval = _as_set(gold)
    return interval is not None and isinstance(said, Group | Many) and _same(interval, said, rules)


def _stated_by(gold: Answer, said: Relation, rules: Rules) -> bool:
    """Compare a gold answer that is no relation with one that names, derives or describes it."""
    pair = _assigned(said)
    if pair is not None:
        return _same(gold, pair[1], rules)
    if set(said.signs) == {"="} and all(map(_is_constant, said.sides)):
        return all(_same(gold, side, rules) for side in said.sides)
    if said.signs == ("=",) and _is_measured(said.sides[0]) and _is_constant(gold):
        return _same(gold, said.sides[1], rules)
    interval = _as_set(said)
    return interval is not None and isinstance(gold, Group | Many) and _same(gold, interval, rules)


def _as_union(many: Many) -> Many | None:
    """Several inequalities as the union of the sets they describe; a union unchanged."""
    if many.sort == "union":
        return many
    parts = [_as_set(part) if isinstance(part, Relation) else None for part in many.parts]
    found = tuple(part for part in parts if part is not None)
    is_union = many.sort == "several" and len(found) == len(parts)
    return Many(many.written, found, "union") if is_union else None


_TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc")


def _is_measured(side: Answer) -> bool:
    """True for an expression whose value a question may ask: m+n (but x+y = 1 is a line), cos A."""
    if not isinstance(side, Value):
        return False
    node = side.node
    angle = isinstance(node, Apply) and node.what in _TRIGONOMETRIC and node.to[0]
    return isinstance(angle, Symbol) or bool(re.fullmatch(r"[a-wA-W](?:\+[a-wA-W])+", side.written))


def _as_set(answer: Answer) -> Answer | None:
    """The interval of an inequality for one letter."""
    if not isinstance(answer, Relation):
        return None
    if answer.signs == ("∈",):
        return answer.sides[1]
    relation = _ascending(answer)
    if not set(relation.signs) <= {"<", "≤"}:
        return None
    sides, signs = relation.sides, relation.signs
    if len(sides) == 2:
        if _is_name(sides[0]):
            sides, signs = (Text("-∞"), *sides), ("<", *signs)
        else:
            sides, signs = (*sides, Text("∞")), (*signs, "<")
    if len(sides) != 3 or not _is_name(sides[1]):
        return None
    brackets = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
    return Group(f"{answer.written} as a set", brackets, (sides[0], sides[2]))


# --- votes ----------------------------------------------------------------------------------------


def spelling(answer: Answer) -> str:
    """A text that is the same for equal answers, for votes: digits of a number, a set in order.

    An expression with letters is written as its value at a fixed point.
    """
    if isinstance(answer, Value):
        return _digits(answer.node) or answer.written
    if isinstance(answer, Quantity):
        size = answer.unit.size / (100 if answer.unit.is_percent else 1)
        amount = _digits(_times(answer.node, size)) or answer.written
        units = " ".join(f"{n}^{p}" if p != 1 else n for n, p in answer.unit.powers)
        return amount if answer.unit.is_percent else f"{amount} {units}"
    if isinstance(answer, Based):
        return f"{answer.digits}_{answer.base}"
    if isinstance(answer, Many):
        parts = sorted(map(spelling, answer.parts))
        if answer.sort == "set":
            parts = sorted(set(parts))
        return (" ∪ " if answer.sort == "union" else ", ").join(parts)
    if isinstance(answer, Group):
        return answer.brackets[0] + ", ".join(map(spelling, answer.parts)) + answer.brackets[1]
    if isinstance(answer, Matrix):
        return "; ".join(", ".join(map(spelling, row)) for row in answer.rows)
    if isinstance(answer, Relation):
        pair = _assigned(answer)
        return spelling(pair[1]) if pair is not None else answer.written
    return answer.written


def _digits(node: Node) -> str:
    try:
        value = expression.exact(node)
        if (
            value is not None
            and value.numerator.bit_length() + value.denominator.bit_length() < 2000
        ):
            return str(value)
        names = sorted(expression.symbols(node))
        digits = expression.shown(node, expression.points(frozenset(names))[0])
    except Unreadable:
        return ""
    at = f" ({', '.join(names)})" if names else ""
    return f"{digits}{at}"
