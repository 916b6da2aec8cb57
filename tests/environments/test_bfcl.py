"""BFCL without its package: arguments, the split, calls that leave a choice. More: tests/bfcl."""

import json
import re
import sys

import pytest

from scsdpo.data import BFCL
from scsdpo.data.bfcl import split_of
from scsdpo.environments import BFCLEpisode
from scsdpo.environments.bfcl import INSTALL, MULTI_TURN
from scsdpo.prompt import Prompt
from scsdpo.verifiers import BFCLCalls, BFCLRelevance
from test_configs import CONFIGS, scsdpo  # noqa: F401 - a fixture

ROOT = CONFIGS.parent


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"categories": ["multi_turn"]}, "there is no category 'multi_turn' that can be trained"),
        ({"categories": ["memory_kv"]}, "there is no category 'memory_kv' that can be trained on"),
        ({"categories": "multi_turn_base"}, "must be a list of names, such as [multi_turn_base]"),
        ({"categories": []}, "must be a list of names"),
        ({"categories": ["multiple"], "split": "test"}, "must be 'train', 'val' or 'all'"),
        ({"categories": ["multiple"], "max_steps": 0}, "`BFCLEpisode(max_steps=...)` must be >= 1"),
    ],
)
def test_a_wrong_argument_is_named(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        BFCL(**{"split": "train", **arguments})


def test_an_unknown_category_and_a_missing_package_end_in_one_line(scsdpo, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "bfcl_eval", None)
    task = ("--config", CONFIGS / "tiny.yaml", "--config", CONFIGS / "tasks" / "bfcl.yaml")
    for more, says in (
        (["--data.train.categories=[live]"], "there is no category 'live' that can be trained on"),
        ([], "`BFCL` needs the package bfcl-eval (import of bfcl_eval halted"),
        ([], f"{INSTALL}, or choose another source"),
    ):
        assert scsdpo("fit", *task, *more, "--trainer.accelerator=cpu") == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert says in error


def test_the_line_installs_what_the_tests_install():
    lines = (ROOT / "requirements" / "bfcl.txt").read_text().splitlines()
    packages = [line for line in lines if line and line[0] != "#"]
    assert f"pip install --no-deps {' '.join(packages)}" == INSTALL
    for text in (CONFIGS / "tasks" / "bfcl.yaml", ROOT / "docs" / "task-packages.md"):
        assert INSTALL in text.read_text()


def test_a_fifth_is_for_validation_by_number():
    names = [f"{category}_{number}" for category in MULTI_TURN for number in range(200)]
    val = [name for name in names if split_of(name) == "val"]
    assert val == [name for name in names if name[-1] in "05"]
    assert split_of("live_multiple_15-4-3") == "val" and split_of("live_multiple_4-15-5") == "train"


def test_an_episode_needs_a_task_of_several_turns():
    message = {"role": "user", "content": "Move it."}
    prompt = Prompt(key="a", messages=(message,), verifier=BFCLEpisode(), answer="")
    with pytest.raises(ValueError, match="needs 'ground_truth' of a task of several turns"):
        prompt.verifier.check(prompt)


def asked(verifier, answer="", tools=()):
    functions = tuple({"type": "function", "function": {"name": name}} for name in tools)
    message = {"role": "user", "content": "How warm is it?"}
    return Prompt(key="a", messages=(message,), verifier=verifier, answer=answer, tools=functions)


def said(*calls):
    return "".join(
        f"<tool_call>{json.dumps({'name': name, 'arguments': given})}</tool_call>"
        for name, given in calls
    )


def verdict(gold, response, **settings):
    prompt = asked(BFCLCalls(**settings), json.dumps(gold))
    return prompt.verifier.verify(prompt, response)


CHOICE = [{"f": {"x": [1, 2], "unit": ["m", ""], "of": [{"a": [1], "b": ["c", ""]}, ""]}}]


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ({"x": 1}, True),
        ({"x": 2.0, "unit": "m"}, True),
        ({"x": 1, "of": {"a": 1}}, True),
        ({"x": 1, "of": {"b": "c", "a": 1}}, True),
        ({"x": 1, "of": {"b": "c"}}, False),
        ({"x": 1, "of": {"a": [1]}}, False),
        ({"x": 1, "of": {"a": 1, "d": 1}}, False),
        ({"x": 1, "of": [1]}, False),
        ({"x": 3}, False),
        ({"x": "1"}, False),
        ({"x": True}, False),
        ({"x": [1, 2]}, False),
        ({"x": 1, "unit": "M"}, False),
        ({"x": 1, "unit": None}, False),
        ({"unit": "m"}, False),
        ({"x": 1, "y": 1}, False),
        ([1], False),
        (None, False),
    ],
)
def test_an_argument_has_one_of_its_values_or_may_be_missing(given, right):
    assert verdict(CHOICE, said(("f", given))).reward == right


def test_lists_of_objects_choose_key_by_key():
    gold = [{"f": {"rows": [[{"a": [1, 2]}, {"a": ["x", ""]}]]}}]
    assert verdict(gold, said(("f", {"rows": [{"a": 2}, {}]}))).reward == 1
    assert verdict(gold, said(("f", {"rows": [{"a": 2}]}))).reward == 0
    assert verdict(gold, said(("f", {"rows": [{"a": 2}, {"a": 3}]}))).reward == 0
    assert verdict(gold, said(("f", {"rows": {"a": 2}}))).reward == 0


def test_calls_are_paired_so_that_each_has_its_own_gold():
    gold = [{"f": {"x": [1, 2]}}, {"f": {"x": [1]}}]
    one, two, three = (("f", {"x": x}) for x in (1, 2, 3))
    assert verdict(gold, said(one, two)).reward == verdict(gold, said(two, one)).reward == 1
    assert verdict(gold, said(one, one)).reward == 1
    assert verdict(gold, said(two, two)).reward == 0
    assert verdict(gold, said(one, three)).reward == 0
    assert verdict(gold, said(one)).reward == verdict(gold, said(one, one, two)).reward == 0


def test_many_calls_that_could_be_each_others_are_paired_at_once():
    gold = [{"f": {"x": list(range(20))}}] * 20
    wrong = [("f", {"x": x}) for x in range(19)] + [("f", {"x": -1})]
    assert verdict(gold, said(*wrong)).reward == 0


def test_bare_texts_are_what_the_gold_answer_wants():
    """Qwen3-Coder writes values without quotes."""
    text = "<tool_call><function=f><parameter=x>1</parameter></function></tool_call>"
    assert verdict([{"f": {"x": ["1"]}}], text).reward == 1
    assert verdict([{"f": {"x": [1]}}], text).reward == 1
    assert verdict([{"f": {"x": [2]}}], text).reward == 0


def test_feedback_does_not_name_what_was_wanted_unless_it_is_told_to():
    gold = [{"secret": {"x": [17]}}]
    for response, says in (
        ("It is warm.", "no tool call"),
        (said(("f", {})), "The choice of tools is not correct."),
        (said(("secret", {"x": 1})), "The input of a call to `secret` is not correct."),
        (said(("secret", {"x": 17}), ("f", {})), "There are too many tool calls."),
    ):
        found = verdict(gold, response)
        assert found.reward == 0 and says in found.feedback and "17" not in found.feedback
        told = verdict(gold, response, reveal=True).feedback
        assert told.endswith('Right would be: `secret` with {"x": 17}.')
    assert verdict([], said(("f", {}))).feedback == "Nothing should be called."


def test_where_no_function_fits_only_words_are_right():
    assert verdict([], "None of them does.").reward == 1
    for response in (said(("f", {})), '<tool_call>{"name": "f"', "Action: f\nAction Input: {}"):
        assert verdict([], response).reward == 0


def test_where_one_fits_a_call_to_it_is_right():
    prompt = asked(BFCLRelevance(), tools=("f", "g"))
    assert prompt.verifier.verify(prompt, said(("g", {"x": 1}))).reward == 1
    for response in (said(("h", {})), said(("f", {}), ("h", {})), "None.", '<tool_call>{"name": 1'):
        assert prompt.verifier.verify(prompt, response).reward == 0


@pytest.mark.parametrize(
    "answer", ["", "{}", "[1]", '[{"f": {"x": 1}}]', '[{"f": {"x": []}}]', '[{"f": {}, "g": {}}]']
)
def test_a_gold_answer_that_cannot_be_read_is_refused(answer):
    prompt = asked(BFCLCalls(), answer)
    with pytest.raises(ValueError, match="the gold answer of a call must read"):
        prompt.verifier.check(prompt)
    assert prompt.verifier.verify(prompt, "No.").error


def test_the_gold_answer_is_written_as_a_response():
    prompt = asked(BFCLCalls(), json.dumps([*CHOICE, {"g": {"y": [""]}}]))
    written = prompt.verifier.written(prompt)
    assert prompt.verifier.verify(prompt, written).reward == 1
    assert '"unit": "m"' in written and '{"name": "g", "arguments": {}}' in written
