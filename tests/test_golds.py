"""Gold answers: a verifier says which it cannot read, before anything is asked."""

import pytest

from scsdpo.data import make_prompt
from scsdpo.verifiers import ExactMatch, MathAnswer, MultipleChoice, PythonTests, ToolCall

GOLDS = [
    (
        MathAnswer(),
        [
            "7",
            r"\frac{1}{2}",
            r"\left\{1,2\right\}",
            r"a \leftarrow b",
            "east",
            "<",
            r"\$12.50",
            "$5",
            r"$\frac12$",
            r"\boxed{7}",
        ],
    ),
    (ToolCall(), ['[{"Action": "f", "Action_Input": "{}"}]']),
    (MultipleChoice(), ["A", " B "]),
    (PythonTests(), ['["assert True"]']),
    (ExactMatch(), ["", "x"]),
]
UNREADABLE = [
    (MathAnswer(), [r"\frac{1}{", "}", "", " ", "$", r"\left(1, 2", r"\frac{1}{2", '"']),
    (ToolCall(), ["", "[]", '[{"Action": "f"}]', '[{"Action": "f", "Action_Input": "{"}]']),
    (MultipleChoice(), ["", "a", "AB", "1"]),
    (PythonTests(), ["", "[]", "[1]", '"assert True"']),
]


def asked(verifier, answer):
    return make_prompt("x", question="?", answer=answer, verifier=verifier)


@pytest.mark.parametrize(("verifier", "golds"), GOLDS)
def test_gold_answers_that_can_be_right_are_taken(verifier, golds):
    for gold in golds:
        verifier.check(asked(verifier, gold))


@pytest.mark.parametrize(("verifier", "golds"), UNREADABLE)
def test_gold_answers_that_no_response_could_meet_are_not(verifier, golds):
    for gold in golds:
        with pytest.raises(ValueError, match="answer"):
            verifier.check(asked(verifier, gold))


@pytest.mark.parametrize("gold", GOLDS[0][1])
def test_a_mathematical_answer_that_is_taken_is_right_in_a_box(gold):
    assert MathAnswer().verify(asked(MathAnswer(), gold), rf"\boxed{{{gold}}}").reward == 1
