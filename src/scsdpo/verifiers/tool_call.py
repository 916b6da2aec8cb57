"""A verifier of tool calls."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from scsdpo.prompt import Prompt, Verdict, Verifier
from scsdpo.verifiers.tool_call_reference import reference_verdict
from scsdpo.verifiers.tool_forms import (
    Call,
    MalformedCall,
    canonical,
    json_call,
    read_calls,
    read_json,
    typed,
)


@dataclass(frozen=True, kw_only=True)
class ToolCall(Verifier):
    """Right iff the calls of the response are those of `prompt.answer`, as a multiset.

    The response writes them as lines `Action: <tool>` and `Action Input: <JSON>`, or in the form of
    a common model family (`scsdpo.verifiers.tool_forms`); where the tokenizer has a response
    template (transformers' `parse_response`), by that. A malformed call costs the response. Inputs
    are compared as JSON values: order of keys, whitespace, escapes and 1 against 1.0 do not matter;
    1, true and "1" all differ. Where a form writes values as bare texts (Qwen3-Coder, GLM), 1 and
    "1" look the same, and the gold answer says which is meant.

    `prompt.answer` is a JSON list of `{"Action": <tool>, "Action_Input": <JSON, as a string>}`, or
    of `{"name": <tool>, "arguments": <JSON>}`, which may stand within "function".

    Args:
        reveal: the feedback on wrong calls names the right ones.
        compatibility: `reference` gives the reward of the published grader instead, for numbers
            that compare with published ones. It stops at the first "}" of an input and merges all
            inputs, and so rejects some gold answers and accepts swapped arguments. It reads the
            thinking too.
        strip_thinking: judge only the text after the thinking (see `Verifier`); False: the whole
            response.

    Raises:
        ValueError: if `compatibility` is neither `none` nor `reference`.

    Source:
        Tang et al. 2023, arXiv:2306.05301 (format). Differs from the grader of lasgroup/SDPO: each
        input stays with its call, and nested objects are read to their end.
    """

    reads_json: ClassVar[bool] = True
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
        """Raise if the answer is no list of calls."""
        gold_calls(prompt.answer)

    def graded(self, prompt: Prompt, response: str) -> str:
        """The text after the thinking; for the published grader, the whole response."""
        if self.compatibility == "reference":
            return response
        return super().graded(prompt, response)

    def written(self, prompt: Prompt) -> str:
        """The calls in the form of the gold answer: `Action:` lines, or JSON in <tool_call> tags.

        It is empty for the published grader, which rejects some gold answers.
        """
        if self.compatibility == "reference":
            return ""
        calls = gold_calls(prompt.answer)
        if all("Action" in call for call in json.loads(prompt.answer)):
            return "\n".join(f"Action: {tool}\nAction Input: {text}" for tool, text in calls)
        return "\n".join(
            f'<tool_call>{{"name": {json.dumps(tool)}, "arguments": {text}}}</tool_call>'
            for tool, text in calls
        )

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """Reward 1 or 0; the verdict's answer is the sorted calls in canonical spelling."""
        try:
            gold = gold_calls(prompt.answer)
        except ValueError as error:
            return Verdict(reward=0.0, error=str(error))
        own = self._judge(prompt, gold, response)
        if self.compatibility == "none":
            return own
        right, answer = reference_verdict(prompt.answer, response)
        if right:
            return Verdict(reward=1.0, answer=answer)
        feedback = own.feedback or "The calls are not written in the form that is graded."
        return Verdict(reward=0.0, answer=answer, feedback=feedback)

    def _judge(self, prompt: Prompt, gold: list[tuple[str, str]], response: str) -> Verdict:
        hint = f" Right would be: {_spelled(gold)}." if self.reveal else ""
        try:
            calls = [_comparable(call, gold) for call in calls_of(prompt, response)]
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
        calls = [_gold_call(call) for call in json.loads(answer)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        calls, reason = [], f" ({type(error).__name__}: {error})"
    else:
        reason = ""
    if not calls or not all(isinstance(tool, str) for tool, _ in calls):
        form = '[{"Action": "tool", "Action_Input": "{...}"}, ...]'
        other = '[{"name": "tool", "arguments": {...}}, ...]'
        raise ValueError(f"the gold answer of a tool call must read {form} or {other}{reason}")
    return calls


def _gold_call(call: dict[str, Any]) -> tuple[str, str]:
    if "Action" in call:
        return call["Action"], canonical(read_json(call["Action_Input"], 0)[0])
    made = json_call(call)
    return made.tool, canonical(made.arguments)


def calls_of(prompt: Prompt, response: str) -> list[Call]:
    """The calls, read by the tokenizer's response template if it finds any, else by known forms.

    Raises:
        MalformedCall: in words for the teacher, at the first malformed one.
        NoCall: if there is no call.
    """
    if prompt.response_template:
        from transformers.utils.chat_parsing import parse_response  # takes a second

        template, tools = dict(prompt.response_template), list(prompt.tools)
        try:
            message = parse_response(response, template, prefix="", tools=tools)
        except (ValueError, TypeError, RecursionError):
            raise MalformedCall("A call is not written in the model's own form.") from None
        if made := message.get("tool_calls"):
            return [json_call(call) for call in made]
    return read_calls(response)


def _comparable(call: Call, gold: list[tuple[str, str]]) -> tuple[str, str]:
    """(tool, canonical input); an untyped value is a string if the gold answer has a string."""
    arguments = call.arguments
    if call.texts:
        wanted = [json.loads(text) for tool, text in gold if tool == call.tool]
        wanted = [given for given in wanted if isinstance(given, dict)]
        arguments = {
            key: typed(value, [given[key] for given in wanted if key in given])
            if key in call.texts
            else value
            for key, value in arguments.items()
        }
    try:
        return call.tool, canonical(arguments)
    except (ValueError, RecursionError):
        raise MalformedCall(f"The arguments of the call to `{call.tool}` are no JSON.") from None


def _spelled(calls: list[tuple[str, str]]) -> str:
    return "; ".join(f"`{tool}` with {text}" for tool, text in calls)


def _difference(calls: list[tuple[str, str]], gold: list[tuple[str, str]]) -> str:
    """Describe the fault without naming the right tools and inputs."""
    if len(calls) != len(gold):
        return f"There are too {'few' if len(calls) < len(gold) else 'many'} tool calls."
    if Counter(tool for tool, _ in calls) != Counter(tool for tool, _ in gold):
        return "The choice of tools is not correct."
    wrong = Counter(calls) - Counter(gold)
    tools = sorted({f"`{tool}`" for tool, _ in wrong})
    return f"The input of a call to {', '.join(tools)} is not correct."
