"""Run the function calls of a response."""

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

from scsdpo.prompt import Message, Observation, Prompt, ToolSchema
from scsdpo.verifiers.stage import MAX_MESSAGES
from scsdpo.verifiers.tool_call import calls_of
from scsdpo.verifiers.tool_forms import Call, MalformedCall, NoCall, typed

Role = Literal["tool", "user"]


def schema_of(function: Callable[..., Any], owner: str) -> ToolSchema:
    """The JSON schema of a function, from its type hints and its docstring.

    Args:
        function: a bound method or a plain function.
        owner: the argument that names it, for the error.

    Raises:
        ValueError: if these do not describe the function's arguments.
    """
    from transformers.utils import get_json_schema  # takes a second
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
    )

    try:
        schema: ToolSchema = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException, ValueError) as error:
        raise ValueError(
            f"`{owner}`: `{function.__name__}` cannot be described to a model: {error}; "
            "each argument needs a type, and a line under `Args:` of a docstring"
        ) from error
    return {"type": "function", "function": schema["function"]}


def answered(
    functions: Mapping[str, Callable[..., Any]], prompt: Prompt, response: str, role: Role
) -> Observation | None:
    """A message for the result of each call of a response, in order; None: it calls nothing.

    The message of a malformed or failed call describes the error, so that the policy can try again.
    If one call of a response is malformed, none of them is made.

    Args:
        functions: functions by name.
        prompt: has their schemas, and the form in which its model writes calls.
        response: the graded part of the response.
        role: role of the messages.
    """
    try:
        calls = calls_of(prompt, response)
    except NoCall:
        return None
    except MalformedCall as error:
        if not _may_call(functions, response):
            return None
        said = _message(role, "", f"Error: {error}")
        return Observation(messages=(said,), feedback=str(error), calls=1, failed=1)
    if len(calls) > MAX_MESSAGES:
        text = f"Error: at most {MAX_MESSAGES} calls at a time, and these are {len(calls)}."
        said, count = _message(role, calls[0].tool, text), len(calls)
        return Observation(messages=(said,), feedback=text, calls=count, failed=count)
    messages, failed = [], 0
    for call in calls:
        try:
            text = _result(functions, prompt, call)
        except _Failed as fault:
            text, failed = f"Error: {fault}", failed + 1
        messages.append(_message(role, call.tool, text))
    return Observation(messages=tuple(messages), calls=len(calls), failed=failed)


def calls_something(
    functions: Mapping[str, Callable[..., Any]], prompt: Prompt, response: str
) -> bool:
    """True if `answered` would give messages for a response."""
    try:
        return bool(calls_of(prompt, response))
    except NoCall:
        return False
    except MalformedCall:
        return _may_call(functions, response)


def _may_call(functions: Mapping[str, Callable[..., Any]], malformed: str) -> bool:
    """True if malformed JSON or a list without tags names a tool: else it may be an answer."""
    return any(name in malformed for name in functions) or "<" in malformed


class _Failed(Exception):
    """A call that could not be made, or raised."""


def _message(role: Role, tool: str, text: str) -> Message:
    if role == "user":
        return {"role": role, "content": f"{tool}: {text}" if tool else text}
    return {"role": role, "name": tool or "error", "content": text}


def _result(functions: Mapping[str, Callable[..., Any]], prompt: Prompt, call: Call) -> str:
    function = functions.get(call.tool)
    if function is None:
        raise _Failed(f"there is no tool `{call.tool}`; there are {', '.join(functions)}.")
    if not isinstance(call.arguments, dict):
        raise _Failed(f"the arguments of `{call.tool}` must be a JSON object with their names.")
    given = {
        key: _meant(prompt, call, key, value) if key in call.texts else value
        for key, value in call.arguments.items()
    }
    try:
        inspect.signature(function).bind(**given)
    except TypeError as error:
        raise _Failed(f"`{call.tool}`: {error}.") from error
    try:
        result = settled(function(**given))
    except Exception as error:
        raise _Failed(f"{type(error).__name__}: {error}") from error
    return result if isinstance(result, str) else json.dumps(result, default=str)


def _meant(prompt: Prompt, call: Call, key: str, text: Any) -> Any:
    """The value of an untyped text by the schema: "1" stays a string if a string is wanted."""
    schemas = {tool["function"]["name"]: tool["function"] for tool in prompt.tools}
    wanted = schemas.get(call.tool, {}).get("parameters", {}).get("properties", {}).get(key, {})
    return text if wanted.get("type") == "string" else typed(text, [])


def settled(result: Any) -> Any:
    """The result of a function; an awaitable is awaited."""

    async def wait() -> Any:
        return await result

    return asyncio.run(wait()) if inspect.isawaitable(result) else result


def accepted(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments that a function takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        return dict(given)
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in given.items() if name in names}
