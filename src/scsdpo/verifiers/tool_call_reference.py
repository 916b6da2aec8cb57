"""The published grader of tool calls with its flaws, for comparable numbers."""

import json
import re
from collections import Counter
from typing import Any

_ACTION = re.compile(r"Action:\s*(\w+)")
_INPUT = re.compile(r"Action Input:\s*(?=\{)")


def reference_verdict(answer: str, response: str) -> tuple[bool, str]:
    r"""The published grader's verdict on the response, and the calls it read, in canonical form.

    Tools are the words after `Action:`. An input is the text from `{` to the next `}` after
    `Action Input:`, and all inputs of a response are merged into one. So nested objects are not
    read, tools whose names begin with a bracket are missed, inputs may be swapped between calls,
    and 1, 1.0 and true are equal.

    Source:
        Hübotter et al. 2026, arXiv:2601.20802, and its code: lasgroup/SDPO,
        verl/utils/reward_score/feedback/tooluse.py. The same verdicts, in linear time.
    """
    gold = json.loads(answer)
    tools = Counter(_ACTION.findall(response))
    inputs = _merged(response)
    wanted: dict[str, Any] = {}
    for call in gold:
        wanted |= _object(call["Action_Input"])
    right = tools == Counter(call["Action"] for call in gold) and inputs == wanted
    return right, json.dumps([sorted(tools.items()), inputs], sort_keys=True)


def _merged(response: str) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    position = 0
    while match := _INPUT.search(response, position):
        # Without a closing brace later inputs have none either: stop, or time would be quadratic.
        end = response.find("}", match.end())
        if end < 0:
            break
        position = end + 1
        merged |= _object(response[match.end() : position])
    return merged


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
        json.dumps(value)  # a value too deep to write cannot be compared either
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
