"""Verifiers: gold answers score 1, corrupted ones 0; nothing raises, nothing is slow."""

import json
import pickle
import time
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precision import within
from scsdpo.errors import TrainingStopped
from scsdpo.types import Prompt, Verdict
from scsdpo.verifiers import (
    ExactMatch,
    Failures,
    MultipleChoice,
    ToolCall,
    Verifier,
    last_answer,
    verify_all,
)
from shared import SHARED, needs_shared

PROPERTY = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
VERIFIERS = (ExactMatch(), MultipleChoice(), MultipleChoice(strict=False), ToolCall())


def prompt(answer, verifier):
    return Prompt(key="k", messages=(), verifier=verifier, answer=answer)


def judge(verifier, answer, response):
    verdict = verifier.verify(prompt(answer, verifier), response)
    assert verdict.error == ""
    assert bool(verdict.feedback) == (verdict.reward == 0)
    return verdict


def rows(path):
    return [json.loads(line) for line in (SHARED / "data" / path).read_text().splitlines()]


# --- answers between tags -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<answer>A</answer>", "A"),
        ("<answer>\n A \n</answer> bye", "A"),
        ("<answer>A</answer> no: <answer>B</answer>", "B"),
        ("<answer>A</answer> and <answer>B", "A"),
        ("<answer> <answer>B</answer></answer>", "B"),
        ("<answer></answer>", ""),
        ("</answer>A<answer>", None),
        ("A", None),
        ("", None),
    ],
)
def test_the_last_closed_block_is_the_answer(response, answer):
    assert last_answer(response) == answer
    assert judge(ExactMatch(), "never", response).answer == answer


def test_exact_match_ignores_outer_whitespace_only():
    assert judge(ExactMatch(), "4 2", "<answer>\n4 2 </answer>").reward == 1
    assert judge(ExactMatch(), "4 2", "<answer>42</answer>").reward == 0
    assert judge(ExactMatch(), "a", "<answer>A</answer>").reward == 0


@pytest.mark.parametrize("text", ["B", " B\n"])
def test_both_modes_accept_the_bare_letter(text):
    for strict in (True, False):
        verdict = judge(MultipleChoice(strict=strict), "B", f"<answer>{text}</answer>")
        assert (verdict.reward, verdict.answer) == (1, "B")


SPELLED = [
    *("b", "B.", "(B)", "(b)", "**B**", "[B]", "`B`", '"B"', "$B$", "\uff08\uff22\uff09", "B)"),
    *(r"\boxed{B}", r"\text{B}", r"\boxed{\text{B}}", r"$\mathrm{(B)}$", r"\boxed{(B)}"),
    *("Option B", "option (B)", "**Option B**", "Answer: B", "Choice B.", "Final answer: B"),
    *("The answer is B", "The correct answer is (B).", "the correct option is B"),
]
WITH_TEXT = ["B: 0.8", "B) yes", "**B.** x", "(B) vitamin C", "Option B: vitamin C.", "B: a or b"]
SEVERAL = [
    *("A) B) C) D)", "B) A)", "B) x\nA) y", "(B)(A)", "B. A", "B) or A)", "B: 5 or A: 6"),
    *("B or A", "B, A", "B/A", "B and A", r"\boxed{B, A}", r"\boxed{B} \boxed{A}", "Options B, A"),
]


@pytest.mark.parametrize("text", [*SPELLED, *WITH_TEXT])
def test_only_the_lenient_mode_accepts_other_spellings_of_the_letter(text):
    response = f"<answer>{text}</answer>"
    assert judge(MultipleChoice(), "B", response).reward == 0
    lenient = judge(MultipleChoice(strict=False), "B", response)
    assert (lenient.reward, lenient.answer) == (1, "B")
    assert judge(MultipleChoice(strict=False), "C", response).reward == 0


@pytest.mark.parametrize("text", SEVERAL)
def test_a_text_that_names_several_options_is_none_of_them(text):
    for response in (f"<answer>{text}</answer>", text):
        for letter in "AB":
            assert judge(MultipleChoice(strict=False), letter, response).reward == 0


def test_without_a_block_the_lenient_mode_takes_a_box_or_the_bare_letter():
    lenient = MultipleChoice(strict=False)
    for response in (r"So \boxed{B}.", r"First \boxed{A}" "\nthen \\boxed{\\text{B}}.", *SPELLED):
        assert judge(lenient, "B", response).reward == 1
        assert judge(MultipleChoice(), "B", response).reward == 0
    for response in (*WITH_TEXT, "I think B", "B it is", r"\boxed{7}", r"\boxed{B", r"\boxed{}"):
        assert judge(lenient, "B", response).reward == 0


@pytest.mark.parametrize("text", ["", "B protein", "A or B", "AB", "A, B", "ß", "1", "A B"])
def test_a_text_that_is_no_single_letter_is_wrong_in_both_modes(text):
    for strict in (True, False):
        for letter in "AB":
            verdict = judge(MultipleChoice(strict=strict), letter, f"<answer>{text}</answer>")
            assert verdict.reward == 0


@needs_shared
@pytest.mark.parametrize("domain", ["biology", "chemistry"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_published_letter_scores_1_and_every_other_letter_0(domain, split):
    for row in rows(f"sciknoweval/{domain}/{split}.json"):
        for letter in "ABCD":
            response = f"<reasoning>\n...\n</reasoning>\n<answer>\n{letter}\n</answer>"
            verdict = judge(MultipleChoice(), row["answer"], response)
            assert verdict.reward == (letter == row["answer"])
            assert verdict.answer == letter


# --- tool calls -----------------------------------------------------------------------------------


def gold(*calls):
    """A gold answer as the published files spell it."""
    return json.dumps([{"Action": tool, "Action_Input": json.dumps(args)} for tool, args in calls])


def spelled(calls, after=""):
    """A response in the prompts' own format; `calls` are (tool, text of the input)."""
    lines = [f"Action: {tool}\nAction Input: {text}{after}" for tool, text in calls]
    return "\n".join(["Thought: I should use a tool.", *lines])


def written(answer):
    return [(call["Action"], call["Action_Input"]) for call in json.loads(answer)]


@needs_shared
def test_every_published_gold_answer_scores_1_as_the_prompt_wants_it_written():
    answers = [row["answer"] for row in rows("tooluse/test_a.json")]
    assert len(answers) == 34
    for answer in answers:
        calls = written(answer)
        assert judge(ToolCall(), answer, spelled(calls)).reward == 1
        assert judge(ToolCall(), answer, spelled(calls[::-1], after=" done.\n")).reward == 1


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "b": {"c": [1, {"d": "}"}]}, "e": "é"}',
        '{"e":"\\u00e9","b":{"c":[1.0,{"d":"}"}]},"a":1.0}',
        '\n  {"a": 1, "b": {"c": [1, {"d": "}"}]},\n "e": "é"} and so on {',
        '{"a": 1, "b": {"c": [1, {"d": "}"}]}, "e": "é"}\nObservation: {"x": 1}',
    ],
)
def test_inputs_are_compared_as_json_values(text):
    answer = gold(("tool", {"a": 1, "b": {"c": [1, {"d": "}"}]}, "e": "é"}))
    verdict = judge(ToolCall(), answer, spelled([("tool", text)]))
    assert verdict.reward == 1
    assert verdict.answer == judge(ToolCall(), answer, spelled(written(answer))).answer


WRONG = [
    '{"a": true}',
    '{"a": "1"}',
    '{"a": [1]}',
    '{"a": null}',
    '{"a": 1.5}',
    "{}",
    '{"a":1,"b":1}',
]
INVALID = ['{"a": 1', "{'a': 1}", "```json", "", '{"a": NaN}', '{"a": 1e999}', '"a\nb"', "[" * 5000]


@pytest.mark.parametrize("text", [*WRONG, *INVALID])
def test_wrong_types_and_invalid_json_are_rejected(text):
    assert judge(ToolCall(), gold(("tool", {"a": 1})), spelled([("tool", text)])).reward == 0


def test_an_input_stays_with_its_call():
    answer = gold(("f", {"x": 1}), ("g", {"x": 2}))
    assert judge(ToolCall(), answer, spelled([("g", '{"x": 2}'), ("f", '{"x": 1}')])).reward == 1
    assert judge(ToolCall(), answer, spelled([("f", '{"x": 2}'), ("g", '{"x": 1}')])).reward == 0


def test_calls_are_a_multiset():
    once, twice = gold(("f", {})), gold(("f", {}), ("f", {}))
    assert judge(ToolCall(), twice, spelled([("f", "{}")] * 2)).reward == 1
    assert judge(ToolCall(), twice, spelled([("f", "{}")])).reward == 0
    assert judge(ToolCall(), once, spelled([("f", "{}")] * 2)).reward == 0


@pytest.mark.parametrize(
    "response",
    [
        "Action: f",
        "Action Input: {}",
        "Action:\nAction Input: {}",
        "Action: f\nAction: f\nAction Input: {}",
        "Action Input: {}\nAction: f",
        "I would use Action: f with Action Input: {}",
        "f({})",
        "",
    ],
)
def test_a_malformed_response_is_wrong_and_says_why(response):
    verdict = judge(ToolCall(), gold(("f", {})), response)
    assert (verdict.reward, verdict.answer) == (0, None)


def test_a_header_inside_an_input_is_no_call():
    text = json.dumps({"note": "Action: g\nAction Input: {}"})
    answer = gold(("f", {"note": "Action: g\nAction Input: {}"}))
    assert judge(ToolCall(), answer, spelled([("f", text)])).reward == 1


@pytest.mark.parametrize("answer", ["", "x", "[]", "{}", "[1]", '[{"Action": "f"}]', "[" * 5000])
def test_an_unreadable_gold_answer_is_an_error_not_a_silent_zero(answer):
    verdict = ToolCall().verify(prompt(answer, ToolCall()), spelled([("f", "{}")]))
    assert verdict.reward == 0
    assert "must read" in verdict.error


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(
        st.sampled_from(["get", "set", "[Optional]find"]),
        st.dictionaries(st.text(max_size=4), VALUES, max_size=3),
    ),
    min_size=1,
    max_size=3,
)


def same(a, b):
    """Equality of JSON values, slowly and by the book."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return isinstance(a, str) == isinstance(b, str) and a == b


def same_calls(a, b):
    if not a:
        return not b
    (tool, args), *rest = a
    return any(
        tool == other and same(args, values) and same_calls(rest, b[:i] + b[i + 1 :])
        for i, (other, values) in enumerate(b)
    )


@PROPERTY
@given(CALLS, CALLS, st.booleans())
def test_verdicts_equal_those_of_a_slow_checker(wanted, made, shuffle):
    made = wanted[::-1] if shuffle else made
    response = spelled([(tool, json.dumps(args)) for tool, args in made])
    assert judge(ToolCall(), gold(*wanted), response).reward == same_calls(wanted, made)


@st.composite
def corrupted(draw):
    """Gold calls, and a response that differs from them in one place."""
    calls = draw(CALLS)
    texts = [(tool, json.dumps(args)) for tool, args in calls]
    at = draw(st.integers(0, len(calls) - 1))
    tool, args = calls[at]
    kind = draw(st.sampled_from(["drop", "add", "tool", "key", "value", "type", "cut", "swap"]))
    if kind == "drop":
        del texts[at]
    elif kind == "add":
        texts.insert(at, texts[at])
    elif kind == "tool":
        texts[at] = (tool + "s", texts[at][1])
    elif kind == "key" or not args:
        texts[at] = (tool, json.dumps(args | {"longer than any": 1}))
    elif kind == "cut":
        texts[at] = (tool, texts[at][1][:-1])
    elif kind == "swap":
        other = draw(st.integers(0, len(calls) - 1))
        if tool == calls[other][0] or same(args, calls[other][1]):
            texts = []
        else:
            texts[at], texts[other] = (tool, texts[other][1]), (texts[other][0], texts[at][1])
    else:
        key = draw(st.sampled_from(sorted(args)))
        new = [args[key]] if kind == "value" else f"{args[key]!r} "
        texts[at] = (tool, json.dumps(args | {key: new}))
    return calls, texts


@PROPERTY
@given(corrupted())
def test_a_corrupted_gold_answer_scores_0(case):
    calls, texts = case
    assert judge(ToolCall(), gold(*calls), spelled(texts)).reward == 0


@PROPERTY
@given(st.integers(0, 9))
def test_feedback_does_not_give_the_answer_away(number):
    answer = gold(("secretTool", {"secretKey": "secret value"}), ("f", {"x": number}))
    nearly = [("secretTool", "{}"), ("f", json.dumps({"x": number}))]
    for calls in ([], [("f", "{}")], [("f", "{}"), ("g", "{}")], [("f", "{")], nearly):
        feedback = judge(ToolCall(), answer, spelled(calls)).feedback
        assert "secretKey" not in feedback
        assert "secret value" not in feedback
        assert "secretTool" not in feedback or calls == nearly
    for verifier in (ExactMatch(), MultipleChoice()):
        for text in ("<answer>Z</answer>", "<answer>zzz</answer>", ""):
            assert "Q" not in judge(verifier, "Q", text).feedback


# --- every verifier -------------------------------------------------------------------------------

MARKS = [
    "Action:",
    "Action Input:",
    "<answer>",
    "</answer>",
    "\n",
    "\r",
    "\u2028",
    "\x00",
    "\ud800",
]
PIECES = st.sampled_from([*MARKS, *'{}[]":\\ 1-Aé', "f", "e9", "NaN", "true"])


@PROPERTY
@given(st.text(alphabet=st.characters()) | st.lists(PIECES).map("".join))
def test_no_response_makes_a_verifier_raise(response):
    for verifier in VERIFIERS:
        verdict = judge(verifier, gold(("f", {})), response)
        assert verdict.reward in (0, 1)


@PROPERTY
@given(st.text(alphabet=st.characters()) | st.lists(PIECES).map("".join))
def test_no_gold_answer_makes_a_verifier_raise(answer):
    for verifier in VERIFIERS:
        verifier.verify(prompt(answer, verifier), "<answer>A</answer>\nAction: f\nAction Input: {}")


BITS = [
    "Action: a\nAction Input: {}\n",
    "Action: a\nAction Input: x\n",
    "Action: a\nAction Input: [[\n",
    'Action: a\nAction Input: "',
    *("Action:", "Action Input:", "Action", "\nAction ", " ", "\n", " \n", "[", '{"a":', "1", "9."),
    *("<answer>", "</answer>", "<answer></answer>", "<answer>A", "(", "* ", "A", "-", "\\"),
]


@pytest.mark.parametrize("bit", BITS, ids=repr)
@pytest.mark.parametrize("start", ["", "Action: a\nAction Input: ", "<answer>"], ids=repr)
def test_a_megabyte_is_judged_in_linear_time(bit, start):
    response = start + bit * (1_000_000 // len(bit)) + ("</answer>" if "answer" in start else "")
    for verifier in VERIFIERS:
        begin = time.perf_counter()
        judge(verifier, gold(("f", {})), response)
        assert time.perf_counter() - begin < 3  # a quadratic pass would take minutes


def test_verifiers_are_picklable_values():
    for verifier in VERIFIERS:
        assert pickle.loads(pickle.dumps(verifier)) == verifier


# --- verify_all -----------------------------------------------------------------------------------


class Broken(Verifier):
    def verify(self, prompt, response):
        if response == "raise":
            raise KeyError("oops")
        if response == "exit":
            raise SystemExit(3)
        return {
            "none": None,
            "nan": Verdict(reward=float("nan")),
            "text": Verdict(reward="1"),
            "fine": Verdict(reward=0.5),
        }[response]


def test_a_broken_verifier_costs_its_own_rollout_only():
    prompts = (prompt("A", MultipleChoice()), prompt("", Broken()))
    responses = ["raise", "exit", "none", "nan", "text", "fine"]
    right, broken = verify_all(prompts, [["<answer>A</answer>"], responses])
    assert [verdict.reward for verdict in right] == [1]
    assert [verdict.reward for verdict in broken] == [0, 0, 0, 0, 0, 0.5]
    assert [bool(verdict.error) for verdict in broken] == [True] * 5 + [False]
    assert "KeyError('oops')" in broken[0].error
    assert all("Broken" in verdict.error for verdict in broken[:-1])


def test_verdicts_keep_the_order_of_the_rollouts():
    prompts = [prompt(letter, MultipleChoice()) for letter in "ABC"]
    texts = [[f"<answer>{letter}</answer>" for letter in "ABCA"]] * 3
    rewards = [[v.reward for v in group] for group in verify_all(prompts, texts)]
    assert rewards == [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]


def test_512_rollouts_of_multiple_choice_take_less_than_a_fifth_of_a_second():
    prompts = [prompt("A", MultipleChoice())] * 64
    texts = [["reasoning " * 800 + "<answer>A</answer>"] * 8] * 64
    verdicts = within(0.2, lambda: verify_all(prompts, texts))
    assert Counter(v.reward for group in verdicts for v in group) == {1: 512}


def failed(count, of, kind=Broken):
    """A batch of one question, some verdicts of which failed."""
    group = [Verdict(reward=0.0, error="Broken: no")] * count + [Verdict(reward=1.0)] * (of - count)
    return (prompt("A", kind()),), (group,)


def test_a_verifier_that_fails_on_most_responses_stops_the_run_with_its_reason(caplog):
    failures = Failures()
    failures.count(*failed(4, 8))  # half
    assert caplog.messages == ["4 of 8 verdicts failed: 4 x Broken: no"]
    with pytest.raises(
        TrainingStopped, match=r"Broken fails too often: 5 of 8 .* 5 x Broken: no\. "
    ):
        failures.count(*failed(5, 8))


def test_in_small_batches_all_of_the_last_eight_verdicts_must_have_failed():
    failures = Failures()
    for count in (3, 3, 0, 3, 3, 1, 3, 3):  # 0 and 1 of 3: it does judge
        failures.count(*failed(count, 3))
    with pytest.raises(TrainingStopped):
        failures.count(*failed(3, 3))


def test_a_verifier_that_judges_does_not_cover_for_another_that_fails():
    failures = Failures()
    fine, broken = failed(0, 99, MultipleChoice), failed(8, 8)
    with pytest.raises(TrainingStopped, match="the verifier Broken"):
        failures.count(fine[0] + broken[0], fine[1] + broken[1])
