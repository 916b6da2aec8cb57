"""A verifier of mathematical answers."""

import logging
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, lru_cache
from types import ModuleType
from typing import Literal

from scsdpo.prompt import Prompt, Verdict, Verifier
from scsdpo.verifiers.maths.answers import Answer, Rules, read_answer, same, spelling
from scsdpo.verifiers.maths.finding import MAX_ANSWER, final_answer


@dataclass(frozen=True, kw_only=True)
class MathAnswer(Verifier):
    r"""Right iff the final answer equals `prompt.answer` as mathematics.

    The final answer is the last closed and non-empty \boxed{...}, together with the boxes that it
    is listed with (\boxed{1} and \boxed{2}); else the last <answer> block; else the text after the
    last "the answer is", "Answer:" or ####; else the last line, if it is mathematics or ends in it.
    Both answers are read as one of these kinds, and compared by kind:

    * numbers and expressions by their values, exactly: 1/2^70 is not 1/2^71. A decimal of six
      digits or more equals a number that no decimal is (1/3, the root of 2) if it is that number
      rounded to its last digit; with `tolerance` all decimals are compared relatively.
    * equations as multiples of each other, inequalities as positive multiples. `x = 5` and `5` are
      the same, `x = 5` and `y = 5` are not; what holds always or never (1=1, 1=2) is no answer.
    * tuples and intervals in order, with their brackets; sets, unions and several answers in any
      order, all of them. A part is not the whole.
    * quantities with their unit, unless one of the two has none; 50% is 0.5, and 50. Numbers with
      a base by digits and base.
    * dates, times, ranges, names of points, words, and all else that is no mathematics as text.

    Unicode (½, x², √2, 90°, ∞) is read. What is beyond elementary functions (sums, integrals) is
    read by math-verify, and only where both answers have the same symbols in another order. No
    answer is longer than 1,000 characters, no exact value has more than 12,000 digits, and no other
    is computed to more than 1,000: beyond that, answers are compared as text.

    Args:
        tolerance: how far a number may be from the gold one, relative to it, where one of the two
            is written with a decimal point. 0: not at all, but for rounding as above.
        units: `compared`: 5 cm is not 5 km, and is 50 mm. `ignored`: only the numbers count.
        strip_thinking: judge only the text after the thinking (see `Verifier`); False: the whole
            response.

    Raises:
        ValueError: if `tolerance` is not in [0, 1).

    Source:
        For sums, integrals and the like github.com/huggingface/Math-Verify.
    """

    tolerance: float = 0.0
    units: Literal["compared", "ignored"] = "compared"
    strip_thinking: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise ValueError(
                f"`MathAnswer(tolerance=...)` must be at least 0 and below 1, got {self.tolerance}"
            )

    def prepare(self) -> None:
        """Import the library that computes values."""
        read = read_answer(r"\sqrt{2}")
        same(read, read_answer("1.5"), Rules())

    def check(self, prompt: Prompt) -> None:
        """Raise if a response with the answer in a box would not be right."""
        if not _is_met(prompt.answer):
            raise ValueError(_unreadable(prompt.answer))

    def written(self, prompt: Prompt) -> str:
        """The answer in a box."""
        return _boxed(prompt.answer)

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """Reward 1 or 0; the verdict's answer is the same text for equal answers."""
        if not _is_met(prompt.answer):
            return Verdict(reward=0.0, error=_unreadable(prompt.answer))
        gold, written = _gold(prompt.answer), final_answer(response)
        answer = read_answer(written)
        if not answer.written:
            form = r"The response has no final answer in \boxed{...} that can be read."
            return Verdict(reward=0.0, feedback=form)
        rules = Rules(Fraction(str(self.tolerance)), self.units == "compared")
        if same(gold, answer, rules) or _same_by_library(prompt.answer, written):
            return Verdict(reward=1.0, answer=spelling(gold))
        feedback = "The final answer is not correct."
        return Verdict(reward=0.0, answer=spelling(answer), feedback=feedback)


@lru_cache(4096)
def _gold(answer: str) -> Answer:
    """The gold answer; of a worked solution, the text of its box."""
    return read_answer(final_answer(answer) if "\\boxed" in answer else answer)


@lru_cache(20_000)
def _is_met(answer: str) -> bool:
    """True if a response with the same text in a box is right."""
    if not answer.strip() or not _is_whole(answer):
        return False
    gold = _gold(answer)
    if not gold.written.strip("\"'") or len(gold.written) > MAX_ANSWER:
        return False
    return same(gold, read_answer(final_answer(_boxed(answer))), Rules())


def _boxed(answer: str) -> str:
    return answer if "\\boxed" in answer else rf"\boxed{{{answer}}}"


def _is_whole(text: str) -> bool:
    r"""True if braces, \left and \begin are closed; a cut text is no answer."""
    bare = re.sub(r"\\[\\{}]", " ", text)
    pairs = ((r"\{", r"\}"), (r"\\left\b", r"\\right\b"), (r"\\begin\b", r"\\end\b"))
    return all(len(re.findall(a, bare)) == len(re.findall(b, bare)) for a, b in pairs)


def _unreadable(answer: str) -> str:
    return f"the gold answer {answer!r} cannot be read as mathematics"


# --- what only math-verify reads ------------------------------------------------------------------

_SYMBOLS = re.compile(r"\\[A-Za-z]+|[A-Za-z0-9]|[^\s\w{}()\\,.$]")
_BEYOND = re.compile(r"\\(?:sum|prod|int|lim|max|min|gcd|det|bmod|pmod)(?![A-Za-z])")
_MAX_SYMBOLS = 60


def _same_by_library(gold: str, written: str) -> bool:
    """True if math-verify finds both equal, and both have the same symbols.

    Its parser does not distinguish R from r, and drops unknown commands. So it is asked only about
    texts that differ in nothing but the order of their symbols.
    """
    if not _BEYOND.search(gold):
        return False
    symbols = [Counter(_SYMBOLS.findall(text)) for text in (gold, written)]
    if symbols[0] != symbols[1] or symbols[0].total() > _MAX_SYMBOLS:
        return False
    parsed = [
        _library().parse(f"${text.strip(' $')}$", parsing_timeout=None) for text in (gold, written)
    ]
    return bool(_library().verify(*parsed, timeout_seconds=None))


@cache
def _library() -> ModuleType:
    import math_verify  # slow: it brings sympy

    # It warns at each call that its timeouts are off. They use signals, which work in a main thread
    # only; the pool's deadline is enforced instead.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify
