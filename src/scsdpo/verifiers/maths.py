"""Verifier of mathematical answers."""

import logging
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

from scsdpo.prompt import Prompt, Verdict, Verifier
from scsdpo.verifiers.answer import last_answer

MAX_ANSWER = 300
r"""Characters of a final answer: a longer one is no answer, and its parsing would take its time."""
_TAIL = 200
_DOLLAR = re.compile(r"(?<!\\)\$")
"""Opens or ends mathematics, where \\$ is a currency."""


@dataclass(frozen=True, kw_only=True)
class MathAnswer(Verifier):
    r"""Right iff the final answer equals `prompt.answer` as mathematics, as math-verify decides.

    The final answer is the last `\boxed{...}`, else the last <answer> block, else what math-verify
    finds in the response's last line. 1/2, 0.5 and \frac{1}{2} are equal, and so are sets in any
    order. An expression can be made to take forever to simplify; the pool's deadline ends that.

    Args:
        strip_thinking: judge only what stands behind the thinking, as `Verifier` says; False: all
            of the response.

    Source:
        github.com/huggingface/Math-Verify.
    """

    strip_thinking: bool = True

    def prepare(self) -> None:
        """Import sympy and build the parser."""
        _parsed("1")

    def check(self, prompt: Prompt) -> None:
        """Whether it is mathematics, or at least a text that a response can write in a box."""
        if not _readable(prompt.answer):
            raise ValueError(_unreadable(prompt.answer))

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """Reward 1 or 0; the verdict's answer is the same for equal answers, however spelled."""
        gold = _gold(prompt.answer)
        if not gold:
            return Verdict(reward=0.0, error=_unreadable(prompt.answer))
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
    bare = "\\boxed" not in text and not _DOLLAR.search(text)
    wrapped = f"\\boxed{{{text}}}" if bare else text
    return _library().parse(wrapped, parsing_timeout=None) or _library().parse(
        text, parsing_timeout=None
    )


@lru_cache(4096)
def _gold(answer: str) -> list[Any]:
    return _parsed(answer)


@lru_cache(20_000)
def _readable(answer: str) -> bool:
    """Whether a response could be right: one with the same text in a box, or an equal expression.

    Parsing takes 5 ms, and few texts need it.
    """
    text = answer.strip()
    if not _is_whole(text):
        return False
    said = text.strip("\"'$\\ ")  # math-verify cleans these away
    special = "\\boxed" in said or "\n" in said or _DOLLAR.search(said)
    if said and not special and final_answer(f"\\boxed{{{text}}}") == text:
        return True
    return any(not isinstance(part, str) for part in _gold(answer))


def _is_whole(text: str) -> bool:
    r"""Whether braces, \left and \begin are closed: of a torn text math-verify reads a part."""
    bare = re.sub(r"\\[\\{}]", " ", text)
    pairs = ((r"\{", r"\}"), (r"\\left\b", r"\\right\b"), (r"\\begin\b", r"\\end\b"))
    return all(len(re.findall(a, bare)) == len(re.findall(b, bare)) for a, b in pairs)


def _unreadable(answer: str) -> str:
    return f"the gold answer {answer!r} cannot be read as mathematics"


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
