"""A verifier of an answer that a regular expression finds."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import re2

from scsdpo.prompt import Prompt, Verdict, Verifier


@dataclass(frozen=True, kw_only=True)
class Regex(Verifier):
    """Right iff the first match of `pattern` in the response, stripped, equals `prompt.answer`.

    Args:
        pattern: in RE2's syntax, which takes time linear in the response whatever the pattern; it
            has no lookaround and no back references. If it has a group, the first one is the
            answer. For the last match begin it with `(?s).*`: `(?s).*answer: (-?[0-9]+)`.
        strip_thinking: judge only the text after the thinking (see `Verifier`); False: the whole
            response.

    Raises:
        ValueError: if RE2 does not accept the pattern.
    """

    pattern: str
    strip_thinking: bool = True

    def __post_init__(self) -> None:
        try:
            _compiled(self.pattern)
        except (re2.error, UnicodeEncodeError) as error:
            reason = error.args[0]
            reason = reason.decode() if isinstance(reason, bytes) else reason
            raise ValueError(
                f"`Regex(pattern={self.pattern!r})` must be in RE2's syntax: {reason}"
            ) from error

    def check(self, prompt: Prompt) -> None:
        """Raise if the pattern, or its group, can never match the answer."""
        gold = prompt.answer.strip()
        padded = (f"{a}{gold}{b}" for a in ("", " ", "\n") for b in ("", " ", "\n"))
        answer = _answer_alone(self.pattern)
        if not any(answer.fullmatch(text.encode(errors="replace").decode()) for text in padded):
            raise ValueError(
                f"the gold answer {prompt.answer!r} is never found by "
                f"`Regex(pattern={self.pattern!r})`"
            )

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """Reward 1 or 0; the verdict's answer is the match."""
        # RE2 reads UTF-8, which has no lone surrogates.
        match = _compiled(self.pattern).search(response.encode(errors="replace").decode())
        found = match[min(1, match.re.groups)] if match else None
        if found is None:
            return Verdict(reward=0.0, feedback="The response has no answer in the required form.")
        if found.strip() == prompt.answer.strip():
            return Verdict(reward=1.0, answer=found.strip())
        return Verdict(reward=0.0, answer=found.strip(), feedback="The answer is not correct.")


_TOKEN = re.compile(
    r"(?P<quoted>\\Q.*?(?:\\E|$))|\\.|\[\^?\]?(?:\[:\^?\w+:\]|\\.|[^\]\\])*\]"
    r"|\(\?(?P<flags>[a-zA-Z-]+)(?P<scope>[):])|(?P<apart>\(\?:)"
    r"|(?P<open>\((?:\?P?<\w+>)?)|(?P<close>\))",
    re.DOTALL,
)


@lru_cache
def _answer_alone(pattern: str) -> Any:
    """The pattern that an answer must match: the first group with its flags, or all of it."""
    if not _compiled(pattern).groups:
        return _compiled(pattern)
    flags, depth, start = "", 0, -1
    for token in _TOKEN.finditer(pattern):
        if token["flags"] and start < 0:
            # A group that has closed counts too: matching too much is safe here.
            flags += f"(?{token['flags']})"
        if token["open"] and start < 0:
            start, depth = token.end(), 0
        elif token["open"] or token["apart"] or token["scope"] == ":":
            depth += 1
        elif token["close"]:
            if start >= 0 and depth == 0:
                return _compiled(flags + pattern[start : token.start()])
            depth -= 1
    return _compiled("(?s).*")  # no group was found: accept anything


@lru_cache
def _compiled(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    return re2.compile(pattern, options)
