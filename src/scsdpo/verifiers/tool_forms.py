"""Read tool calls in the forms that models write, without the model's tokenizer.

| form | of |
|---|---|
| `Action: f`, `Action Input: {"x": 1}` | ReAct, ToolAlpaca |
| `<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>` | Qwen, Hermes; other tags: Granite, Phi, Nemotron, Hunyuan, Cohere, InternLM |
| `<tool_call><function=f><parameter=x>1</parameter></function></tool_call>` | Qwen3-Coder, Qwen3.5, Seed-OSS; `<invoke name="f">`: MiniMax, DeepSeek-V3.2 |
| `<tool_call>f<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>` | GLM |
| `{"name": "f", "parameters": {"x": 1}}`, alone or behind `<|python_tag|>` | Llama 3 |
| `[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]`, `[TOOL_CALLS]f[ARGS]{"x": 1}` | Mistral |
| `<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"x": 1}<｜tool▁call▁end｜>` | DeepSeek |
| `<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"x": 1}<|tool_call_end|>` | Kimi |
| `<|channel|>commentary to=functions.f<|message|>{"x": 1}` | gpt-oss |
| `[f(x=1)]`, alone or in tags or a tool_code block | Gemma, Llama 4, LFM2, OLMo 3 |
| `<start_function_call>call:f{x:<escape>a<escape>}<end_function_call>` | FunctionGemma, Gemma 4 |

The form that a response uses first is the one that is read, with all its calls. Text around calls is
ignored; only a form without tags must be the whole answer.
"""  # noqa: E501

import ast
import json
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_SPACE = re.compile(r"\s*")
_HEADER = re.compile(r"^[ \t]*(Action|Action Input)[ \t]*:[ \t]*", re.MULTILINE)

_CLOSED = {
    "<tool_call>": "</tool_call>",
    "<tool_calls>": "</tool_calls>",
    "<TOOLCALL>": "</TOOLCALL>",
    "<function_calls>": "</function_calls>",
    "<seed:tool_call>": "</seed:tool_call>",
    "<minimax:tool_call>": "</minimax:tool_call>",
    "<start_function_call>": "<end_function_call>",
    "<｜DSML｜function_calls>": "</｜DSML｜function_calls>",
    "<｜tool▁calls▁begin｜>": "<｜tool▁calls▁end｜>",
    "<|tool_calls_section_begin|>": "<|tool_calls_section_end|>",
    "<|tool_call_start|>": "<|tool_call_end|>",
    "<|tool_call|>": "<|/tool_call|>",
    "<|tool_call>": "<tool_call|>",
    "<|START_ACTION|>": "<|END_ACTION|>",
    "<|python_start|>": "<|python_end|>",
    "<|action_start|><|plugin|>": "<|action_end|>",
    "```tool_code": "```",
    "```tool_call": "```",
}
"""Opening and closing tags of calls; the closing tag may be missing at the end of a response."""
_UNCLOSED = (r"<\|python_tag\|>", r"\[TOOL_CALLS\]", r"functools(?=\[)")
_XML = (
    r"<(?:｜DSML｜)?(?P<tag>function|invoke)(?:=|\s+name\s*=\s*)"
    r"(?P<q>[\"']?)(?P<tool>[^<>\"']+)(?P=q)\s*>"
)
_HARMONY = r"to=(?:functions\.)?(?P<to>[^\s<>{}]{1,99}+)[^{}\n]{0,99}?<\|message\|>"
_BEGUN = r"<｜tool▁call▁begin｜>|<\|tool_call_begin\|>"
_OPENING = re.compile(
    "|".join([*map(re.escape, _CLOSED), *_UNCLOSED, f"(?={_BEGUN}|{_XML}|{_HARMONY})"])
)
_XML_CALL, _HARMONY_CALL = re.compile(_XML), re.compile(_HARMONY)
_XML_ARGUMENT = re.compile(
    r"\s*<(?P<dsml>｜DSML｜)?parameter(?:=|\s+name\s*=\s*)(?P<q>[\"']?)(?P<key>[^<>\"']+)(?P=q)"
    r"(?:\s+string=\"(?P<string>true|false)\")?\s*>"
)
_GLM_CALL = re.compile(r"(?P<tool>[^\s<>{}()\[\]]+)\s*(?=<arg_key>|</tool_call>|\Z)")
_GLM_ARGUMENT = re.compile(
    r"\s*<arg_key>(?P<key>[^<]*)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>", re.DOTALL
)
_NAMED = re.compile(
    r"(?:<｜tool▁call▁begin｜>\s*(?:function<｜tool▁sep｜>)?|<\|tool_call_begin\|>\s*)?"
    r"(?:functions\.)?(?P<tool>[^\s<>{}(),;:\"']{1,256}?)(?::\d+)?"
    r"(?:<｜tool▁sep｜>|<\|tool_call_argument_begin\|>|\[CALL_ID\]\w+|\[ARGS\]|```json|\s)*(?=\{)"
)
_NAMED_END = re.compile(r"(?:\s*```)?\s*(?:<｜tool▁call▁end｜>|<\|tool_call_end\|>)?")
_GEMMA = re.compile(r"call:(?P<tool>[^\s<>{}]{1,256})(?=\{)")
_GEMMA_PART = re.compile(
    r"<escape>(?P<a>.*?)<escape>|<\|\"\|>(?P<b>.*?)<\|\"\|>|(?P<json>\"(?:[^\"\\]|\\.)*\")"
    r"|(?P<sign>[{}\[\],:])|(?P<word>[^\s{}\[\],:<\"]+)|\s+",
    re.DOTALL,
)
_PYTHON = re.compile(r"\[?\s*[A-Za-z_][\w.]*\s*\(")
_PYTHON_SIGN = re.compile(
    r"\"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}"
    r"|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|[()\[\]{}]",
    re.DOTALL,
)
_BETWEEN = re.compile(r"[\s,;]*")
_DEEPEST, _LONGEST = 100, 100_000
"""Limits on nested brackets and characters of a Python call; a call beyond them is malformed."""


class MalformedCall(ValueError):
    """A malformed call; the message is feedback for the teacher."""


class NoCall(MalformedCall):
    """The response has no call, also no malformed one."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call, as the response writes it."""

    tool: str
    """Name of the tool."""
    arguments: Any
    """JSON value; keywords and their values, as a rule."""
    texts: frozenset[str] = field(default_factory=frozenset)
    """Keys of values that are written without a type, so that 1 and "1" look the same."""


def read_calls(response: str) -> list[Call]:
    """The calls of a response, in order.

    Raises:
        MalformedCall: at the first one that is malformed.
        NoCall: if there is no call.
    """
    try:
        header, opening = _HEADER.search(response), _OPENING.search(response)
        if calls := _bare(response, tagged=bool(header or opening)):
            return calls
        if header and not (opening and opening.start() < header.start()):
            return _action_calls(response)
        calls = list(_tagged(response))
    except (RecursionError, MemoryError):
        raise MalformedCall("A call is nested too deeply.") from None
    if not calls:
        raise NoCall("The response has no tool call in a form that is known.")
    return calls


def json_call(value: Any) -> Call:
    """A call from its JSON object: {"name": ..., "arguments": {...}}, also within "function"."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        raise MalformedCall("A call must be a JSON object with `name` and `arguments`.")
    tool = next((value[key] for key in ("name", "tool_name", "function") if key in value), None)
    if not isinstance(tool, str) or not tool.strip():
        raise MalformedCall("A call names no tool.")
    given = [value[key] for key in ("arguments", "parameters") if key in value]
    arguments = given[0] if given else {}
    if isinstance(arguments, str):
        arguments = _decoded(arguments, tool)
    return Call(tool=tool.strip(), arguments=arguments)


def canonical(value: Any) -> str:
    """The value in JSON with sorted keys, where 1.0 is 1."""
    return json.dumps(_DECODER.decode(json.dumps(value, allow_nan=False)), sort_keys=True)


def read_json(text: str, position: int) -> tuple[Any, int]:
    """The JSON value at `position`, after any white space, and its end.

    Raises:
        ValueError: if there is none, or a number is out of range.
    """
    return _DECODER.raw_decode(text, _behind(_SPACE, text, position))


# --- the forms ------------------------------------------------------------------------------------


def _action_calls(response: str) -> list[Call]:
    calls: list[Call] = []
    tool, position = "", 0
    # `position` skips each input, so that headers inside its strings are not calls. Reading ends at
    # the first error, because the decoder scans the whole text to find the line of an error.
    while header := _HEADER.search(response, position):
        position = header.end()
        if header[1] == "Action":
            if tool:
                raise MalformedCall(f"The call to `{tool}` has no `Action Input:` line.")
            end = response.find("\n", position)
            tool = response[position : end if end >= 0 else len(response)].strip()
            if not tool:
                raise MalformedCall("An `Action:` line names no tool.")
        elif not tool:
            raise MalformedCall("An `Action Input:` line has no `Action:` line before it.")
        else:
            try:
                arguments, position = read_json(response, position)
            except (ValueError, RecursionError):
                raise MalformedCall(
                    f"The input of the call to `{tool}` is not valid JSON."
                ) from None
            calls.append(Call(tool=tool, arguments=arguments))
            tool = ""
    if tool:
        raise MalformedCall(f"The call to `{tool}` has no `Action Input:` line.")
    return calls


def _bare(response: str, *, tagged: bool) -> list[Call]:
    """Calls without a tag: JSON objects or lists, or a Python list of calls, and nothing else.

    It is empty if that is malformed and a tag follows later.
    """
    text, position = response.strip(), 0
    calls: list[Call] = []
    try:
        while text.startswith(("{", "["), position):
            more, position = _value(text, position)
            calls += more
            position = _behind(_BETWEEN, text, position)
        if position and position < len(text):
            raise MalformedCall("There is text behind the calls, which have no tags around them.")
    except MalformedCall:
        if not tagged:
            raise
        return []
    return calls


def _tagged(response: str) -> Iterator[Call]:
    position = 0
    while opening := _OPENING.search(response, position):
        closing = _CLOSED.get(opening[0], "")
        calls, position = _value(response, opening.end())
        yield from calls
        while (position := _behind(_BETWEEN, response, position)) < len(response):
            if closing and response.startswith(closing, position):
                position += len(closing)
                break
            # Without a closing tag, another JSON object is a further call, and all else is text.
            if not closing and response[position] != "{":
                break
            calls, position = _value(response, position)
            yield from calls


def _value(text: str, position: int) -> tuple[list[Call], int]:
    """The call or list of calls at `position`, in any form, and its end."""
    position = _behind(_SPACE, text, position)
    if call := _HARMONY_CALL.match(text, position):
        arguments, position = _object(text, call.end(), call["to"])
        return [Call(tool=call["to"], arguments=arguments)], position
    if call := _XML_CALL.match(text, position):
        return _xml_call(text, call)
    if call := _GEMMA.match(text, position):
        return _gemma_call(text, call)
    if _PYTHON.match(text, position):
        return _python_calls(text, position)
    if text.startswith(("{", "["), position):
        try:
            value, position = read_json(text, position)
        except ValueError:
            raise MalformedCall("A call is not valid JSON.") from None
        return [json_call(one) for one in (value if isinstance(value, list) else [value])], position
    if call := _NAMED.match(text, position):
        arguments, position = _object(text, call.end(), call["tool"])
        made = Call(tool=call["tool"], arguments=arguments)
        return [made], _behind(_NAMED_END, text, position)
    if call := _GLM_CALL.match(text, position):
        return _glm_call(text, call)
    raise MalformedCall("A call is written in no form that is known.")


def _xml_call(text: str, call: re.Match[str]) -> tuple[list[Call], int]:
    tool, position = call["tool"].strip(), call.end()
    arguments: Any = {}
    texts = set()
    if text.startswith("{", _behind(_SPACE, text, position)):
        arguments, position = _object(text, position, tool)
    while argument := _XML_ARGUMENT.match(text, position):
        closing = f"</{argument['dsml'] or ''}parameter>"
        end = text.find(closing, argument.end())
        key, value = argument["key"].strip(), text[argument.end() : end]
        if end < 0 or key in arguments:
            raise MalformedCall(
                f"An argument of the call to `{tool}` has no end, or is there twice."
            )
        position = end + len(closing)
        if argument["string"] == "false":
            value = _decoded(value, tool)
        elif argument["string"] is None:
            value = value.removeprefix("\n").removesuffix("\n")
            texts.add(key)
        arguments[key] = value
    position = _behind(_SPACE, text, position)
    closing = f"</{'｜DSML｜' if '｜DSML｜' in call[0] else ''}{call['tag']}>"
    if not text.startswith(closing, position):
        raise MalformedCall(f"The call to `{tool}` does not end with {closing}.")
    made = Call(tool=tool, arguments=arguments, texts=frozenset(texts))
    return [made], position + len(closing)


def _glm_call(text: str, call: re.Match[str]) -> tuple[list[Call], int]:
    arguments: dict[str, Any] = {}
    position = call.end()
    while argument := _GLM_ARGUMENT.match(text, position):
        if argument["key"].strip() in arguments:
            raise MalformedCall(f"An argument of the call to `{call['tool']}` is there twice.")
        arguments[argument["key"].strip()] = argument["value"]
        position = argument.end()
    return [Call(tool=call["tool"], arguments=arguments, texts=frozenset(arguments))], position


def _gemma_call(text: str, call: re.Match[str]) -> tuple[list[Call], int]:
    """A call with keys and strings in its own kind of quotes, read as JSON."""
    parts: list[str] = []
    depth, position = 0, call.end()
    while depth or not parts:
        part = _GEMMA_PART.match(text, position)
        if not part:
            raise MalformedCall(f"The call to `{call['tool']}` is not finished.")
        position = part.end()
        if part["sign"]:
            depth += (part["sign"] in "{[") - (part["sign"] in "}]")
            parts.append(part["sign"])
        elif part["word"]:
            is_key = text.startswith(":", position)
            parts.append(json.dumps(part["word"]) if is_key else part["word"])
        elif part["json"]:
            parts.append(part["json"])
        elif part.lastgroup:
            parts.append(json.dumps(part[part.lastgroup]))
    arguments = _decoded("".join(parts), call["tool"])
    return [Call(tool=call["tool"], arguments=arguments)], position


def _python_calls(text: str, position: int) -> tuple[list[Call], int]:
    """`f(x=1)`, or a list of such calls; values are literals."""
    depth, end = 0, position
    for sign in _PYTHON_SIGN.finditer(text, position, position + _LONGEST):
        depth += (sign[0] in "([{") - (sign[0] in ")]}")
        end = sign.end()
        if depth > _DEEPEST or depth <= 0:
            break
    if depth:
        raise MalformedCall("A call is not finished, too long or too deep.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes such as "\d"
            tree = ast.parse(text[position:end].strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise MalformedCall("A call is not valid Python.") from None
    nodes = tree.elts if isinstance(tree, ast.List) else [tree]
    return [_python_call(node) for node in nodes], end


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call):
        raise MalformedCall("A list of calls holds something else.")
    tool = ast.unparse(node.func)
    keys = [keyword.arg for keyword in node.keywords]
    if node.args or None in keys or len({*keys}) < len(keys):
        raise MalformedCall(f"The call to `{tool}` must name each of its arguments once.")
    values = [_literal(keyword.value) for keyword in node.keywords]
    return Call(tool=tool.removesuffix(".call"), arguments=dict(zip(keys, values, strict=True)))


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _literal(key) for key in node.keys]
        if all(isinstance(key, str) for key in keys):
            return dict(zip(keys, map(_literal, node.values), strict=True))
    raise MalformedCall("An argument of a call is not a plain value.")


# --- values ---------------------------------------------------------------------------------------


def _behind(pattern: re.Pattern[str], text: str, position: int) -> int:
    """The end of the match at `position`; the match may be empty."""
    return pattern.match(text, position).end()  # type: ignore[union-attr]


def _object(text: str, position: int, tool: str) -> tuple[Any, int]:
    try:
        return read_json(text, position)
    except ValueError:
        raise MalformedCall(f"The arguments of the call to `{tool}` are not valid JSON.") from None


def _decoded(text: str, tool: str) -> Any:
    try:
        return _DECODER.decode(text)
    except ValueError:
        raise MalformedCall(f"The arguments of the call to `{tool}` are not valid JSON.") from None


def typed(text: str, wanted: list[Any]) -> Any:
    """The value of an untyped text: the text itself if that is wanted, else its JSON value."""
    if text in wanted:
        return text
    if text.strip() in _NAMES:
        return _NAMES[text.strip()]
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return text


def _number(text: str) -> int | float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return int(value) if value.is_integer() else value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(parse_float=_number, parse_constant=_constant)
_NAMES = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
