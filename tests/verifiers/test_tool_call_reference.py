"""`ToolCall(compatibility="reference")` gives the rewards of the published grader."""

import json
import re
import time
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scsdpo.prompt import Prompt
from scsdpo.verifiers import ToolCall
from shared import SHARED, needs_shared

REFERENCE = ToolCall(compatibility="reference")


def gold(*calls):
    return json.dumps([{"Action": tool, "Action_Input": text} for tool, text in calls])


def spelled(*calls):
    return "\n".join(f"Action: {tool}\nAction Input: {text}" for tool, text in calls)


def judge(verifier, answer, response):
    verdict = verifier.verify(
        Prompt(key="k", messages=(), verifier=verifier, answer=answer), response
    )
    assert verdict.error == ""
    assert bool(verdict.feedback) == (verdict.reward == 0)
    return verdict


def published(answer, response):
    """The published grader, in its own words (lasgroup/SDPO, tooluse.py)."""
    merged, wanted = {}, {}
    for block in re.findall(r"Action Input:\s*({.*?})", response, re.DOTALL):
        with suppress(json.JSONDecodeError):
            merged.update(json.loads(block))
    for call in json.loads(answer):
        wanted.update(json.loads(call["Action_Input"]))
    tools = Counter(re.findall(r"Action:\s*(\w+)", response))
    return tools == Counter(call["Action"] for call in json.loads(answer)) and merged == wanted


@needs_shared
def test_the_published_flaws_are_reproduced_on_the_published_answers():
    text = (SHARED / "data" / "tooluse" / "test_a.json").read_text()
    answers = [json.loads(line)["answer"] for line in text.splitlines()]
    rejected = 0
    for answer in answers:
        calls = [(call["Action"], call["Action_Input"]) for call in json.loads(answer)]
        reward = judge(REFERENCE, answer, spelled(*calls)).reward
        assert reward == published(answer, spelled(*calls))
        assert judge(ToolCall(), answer, spelled(*calls)).reward == 1
        rejected += reward == 0
    assert rejected == 2  # nested objects; the other half of the split has none


def test_where_the_gradings_differ():
    nested = ("f", '{"a": {"b": 1}}')
    one, two = ("f", '{"x": 1}'), ("g", '{"y": 2}')
    swapped = (("f", '{"y": 2}'), ("g", '{"x": 1}'))
    for answer, calls, ours, theirs in (
        (gold(nested), (nested,), 1, 0),
        (gold(("[Optional]f", "{}")), (("[Optional]f", "{}"),), 1, 0),
        (gold(one, two), swapped, 0, 1),
        (gold(one), (("f", '{"x": true}'),), 0, 1),
        (gold(one, two), (one, two), 1, 1),
        (gold(one, two), (one,), 0, 0),
    ):
        assert judge(ToolCall(), answer, spelled(*calls)).reward == ours
        assert judge(REFERENCE, answer, spelled(*calls)).reward == theirs
        assert published(answer, spelled(*calls)) == theirs


CALLS = st.lists(
    st.tuples(
        st.sampled_from(["f", "g", "[Optional]f"]),
        st.sampled_from(
            ["{}", '{"x": 1}', '{"x": {"y": 2}}', '{"x": 1.0, "y": "}"}', '{"y": [1]}']
        ),
    ),
    min_size=1,
    max_size=3,
)
PIECES = ["Action:", "Action Input:", "{", "}", "{}", '{"x": 1}', " ", "\n", "f", "g", '"', "NaN"]


@settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    CALLS, CALLS.map(lambda calls: spelled(*calls)) | st.lists(st.sampled_from(PIECES)).map("".join)
)
def test_rewards_equal_those_of_the_published_grader(wanted, response):
    answer = gold(*wanted)
    assert judge(REFERENCE, answer, response).reward == published(answer, response)


def test_the_answer_is_revealed_only_on_request():
    answer = gold(("secretTool", '{"secretKey": 5}'))
    for response in ("", spelled(("secretTool", "{}")), spelled(("f", "{}")), "Action: f"):
        assert "secretKey" not in judge(ToolCall(), answer, response).feedback
        assert "secretKey" not in judge(REFERENCE, answer, response).feedback
        told = judge(ToolCall(reveal=True), answer, response).feedback
        assert told.endswith('Right would be: `secretTool` with {"secretKey": 5}.')


def test_an_unknown_compatibility_is_refused():
    with pytest.raises(
        ValueError, match=r"compatibility=...\)` must be 'none' or 'reference', got"
    ):
        ToolCall(compatibility="published")


BITS = [
    "Action Input: {",
    "Action Input: ",
    "Action: ",
    "Action:",
    "{",
    "}",
    " ",
    "[",
    "Action: f\n",
]


@pytest.mark.parametrize("bit", BITS, ids=repr)
def test_a_megabyte_is_judged_in_linear_time(bit):
    response = "Action Input: {" + bit * (1_000_000 // len(bit))
    for text in (response, response + "}"):
        begin = time.perf_counter()
        judge(REFERENCE, gold(("f", "{}")), text)
        assert time.perf_counter() - begin < 3  # a quadratic pass would take minutes
