"""Units of quantities, with their dimensions and sizes."""

import re
from dataclasses import dataclass
from fractions import Fraction

_SIZES: dict[str, dict[str, int | str]] = {
    "length": {
        "m": 1, "meter": 1, "metre": 1, "cm": "0.01", "centimeter": "0.01", "centimetre": "0.01",
        "mm": "0.001", "millimeter": "0.001", "millimetre": "0.001", "km": 1000,
        "kilometer": 1000, "kilometre": 1000, "in": "0.0254", "inch": "0.0254", "inche": "0.0254",
        "ft": "0.3048", "foot": "0.3048", "feet": "0.3048", "yd": "0.9144", "yard": "0.9144",
        "mi": "1609.344", "mile": "1609.344", "dm": "0.1", "nm": "1e-9", "um": "1e-6",
    },
    "mass": {
        "g": 1, "gram": 1, "kg": 1000, "kilogram": 1000, "mg": "0.001", "milligram": "0.001",
        "lb": "453.59237", "oz": "28.349523125", "ounce": "28.349523125",
    },
    "time": {
        "s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hr": 3600,
        "hour": 3600, "day": 86400, "week": 604800, "ms": "0.001",
    },
    "volume": {"L": 1, "l": 1, "liter": 1, "litre": 1, "mL": "0.001", "ml": "0.001",
               "milliliter": "0.001", "millilitre": "0.001"},
    "angle": {"°": 1, "degree": 1, "deg": 1},
    "radian": {"rad": 1, "radian": 1},
    "dollar": {"$": 100, "dollar": 100, "USD": 100, "usd": 100, "buck": 100, "cent": 1, "¢": 1},
    "euro": {"€": 1, "euro": 1, "EUR": 1},
    "part": {"%": 1, "percent": 1, "pct": 1, "percentage": 1},
    "sterling": {"£": 1},
    "yen": {"¥": 1, "yen": 1},
    "power": {"W": 1, "kW": 1000, "watt": 1, "kilowatt": 1000},
    "energy": {"J": 1, "kJ": 1000, "joule": 1, "kilojoule": 1000, "eV": "1.602176634e-19"},
    "voltage": {"V": 1, "volt": 1}, "current": {"A": 1, "ampere": 1, "amp": 1},
    "force": {"N": 1, "newton": 1, "kN": 1000}, "frequency": {"Hz": 1, "hertz": 1, "kHz": 1000},
    "amount": {"mol": 1, "mole": 1}, "temperature": {"K": 1, "kelvin": 1},
    "celsius": {"degC": 1, "celsius": 1}, "fahrenheit": {"degF": 1, "fahrenheit": 1},
}  # fmt: skip
_KNOWN = {
    name: (kind, Fraction(str(size)))
    for kind, sizes in _SIZES.items()
    for name, size in sizes.items()
}
_WHOLE = {"mph": "mile/hour", "kph": "km/h", "kmh": "km/h", "sq": "square", "cc": "cm^3"}
NEUTRAL = frozenset([
    "unit", "every", "each", "total", "altogether", "left", "remaining", "all", "way",
])  # fmt: skip
"""Words that name no unit."""
_NOT_UNITS = frozenset([
    "and", "or", "if", "for", "where", "when", "is", "are", "the", "than", "mod", "more",
    "less", "times", "of", "only", "not", "in", "at", "with", "am", "pm", "a.m.", "p.m.",
    "base", "a", "an", "to", "from", "by", "but", "then", "so", "that", "which", "because",
    "since", "wrong", "incorrect", "false", "fewer", "plus", "minus", "greater", "half",
    "double", "couple", "pairs", "pair", "percentile", "score", "squared", "cubed", "factorial",
    "root", "below", "above", "under", "over", "past", "short", "behind", "negative", "ten",
    "tens", "gross", "halves", "third", "thirds", "quarter", "quarters", "fourth", "fourths",
    "fifth", "fifths", "sixth", "sixths", "seventh", "sevenths", "eighth", "eighths", "ninth",
    "ninths", "tenth", "tenths", "twelfth", "twelfths", "hundredth", "hundredths", "thousandth",
    "thousandths", "millionth", "millionths",
])  # fmt: skip
_PIECE = re.compile(
    r"\s*(?:(?P<name>[A-Za-z]+|[°$€%£¥¢])(?:\s*\^\s*\{?\s*(?P<power>-?\d)\s*\}?)?|(?P<sign>[/*]))\s*\.?"
)
PERCENT = "%"


@dataclass(frozen=True)
class Unit:
    """Powers of its dimensions, and its size in base units."""

    powers: tuple[tuple[str, int], ...]
    size: Fraction

    @property
    def is_percent(self) -> bool:
        return self.powers == (("part", 1),)


def read_unit(text: str, *, any_words: bool) -> Unit | None:
    """The unit that the whole text names: "cm^2", "miles per hour", "square feet"; None: no unit.

    Args:
        text: cleaned, and without the marks of a text.
        any_words: accept up to three unknown words, such as "blue apples", as a unit.
    """
    words = re.sub(r"\bper\b", "/", text.replace("square units", "").replace("cubic units", ""))
    words = re.sub(r"(?:degrees?|°)\s*([Cc]elsius|[Ff]ahrenheit)", r"\1", words)
    for whole, parts in _WHOLE.items():
        words = re.sub(rf"\b{whole}\b", parts, words)
    powers: dict[str, int] = {}
    size, place, over, next_power, unknown = Fraction(1), 0, 1, 1, 0
    words = words.strip()
    while place < len(words):
        match = _PIECE.match(words, place)
        if match is None or match.end() == place:
            return None
        place = match.end()
        if match["sign"]:
            over = -1 if match["sign"] == "/" else over
            continue
        name = match["name"]
        if name.lower() in ("square", "cubic", "squared", "cubed"):
            if name.lower() in ("squared", "cubed"):
                return None
            next_power = 2 if name.lower() == "square" else 3
            continue
        known = _known(name)
        if known is None:
            unknown += 1
            if name in _NOT_UNITS or not any_words or unknown > 3 or not name.islower():
                return None
            if len(name) == 1:
                return None
            known = (_stem(name), Fraction(1))
        power = over * next_power * int(match["power"] or 1)
        if power == 0:
            return None
        powers[known[0]] = powers.get(known[0], 0) + power
        size *= known[1] ** power
        next_power = 1
    kept = {kind: power for kind, power in powers.items() if power and kind not in NEUTRAL}
    return Unit(tuple(sorted(kept.items())), size)


def _known(name: str) -> tuple[str, Fraction] | None:
    for spelling in (name, name.lower() if len(name) > 2 else name, _stem(name.lower())):
        if spelling in _KNOWN and (len(spelling) > 2 or spelling == name):
            return _KNOWN[spelling]
    return _KNOWN.get(name[:-1]) if name.endswith("s") and len(name) == 3 else None  # lbs, hrs


def _stem(name: str) -> str:
    return name[:-1] if name.endswith("s") and len(name) > 3 else name
