"""Verifier of tool calls written as `Action:` and `Action Input:` lines."""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from scsdpo.prompt import Prompt, Verdict, Verifier
from scsdpo.verifiers.tool_call_reference import reference_verdict

_HEADER = re.compile(r"^[ \t]*(Action|Action Input)[ \t]*:[ \t]*", re.MULTILINE)
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, kw_only=True)
class ToolCall(Verifier):
    """Right iff the calls of the response are those of `prompt.answer`, as a multiset.

    The response writes each call as a line `Action: <tool>`, then `Action Input: <JSON>`; text
    before, between and after the calls is ignored. Inputs are compared as JSON values: order of
    keys, whitespace, escapes and 1 against 1.0 do not matter; 1, true and "1" all differ.
    `prompt.answer` is a JSON list of `{"Action": <tool>, "Action_Input": <JSON, as a string>}`.

    Args:
        reveal: the feedback on calls that are wrong says which would have been right.
        compatibility: `reference` gives the reward of the published grader instead, for numbers
            that compare with published ones. It stops at the first "}" of an input and merges all
            inputs, and so rejects some gold answers and accepts swapped arguments. It reads the
            thinking too.
        strip_thinking: judge only what stands behind the thinking, as `Verifier` says; False: all
            of the response.

    Raises:
        ValueError: if `compatibility` is neither `none` nor `reference`.

    Source:
        Tang et al. 2023, arXiv:2306.05301 (format). Differs from the grader of lasgroup/SDPO: each
        input stays with its call, and nested objects are read to their end.
    """

    reveal: bool = False
    compatibility: Literal["none", "reference"] = "none"
    strip_thinking: bool = True

    def __post_init__(self) -> None:
        if self.compatibility not in ("none", "reference"):
            raise ValueError(
                "`ToolCall(compatibility=...)` must be 'none' or 'reference', got "
                f"{self.compatibility!r}"
            )

    def check(self, prompt: Prompt) -> None:
        """Whether it is a list of calls."""
        gold_calls(prompt.answer)

    def graded(self, prompt: Prompt, response: str) -> str:
        """What stands behind the thinking; for the published grader, all."""
        if self.compatibility == "reference":
            return response
        return super().graded(prompt, response)

    def written(self, prompt: Prompt) -> str:
        """The calls as text; none for the published grader, which rejects some gold answers."""
        if self.compatibility == "reference":
            return ""
        calls = gold_calls(prompt.answer)
        return "\n".join(f"Action: {tool}\nAction Input: {text}" for tool, text in calls)

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """Reward 1 or 0; the verdict's answer is the sorted calls in canonical spelling."""
        try:
            gold = gold_calls(prompt.answer)
        except ValueError as error:
            return Verdict(reward=0.0, error=str(error))
        own = self._judge(gold, response)
        if self.compatibility == "none":
            return own
        right, answer = reference_verdict(prompt.answer, response)
        if right:
            return Verdict(reward=1.0, answer=answer)
        feedback = own.feedback or "The calls are not written in the form that is graded."
        return Verdict(reward=0.0, answer=answer, feedback=feedback)

    def _judge(self, gold: list[tuple[str, str]], response: str) -> Verdict:
        hint = f" Right would be: {_spelled(gold)}." if self.reveal else ""
        try:
            calls = _calls(response)
        except ValueError as error:
            return Verdict(reward=0.0, feedback=f"{error}{hint}")
        answer = json.dumps(sorted(calls))
        if Counter(calls) == Counter(gold):
            return Verdict(reward=1.0, answer=answer)
        return Verdict(reward=0.0, answer=answer, feedback=_difference(calls, gold) + hint)


def gold_calls(answer: str) -> list[tuple[str, str]]:
    """(tool, input in canonical spelling) of each call of a gold answer.

    Raises:
        ValueError: if `answer` is not a non-empty list of calls in the form that `ToolCall` states.
    """
    try:
        calls = [(call["Action"], _read(call["Action_Input"], 0)[0]) for call in json.loads(answer)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        calls, reason = [], f" ({type(error).__name__}: {error})"
    else:
        reason = ""
    if not calls or not all(isinstance(tool, str) for tool, _ in calls):
        form = '[{"Action": "tool", "Action_Input": "{...}"}, ...]'
        raise ValueError(f"the gold answer of a tool call must read {form}{reason}")
    return calls


def _calls(response: str) -> list[tuple[str, str]]:
    """The calls of a response; ValueError, in words for the teacher, at the first malformed one."""
    calls: list[tuple[str, str]] = []
    tool, position = "", 0
    # `position` jumps over each input, so that headers inside its strings are not calls. Reading
    # ends at the first error: finding the line of an error costs the decoder the whole text.
    while header := _HEADER.search(response, position):
        position = header.end()
        if header[1] == "Action":
            if tool:
                raise ValueError(f"The call to `{tool}` has no `Action Input:` line.")
            tool = response[position : _line_end(response, position)].strip()
            if not tool:
                raise ValueError("An `Action:` line names no tool.")
        elif not tool:
            raise ValueError("An `Action Input:` line has no `Action:` line before it.")
        else:
            try:
                text, position = _read(response, position)
            except (ValueError, RecursionError):
                raise ValueError(f"The input of the call to `{tool}` is not valid JSON.") from None
            calls.append((tool, text))
            tool = ""
    if tool:
        raise ValueError(f"The call to `{tool}` has no `Action Input:` line.")
    if not calls:
        raise ValueError("The response has no `Action:` line followed by an `Action Input:` line.")
    return calls


def _line_end(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end


def _read(text: str, position: int) -> tuple[str, int]:
    """The JSON value at `position` in canonical spelling, and where it ends."""
    start = _SPACE.match(text, position).end()  # type: ignore[union-attr]
    value, end = _DECODER.raw_decode(text, start)
    return json.dumps(value, sort_keys=True), end


def _number(text: str) -> int | float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return int(value) if value.is_integer() else value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(parse_float=_number, parse_constant=_constant)


def _spelled(calls: list[tuple[str, str]]) -> str:
    return "; ".join(f"`{tool}` with {text}" for tool, text in calls)


def _difference(calls: list[tuple[str, str]], gold: list[tuple[str, str]]) -> str:
    """What is wrong, without the tools and inputs that were wanted."""
    if len(calls) != len(gold):
        return f"There are too {'few' if len(calls) < len(gold) else 'many'} tool calls."
    if Counter(tool for tool, _ in calls) != Counter(tool for tool, _ in gold):
        return "The choice of tools is not correct."
    wrong = Counter(calls) - Counter(gold)
    tools = sorted({f"`{tool}`" for tool, _ in wrong})
    return f"The input of a call to {', '.join(tools)} is not correct."
