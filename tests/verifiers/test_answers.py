"""MathAnswer, Regex, Callable: right answers score 1, wrong ones 0, and nothing takes long."""

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scsdpo.metrics import MajAtK
from scsdpo.prompt import Prompt, Verdict
from scsdpo.verifiers import Callable, MathAnswer, Regex, Verification, VerifierPool, verify_all

PROPERTY = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))


def judge(verifier, answer, response):
    prompt = Prompt(key="k", messages=(), verifier=verifier, answer=answer)
    verdict = verify_all([prompt], [[response]])[0][0]
    assert verdict.error == ""
    assert bool(verdict.feedback) == (verdict.reward == 0)
    return verdict


# --- mathematics ----------------------------------------------------------------------------------

EQUAL = [
    ["1/2", "0.5", r"\frac{1}{2}", r"\frac12", r"50\%", "0.50"],
    ["1234", "1,234", "1234.0"],
    [r"\sqrt{8}", r"2\sqrt{2}"],
    [r"\{1, 2\}", r"\{2,1\}"],
    ["x^2+2x+1", "1 + 2x + x^2"],
    ["-3", "- 3"],
    [r"\frac{\pi}{4}", r"\pi/4"],
]


@pytest.mark.parametrize("spellings", EQUAL)
def test_equal_answers_are_right_in_every_spelling_and_vote_together(spellings):
    for gold in spellings:
        verdicts = [judge(MathAnswer(), gold, rf"so \boxed{{{text}}}.") for text in spellings]
        assert [v.reward for v in verdicts] == [1] * len(spellings)
        assert len({v.answer for v in verdicts}) == 1
    wrong = [judge(MathAnswer(), "777", rf"\boxed{{{text}}}") for text in spellings[:3]]
    assert [v.reward for v in wrong] == [0] * len(wrong)


def test_wrong_answers_vote_together_too():
    texts = [r"\boxed{1/2}", r"\boxed{0.5}", r"\boxed{3}", r"\boxed{7}"]
    verdicts = [judge(MathAnswer(), "7", text) for text in texts]
    maj = MajAtK()
    maj.update(_tensor([[v.reward for v in verdicts]]), [[v.answer for v in verdicts]])
    assert maj.compute() == 0  # two for 1/2, one for 3, one for 7


def _tensor(rows):
    import torch

    return torch.tensor(rows)


@PROPERTY
@given(st.integers(-999, 999), st.integers(1, 99), st.integers(-999, 999), st.integers(1, 99))
def test_a_fraction_is_right_iff_it_is_the_same_number(a, b, c, d):
    verdict = judge(MathAnswer(), f"{a}/{b}", rf"\boxed{{\frac{{{c}}}{{{d}}}}}")
    assert verdict.reward == (a * d == c * b)


@PROPERTY
@given(st.integers(-9999, 9999), st.integers(1, 9999))
def test_a_corrupted_number_is_wrong(number, change):
    assert judge(MathAnswer(), str(number), rf"\boxed{{{number}}}").reward == 1
    assert judge(MathAnswer(), str(number), rf"\boxed{{{number + change}}}").reward == 0


def test_an_answer_that_is_no_mathematics_is_wrong_and_such_a_gold_answer_an_error():
    for response in ("", r"\boxed{}", "I do not know", r"\boxed{"):
        assert judge(MathAnswer(), "1", response).reward == 0
    prompt = Prompt(key="k", messages=(), verifier=MathAnswer(), answer="")
    assert "cannot be read" in MathAnswer().verify(prompt, r"\boxed{1}").error


PIECES = [r"\frac", r"\sqrt", r"\boxed{", r"\text{", r"\begin{matrix}", "<answer>", "</answer>"]
LATEX = st.lists(
    st.sampled_from([*PIECES, *"\\{}()[]^_+-*/=,.%$& 017xy\né\ud800"]), max_size=12
).map("".join)


def test_no_response_makes_a_verifier_raise():
    pool = VerifierPool(Verification(workers=1, deadline=5.0))
    prompt = Prompt(key="k", messages=(), verifier=MathAnswer(), answer="1")

    @settings(PROPERTY, max_examples=5)
    @given(st.lists(LATEX | st.text(), min_size=40, max_size=40))
    def check(responses):
        boxed = [rf"\boxed{{{response}}}" for response in responses[::2]]
        for verdict in pool.verify([prompt], [[*boxed, *responses[1::2]]])[0]:
            assert verdict.error in ("", "MathAnswer: no verdict within 5 s")

    check()
    pool.close()


# --- regular expressions --------------------------------------------------------------------------


def test_the_first_match_or_its_group_is_the_answer():
    assert judge(Regex(pattern="[0-9]+"), "12", "a 12 b 34").answer == "12"
    assert judge(Regex(pattern="answer: *([a-z]+)"), "yes", "answer:  yes.").reward == 1
    last = Regex(pattern="(?s).*answer: ([a-z]+)")
    assert judge(last, "no", "answer: yes\nanswer: no").reward == 1
    assert judge(last, "yes", "answer: yes\nanswer: no").answer == "no"
    assert judge(last, "yes", "yes").answer is None
    assert judge(Regex(pattern="(a)|b"), "b", "b").reward == 0  # the group took no part


@pytest.mark.parametrize("pattern", ["(", r"(?=a)", r"(a)\1", "\ud800"])
def test_a_pattern_that_is_not_re2_is_refused_in_one_line(pattern):
    with pytest.raises(ValueError, match=r"`Regex\(pattern=.*\)` must be in RE2's syntax: "):
        Regex(pattern=pattern)


# --- functions ------------------------------------------------------------------------------------


def as_verdict(prompt, response):
    return (
        Verdict(reward=1.0, answer=response)
        if response == prompt.answer
        else Verdict(reward=0.0, feedback="No.")
    )


def as_number(prompt, response):
    return response == prompt.answer


def test_a_function_gives_a_verdict_or_a_reward():
    assert judge(Callable(function="test_answers:as_verdict"), "a", "a").answer == "a"
    assert judge(Callable(function="test_answers:as_verdict"), "a", "b").feedback == "No."
    assert judge(Callable(function="test_answers:as_number"), "a", "a").reward == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"must read `module:function`, got 'nothing'"),
        (":f", r"must read `module:function`"),
        (
            "no_such_module:f",
            "No module named 'no_such_module'; the module must be in the folder",
        ),
        ("math:no", "has no attribute 'no'"),
        ("math:pi", "must name a function, got 3.14"),
    ],
)
def test_a_function_that_is_not_there_is_named_at_construction(name, message):
    with pytest.raises(ValueError, match=message):
        Callable(function=name)


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bit", ["a", "{", "}", r"\boxed{", "<answer>", "<answer></answer>", "answer: ", " ", "\n", "1"]
)
def test_a_megabyte_is_judged_in_linear_time(bit):
    response = bit * (1_000_000 // len(bit))
    evil = [
        Regex(pattern="(a+)+$"),
        Regex(pattern=r"(?s).*answer: (\w+)"),
        Regex(pattern="(a|a)*b"),
    ]
    for verifier in (MathAnswer(), *evil):
        judge(verifier, "2", "warm")
        begin = time.perf_counter()
        judge(verifier, "2", response)
        assert time.perf_counter() - begin < 3
