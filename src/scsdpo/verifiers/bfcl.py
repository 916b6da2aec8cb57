"""Verifiers of BFCL's tasks of one turn."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from scsdpo.prompt import Prompt, Verdict, Verifier
from scsdpo.verifiers.tool_call import calls_of
from scsdpo.verifiers.tool_forms import Call, MalformedCall, NoCall, canonical, typed


@dataclass(frozen=True, kw_only=True)
class BFCLCalls(Verifier):
    """Right iff the calls of the response match `prompt.answer`, which may allow several values.

    Calls are read, and values compared, as `ToolCall` does. `prompt.answer` is BFCL's: a JSON list
    of `{tool: {argument: [value, ...]}}`. An argument must have one of the listed values; if "" is
    among them, it may be missing. The same holds for each key of an object, also in a list of
    objects. The calls may come in any order. An empty list: right iff nothing is called.

    Args:
        reveal: the feedback on wrong calls names the right ones.
        strip_thinking: judge only the text after the thinking (see `Verifier`); False: the whole
            response.

    Source:
        Patil et al. 2025, "The Berkeley Function Calling Leaderboard", its possible answers.
        Differs: its own check ignores case, spaces and punctuation of strings, which count here;
        1 and 1.0 are equal here, and values of Java or JavaScript are read as JSON.
    """

    reads_json: ClassVar[bool] = True
    reveal: bool = False
    strip_thinking: bool = True

    def check(self, prompt: Prompt) -> None:
        """Raise if the answer is no such list."""
        _gold(prompt.answer)

    def written(self, prompt: Prompt) -> str:
        """The first choice of every call, as JSON in <tool_call> tags."""
        calls = [_first_choice(one) for one in _gold(prompt.answer)]
        written = [json.dumps({"name": tool, "arguments": given}) for tool, given in calls]
        return "\n".join(f"<tool_call>{one}</tool_call>" for one in written) or "No tool fits."

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """Reward 1 or 0; the verdict's answer is the sorted calls in canonical spelling."""
        try:
            gold = _gold(prompt.answer)
        except ValueError as error:
            return Verdict(reward=0.0, error=str(error))
        right = "; ".join(
            f"`{tool}` with {json.dumps(given)}" for tool, given in map(_first_choice, gold)
        )
        hint = f" Right would be: {right or 'no call'}." if self.reveal else ""
        try:
            calls = calls_of(prompt, response)
        except NoCall as error:
            if gold:
                return Verdict(reward=0.0, feedback=f"{error}{hint}")
            return Verdict(reward=1.0, answer="[]")
        except MalformedCall as error:
            return Verdict(reward=0.0, feedback=f"{error}{hint}")
        try:
            spelled = sorted((call.tool, canonical(call.arguments)) for call in calls)
        except (ValueError, RecursionError):
            return Verdict(reward=0.0, feedback=f"The arguments of a call are no JSON.{hint}")
        answer = json.dumps(spelled)
        if _paired(calls, gold):
            return Verdict(reward=1.0, answer=answer)
        return Verdict(reward=0.0, answer=answer, feedback=_difference(calls, gold) + hint)


@dataclass(frozen=True, kw_only=True)
class BFCLRelevance(Verifier):
    """Right iff the response calls an offered function, with any arguments.

    Args:
        strip_thinking: judge only the text after the thinking (see `Verifier`); False: the whole
            response.

    Source:
        Patil et al. 2025, "The Berkeley Function Calling Leaderboard", live_relevance. Differs: its
        own check takes a call to any name.
    """

    needs_answer: ClassVar[bool] = False
    strip_thinking: bool = True

    def verify(self, prompt: Prompt, response: str) -> Verdict:
        """Reward 1 or 0; the verdict's answer holds the names of the called functions."""
        try:
            called = sorted({call.tool for call in calls_of(prompt, response)})
        except MalformedCall as error:
            return Verdict(reward=0.0, feedback=str(error))
        offered = {tool["function"]["name"] for tool in prompt.tools}
        if strange := [name for name in called if name not in offered]:
            said = f"There is no function `{strange[0]}`."
            return Verdict(reward=0.0, answer=json.dumps(called), feedback=said)
        return Verdict(reward=1.0, answer=json.dumps(called))


Choice = tuple[str, dict[str, list[Any]]]
"""A tool, and the allowed values of each argument."""


def _gold(answer: str) -> list[Choice]:
    form = '[{"tool": {"argument": [value, ...]}}, ...]'
    try:
        calls = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the gold answer of a call must read {form} ({error})") from error
    if not isinstance(calls, list) or not all(map(_is_choice, calls)):
        raise ValueError(f"the gold answer of a call must read {form}, got {answer[:60]!r}")
    return [next(iter(call.items())) for call in calls]


def _is_choice(call: object) -> bool:
    if not isinstance(call, dict) or len(call) != 1:
        return False
    (given,) = call.values()
    return isinstance(given, dict) and all(isinstance(v, list) and v for v in given.values())


def _first_choice(choice: Choice) -> tuple[str, dict[str, Any]]:
    tool, arguments = choice
    return tool, _first_values(arguments)


def _first_values(choices: Mapping[str, Any]) -> dict[str, Any]:
    first = {key: (each if isinstance(each, list) else [each])[0] for key, each in choices.items()}
    return {key: _plain(value) for key, value in first.items() if value != ""}


def _plain(value: Any) -> Any:
    """The value with the first choice of each key, in objects that list choices."""
    if isinstance(value, dict):
        return _first_values(value)
    if isinstance(value, list):
        return [_first_values(one) if isinstance(one, dict) else one for one in value]
    return value


def _paired(calls: list[Call], gold: list[Choice]) -> bool:
    """True if calls and gold calls can be matched one to one."""
    fits = [[at for at, one in enumerate(gold) if _is_right(call, one)] for call in calls]
    holder: dict[int, int] = {}

    def place(call: int, tried: set[int]) -> bool:
        for at in fits[call]:
            if at not in tried:
                tried.add(at)
                if at not in holder or place(holder[at], tried):
                    holder[at] = call
                    return True
        return False

    return len(calls) == len(gold) and all(place(call, set()) for call in range(len(calls)))


def _is_right(call: Call, wanted: Choice) -> bool:
    tool, choices = wanted
    if call.tool != tool or not isinstance(call.arguments, dict):
        return False
    arguments = {
        key: typed(value, choices.get(key, [])) if key in call.texts else value
        for key, value in call.arguments.items()
    }
    return _among(arguments, choices)


def _among(given: Mapping[str, Any], choices: Mapping[str, Any]) -> bool:
    """True if each key has an allowed value, and no required key is missing."""
    listed = {key: each if isinstance(each, list) else [each] for key, each in choices.items()}
    missing = [key for key, each in listed.items() if key not in given and "" not in each]
    return not missing and all(
        any(_equal(value, one) for one in listed.get(key, ())) for key, value in given.items()
    )


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return isinstance(value, dict) and _among(value, wanted)
    if isinstance(wanted, list) and any(isinstance(one, dict) for one in wanted):
        return (
            isinstance(value, list)
            and len(value) == len(wanted)
            and all(map(_equal, value, wanted))
        )
    try:
        return canonical(value) == canonical(wanted)
    except (ValueError, RecursionError):
        return False


def _difference(calls: list[Call], gold: list[Choice]) -> str:
    """Describe the fault without naming the right tools and inputs."""
    if not gold:
        return "Nothing should be called."
    if len(calls) != len(gold):
        return f"There are too {'few' if len(calls) < len(gold) else 'many'} tool calls."
    if sorted(call.tool for call in calls) != sorted(tool for tool, _ in gold):
        return "The choice of tools is not correct."
    wrong = sorted({c.tool for c in calls if not any(_is_right(c, one) for one in gold)})
    tools = ", ".join(f"`{tool}`" for tool in wrong) or "a tool"
    return f"The input of a call to {tools} is not correct."
