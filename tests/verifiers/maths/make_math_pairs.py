r"""Makes tests/verifiers/maths/math_pairs.jsonl: `python tests/verifiers/maths/make_math_pairs.py`.

Each line has a kind, a gold answer, a response, and whether the response is right. A question is
made first: how its gold answer can be written, how a right answer can be written, and which wrong
answers are near it. The verdict follows from that, and no grader is asked. For each question there
is one right response and one wrong one.
"""

# fmt: off
# ruff: noqa: E501, RUF001
# Spellings of one answer read best on one line.

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, getcontext
from fractions import Fraction
from pathlib import Path
from random import Random

TABLE = Path(__file__).with_name("math_pairs.jsonl")
SEED = 23
QUESTIONS = 64
"""For each kind; twice as many pairs."""
getcontext().prec = 40


@dataclass(frozen=True, kw_only=True)
class Question:
    golds: Sequence[str]
    rights: Sequence[str]
    wrongs: Sequence[str]


# --- numbers --------------------------------------------------------------------------------------


def commas(number: int, comma: str = ",") -> str:
    return f"{number:,}".replace(",", comma)


def other_digit(text: str, draw: Random) -> str:
    """With one digit replaced, not so that only leading zeros differ."""
    places = [i for i, c in enumerate(text) if c.isdigit()]
    place = draw.choice(places)
    digit = draw.choice([d for d in "123456789" if d != text[place]])
    return text[:place] + digit + text[place + 1 :]


def integer(draw: Random) -> Question:
    number = draw.randrange(10 ** draw.randint(1, 9)) + 2
    sign = draw.choice(["", "", "-"])
    plain = f"{sign}{number}"
    spellings = [plain, f"${plain}$", f"{plain}.0", rf"{{{plain}}}", f" {plain} ", f"{plain}."]
    golds = [plain, plain, f"${plain}$"]
    if number >= 1000:
        grouped = [f"{sign}{commas(number, c)}" for c in (",", "{,}", r"\,", r",\!")]
        spellings += grouped
        golds += grouped[:2]
    elif not sign:
        golds.append(f"{number:03}")  # as in AIME
        spellings.append(f"{number:03}")
    wrongs = [
        other_digit(plain, draw),
        f"{sign}{number + 1}",
        f"{sign}{number * 10}",
        f"{'' if sign else '-'}{number}",
        rf"\frac{{1}}{{{plain}}}",
        f"{plain}.5",
        f"{plain}7",
        rf"{plain}\sqrt{{2}}",
        rf"{plain}\pi",
        f"{plain}!" if number > 2 else f"{plain}9",
        f"{plain}i",
    ]
    return Question(golds=golds, rights=spellings, wrongs=wrongs)


def fraction(draw: Random) -> Question:
    value = Fraction(draw.randint(1, 60), draw.randint(2, 60))
    while value.denominator == 1:
        value = Fraction(draw.randint(1, 60), draw.randint(2, 60))
    a, b = value.numerator, value.denominator
    sign = draw.choice(["", "", "-"])
    k = draw.randint(2, 5)
    golds = [rf"{sign}\frac{{{a}}}{{{b}}}", f"{sign}{a}/{b}", rf"${sign}\dfrac{{{a}}}{{{b}}}$"]
    rights = [
        *golds,
        rf"{sign}\tfrac{{{a}}}{{{b}}}",
        rf"{sign}\frac{{{k * a}}}{{{k * b}}}",
        rf"\frac{{{sign}{a}}}{{{b}}}",
        rf"\left({sign}\frac{{{a}}}{{{b}}}\right)",
        rf"{sign}{a} / {b}",
        rf"{sign}{a} \div {b}",
        rf"{sign}\displaystyle\frac{{{a}}}{{{b}}}",
    ]
    if a < 10 and b < 10:
        rights += [rf"{sign}\frac{a}{b}", rf"{sign}\frac {a} {b}", rf"{sign}\frac{{{a}}}{b}"]
    if 10**9 % b == 0:
        rights += [f"{sign}{Decimal(a) / b}", f"{sign}{Decimal(a) / b}0"]
    if a > b:
        rights += [rf"{sign}{a // b}\frac{{{a % b}}}{{{b}}}", rf"{sign}{a // b} {a % b}/{b}"]
    wrongs = [
        rf"{sign}\frac{{{b}}}{{{a}}}",
        rf"{sign}\frac{{{a + 1}}}{{{b}}}",
        rf"{sign}\frac{{{a}}}{{{b + 1}}}",
        rf"{'' if sign else '-'}\frac{{{a}}}{{{b}}}",
        f"{sign}{a}/{b}{draw.randint(0, 9)}",
        f"{sign}{a}{b}",
        rf"{sign}\frac{{{a}}}{{\sqrt{{{b}}}}}" if math.isqrt(b) ** 2 != b else f"{sign}{a}",
        f"{sign}{a}",
        f"{sign}{round(a / b + 0.011, 2)}",
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def decimal(draw: Random) -> Question:
    places = draw.randint(1, 5)
    number = draw.randrange(10 ** draw.randint(1, 7)) * 10 + draw.randint(1, 9)
    text = str(Decimal(number).scaleb(-places).quantize(Decimal(1).scaleb(-places)))
    text = format(Decimal(text), "f")
    sign = draw.choice(["", "", "-"])
    value = Fraction(number, 10**places)
    rights = [sign + text, f"{sign}{text}0", f"${sign}{text}$", rf"{sign}\frac{{{value.numerator}}}{{{value.denominator}}}", f"{sign}{text}000"]
    if text.startswith("0."):
        rights.append(sign + text[1:])
    whole, _, rest = text.partition(".")
    if len(whole) > 3:
        rights.append(f"{sign}{commas(int(whole))}.{rest}")
    wrongs = [
        sign + other_digit(text, draw),
        sign + text.replace(".", ""),
        ("" if sign else "-") + text,
        sign + format(Decimal(text) * 10, "f"),
        f"{sign}{text}1",
        sign + str(Decimal(text) + Decimal(1).scaleb(-places)),
        "0.0",
        sign + whole if set(rest) != {"0"} else sign + text + "9",
    ]
    return Question(golds=[sign + text, f"${sign}{text}$"], rights=rights, wrongs=wrongs)


def scientific(draw: Random) -> Question:
    mantissa, power = Decimal(draw.randint(11, 99)) / 10, draw.randint(4, 12)
    sign = draw.choice(["", "-"])  # of the exponent
    golds = [rf"{mantissa} \times 10^{{{sign}{power}}}", rf"${mantissa}\cdot 10^{{{sign}{power}}}$"]
    plain = format(mantissa.scaleb(-power if sign else power), "f")
    rights = [*golds, plain, f"{mantissa}e{sign}{power}", f"{mantissa}E{sign}{power}"]
    rights += [rf"{mantissa * 10}\times 10^{{{int(f'{sign}{power}') - 1}}}"]
    other = int(f"{sign}{power}") + draw.choice([-1, 1])
    wrongs = [
        rf"{mantissa} \times 10^{{{other}}}",
        rf"{mantissa + 1}\times 10^{{{sign}{power}}}",
        rf"{mantissa}\times 10^{{{'' if sign else '-'}{power}}}",
        str(mantissa),
        "0",
        f"{mantissa}e{other}",
        rf"10^{{{sign}{power}}}",
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def power(draw: Random) -> Question:
    base, exponent = draw.choice([2, 3, 5, 6, 7, 12]), draw.randint(30, 120)
    golds = [rf"\frac{{1}}{{{base}^{{{exponent}}}}}", rf"{base}^{{-{exponent}}}"]
    other = exponent + draw.choice([-1, 1])
    rights = [*golds, rf"1/{base}^{{{exponent}}}", rf"\left(\frac{{1}}{{{base}}}\right)^{{{exponent}}}"]
    rights += [rf"\frac{{{base}}}{{{base}^{{{exponent + 1}}}}}"]
    wrongs = [
        rf"\frac{{1}}{{{base}^{{{other}}}}}",
        rf"{base}^{{-{other}}}",
        rf"\frac{{1}}{{{base + 1}^{{{exponent}}}}}",
        rf"-\frac{{1}}{{{base}^{{{exponent}}}}}",
        "0",
        "0.0",
        rf"{base}^{{{exponent}}}",
    ]
    if draw.random() < 0.5:
        whole = base**exponent
        golds = [rf"{base}^{{{exponent}}}", str(whole)]
        rights = [
            *golds,
            commas(whole),
            rf"{base} \cdot {base}^{{{exponent - 1}}}",
            rf"{base**2}^{{{exponent // 2}}}" + ("" if exponent % 2 == 0 else rf"\cdot {base}"),
        ]
        wrongs = [
            rf"{base}^{{{other}}}",
            str(whole + 1),
            str(whole - draw.randint(1, 9)),
            other_digit(str(whole), draw),
            rf"{base}^{{{exponent}}} - 1",
            f"{base}{exponent}",
            rf"-{base}^{{{exponent}}}",
        ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def factorial(draw: Random) -> Question:
    n = draw.randint(5, 20)
    value = math.factorial(n)
    rights = [str(value), commas(value), f"{n}!", rf"{n} \cdot {n - 1}!"]
    wrongs = [f"{n - 1}!", str(value + 1), f"{n}", str(value * 10), f"{n + 1}!", rf"\frac{{1}}{{{n}!}}"]
    return Question(golds=[str(value), f"{n}!"], rights=rights, wrongs=wrongs)


def rounded(draw: Random) -> Question:
    n = draw.choice([2, 3, 5, 6, 7, 10, 11, 13, 17, 19, 23, 41, 51, 83])
    exact = Decimal(n).sqrt()
    golds, value = draw.choice(
        [
            ([rf"\sqrt{{{n}}}", rf"$\sqrt{{{n}}}$"], exact),
            ([rf"\frac{{\sqrt{{{n}}}}}{{2}}"], exact / 2),
            ([rf"\frac{{{n}}}{{49}}"], Decimal(n) / 49),
            ([rf"\frac{{{n + 1}}}{{{7 * n}}}"], Decimal(n + 1) / (7 * n)),
        ]
    )
    digits = draw.randint(8, 12)
    good = value.quantize(Decimal(1).scaleb(-digits))
    rights = [*golds, str(good)]
    wrongs = [
        other_digit(str(good), draw),
        str(good + Decimal(1).scaleb(1 - digits)),
        str(value.quantize(Decimal("0.1"))),
        f"-{good}",
        str(value.quantize(Decimal("0.00001")) + Decimal("0.00001")),
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def percent(draw: Random) -> Question:
    number = draw.choice([draw.randint(1, 99), Decimal(draw.randint(11, 999)) / 10])
    golds = [rf"{number}\%", rf"${number}\%$", f"{number}%"]
    rights = [
        rf"{number}\%",
        f"{number}%",
        rf"{number} \%",
        rf"{number}\text{{ percent}}",
        f"{number} percent",
        format(Decimal(number) / 100, "f"),
        rf"\frac{{{number * 10 // 1}}}{{1000}}" if number == int(number) else rf"{number}\%",
    ]
    wrongs = [
        rf"{number + 1}\%",
        rf"{number * 10}\%",
        rf"-{number}\%",
        format(Decimal(number) / 10, "f"),
        f"{other_digit(str(number), draw)} percent",
        rf"{Decimal(number) / 100}\%",
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def repeating(draw: Random) -> Question:
    digit = draw.randint(1, 8)
    value = Fraction(digit, 9)
    whole = draw.randint(0, 9)
    value += whole
    golds = [rf"{whole}.\overline{{{digit}}}", rf"\frac{{{value.numerator}}}{{{value.denominator}}}"]
    wrongs = [
        rf"{whole}.{digit}",
        rf"{whole}.\overline{{{digit}0}}",
        rf"{whole}.0\overline{{{digit}}}",
        rf"{whole}.\overline{{{9 - digit or 1}}}" if digit * 2 != 9 else f"{whole}",
        rf"{whole + 1}.\overline{{{digit}}}",
        rf"\frac{{{value.numerator}}}{{{value.denominator + 1}}}",
    ]
    return Question(golds=golds, rights=[*golds, rf"{whole}.{digit}\overline{{{digit}}}"], wrongs=wrongs)


# --- expressions ----------------------------------------------------------------------------------


def surd(draw: Random) -> Question:
    a, b = draw.randint(2, 12), draw.choice([2, 3, 5, 6, 7, 10, 11, 13, 15])
    golds = [rf"{a}\sqrt{{{b}}}", rf"${a} \sqrt{{{b}}}$"]
    rights = [
        *golds,
        rf"\sqrt{{{a * a * b}}}",
        rf"\sqrt{{{b}}} \cdot {a}",
        rf"{a}\cdot\sqrt{{{b}}}",
        rf"{a}*sqrt({b})",
        rf"\frac{{{a * b}}}{{\sqrt{{{b}}}}}",
        rf"{a} \cdot {b}^{{1/2}}",
        rf"{a}\sqrt{b}" if b < 10 else rf"{a}\sqrt{{{b}}}",
    ]
    wrongs = [
        rf"{a + 1}\sqrt{{{b}}}",
        rf"{a}\sqrt{{{b + 1}}}",
        rf"-{a}\sqrt{{{b}}}",
        rf"{a} + \sqrt{{{b}}}",
        rf"\sqrt{{{a * b}}}",
        rf"{a}",
        rf"\sqrt{{{b}}}",
        rf"{a}\sqrt[3]{{{b}}}",
        rf"{a}{b}",
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def signed(number: int, after: str = "") -> str:
    """` + 3x`, ` - x`: a term that follows another."""
    size = "" if abs(number) == 1 and after else str(abs(number))
    return f" {'-' if number < 0 else '+'} {size}{after}"


def nonzero(draw: Random, most: int) -> int:
    return draw.choice([-1, 1]) * draw.randint(1, most)


def quadratic(draw: Random) -> Question:
    x = draw.choice("xxtnya")
    p, q = nonzero(draw, 9), nonzero(draw, 9)
    while p + q == 0 or p == q:
        q = nonzero(draw, 9)
    b, c = p + q, p * q
    expanded = f"{x}^2{signed(b, x)}{signed(c)}"
    golds = [expanded, f"${expanded}$"]
    rights = [
        expanded,
        expanded.replace(" ", ""),
        f"({x}{signed(p)})({x}{signed(q)})",
        rf"\left({x}{signed(q)}\right)\left({x}{signed(p)}\right)",
        f"{x}^{{2}}{signed(b, x)}{signed(c)}",
        f"{c}{signed(b, x)} + {x}^2",
        f"{x}({x}{signed(b)}){signed(c)}",
        rf"{x} \cdot {x}{signed(b, x)}{signed(c)}",
    ]
    y = "z" if x != "z" else "w"
    wrongs = [
        f"{x}^2{signed(-b, x)}{signed(c)}",
        f"{x}^2{signed(b, x)}{signed(-c)}",
        f"{x}^2{signed(b, x)}",
        f"{x}^3{signed(b, x)}{signed(c)}",
        f"{x}^2{signed(b, x)}{signed(c + 1)}",
        expanded.replace(x, y),
        f"2{expanded}",
        f"({x}{signed(-p)})({x}{signed(q)})",
        f"{x}^2{signed(b, y)}{signed(c)}",
        expanded + " = 0" if c != 1 else f"{x}^2",
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def over(draw: Random) -> Question:
    x, a, b = draw.choice("xyn"), draw.randint(1, 9), draw.randint(2, 9)
    golds = [rf"\frac{{{x}+{a}}}{{{b}}}"]
    rights = [
        *golds,
        rf"\frac{{{x}}}{{{b}}}+\frac{{{a}}}{{{b}}}",
        rf"\frac{{1}}{{{b}}}({x}+{a})",
        f"({x}+{a})/{b}",
        rf"\frac{{{a}+{x}}}{{{b}}}",
        rf"\dfrac{{2{x}+{2 * a}}}{{{2 * b}}}",
    ]
    wrongs = [
        rf"\frac{{{x}-{a}}}{{{b}}}",
        rf"\frac{{{x}+{a}}}{{{b + 1}}}",
        rf"{x}+\frac{{{a}}}{{{b}}}",
        rf"\frac{{{b}}}{{{x}+{a}}}",
        rf"\frac{{{x}}}{{{b}}}",
        f"{x}+{a}/{b}",
        rf"\frac{{{a}{x}}}{{{b}}}" if a > 1 else rf"\frac{{{x}}}{{{b}}}",
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def trigonometric(draw: Random) -> Question:
    x = draw.choice(["x", r"\theta", "t"])
    return draw.choice(
        [
            Question(
                golds=[rf"\sin 2{x}", rf"\sin(2{x})"],
                rights=[rf"2\sin {x} \cos {x}", rf"\sin(2{x})", rf"2 \cos({x}) \sin({x})"],
                wrongs=[rf"\cos 2{x}", rf"\sin {x}", rf"2\sin {x}", rf"\sin {x}\cos {x}", rf"-\sin 2{x}"],
            ),
            Question(
                golds=[rf"\tan^2 {x} + 1"],
                rights=[rf"\sec^2 {x}", rf"\frac{{1}}{{\cos^2 {x}}}", rf"1+\tan^2({x})"],
                wrongs=[rf"\tan^2 {x} - 1", rf"\sec {x}", rf"\csc^2 {x}", rf"\tan^2 {x}", "1"],
            ),
            Question(
                golds=[r"2 \sin b \cos a"],
                rights=[r"2\cos a\sin b", r"2\cos(a)\sin(b)", r"\sin(a+b)-\sin(a-b)"],
                wrongs=[r"2\sin a\cos b", r"\sin b\cos a", r"2\sin b\sin a", r"-2\sin b\cos a", "2"],
            ),
            Question(
                golds=[rf"\cos^2 {x} - \sin^2 {x}"],
                rights=[rf"\cos 2{x}", rf"1 - 2\sin^2 {x}", rf"2\cos^2 {x} - 1"],
                wrongs=[rf"\cos^2 {x} + \sin^2 {x}", "1", rf"1-\sin^2 {x}", rf"\sin 2{x}", r"\cos 2y"],
            ),
        ]
    )


def logarithm(draw: Random) -> Question:
    b, k, n = draw.choice([2, 3, 5]), draw.randint(2, 5), draw.choice([7, 11, 13])
    return draw.choice(
        [
            Question(
                golds=[rf"\ln {b**k}", rf"{k}\ln {b}"],
                rights=[rf"{k}\ln {b}", rf"\ln({b**k})", rf"\ln {b} \cdot {k}", rf"{k}\ln({b})"],
                wrongs=[rf"{k + 1}\ln {b}", rf"\ln {b}", rf"{k}", rf"\ln {b * k + 1}", rf"-{k}\ln {b}"],
            ),
            Question(
                golds=[rf"\log_{{{b}}} {n}", rf"\log_{b}{n}" if n < 10 else rf"\log_{b} {n}"],
                rights=[rf"\frac{{\ln {n}}}{{\ln {b}}}", rf"\log_{{{b}}}({n})", rf"\frac{{\log {n}}}{{\log {b}}}"],
                wrongs=[rf"\log_{{{b + 1}}} {n}", rf"\log_{{{n}}} {b}", rf"\ln {n}", rf"\log_{{{b}}} {n + 1}"],
            ),
            Question(
                golds=[r"1 - \frac{1}{e}", r"1-e^{-1}"],
                rights=[r"\frac{e-1}{e}", r"1 - e^{-1}", r"1-\frac{1}{\mathrm{e}}", r"-\frac1e+1"],
                wrongs=[r"1+\frac{1}{e}", r"\frac{1}{e}", "1", r"1-\frac{1}{e^2}", r"\frac{1}{e}-1", "1-e"],
            ),
            Question(
                golds=[rf"e^{{{k}x}}"],
                rights=[rf"(e^x)^{k}", rf"\left(e^{{x}}\right)^{{{k}}}", rf"\exp({k}x)", rf"e^{{x}}e^{{{k - 1}x}}"],
                wrongs=[rf"e^{{{k + 1}x}}", rf"e^{{-{k}x}}", rf"{k}e^x", rf"e^{{{k}y}}", rf"e^{k}x", rf"{k}^x"],
            ),
        ]
    )


def complex_number(draw: Random) -> Question:
    a, b = nonzero(draw, 9), draw.choice([-1, 1]) * draw.randint(10, 29)
    golds = [f"{a}{signed(b, 'i')}", f"${a}{signed(b, 'i')}$", f"{a}{signed(b)}" + r"\mathrm{i}"]
    lead = f"{b}i"
    rights = [f"{a}{signed(b, 'i')}".replace(" ", ""), f"{lead}{signed(a)}", f"{a}{signed(b)}" + r" \cdot i", f"{a}{signed(b)}" + r"\mathrm{i}"]
    wrongs = [f"{a}{signed(-b, 'i')}", f"{a}", f"{a}{signed(b)}", f"{-a}{signed(b, 'i')}", lead, f"{a}i{signed(b)}", f"{a}{signed(b + 10, 'i')}"]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def of_pi(draw: Random) -> Question:
    value = Fraction(draw.randint(1, 40), draw.randint(2, 12))
    while 1 in (value.denominator, value.numerator):
        value = Fraction(draw.randint(1, 40), draw.randint(2, 12))
    a, b = value.numerator, value.denominator
    golds = [rf"\frac{{{a}\pi}}{{{b}}}", rf"\frac{{{a}}}{{{b}}}\pi"]
    rights = [
        *golds,
        rf"{a}\pi/{b}",
        rf"\dfrac{{{a} \pi}}{{{b}}}",
        rf"\frac{{{a}}}{{{b}}} \cdot \pi",
        rf"\frac{{\pi \cdot {a}}}{{{b}}}",
        rf"\frac{{{2 * a}\pi}}{{{2 * b}}}",
    ]
    wrongs = [
        rf"\frac{{{a + 1}\pi}}{{{b}}}",
        rf"\frac{{{a}}}{{{b}}}",
        rf"\frac{{{a}\pi}}{{{b + 1}}}",
        rf"\frac{{{a}}}{{{b}\pi}}",
        rf"-\frac{{{a}\pi}}{{{b}}}",
        rf"\frac{{{a}\pi^2}}{{{b}}}",
        rf"{a}\pi",
        r"\pi",
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def rationalised(draw: Random) -> Question:
    n = draw.choice([2, 3, 5, 6, 7, 10, 11, 13])
    a = draw.choice([k for k in range(1, 9) if k % n])
    golds = [rf"\frac{{{a}\sqrt{{{n}}}}}{{{n}}}" if a > 1 else rf"\frac{{\sqrt{{{n}}}}}{{{n}}}"]
    rights = [
        *golds,
        rf"\frac{{{a}}}{{\sqrt{{{n}}}}}",
        rf"{a}/\sqrt{{{n}}}",
        rf"\sqrt{{\frac{{{a * a}}}{{{n}}}}}",
        rf"\frac{{{a}}}{{{n}}}\sqrt{{{n}}}",
    ]
    wrongs = [
        rf"\frac{{{a}}}{{{n}}}",
        rf"\frac{{{a}\sqrt{{{n}}}}}{{{n + 1}}}",
        rf"\frac{{{a + 1}}}{{\sqrt{{{n}}}}}",
        rf"-\frac{{{a}}}{{\sqrt{{{n}}}}}",
        rf"{a}\sqrt{{{n}}}",
        rf"\frac{{\sqrt{{{a}}}}}{{{n}}}",
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def choose(draw: Random) -> Question:
    n, k = draw.randint(5, 14), draw.randint(2, 4)
    value = math.comb(n, k)
    rights = [
        rf"\binom{{{n}}}{{{k}}}",
        str(value),
        rf"\dbinom{{{n}}}{{{k}}}",
        rf"\frac{{{n}!}}{{{k}!{n - k}!}}",
        rf"\binom{{{n}}}{{{n - k}}}",
        rf"\frac{{{n}!}}{{{k}! \cdot {n - k}!}}",
    ]
    wrongs = [
        rf"\binom{{{n + 1}}}{{{k}}}",
        str(value + 1),
        rf"\binom{{{n}}}{{{k + 1}}}" if 2 * k + 1 != n else str(value - 1),
        rf"\frac{{{n}!}}{{{k}!}}",
        rf"\frac{{{n}}}{{{k}}}",
        rf"({n}, {k})",
    ]
    return Question(golds=[rf"\binom{{{n}}}{{{k}}}", str(value)], rights=rights, wrongs=wrongs)


def symbolic(draw: Random) -> Question:
    a = draw.randint(2, 9)
    return draw.choice(
        [
            Question(
                golds=[r"\frac{n(n+1)}{2}"],
                rights=[r"\frac{n^2+n}{2}", r"\frac{1}{2}n(n+1)", r"n(n+1)/2", r"\frac{(n+1)n}{2}"],
                wrongs=[r"\frac{n(n-1)}{2}", r"\frac{n^2}{2}", r"n(n+1)", r"\frac{m(m+1)}{2}", r"\binom{n}{2}"],
            ),
            Question(
                golds=[rf"{a}^{{n+1}}"],
                rights=[rf"{a} \cdot {a}^n", rf"{a}^{{n}} \cdot {a}", rf"{a}^{{1+n}}"],
                wrongs=[rf"{a}^{{n}}", rf"{a}^n+1", rf"{a}^{{n-1}}", rf"{a + 1}^{{n+1}}", rf"{a}(n+1)", rf"{a}^{{m+1}}"],
            ),
            Question(
                golds=[r"\frac{\pi r}{h+r}"],
                rights=[r"\frac{\pi r}{r+h}", r"\pi r/(h+r)", r"\pi \cdot \frac{r}{h + r}"],
                wrongs=[r"\frac{\pi h}{h+r}", r"\frac{\pi r}{h-r}", r"\frac{r}{h+r}", r"\frac{\pi r}{h}", r"\pi"],
            ),
            Question(
                golds=[rf"{a} - {a}p"],
                rights=[rf"{a}(1-p)", rf"-{a}p+{a}", rf"{a}-{a} p", rf"{a} \left(1 - p\right)"],
                wrongs=[rf"{a} + {a}p", rf"{a}p", rf"{a}", rf"{a}(p-1)", rf"{a}-{a + 1}p", rf"{a} - {a}q"],
            ),
            Question(
                golds=[r"\sqrt{a^2+b^2}", r"$\sqrt{a^{2} + b^{2}}$"],
                rights=[r"\sqrt{b^2+a^2}", r"(a^2+b^2)^{1/2}", r"\sqrt{(a+b)^2-2ab}"],
                wrongs=["a+b", r"\sqrt{a^2-b^2}", "a^2+b^2", r"\sqrt{a+b}", r"\sqrt{a^2+c^2}", r"\sqrt[3]{a^2+b^2}"],
            ),
            Question(
                golds=[r"\alpha + 2\beta"],
                rights=[r"2\beta+\alpha", r"\alpha+2 \beta", r"\alpha + \beta + \beta"],
                wrongs=[r"\alpha + \beta", r"2\alpha+\beta", r"\alpha-2\beta", r"\alpha+2\gamma", r"\alpha"],
            ),
            Question(
                golds=[r"a_1 + a_2", r"a_{1}+a_{2}"],
                rights=[r"a_2+a_1", r"a_{1} + a_{2}"],
                wrongs=[r"a_1 + a_3", r"a_1 - a_2", r"a_1", r"a_1a_2", r"b_1+b_2", r"a_{12}"],
            ),
            Question(
                golds=[rf"(x-{a})(x+{a})"],
                rights=[rf"x^2-{a * a}", rf"(x+{a})(x-{a})", rf"-{a * a}+x^2"],
                wrongs=[rf"x^2+{a * a}", rf"x^2-{a}", rf"(x-{a})^2", rf"x-{a}", rf"(x-{a})", rf"y^2-{a * a}"],
            ),
            Question(
                golds=[r"\sqrt[3]{4}", r"4^{1/3}"],
                rights=[r"2^{2/3}", r"4^{\frac{1}{3}}", r"\sqrt[3]{4}"],
                wrongs=[r"\sqrt{4}", r"\sqrt[3]{2}", r"4^{3}", r"\sqrt[4]{3}", r"2^{1/3}", "1.587"],
            ),
            Question(
                golds=[rf"\frac{{{a}+\sqrt{{5}}}}{{2}}"],
                rights=[rf"\frac{{\sqrt{{5}}+{a}}}{{2}}", rf"\frac{{{a}}}{{2}}+\frac{{\sqrt{{5}}}}{{2}}", rf"({a}+\sqrt5)/2"],
                wrongs=[rf"\frac{{{a}-\sqrt{{5}}}}{{2}}", rf"{a}+\frac{{\sqrt{{5}}}}{{2}}", rf"\frac{{{a}}}{{2}}"],
            ),
        ]
    )


# --- equations and inequalities -------------------------------------------------------------------

TRUTHS = ["1=1", "0=0", "1=2", "2 = 3", "x = x", "0 = 1", r"\text{True}"]


def line(draw: Random) -> Question:
    a, b = draw.choice([-1, 1]) * draw.randint(2, 9), nonzero(draw, 9)
    golds = [f"y = {a}x{signed(b)}", f"$y={a}x{signed(b)}$"]
    rights = [
        f"y={a}x{signed(b)}".replace(" ", ""),
        f"{a}x - y{signed(b)} = 0",
        f"y - {a}x = {b}" if a > 0 else f"y + {-a}x = {b}",
        f"{a}x{signed(b)} = y",
        f"{2 * a}x - 2y{signed(2 * b)} = 0",
        f"y = {b}{signed(a, 'x')}",
    ]
    wrongs = [
        f"y = {a}x{signed(-b)}",
        f"y = {a + 10}x{signed(b)}",
        f"x = {a}y{signed(b)}",
        f"y = {a}x",
        f"{a}x - y{signed(b)} = 1",
        f"y > {a}x{signed(b)}",
        f"y = {-a}x{signed(b)}",
        "y",
        *TRUTHS,
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def conic(draw: Random) -> Question:
    h, k, r = nonzero(draw, 6), nonzero(draw, 6), draw.randint(2, 9)
    golds = [f"(x{signed(-h)})^2 + (y{signed(-k)})^2 = {r * r}"]
    rights = [
        golds[0].replace(" ", ""),
        f"(y{signed(-k)})^2+(x{signed(-h)})^2={r * r}",
        f"x^2 + y^2{signed(-2 * h, 'x')}{signed(-2 * k, 'y')}{signed(h * h + k * k - r * r)} = 0" if h * h + k * k != r * r else golds[0],
        f"{r * r} = (x{signed(-h)})^2 + (y{signed(-k)})^2",
        rf"\left(x{signed(-h)}\right)^{{2}} + \left(y{signed(-k)}\right)^{{2}} = {r}^2",
    ]
    wrongs = [
        f"(x{signed(h)})^2 + (y{signed(-k)})^2 = {r * r}",
        f"(x{signed(-h)})^2 + (y{signed(-k)})^2 = {r}",
        f"(x{signed(-h)})^2 - (y{signed(-k)})^2 = {r * r}",
        f"(x{signed(-h)})^2 + (y{signed(-k)})^2",
        f"(x{signed(-h)})^2 = {r * r}",
        str(r * r),
        *TRUTHS,
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def plane(draw: Random) -> Question:
    a, b, c, d = (nonzero(draw, 9) for _ in range(4))
    left = f"{abs(a) + 1}x{signed(b, 'y')}{signed(c, 'z')}{signed(d)}"
    golds = [f"{left} = 0", f"${left}=0$"]
    a = abs(a) + 1
    rights = [
        f"{left}=0".replace(" ", ""),
        f"{-a}x{signed(-b, 'y')}{signed(-c, 'z')}{signed(-d)} = 0",
        f"{a}x{signed(b, 'y')}{signed(c, 'z')} = {-d}",
        f"{3 * a}x{signed(3 * b, 'y')}{signed(3 * c, 'z')}{signed(3 * d)} = 0",
        f"0 = {left}",
    ]
    wrongs = [
        f"{a}x{signed(b, 'y')}{signed(c, 'z')} = {d}",
        f"{a}x{signed(-b, 'y')}{signed(c, 'z')}{signed(d)} = 0",
        f"{a + 1}x{signed(b, 'y')}{signed(c, 'z')}{signed(d)} = 0",
        f"{a}x{signed(b, 'y')}{signed(d)} = 0",
        "0",
        left,
        *TRUTHS,
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def assigned(draw: Random) -> Question:
    name = draw.choice(["x", "k", "n", "I", "a", r"\theta", "x_1", "P", "m"])
    value = draw.choice([nonzero(draw, 99), nonzero(draw, 999)])
    golds = [f"{name}={value}", f"${name} = {value}$"]
    rights = [f"{name}={value}", f"{name} = {value}", str(value), f"${name} = {value}$", f"{value} = {name}"]
    wrongs = [
        f"{name}={value + 1}",
        f"{name}={-value}",
        str(value + 2),
        f"{name} > {value}",
        rf"{name} \neq {value}",
        f"{name}={value}{draw.randint(0, 9)}",
        name,
        f"{name}={value}.5",
        "1=1",
        "0=0",
        f"{value} = {value}",
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def function(draw: Random) -> Question:
    a, b = draw.randint(2, 9), nonzero(draw, 9)
    f = draw.choice(["f(x)", "g(x)", "P(x)", "f(x)"])
    golds = [f"{f} = {a}x{signed(b)}", f"${f}={a}x{signed(b)}$"]
    rights = [f"{f}={a}x{signed(b)}", f"{f} = {b} + {a}x", f"{a}x{signed(b)}", rf"{f} = {a} \cdot x{signed(b)}"]
    wrongs = [f"{f} = {a}x{signed(-b)}", f"{f} = {a + 1}x{signed(b)}", f"{f} = x{signed(b)}", f"{a}x", f"{f} = {a}x^2{signed(b)}", f, f"{b}", "1=1"]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def inequality(draw: Random) -> Question:
    a = nonzero(draw, 30)
    sign, latex, flipped, strict = draw.choice(
        [(">", r"\gt", "<", r"\geq"), ("<", r"\lt", ">", r"\le"), (r"\ge", r"\geq", r"\leq", ">"), (r"\le", r"\leq", r"\ge", "<")]
    )
    golds = [f"x {sign} {a}", f"$x {sign} {a}$"]
    rights = [f"x {sign} {a}", f"{a} {flipped} x", f"x {latex} {a}", f"2x {sign} {2 * a}", f"x{signed(-a)} {sign} 0"]
    wrongs = [
        f"x {flipped} {a}",
        f"x {strict} {a}",
        f"x {sign} {a + 1}",
        f"x {sign} {-a}",
        f"x = {a}",
        str(a),
        f"{a} {sign} x",
        f"y {strict} {a}",
        "1 < 2",
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


# --- sets, intervals, tuples, several answers -----------------------------------------------------


def element(draw: Random) -> tuple[str, list[str], str]:
    """A number, its spellings, and another number near it."""
    if draw.random() < 0.6:
        n = draw.randint(-60, 99)
        return str(n), [str(n)], str(n + draw.choice([-1, 1]) * 101)
    if draw.random() < 0.6:
        value = Fraction(draw.randint(1, 30), draw.choice([7, 9, 11, 13]))
        if value.denominator > 1:
            a, b = value.numerator, value.denominator
            return (rf"\frac{{{a}}}{{{b}}}", [rf"\dfrac{{{a}}}{{{b}}}", f"{a}/{b}"], rf"\frac{{{a + 1}}}{{{b}}}")
    a = draw.randint(2, 9)
    b = draw.choice([2, 3, 5, 7])
    return (rf"{a}\sqrt{{{b}}}", [rf"{a} \sqrt{{{b}}}", rf"\sqrt{{{a * a * b}}}"], rf"{a}\sqrt{{{b + 4}}}")


def elements(draw: Random, count: int) -> list[tuple[str, list[str], str]]:
    found: dict[str, tuple[str, list[str], str]] = {}
    while len(found) < count:
        made = element(draw)
        found.setdefault(made[0], made)
    return list(found.values())


def shuffled(draw: Random, things: Sequence[str]) -> list[str]:
    """In another order."""
    mixed = list(things)
    while mixed == list(things):
        draw.shuffle(mixed)
    return mixed


def finite_set(draw: Random) -> Question:
    if draw.random() < 0.08:
        return Question(
            golds=[r"\emptyset", r"\varnothing"],
            rights=[r"\emptyset", r"\varnothing", r"\{\}", r"\{ \}"],
            wrongs=["0", r"\{0\}", r"\{\emptyset\}", r"\mathbb{R}", "1"],
        )
    made = elements(draw, draw.randint(2, 5))
    names = [e[0] for e in made]
    plain = [draw.choice(e[1]) for e in made]
    golds = [rf"\{{{', '.join(names)}\}}", rf"$\{{{','.join(names)}\}}$", rf"\left\{{{', '.join(names)}\right\}}"]
    rights = [
        *golds,
        rf"\{{{', '.join(shuffled(draw, plain))}\}}",
        rf"\left\{{{', '.join(shuffled(draw, names))}\right\}}",
        rf"\{{{'; '.join(names)}\}}",
        rf"\lbrace {', '.join(names)} \rbrace",
        rf"x \in \{{{', '.join(names)}\}}",
    ]
    wrongs = [
        rf"\{{{', '.join(names[1:])}\}}",
        rf"\{{{', '.join([made[0][2], *names[1:]])}\}}",
        rf"\{{{', '.join([*names, '1234'])}\}}",
        names[0],
        names[-1],
        rf"\{{{names[0]}\}}",
        r"\emptyset",
        rf"\{{{', '.join([*names[:-1], names[0]])}\}}",
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def interval(draw: Random) -> Question:
    a = draw.randint(-40, 20)
    b = a + draw.randint(1, 50)
    left, right = draw.choice("(["), draw.choice(")]")
    less = {"(": "<", "[": r"\le", ")": "<", "]": r"\leq"}
    low, high = str(a), str(b)
    endless = draw.random()
    if endless < 0.2:
        low, left = r"-\infty", "("
    elif endless < 0.4:
        high, right = r"\infty", ")"
    golds = [f"{left}{low}, {high}{right}", f"${left}{low},{high}{right}$"]
    rights = [*golds, rf"\left{left}{low}, {high}\right{right}", rf"x \in {left}{low}, {high}{right}", f"{left}{low},{high}{right}"]
    if endless >= 0.4:
        rights += [f"{low} {less[left]} x {less[right]} {high}"]
    elif low == r"-\infty":
        rights += [f"x {less[right]} {high}"]
    else:
        rights += [f"{left}{low}, +{high}{right}"]
        if left == "(":
            rights.append(f"x > {low}")
    flip = {"(": "[", "[": "(", ")": "]", "]": ")"}
    wrongs = [
        f"{left}{low}, {b + 1}{right}",
        f"{left}{a - 1}, {high}{right}",
        low if endless >= 0.2 else high,
        f"{left}{b}, {b + 5}{right}",
        rf"{left}{low}, {high}{right} \cup [100, 101]",
        r"\mathbb{R}",
    ]
    if low != r"-\infty":
        wrongs.append(f"{flip[left]}{low}, {high}{right}")
    if high != r"\infty":
        wrongs.append(f"{left}{low}, {high}{flip[right]}")
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def union(draw: Random) -> Question:
    a = draw.randint(-20, 0)
    b, c = a + draw.randint(2, 9), a + draw.randint(10, 19)
    first, second = rf"(-\infty, {a})", rf"[{b}, {c})"
    golds = [rf"{first} \cup {second}", rf"${first}\cup{second}$"]
    rights = [
        *golds,
        rf"{second} \cup {first}",
        rf"\left(-\infty, {a}\right) \cup \left[{b}, {c}\right)",
        rf"x \in {first} \cup {second}",
        rf"(-\infty,{a})\cup [{b},{c})",
    ]
    wrongs = [
        first,
        second,
        rf"(-\infty, {a}] \cup {second}",
        rf"{first} \cup ({b}, {c})",
        rf"{first} \cup [{b}, {c + 1})",
        rf"{first} \cap {second}",
        rf"(-\infty, {a + 1}) \cup {second}",
        rf"{first} \cup {second} \cup (100, \infty)",
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def coordinates(draw: Random) -> Question:
    made = elements(draw, draw.randint(2, 4))
    names = [e[0] for e in made]
    plain = [draw.choice(e[1]) for e in made]
    letters = ["x", "y", "z", "w"][: len(names)]
    inner = ", ".join(names)
    golds = [f"({inner})", f"$({','.join(names)})$", rf"\left({inner}\right)"]
    rights = [*golds, f"({', '.join(plain)})", rf"\left( {', '.join(plain)} \right)", f"({','.join(letters)}) = ({inner})", rf"\bigl({inner}\bigr)"]
    wrongs = [
        f"({', '.join(names[::-1])})",
        f"({', '.join([made[0][2], *names[1:]])})",
        f"({', '.join([*names[:-1], made[-1][2]])})",
        f"({', '.join(names[1:])})",
        f"({inner}, 0)",
        names[0],
        names[-1],
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def matrix(draw: Random) -> Question:
    rows = draw.choice([[2, 2], [3, 1], [2, 1], [2, 3], [1, 2]])
    values = [[draw.randint(-9, 9) for _ in range(rows[1])] for _ in range(rows[0])]

    def written(values: list[list[int]], kind: str = "pmatrix", space: str = " ") -> str:
        body = rf"{space}\\{space}".join(f"{space}&{space}".join(map(str, row)) for row in values)
        return rf"\begin{{{kind}}}{space}{body}{space}\end{{{kind}}}"

    changed = [list(row) for row in values]
    changed[draw.randrange(rows[0])][draw.randrange(rows[1])] += draw.choice([-1, 1, 10])
    negative = [[-v for v in row] for row in values]
    if negative == values:
        negative = [[v + 1 for v in row] for row in values]
    golds = [written(values), f"${written(values)}$", written(values, "bmatrix")]
    rights = [
        *golds,
        written(values, space=""),
        rf"\left[\begin{{array}}{{{'c' * rows[1]}}}" + r" \\ ".join(" & ".join(map(str, row)) for row in values) + r"\end{array}\right]",
        rf"\mathbf{{A}} = {written(values)}",
    ]
    wrongs = [
        written(changed),
        written(negative),
        written(values[:-1]) if len(values) > 1 else written([values[0][:-1]]),
        str(values[0][0]),
        written([[*row, 0] for row in values]),
        written(changed, "bmatrix", ""),
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def several(draw: Random) -> Question:
    made = elements(draw, draw.randint(2, 4))
    names = [e[0] for e in made]
    plain = [draw.choice(e[1]) for e in made]
    golds = [", ".join(names), f"${', '.join(names)}$", ";".join(f"${n}$" for n in names), ",".join(names)]
    last = r" \text{ and } "
    golds.append(", ".join(names[:-1]) + last + names[-1])
    rights = [
        ", ".join(names),
        ", ".join(shuffled(draw, plain)),
        "; ".join(names),
        ", ".join(names[:-1]) + " and " + names[-1],
        ", ".join(names[:-1]) + r" \text{ or } " + names[-1],
        r",\ ".join(names),
        r", \quad ".join(names),
        ", ".join(names[:-1]) + last + names[-1],
        ", ".join(f"x = {n}" for n in names),
        f"x = {', '.join(names)}",
    ]
    wrongs = [
        names[0],
        names[-1],
        ", ".join(names[1:]),
        ", ".join([*names, "1234"]),
        ", ".join([made[0][2], *names[1:]]),
        f"x = {names[-1]}",
        ", ".join([*names[:-1], made[-1][2]]),
        f"{names[0]} + {names[1]}",
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def plus_minus(draw: Random) -> Question:
    a, b = draw.randint(1, 20), draw.choice([2, 3, 5, 6, 7, 10, 19])
    golds = [rf"{a} \pm \sqrt{{{b}}}", rf"{a}+\sqrt{{{b}}}, {a}-\sqrt{{{b}}}"]
    rights = [*golds, rf"{a} + \sqrt{{{b}}} \text{{ and }} {a} - \sqrt{{{b}}}", rf"x = {a} \pm \sqrt{{{b}}}", rf"{a}-\sqrt{{{b}}}, {a}+\sqrt{{{b}}}"]
    wrongs = [
        rf"{a}+\sqrt{{{b}}}",
        rf"{a}-\sqrt{{{b}}}",
        rf"{a}\pm\sqrt{{{b + 1}}}",
        rf"{a + 1}\pm\sqrt{{{b}}}",
        rf"-{a}\pm\sqrt{{{b}}}",
        f"{a}",
        rf"\pm\sqrt{{{b}}}",
    ]
    if draw.random() < 0.4:
        golds = [rf"\pm {a}", rf"{a}, -{a}"]
        rights = [rf"\pm {a}", f"-{a}, {a}", rf"{a} \text{{ or }} -{a}", rf"x = \pm {a}", rf"x=-{a}, x={a}"]
        wrongs = [f"{a}", f"-{a}", rf"\pm {a + 1}", f"x = {a}", rf"{a}, {a}", "0"]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def named(draw: Random) -> Question:
    a, b = draw.randint(1, 40), draw.randint(41, 99)
    p, q = draw.choice([("a", "b"), ("p", "q"), ("k", "n"), ("AB", "CD"), ("x", "y")])
    golds = [f"{p} = {a}, {q} = {b}", f"${p}={a}$, ${q}={b}$", f"{p}={a};{q}={b}"]
    rights = [f"{p}={a}, {q}={b}", f"{q}={b}, {p}={a}", rf"{p} = {a} \text{{ and }} {q} = {b}", rf"{p}={a},\ {q}={b}"]
    wrongs = [f"{p}={b}, {q}={a}", f"{p}={a}", f"{q}={b}", f"{p}={a}, {q}={b + 1}", f"{a}", f"{p}={a}, {q}={a}", f"{p}={a + 1}, {q}={b}"]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def points(draw: Random) -> Question:
    pairs = [(draw.randint(-9, 20), draw.randint(21, 60)) for _ in range(draw.randint(2, 4))]
    pairs = list(dict.fromkeys(pairs))
    if len(pairs) == 1:
        pairs.append((77, 78))
    written = [f"({a}, {b})" for a, b in pairs]
    golds = [", ".join(written), f"${','.join(written)}$", ",".join(w.replace(" ", "") for w in written)]
    rights = [
        *golds,
        ", ".join(shuffled(draw, written)),
        rf"\{{{', '.join(written)}\}}",
        ", ".join(written[:-1]) + r" \text{ and } " + written[-1],
        r",\ ".join(written),
    ]
    (a, b), rest = pairs[0], written[1:]
    wrongs = [
        written[0],
        written[-1],
        ", ".join([f"({b}, {a})", *rest]),
        ", ".join([f"({a}, {b + 1})", *rest]),
        ", ".join([*written, "(70, 71)"]),
        f"{a}, {b}",
        ", ".join(str(x) for pair in pairs for x in pair),
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def told(draw: Random) -> Question:
    """Several answers in a sentence, as OlympiadBench has them."""
    a, b = draw.randint(1, 40), draw.randint(41, 99)
    speeds = [rf"{a} \text{{ mph}}, {b} \text{{ mph}}", f"{a} mph, {b} mph"]
    return draw.choice(
        [
            Question(
                golds=[f"$5$;${b}$", f"$5$; ${b}$"],
                rights=[f"5, {b}", rf"5 \text{{ and }} {b}", f"{b}, 5", f"5; {b}"],
                wrongs=[f"{b}", "5", f"5, {b + 1}", f"6, {b}", f"5{b}", f"5.{b}"],
            ),
            Question(
                golds=speeds,
                rights=[*speeds, rf"{b} \text{{ mph}}, {a} \text{{ mph}}"],
                wrongs=[f"{a}", f"{b}", rf"{a} \text{{ mph}}", rf"{a} \text{{ mph}}, {b + 1} \text{{ mph}}"],
            ),
            Question(
                golds=[rf"$\max$ at $x={a}$, min at $x={b}$"],
                rights=[rf"$\max$ at $x={a}$, min at $x={b}$", rf"$\max$ at $x={a}$,  min at $x={b}$."],
                wrongs=[f"x={b}", f"x={a}", rf"$\max$ at $x={b}$, min at $x={a}$", f"{a}, {b + 1}", f"{b}"],
            ),
            Question(
                golds=[rf"\left\{{\begin{{array}}{{l}}x={a}\\y={b}\end{{array}}\right."],
                rights=[rf"\left\{{\begin{{array}}{{l}}x={a}\\y={b}\end{{array}}\right."],
                wrongs=[
                    rf"\left\{{\begin{{array}}{{l}}x={b}\\y={a}\end{{array}}\right.",
                    rf"\left\{{\begin{{array}}{{l}}x={a}\\y={b + 1}\end{{array}}\right.",
                    f"x={a}",
                    f"y={b}",
                    f"{a}",
                ],
            ),
        ]
    )


# --- quantities, dates, times, text, bases --------------------------------------------------------

UNITS = {
    "cm": ("km", "kg", "mm", "ft"),
    "m": ("km", "s", "kg", "ft"),
    "km": ("m", "kg", "cm"),
    "kg": ("g", "m", "lb"),
    "hours": ("minutes", "days", "miles"),
    "minutes": ("hours", "seconds", "meters"),
    "miles": ("meters", "hours"),
    "feet": ("inches", "meters"),
    "mph": ("km", "hours"),
    "inches": ("feet", "hours"),
}


def quantity(draw: Random) -> Question:
    unit = draw.choice(list(UNITS))
    n = draw.choice([draw.randint(2, 500), Decimal(draw.randint(11, 99)) / 10])
    golds = [f"{n} {unit}", rf"{n}\text{{ {unit}}}", rf"{n} \mathrm{{~{unit}}}", rf"${n}$ {unit}"]
    rights = [
        *golds,
        rf"{n}\ \text{{{unit}}}",
        rf"{n}\,\text{{{unit}}}",
        rf"{n}\mbox{{ {unit}}}",
        rf"{n}~\mathrm{{{unit}}}",
        rf"{n} \textrm{{ {unit}}}",
        rf"{n}\textbf{{ {unit}}}",
        f"${n}$ {unit}",
        rf"{n}\text{{ {unit}.}}",
        f"{n}",
    ]
    wrongs = [rf"{n}\text{{ {other}}}" for other in UNITS[unit]]
    wrongs += [f"{n} {other}" for other in UNITS[unit]]
    wrongs += [rf"{n + 1}\text{{ {unit}}}", rf"{n * 10} \text{{ {unit}}}", f"{n + 1}", rf"-{n} \text{{ {unit}}}"]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def area(draw: Random) -> Question:
    n, unit = draw.randint(2, 300), draw.choice(["cm", "m", "km", "ft", "mm"])
    long = {"cm": "centimeters", "m": "meters", "km": "kilometers", "ft": "feet", "mm": "millimeters"}[unit]
    golds = [rf"{n}\text{{ {unit}}}^2", rf"{n}\mbox{{ {unit}}}^2", rf"{n} \mathrm{{~{unit}}}^{{2}}"]
    rights = [*golds, rf"{n} \text{{ {unit}}}^2", rf"{n} \text{{ square {long}}}", f"{n} {unit}^2", f"{n} square {long}"]
    wrongs = [
        rf"{n}\text{{ {unit}}}^3",
        rf"{n + 1}\text{{ {unit}}}^2",
        rf"{n}\text{{ {unit}}}",
        rf"{n * n}\text{{ {unit}}}^2",
        rf"{n} \text{{ cubic {long}}}",
        rf"{n + 3}",
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def angle(draw: Random) -> Question:
    n = draw.randint(10, 179)
    golds = [rf"{n}^\circ", rf"{n}^{{\circ}}", rf"${n}^\circ$"]
    rights = [*golds, rf"{n} \text{{ degrees}}", f"{n} degrees", rf"{n}^{{\circ}}", f"{n}", rf"{n}\degree"]
    wrongs = [
        rf"{n + 1}^\circ",
        rf"{180 - n}^\circ" if n != 90 else r"91^\circ",
        rf"{n * 10}^\circ",
        f"{n + 2}",
        rf"{n} \text{{ radians}}",
        rf"{n}\pi",
        rf"{n} \text{{ cm}}",
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def money(draw: Random) -> Question:
    n = draw.choice([str(draw.randint(2, 900)), f"{draw.randint(2, 90)}.{draw.randint(10, 99)}"])
    golds = [rf"\${n}", f"{n} dollars", rf"{n}\text{{ dollars}}"]
    rights = [rf"\${n}", rf"{n} \text{{ dollars}}", f"{n} dollars", n, rf"\$ {n}"]
    wrongs = [
        f"{n} euros",
        rf"{n} \text{{ euros}}",
        rf"{n} \text{{ cents}}",
        rf"\${n}7" if "." not in n else rf"\$1{n}",
        rf"\${other_digit(n, draw)}",
        rf"{n} \text{{ pounds}}",
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


MONTHS = ["January", "March", "April", "June", "July", "August", "October", "December"]


def date(draw: Random) -> Question:
    year, month, day = draw.randint(1700, 2040), draw.randint(1, 12), draw.randint(1, 28)
    if draw.random() < 0.5:
        text = f"{year}-{month:02}-{day:02}"
        other = f"{year}-{month:02}-{day % 28 + 1:02}"
        wrongs = [
            other,
            str(year - month - day),
            str(year),
            f"{year + 1}-{month:02}-{day:02}",
            f"{year}-{month % 12 + 1:02}-{day:02}",
            f"{year}-{month:02}",
            f"-{day}",
        ]
        return Question(golds=[text, rf"\text{{{text}}}"], rights=[text, rf"\text{{{text}}}", f" {text} "], wrongs=wrongs)
    name = draw.choice(MONTHS)
    text = f"{name} {day}, {year}"
    next_day, next_month = day % 28 + 1, MONTHS[(MONTHS.index(name) + 1) % len(MONTHS)]
    wrongs = [
        f"{name} {next_day}, {year}",
        f"{name} {day}, {year + 1}",
        f"{next_month} {day}, {year}",
        f"{name} {day}",
        str(day),
        str(year),
        rf"\text{{{name}}}",
    ]
    rights = [text, rf"\text{{{text}}}", text.lower(), rf"\text{{{name} {day}}}, {year}", f"{text}."]
    return Question(golds=[text, rf"\text{{{text}}}"], rights=rights, wrongs=wrongs)


def clock(draw: Random) -> Question:
    hour, minute = draw.randint(1, 9), draw.randint(10, 59)
    time = f"{hour}:{minute}"
    if draw.random() < 0.5:
        half, other = draw.choice([("a.m.", "p.m."), ("p.m.", "a.m.")])
        golds = [rf"{time} \text{{ {half}}}", f"{time} {half}", rf"{time}\text{{ {half}}}"]
        short = half.replace(".", "")
        rights = [*golds, f"{time} {short.upper()}", rf"{time} \text{{ {short}}}", rf"\text{{{time} {short.upper()}}}"]
        wrongs = [
            f"{time} {other}",
            rf"{time} \text{{ {other.replace('.', '').upper()}}}",
            f"{hour}:{(minute + 1) % 60:02} {half}",
            f"{hour + 1}:{minute} {half}",
            f"{hour}",
            f"{hour}{minute}",
            rf"\frac{{{hour}}}{{{minute}}}",
        ]
        return Question(golds=golds, rights=rights, wrongs=wrongs)
    wrongs = [
        f"{hour}:{minute % 59 + 1:02}",
        f"{hour + 1}:{minute}",
        f"{minute}:{hour}",
        str(hour),
        str(minute),
        rf"{hour}{minute}",
        f"{hour}.{minute}",
    ]
    return Question(golds=[time, f"${time}$"], rights=[time, rf"\text{{{time}}}", f"{hour}:{minute}"], wrongs=wrongs)


def span(draw: Random) -> Question:
    a, b = draw.randint(1, 40), draw.randint(41, 99)
    wrongs = [str(a - b), f"{b}-{a}", f"{a}-{b + 1}", str(a), str(b), str(b - a), f"{a + 1}-{b}", f"{a}{b}"]
    return Question(golds=[f"{a}-{b}"], rights=[f"{a}-{b}", f"{a} - {b}", f"{a}–{b}", rf"\text{{{a}-{b}}}"], wrongs=wrongs)


def ratio(draw: Random) -> Question:
    a, b = draw.sample([1, 2, 3, 5, 7, 11, 13, 17], 2)
    wrongs = [f"{b}:{a}", f"{a}:{b + 1}", f"{a + 1}:{b}", str(a), str(b), f"{a}{b}", f"{a}:{b}:1"]
    return Question(golds=[f"{a}:{b}", f"${a}:{b}$"], rights=[f"{a}:{b}", f"{a} : {b}", rf"{a}\colon {b}"], wrongs=wrongs)


NAMES = ["Evelyn", "Briana", "Debra", "Angela", "Carla", "Monday", "Friday", "Kansas", "Rhombus"]
WORDS = [
    ("odd", ["even", "add", "neither"]),
    ("Yes", ["No", "Not", "1", "Y"]),
    ("No", ["Yes", "None", "0"]),
    ("True", ["False", "1"]),
    ("False", ["True", "0"]),
    ("neither", ["either", "both"]),
    ("parabola", ["hyperbola", "ellipse"]),
    ("hyperbola", ["parabola", "circle"]),
    ("north", ["south", "northwest"]),
    ("increasing", ["decreasing", "constant"]),
    ("converges", ["diverges", "convergence"]),
    ("red", ["green", "reed"]),
    ("isosceles triangle", ["scalene triangle", "triangle", "isosceles"]),
    ("right triangle", ["acute triangle", "triangle"]),
    ("infinitely many", ["many", "finitely many", "0"]),
    ("no solution", ["one solution", "solution", "0"]),
    ("does not exist", ["exists", "0", "does exist"]),
    ("Bob wins", ["Alice wins", "Bob", "wins"]),
    ("The midpoints form a regular hexagon", ["The midpoints form a hexagon", "hexagon"]),
]


def word(draw: Random) -> Question:
    text, others = draw.choice([*WORDS, *((n, [m for m in NAMES if m != n]) for n in NAMES)])
    golds = [rf"\text{{{text}}}", text, rf"$\text{{{text}}}$"]
    rights = [rf"\text{{{text}}}", text, rf"\textbf{{{text}}}", text.lower(), rf"\text{{{text}.}}", text.capitalize()]
    rights += [rf"\mathrm{{{text}}}" if " " not in text else text, rf"\text{{ {text} }}"]
    wrongs = [rf"\text{{{o}}}" for o in others] + list(others)
    if len(text) > 3 and " " not in text:
        wrongs += [text[:-1], text[1:], rf"\text{{{text[1]}{text[0]}{text[2:]}}}", "".join(sorted(text))]
    return Question(golds=golds, rights=rights, wrongs=[w for w in wrongs if w.lower() != text.lower()])


def letter(draw: Random) -> Question:
    text = draw.choice("ABCDE")
    others = [c for c in "ABCDE" if c != text]
    golds = [text, rf"\text{{{text}}}", rf"\text{{({text})}}", rf"\textbf{{({text})}}", f"({text})"]
    rights = [text, rf"\text{{{text}}}", rf"\text{{({text})}}", f"({text})", rf"\textbf{{({text})}}", rf"\mathrm{{{text}}}"]
    wrongs = [*others, *(rf"\text{{{o}}}" for o in others), text + others[0], f"{text}, {others[0]}", "1"]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def names_of_points(draw: Random) -> Question:
    text = "".join(draw.sample("ABCDEFGHMN", draw.randint(2, 4)))
    other = text[::-1]
    rights = [text, rf"\text{{{text}}}", f"${text}$", " ".join(text), rf"\mathrm{{{text}}}"]
    wrongs = [other, text[:-1], text[:-1] + "Z", text + "K", rf"\text{{{other}}}", text[1:] + text[0], "1"]
    return Question(golds=[text, f"${text}$"], rights=rights[:3] + rights[4:], wrongs=wrongs)


def labels(draw: Random) -> Question:
    a, b, c = draw.sample(["P", "Q", "R", "S", "T"], 3)
    rights = [f"{a}, {b}", rf"\text{{{a}, {b}}}", rf"{a} \text{{ and }} {b}", f"{b}, {a}"]
    wrongs = [a, b, f"{a}, {c}", f"{a}, {b}, {c}", f"{c}, {b}", f"{a}+{b}"]
    return Question(golds=[f"{a}, {b}", rf"\text{{{a}, {b}}}"], rights=rights, wrongs=wrongs)


def based(draw: Random) -> Question:
    base = draw.choice([2, 3, 4, 5, 6, 7, 8, 9, 16])
    digits = "123456789ABCDEF"[: base - 1] + "0"
    text = draw.choice(digits[:-1]) + "".join(draw.choice(digits) for _ in range(draw.randint(2, 8)))
    other = draw.choice([b for b in (2, 3, 4, 5, 6, 7, 8, 9, 12, 16) if b != base])
    place = draw.randrange(1, len(text))
    changed = text[:place] + draw.choice([d for d in digits if d != text[place]]) + text[place + 1 :]
    golds = [f"{text}_{{{base}}}", f"${text}_{{{base}}}$"]
    if base < 10:
        golds.append(f"{text}_{base}")
    rights = [*golds, f"({text})_{{{base}}}", rf"{text}_{{\text{{{base}}}}}" if base < 10 else golds[0]]
    wrongs = [
        f"{text}_{{{other}}}",
        f"{text}_{other}" if other < 10 else f"{text}_{{{other}}}",
        f"{changed}_{{{base}}}",
        f"{text}1_{{{base}}}",
        f"{text[:-1]}_{{{base}}}",
        f"({text})_{{{other}}}",
        f"{int(text, base) + 1}",
        f"{changed}",
    ]
    return Question(golds=golds, rights=rights, wrongs=wrongs)


def unicode_answer(draw: Random) -> Question:
    n = draw.randint(2, 9)
    half = draw.choice([("½", r"\frac{1}{2}", "⅓"), ("¾", r"\frac{3}{4}", "¼"), ("⅔", r"\frac{2}{3}", "⅓"), ("⅛", "0.125", "⅞")])
    wide = str(draw.randint(10, 999)).translate(str.maketrans("0123456789", "０１２３４５６７８９"))
    narrow = wide.translate(str.maketrans("０１２３４５６７８９", "0123456789"))
    return draw.choice(
        [
            Question(golds=[half[1], half[0]], rights=[half[0], half[1]], wrongs=[half[2], "1", "12", f"{n}{half[0]}", f"-{half[0]}"]),
            Question(
                golds=[f"x^2+{n}", f"x²+{n}"],
                rights=[f"x² + {n}", f"{n}+x²", f"x^2 + {n}"],
                wrongs=[f"x³+{n}", f"x2+{n}", f"x²-{n}", f"x²+{n + 1}", f"x²−{n}"],
            ),
            Question(
                golds=[rf"{n}\sqrt{{2}}", f"{n}√2"],
                rights=[f"{n}√2", f"{n}·√2", f"{n}√(2)", rf"{n}\sqrt{{2}}"],
                wrongs=[f"{n}√3", "√2", f"{n}·2", f"{n + 1}√2", f"−{n}√2", f"{n}∛2"],
            ),
            Question(
                golds=[rf"{n}0^\circ", f"{n}0°"],
                rights=[f"{n}0°", f"{n}0 °", f"{n}0º", rf"{n}0^{{\circ}}"],
                wrongs=[f"{n}1°", f"{n}°", f"−{n}0°", f"{n}00°"],
            ),
            Question(
                golds=[rf"[{n}, \infty)", f"[{n}, ∞)"],
                rights=[f"[{n}, ∞)", f"[{n},+∞)", f"x ≥ {n}", rf"[{n}, \infty)"],
                wrongs=[f"({n}, ∞)", f"(−∞, {n}]", f"x > {n}", f"x ≤ {n}", "∞", f"[{n + 1}, ∞)"],
            ),
            Question(golds=[narrow, wide], rights=[wide, narrow], wrongs=[wide[::-1] + "１", wide + "１", f"−{wide}"]),
            Question(golds=[f"-{n}", f"−{n}"], rights=[f"−{n}", f"–{n}", f"-{n}", f"﹣{n}"], wrongs=[f"{n}", f"−{n + 1}", f"−{n}.5"]),
            Question(
                golds=[rf"{n}\pi", f"{n}π"], rights=[f"{n}π", f"{n}·π", f"π × {n}", rf"{n}\pi"], wrongs=[f"{n + 1}π", "π", f"{n}", f"−{n}π", f"π/{n}"]
            ),
            Question(
                golds=[rf"{n} \times 10^5", f"{n}×10⁵"],
                rights=[f"{n}×10⁵", f"{n}00000", f"{n} × 10^5", f"{n}·10⁵"],
                wrongs=[f"{n}×10⁶", f"{n}×10⁻⁵", f"{n}×105", f"{n + 1}×10⁵"],
            ),
            Question(golds=[r"101_2", "101₂"], rights=["101₂", "101_2", "101_{2}"], wrongs=["101₃", "101_3", "100₂", "1011₂"]),
            Question(
                golds=[rf"(-\infty, {n}) \cup ({n}, \infty)"],
                rights=[f"(−∞, {n}) ∪ ({n}, ∞)", f"(-∞,{n})∪({n},∞)"],
                wrongs=[f"(−∞, {n})", f"(−∞, {n}] ∪ ({n}, ∞)", f"(−∞, {n}) ∩ ({n}, ∞)"],
            ),
            Question(
                golds=[rf"2 \le x \le {n + 2}", f"2 ≤ x ≤ {n + 2}"],
                rights=[f"2 ≤ x ≤ {n + 2}", f"2≤x≤{n + 2}", f"[2, {n + 2}]"],
                wrongs=[f"2 < x ≤ {n + 2}", f"2 ≤ x < {n + 2}", f"2 ≤ x ≤ {n + 3}", f"2 ≥ x ≥ {n + 2}"],
            ),
        ]
    )


# --- finding the answer ---------------------------------------------------------------------------

LEADS = [
    "",
    "So the answer is ",
    "Adding both sides gives the result.\n\nTherefore, the final answer is:\n\n",
    "We compute $3 + 4 = 7$ and then $7^2 = 49$. Hence ",
    "**Step 1:** simplify.\n**Step 2:** solve.\n\n**Final Answer**\n\n",
    "<think>\nMaybe 5? Let me see. I get \\boxed{999}.\n</think>\n\nThe answer is ",
]


def boxed(answer: str, draw: Random) -> str:
    """A response with the answer in a box."""
    box = rf"\boxed{{{answer}}}"
    if "$" not in answer:
        box = draw.choice([box, f"${box}$", f"$${box}$$", rf"\[ {box} \]", rf"\({box}\)", f"${box}$"])
    return draw.choice(LEADS) + box + draw.choice(["", ".", "\n", ". This is the answer."])


COURTESY = [
    "I hope this helps!",
    "Let me know if you have any questions.",
    "Thank you for the question, and good luck with the other ones!",
    "I hope it is correct.",
    "If you want more detail on one of the steps, I am happy to go through them again.",
]
WORK = [
    "First we add the 3 apples and the 4 pears, which makes 7 of them.",
    "Let $x$ be the number. Then $2x + 1 = 15$.",
    "There are 12 months in a year, so we multiply by 12.",
    "Note that $2^{10} = 1024$, which is more than 1000.",
]


def finding(draw: Random) -> tuple[str, str, str]:
    """A gold answer, a right response, a wrong one."""
    n = draw.randint(100, 999)
    m = n + draw.choice([1, 10, 100])
    gold, good, bad = draw.choice(
        [
            (str(n), str(n), str(m)),
            (str(n), str(n), str(m)),
            (rf"\frac{{{n}}}{{1{n}}}", rf"\frac{{{n}}}{{1{n}}}", rf"\frac{{{n}}}{{2{n}}}"),
            (rf"{n}\sqrt{{2}}", rf"{n}\sqrt{{2}}", rf"{m}\sqrt{{2}}"),
            (rf"({n}, {m})", rf"({n}, {m})", rf"({m}, {n})"),
        ]
    )
    work, courtesy = draw.choice(WORK), draw.choice(COURTESY)
    is_number = good.isdigit()
    math_of: Callable[[str], str] = (lambda a: a) if is_number else (lambda a: f"${a}$")
    any_form = draw.choice([lambda a: f"${a}$", lambda a: rf"\({a}\)", math_of, lambda a: f"**{math_of(a)}**"])
    long = f"{work} " * 12
    wordings: list[Callable[[str], str]] = [
        lambda a: f"{work}\nThe answer is {any_form(a)}",
        lambda a: f"{work}\nThe answer is {any_form(a)}.",
        lambda a: f"{work}\nThe answer is: {any_form(a)}",
        lambda a: f"{work}\nAnswer: {any_form(a)}",
        lambda a: f"{work}\n**Answer:** {any_form(a)}",
        lambda a: f"{work}\n**Answer: {math_of(a)}**",
        lambda a: f"{work}\nFinal answer: {any_form(a)}.",
        lambda a: f"{work}\nFinal Answer: The final answer is {any_form(a)}. I hope it is correct.",
        lambda a: f"{work}\nThe final answer is {any_form(a)}.\n\n{courtesy}",
        lambda a: f"{work}\nSo the answer is {any_form(a)}.\n\n{courtesy}",
        lambda a: f"{work}\nTherefore, the answer is {any_form(a)}. {courtesy}",
        lambda a: f"{long}\nThe answer is {any_form(a)}.\n\n" + f"{courtesy} " * 5,
        lambda a: f"{work}\n#### {a}" if is_number else f"{work}\n#### {math_of(a)}",
        lambda a: f"{work}\n\n{math_of(a)}",
        lambda a: math_of(a),
        lambda a: f"{math_of(a)}.",
        lambda a: f"{work}\n\n<answer>{a}</answer>",
        lambda a: f"{work}\n\n<answer>\n{math_of(a)}\n</answer>\n",
        lambda a: f"{work}\n# Answer\n{math_of(a)}",
        lambda a: f"{work}\n**Final Answer**\n{any_form(a)}\n",
        lambda a: rf"{work} So \boxed{{{a}}}. (As asked, in \boxed{{}}.)",
        lambda a: rf"{work} So \boxed {{{a}}}.",
        lambda a: rf"{work} So \boxed{{{a}}}. Let me verify: \boxed{{",
        lambda a: rf"{work} So $\boxed{{{a}}}$. Let me check this again. Since \boxed{{{a[:1]}",
        lambda a: rf"{work} So \fbox{{{a}}}.",
        lambda a: rf"{work} So $\boxed{{\text{{{a}}}}}$." if is_number else rf"{work} $\boxed{{{a}}}$",
        lambda a: rf"I first thought of \boxed{{5}}. {work} {long} But that is wrong, so it is \boxed{{{a}}}.",
        lambda a: rf"<think>{work} I guess \boxed{{5}}.</think>{work} So \boxed{{{a}}}.",
        lambda a: f"<think>{work} Maybe \\boxed{{5}}.</think>The answer is {any_form(a)}.",
        lambda a: f"<think>a <think>b</think> c \\boxed{{5}}</think>\nThe answer is {any_form(a)}.",
        lambda a: f"\\boxed{{5}} was my guess.</think>\n\nSo $\\boxed{{{a}}}$.",
        lambda a: rf"{work} $$\boxed{{{a}}}$$" + f"\n\n{courtesy}",
        lambda a: rf"{work} $$\boxed{{\boxed{{{a}}}}}$$",
        lambda a: rf"$\boxed{{{a}}}$ ... so, again, **Final Answer** $\boxed{{{a}}}$",
        lambda a: f"{work}\nThus, the number that we want equals {any_form(a)}." if is_number else f"So the answer is {math_of(a)}",
        lambda a: f"{work}\n\\[ x = {a} \\]" if is_number else f"{work}\n\\[ {a} \\]",
        lambda a: f"{work}\nThe answer is ${a}$" + (" apples." if is_number else "."),
        lambda a: f"{work}\nHence the correct answer is {any_form(a)}!",
        lambda a: f"{work}\nANSWER: {any_form(a)}",
        lambda a: f"{work}\n- Answer: {any_form(a)}",
        lambda a: f"{work}\nAnswer = {any_form(a)}" if is_number else f"{work}\nAnswer: {math_of(a)}",
    ]
    losing: list[str] = [
        rf"<think>I guess \boxed{{{good}}}",
        rf"<think>It is \boxed{{{good}}}.</think>The answer is {math_of(bad)}.",
        rf"<think>It is \boxed{{{good}}}.</think> I do not know.",
        rf"\boxed{{{good}}} was a guess, which is too small. {work} {long} So it is \boxed{{{bad}}}.",
        f"{work} The answer {math_of(good)} would be too small.\nThe answer is {math_of(bad)}.",
        rf"{work} So \boxed{{{good}}} or \boxed{{{bad}}}",
        rf"{work} $\boxed{{{good}}}$, $\boxed{{{bad}}}$",
        rf"{work} \boxed{{{good} \text{{ or }} {bad}}}",
        f"{work} We do not know if it is {math_of(good)}, so the answer is {math_of(bad)}.",
        r"\boxed{}",
        r"\boxed{",
        "",
        "I do not know.",
        f"{work} {courtesy}",
        f"{work}\nThe answer is not {math_of(good)}.",
        f"{work}\nThe answer is {math_of(bad)}.",
        rf"{work} So \boxed{{{bad}}}. The answer {math_of(good)} is wrong.",
        f"<answer>{bad}</answer>",
    ]
    wrong = draw.choice([*losing, draw.choice(wordings)(bad), draw.choice(wordings)(bad)])
    return gold, draw.choice(wordings)(good), wrong


def in_boxes(draw: Random) -> tuple[str, str, str]:
    """Answers over several boxes."""
    a, b, c = draw.sample(range(10, 99), 3)
    gold = draw.choice([f"{a}, {b}", f"{a},{b}", rf"{a} \text{{ and }} {b}", rf"\{{{a}, {b}\}}"])
    joined = draw.choice(
        [
            rf"The numbers are $\boxed{{{a}}}$ and $\boxed{{{b}}}$.",
            rf"\[ \boxed{{{a}}} \quad \text{{and}} \quad \boxed{{{b}}}. \]",
            rf"\boxed{{{a}}}, \boxed{{{b}}}",
            rf"\boxed{{{a}}}\boxed{{{b}}}",
            rf"The roots are \boxed{{{a}}} or \boxed{{{b}}}.",
            rf"$x_1 = \boxed{{{a}}}$ and $x_2 = \boxed{{{b}}}$",
        ]
    )
    wrong = draw.choice(
        [
            rf"The numbers are $\boxed{{{a}}}$ and $\boxed{{{c}}}$.",
            rf"\boxed{{{a}}}, \boxed{{{b}}}, \boxed{{{c}}}",
            rf"The number is $\boxed{{{b}}}$.",
            rf"The number is $\boxed{{{a}}}$.",
            rf"\boxed{{{a}}} is too small. We try again, with care, and find \boxed{{{b}}} at last.",
        ]
    )
    return gold, joined, wrong


# --- the table ------------------------------------------------------------------------------------

KINDS: dict[str, list[Callable[[Random], Question]]] = {
    "number": [integer, integer, fraction, fraction, decimal, scientific, power, factorial, rounded, percent, repeating],
    "expression": [
        surd, quadratic, over, trigonometric, logarithm, complex_number, of_pi, rationalised, choose, symbolic,
        symbolic, symbolic,
    ],
    "equation": [line, conic, plane, assigned, assigned, function, inequality],
    "set": [finite_set],
    "interval": [interval, interval, union],
    "tuple": [coordinates, coordinates, matrix],
    "several": [several, several, plus_minus, named, points, told],
    "quantity": [quantity, quantity, area, angle, money],
    "date or time": [date, clock, span, ratio],
    "text": [word, word, letter, names_of_points, labels],
    "base": [based],
    "unicode": [unicode_answer],
}
FINDING: dict[str, list[Callable[[Random], tuple[str, str, str]]]] = {"finding": [finding] * 3 + [in_boxes]}


def pairs(seed: int = SEED) -> Iterator[dict[str, object]]:
    draw = Random(seed)
    for kind, makers in KINDS.items():
        for number in range(QUESTIONS):
            question = makers[number % len(makers)](draw)
            for right, answers in ((True, question.rights), (False, question.wrongs)):
                gold = draw.choice(question.golds)
                response = boxed(draw.choice(answers), draw)
                yield {"kind": kind, "gold": gold, "response": response, "right": right}
    for kind, finders in FINDING.items():
        for number in range(4 * QUESTIONS):
            gold, good, bad = finders[number % len(finders)](draw)
            for right, response in ((True, good), (False, bad)):
                yield {"kind": kind, "gold": gold, "response": response, "right": right}


def main() -> None:
    rows = [json.dumps(pair, ensure_ascii=False) for pair in pairs()]
    TABLE.write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{len(rows)} pairs in {TABLE.name}")


if __name__ == "__main__":
    main()
