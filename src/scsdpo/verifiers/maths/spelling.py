r"""Rewrite mathematics in Unicode and LaTeX into one small language.

In that language * and / multiply and divide, ⦃ ⦄ are the braces of a set, «...» is a text, ° % $
are units, and ≤ ≥ ≠ ≈ ± ∪ ∩ ∖ ∈ ∞ ∅ have their usual meaning. Unknown letters and commands stay.
"""

# ruff: noqa: RUF001

import re
import unicodedata

_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
_SUB = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-")
_FRACTIONS = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
_GREEK = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta",
    "η": "eta", "θ": "theta", "ι": "iota", "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu",
    "ξ": "xi", "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "υ": "upsilon", "φ": "phi",
    "ϕ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma", "Δ": "Delta", "Θ": "Theta",
    "Λ": "Lambda", "Ξ": "Xi", "Π": "Pi", "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip
_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "‒": "-", "‐": "-", "‑": "-", "﹣": "-", "－": "-",
    "×": "*", "·": "*", "⋅": "*", "∙": "*", "•": "*", "∗": "*", "✕": "*", "⨯": "*",
    "÷": "/", "∕": "/", "⁄": "/", "≦": "≤", "≧": "≥", "⩽": "≤", "⩾": "≥", "º": "°",
    "∶": ":", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"', "∅": "∅",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∠": r"\angle ",
    "△": r"\triangle ", "∆": r"\Delta ", "⟨": r"\langle ", "⟩": r"\rangle ", "∣": "|", "│": "|",
    "≃": "≈", "≅": "≈", "∓": "∓",
}  # fmt: skip
_COMMANDS = {
    "dfrac": r"\frac", "tfrac": r"\frac", "cfrac": r"\frac", "dbinom": r"\binom",
    "tbinom": r"\binom", "times": "*", "cdot": "*", "ast": "*", "bullet": "*", "div": "/",
    "lt": "<", "gt": ">", "le": "≤", "leq": "≤", "leqslant": "≤", "ge": "≥", "geq": "≥",
    "geqslant": "≥", "ne": "≠", "neq": "≠", "approx": "≈", "simeq": "≈", "pm": "±", "mp": "∓",
    "cup": "∪", "cap": "∩", "setminus": "∖", "backslash": "∖", "in": "∈", "infty": "∞",
    "emptyset": "∅", "varnothing": "∅", "circ": "°", "degree": "°", "lbrace": "⦃", "rbrace": "⦄",
    "colon": ":", "prime": "'", "mid": "|", "vert": "|", "bmod": "mod", "dots": "...",
    "ldots": "...", "cdots": "...", "land": "∧", "lor": "∨", "wedge": "∧", "vee": "∨",
    "implies": "⇒", "Rightarrow": "⇒", "lparen": "(", "rparen": ")",
    "lbrack": "[", "rbrack": "]", "langle": "(", "rangle": ")", "euro": "€",
    "pounds": "£", "textdollar": "$", "textdegree": "°", "imath": "i", "cent": "¢",
}  # fmt: skip
_NOTHING = [
    "left", "right", "bigl", "bigr", "Bigl", "Bigr", "biggl", "biggr", "Biggl", "Biggr", "bigm",
    "big", "Big", "bigg", "Bigg", "middle", "displaystyle", "textstyle", "scriptstyle",
    "limits", "nolimits", "mathstrut", "strut", "boldmath", "null", "bf", "it", "rm", "cal",
]  # fmt: skip
_SPACES = ("quad", "qquad", "enspace", "enskip", "thinspace", "space", "hspace", "nobreak")
_TEXT = (
    r"text|textbf|textit|textrm|textnormal|textsf|texttt|mbox|hbox|emph|mathrm|operatorname|rm|bf"
)
_TEXTS = re.compile(rf"\\(?P<name>{_TEXT})\s*\*?\s*\{{(?P<inner>[^{{}}]*)\}}")
_STYLES = re.compile(
    r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf|mathcal|mathscr|mathnormal|pmb)(?![a-z])\s*"
    r"(?:\{([A-Za-z])\})?"
)
_WORDS = ("sin", "cos", "tan", "cot", "sec", "csc", "ln", "log", "exp", "sqrt", "arcsin", "arccos")
_PLAIN = re.compile(
    rf"(?<![\\a-zA-Z])({'|'.join((*_WORDS, 'arctan', 'sinh', 'cosh', 'tanh', 'pi', 'infty'))})"
    r"(?![a-zA-Z])"
)


def clean(text: str) -> str:
    """The text in the small language."""
    text = re.sub(r"[\x00-\x08]", " ", text)  # used as markers below
    text = _latex(_unicode(_undollared(text)))
    text = re.sub(r"\s+", " ", text).strip()
    while True:
        shorter = stripped(text)
        if shorter == text:
            return text
        text = shorter


def _undollared(text: str) -> str:
    r"""The text without $ around mathematics; \$ and a lone $ are a currency."""
    text = text.replace(r"\$", "\x01").replace("$$", " ")
    if text.count("$") % 2:
        text = re.sub(r"\$(?=\s*[\d.])", "\x01", text, count=1)
    text = text.replace("$", " ")
    return re.sub(r"(?<!\\)\\[()\[\]]", " ", text).replace("\x01", "$")


def _unicode(text: str) -> str:
    if text.isascii():
        return text
    for fraction in _FRACTIONS:
        if fraction in text:
            top, below = unicodedata.normalize("NFKC", fraction).split("⁄")
            text = text.replace(fraction, rf"\frac{{{top}}}{{{below}}}")
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ]+", lambda m: f"^{{{m[0].translate(_SUPER)}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉₊₋]+", lambda m: f"_{{{m[0].translate(_SUB)}}}", text)
    roots = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
    text = re.sub(
        r"([√∛∜])\s*(?:\(([^()]*)\)|(\d+|[a-zA-Zα-ωΑ-Ω]))?",
        lambda m: roots[m[1]] + (f"{{{m[2] or m[3]}}}" if m[2] or m[3] else " "),
        text,
    )
    for letter, name in _GREEK.items():
        text = text.replace(letter, rf"\{name} ")
    for character, ours in _CHARACTERS.items():
        text = text.replace(character, ours)
    kept = "⦃⦄«»°≤≥≠≈±∓∪∩∖∈∞∅⇒€£¥¢"
    return "".join(c if c in kept else unicodedata.normalize("NFKC", c) for c in text)


def _latex(text: str) -> str:
    text = re.sub(r"\\(?:boxed|fbox|(?:text)?color\s*\{[a-z]*\})\s*(?=\{|[\d-])", "", text)
    if r"\begin" not in text:  # there are no rows, so the backslashes were escaped twice
        text = re.sub(r"\\\\(?=[A-Za-z(\[{}\])])", r"\\", text)
    text = text.replace(r"\\", "\x02")  # the end of a row
    text = text.replace(r"\{", "⦃").replace(r"\}", "⦄").replace(r"\%", "%").replace(r"\_", "_")
    text = text.replace(r"\#", "#").replace(r"\&", "&").replace("{,}", "\x03").replace("'", "'")
    text = re.sub(r"(?<=\d),?\\[,!;:](?:\\!)*\s?(?=\d{3}(?!\d))", "\x03", text)
    text = re.sub(r"(?<=\d)~(?=\d{3}(?!\d))", "\x03", text)
    text = re.sub(r"\\[,;:> ]|~|(?<!\\)\\$", " ", text).replace(r"\!", "")
    text = _STYLES.sub(lambda m: m[1] or "", text)
    for _ in range(3):  # a text within a text
        text, count = _TEXTS.subn(_texted, text)
        if not count:
            break
    text = re.sub(r"\\([a-zA-Z]+)", _command, text)
    text = text.replace("<=", "≤").replace(">=", "≥").replace("!=", "≠").replace("**", "^")
    text = text.replace("==", "=").replace(r"\|", "|").replace("=<", "≤")
    text = re.sub(r"\^\s*(?:\{\s*°\s*\}|°)", "°", text)
    text = re.sub(r"\^\s*\{\s*('+)\s*\}|\^\s*('+)", lambda m: m[1] or m[2], text)
    text = _PLAIN.sub(lambda m: "∞" if m[0] == "infty" else rf"\{m[0]} ", text)
    text = re.sub(r"(?<=\bsqrt )\(([^()]*)\)", r"{\1}", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"°\s*(?:«\s*([CF])\s*»|([CF])(?![a-z]))", r"«deg\1\2»", text)
    text = re.sub(r"\{([:;=<>≤≥])\}", r"\1", text)
    text = re.sub(r"(?<=[)\]⦄])\s*U\s*(?=[(\[⦃])", "∪", text)
    if re.search(r"[<>≤≥=]", text):  # it joins relations, and is no logical operator
        text = text.replace("∧", " «and» ").replace("∨", " «or» ")
    return text.replace("\x02", r" \\ ")


def _texted(match: re.Match[str]) -> str:
    inner = match["inner"].replace("\\ ", " ").replace("~", " ")
    bare = inner.strip()
    upright = match["name"] in ("mathrm", "rm", "operatorname")
    if upright and len(bare) == 1 and inner == bare and (bare in "ied" or bare.isupper()):
        return bare
    if match["name"] == "operatorname" and bare in _WORDS:
        return rf"\{bare} "
    if re.fullmatch(r"[\d.,/%$+-]*", bare):
        return f" {bare} "
    return f"«{bare.replace('«', '').replace('»', '')}»"


def _command(match: re.Match[str]) -> str:
    name = match[1]
    if name in _NOTHING:
        return " "
    if name in _SPACES:
        return " "
    return _COMMANDS.get(name, rf"\{name} ")


def stripped(text: str) -> str:
    """The text without outer braces, quotes and final punctuation."""
    text = text.strip().strip('"`').strip()
    text = re.sub(r"\*\*(.*)\*\*", r"\1", text) if text.startswith("**") else text
    text = re.sub(r"(?:\s*\\\\)+$", "", re.sub(r"(?<=[^.])[.,;:]$", "", text)).strip()
    if text.startswith("{") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    if text.startswith("«") and text.endswith("»") and text.count("«") == 1:
        inner = text[1:-1].strip()
        return f"«{re.sub(r'(?<=[A-Za-z0-9)%])(?<![.][A-Za-z])[.]$', '', inner)}»"
    return text


OPENING, CLOSING = "([{⦃«", ")]}⦄»"


def closing(text: str, start: int) -> int:
    """Index of the bracket of any kind that closes the one at `start`; -1: there is none."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] in OPENING:
            depth += 1
        elif text[place] in CLOSING:
            depth -= 1
            if depth == 0:
                return place
    return -1


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts between the matches of `separator` outside brackets."""
    parts, depth, start, place = [], 0, 0, 0
    while place < len(text):
        match = separator.match(text, place) if depth == 0 else None
        if match is not None and match.end() > place:
            parts.append(text[start:place])
            start = place = match.end()
            continue
        depth += (text[place] in OPENING) - (text[place] in CLOSING)
        place += 1
    return [*parts, text[start:]]


def flat(text: str) -> str:
    """A cleaned text without spaces and braces, and with words in lower case.

    Names of one letter or of capitals keep their case: A is not a, and AB is not ab.
    """
    text = text.replace("«", "").replace("»", "").replace("\x03", "")
    text = re.sub(r"(?<=\d)\s+(?=[\d.])|(?<=\d,)\s+(?=\d{3})", "\x04", text)
    text = re.sub(r"\s+", "", text).replace("\x04", " ")
    text = re.sub(r"\{([a-zA-Z0-9])\}", r"\1", text)
    text = re.sub(r"^\(([A-Za-z])\)$", r"\1", text)
    only_words = re.fullmatch(r"[A-Za-z .,'?!-]*", text)
    longest = max((len(run) for run in re.findall(r"[A-Za-z]?[a-z]+", text)), default=0)
    is_text = (only_words and (longest >= 3 or text in ("No", "no"))) or longest >= 4
    return text.casefold() if is_text and "\\" not in text else text
