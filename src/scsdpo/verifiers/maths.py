"""Verifier of mathematical answers."""

import logging
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

from scsdpo.prompt import Prompt, Verdict, Verifier
from scsdpo.verifiers.answer import last_answer

MAX_ANSWER = 300
r"""Characters of a final answer: a longer one is no answer, and its parsing would take its time."""
_TAIL = 200


@dataclass(frozen=True, kw_only=True)
class MathAnswer(Verifier):
    r"""Right iff the final answer equals `prompt.answer` as mathematics, as math-verify decides.

    The final answer is the last `\boxed{...}`, else the last <answer> block, else what math-verify
    finds in the response's last line. 1/2, 0.5 and \frac{1}{2} are equal, and so are sets in any
    order. An expression can be made to take forever to simplify; the pool's deadline ends that.

    Source:
        github.com/huggingface/Math-Verify.
    """

    def prepare(self) -> None:
        """Import sympy and build the parser."""
        _parsed("1")

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """Reward 1 or 0; the verdict's answer is the same for equal answers, however spelled."""
        gold = _gold(prompt.answer)
        if not gold:
            return Verdict(
                reward=0.0, error=f"the gold answer {prompt.answer!r} cannot be read as mathematics"
            )
        written = final_answer(response)
        answer = _parsed(written) if written else []
        if not answer:
            form = r"The response has no final answer in \boxed{...} that can be read."
            return Verdict(reward=0.0, feedback=form)
        if _library().verify(gold, answer, timeout_seconds=None):
            return Verdict(reward=1.0, answer=_spelling(gold))
        feedback = "The final answer is not correct."
        return Verdict(reward=0.0, answer=_spelling(answer), feedback=feedback)


def final_answer(response: str) -> str:
    r"""The text of the final answer; empty if there is none. Takes linear time."""
    start = response.rfind("\\boxed{")
    if start >= 0:
        return _braced(response, start + len("\\boxed{"))
    block = last_answer(response)
    if block is not None:
        return block if len(block) <= MAX_ANSWER else ""
    return response.rstrip()[-_TAIL:].rpartition("\n")[2]


def _braced(text: str, start: int) -> str:
    """What stands between the brace before `start` and the one that closes it; empty if none."""
    depth = 1
    for end in range(start, min(len(text), start + MAX_ANSWER)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip()
    return ""


@cache
def _library() -> ModuleType:
    import math_verify  # slow: it brings sympy

    # It warns, each time, that its timeouts are off. They are signals, which work in a main thread
    # only; the pool's deadline is the one that holds.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify


def _parsed(text: str) -> list[Any]:
    """The expression, then its text; empty if it is none."""
    wrapped = text if "$" in text or "\\boxed" in text else f"\\boxed{{{text}}}"
    return _library().parse(wrapped, parsing_timeout=None) or _library().parse(
        text, parsing_timeout=None
    )


@lru_cache(4096)
def _gold(answer: str) -> list[Any]:
    return _parsed(answer)


def _spelling(parsed: list[Any]) -> str:
    """One spelling for equal numbers and for expressions that sympy orders alike."""
    import sympy

    value = parsed[0]
    if isinstance(value, sympy.Basic):
        try:
            return str(sympy.nsimplify(value.doit(), rational=True))
        except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError):
            return str(parsed[-1])  # sympy cannot, as with matrices or numbers of many digits
    return str(value)
