"""Gold answers: a verifier says which it cannot read, before anything is asked."""

import json
import logging

import pytest

from models import tokenizer
from runs import strategies
from scsdpo.data import (
    PromptList,
    Records,
    SciKnowEval,
    Stream,
    TaskDataModule,
    ToolUse,
    make_prompt,
)
from scsdpo.data import golds as proofs
from scsdpo.data.startup import check_golds
from scsdpo.errors import ConfigurationError
from scsdpo.policy import Chat
from scsdpo.prompt import Verdict
from scsdpo.verifiers import (
    ExactMatch,
    MathAnswer,
    MultipleChoice,
    PythonTests,
    Regex,
    ToolCall,
    Verifier,
)
from shared import SHARED, needs_shared

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
    (Regex(pattern="(?s).*answer: (-?[0-9]+)"), ["7", " -12 "]),
    (PythonTests(), ['["assert True"]']),
    (ExactMatch(), ["", "x"]),
]
UNREADABLE = [
    (MathAnswer(), [r"\frac{1}{", "}", "", " ", "$", r"\left(1, 2", r"\frac{1}{2", '"']),
    (ToolCall(), ["", "[]", '[{"Action": "f"}]', '[{"Action": "f", "Action_Input": "{"}]']),
    (MultipleChoice(), ["", "a", "AB", "1"]),
    (Regex(pattern="(?s).*answer: (-?[0-9]+)"), ["", "7.5", "seven", "1 2"]),
    (Regex(pattern="yes|no"), ["maybe", "yes no", ""]),
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


# --- proofs ---------------------------------------------------------------------------------------


def call(tool="f", given="{}"):
    return json.dumps([{"Action": tool, "Action_Input": given}])


OPTIONS = "Which one?\n\nA: this\nB: that\nC: both\nD: none\nPlease reason step by step."
WITHIN_REACH = [
    (ToolCall(), "q", [call(), call("[x] f"), call("f", '{"a": "Action: g"}')]),
    (ToolCall(), "q", ['[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]']),
    (ExactMatch(), "q", ["x", "a < b", " padded "]),
    (MultipleChoice(), OPTIONS, ["A", "D"]),
    (MultipleChoice(strict=False), OPTIONS, ["B"]),
    (MultipleChoice(), "Vitamin C. Or vitamin E: which?", ["D"]),  # lists no options
    (MultipleChoice(), "(A) 1 (B) 2 (C) 3 (D) 4 (E) 5", ["E"]),
    (MathAnswer(), "q", ["7", r"\frac{1}{2}", "east"]),
    (ToolCall(compatibility="reference"), "q", [call("f", '{"a": {"b": 1}}')]),
]
BEYOND_REACH = [
    (ToolCall(), "q", [call("f "), call("f\ng"), call(" "), call("f", '{"a": "<think>"}')]),
    (
        ExactMatch(),
        "q",
        ["a</answer>", "<answer>7</answer>", "<think>x", "x</think>", "a <answer> b", "[THINK]"],
    ),
    (MultipleChoice(), OPTIONS, ["E", "Z"]),
    (MultipleChoice(strict=False), "(A) 1 (B) 2 (C) 3", ["D"]),
    (MultipleChoice(), "A) 1 B) 2", ["C"]),
    (MathAnswer(), "q", [r"\frac{1}{", "}"]),
]


def rows_of(tmp_path, question, golds):
    path = tmp_path / "rows.jsonl"
    lines = (json.dumps({"prompt": question, "answer": gold}) for gold in golds)
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize(("verifier", "question", "golds"), WITHIN_REACH)
def test_a_gold_answer_that_a_response_can_give_is_taken(tmp_path, verifier, question, golds):
    path = rows_of(tmp_path, question, golds)
    assert len(Records(path, verifier)) == len(golds)
    assert len(list(Records(path, verifier, streaming=True).read())) == len(golds)
    for prompt in Records(path, verifier).prompts:
        response = verifier.written(prompt)
        assert not response or verifier.verify(prompt, response).reward == 1


@pytest.mark.parametrize(("verifier", "question", "golds"), BEYOND_REACH)
def test_a_gold_answer_that_no_response_can_give_is_refused_by_its_row(
    tmp_path, caplog, verifier, question, golds
):
    right = next(good for one, asks, good in WITHIN_REACH if type(one) is type(verifier))[0]
    for gold in golds:
        path = rows_of(tmp_path, question, [right, gold])
        with pytest.raises(ValueError, match=r"rows.jsonl, line 2.* answer .*correct") as caught:
            len(Records(path, verifier))
        assert "\n" not in str(caught.value)
        with caplog.at_level(logging.WARNING):
            assert len(list(Records(path, verifier, streaming=True).read())) == 1
        assert "1 of 2 rows left out" in caplog.text
        caplog.clear()


def test_the_first_row_is_named_and_the_others_are_counted(tmp_path):
    path = rows_of(tmp_path, "q", ["x", "</answer>", "y", "</answer>", "<think>"])
    with pytest.raises(ValueError, match=r"line 2: .*'</answer>' is judged wrong .*2 more"):
        len(Records(path, ExactMatch()))


class Fails(Verifier):
    """Cannot judge its own gold answer."""

    def written(self, prompt):
        return prompt.answer

    def verify(self, prompt, response):
        if response == "boom":
            raise RuntimeError("no luck")
        return Verdict(reward=float(response == "7") / 2, feedback="no seven")


class Own(PromptList):
    name = "own"

    def __init__(self, *golds):
        self.golds = golds

    def load(self):
        return [make_prompt("own", question="q", answer=g, verifier=Fails()) for g in self.golds]


def test_sources_and_verifiers_of_ones_own_are_proved_too():
    check_golds(Own("7", "7"))
    with pytest.raises(ValueError, match=r"prompt 2 of 'own': .*'8' is judged wrong .*no seven"):
        check_golds(Own("7", "8"))
    with pytest.raises(ValueError, match=r"prompt 1 of 'own': .*'boom' cannot be judged: .*luck"):
        check_golds(Own("boom"))


class Flow(Stream):
    name = "flow"

    def __init__(self, *golds):
        super().__init__(size=len(golds), window=2)
        self.golds = golds

    def read(self):
        return iter(Own(*self.golds).load())


def test_of_a_stream_of_ones_own_they_are_left_out_as_they_come(caplog):
    chat = Chat(tokenizer=tokenizer(), eos_ids=(2, 0))
    data = TaskDataModule(
        Flow("7", "8", "boom", "7", "8"), Flow("8", "7"), questions_per_batch=1, seed=0
    )
    data.set_up_for(strategies(chat))
    asked = [data.train_set[0, number].answer for number in range(6)]
    assert asked == ["7"] * 6 and [prompt.answer for prompt in data.val_prompts()] == ["7"]
    assert (
        "flow: 1 of 1 prompts left out, because no response to them could be right. " in caplog.text
    )
    assert all(f"flow: {n} of" in caplog.text for n in (1, 2)) and "3 of" not in caplog.text
    with pytest.raises(ConfigurationError, match=r"data.train: all 2 prompts of 'flow' were left"):
        TaskDataModule(Flow("8", "8"), [], questions_per_batch=1).set_up_for(strategies(chat))


def test_what_takes_too_long_is_proved_in_a_sample_and_a_line_says_so(monkeypatch, caplog):
    now = [0.0]

    def tick():
        now[0] += 1.0
        return now[0]

    monkeypatch.setattr(proofs.time, "monotonic", tick)
    prompts = Own(*["7"] * 99, "8").prompts
    with caplog.at_level(logging.INFO):
        proofs.refuse_unmet("own", prompts, str)  # the wrong one is not in the sample
    assert caplog.messages == [
        "own: the verifier checked 60 of 100 gold answers, a random sample; the check stops after "
        "60 s"
    ]
    with pytest.raises(ValueError, match=r"'8' is judged wrong .*59 more"):
        now[0] = 0.0
        proofs.refuse_unmet("own", Own(*["8"] * 100).prompts, str)
    caplog.clear()
    proofs.refuse_unmet("own", prompts[:50], str)
    assert not caplog.messages


@needs_shared
def test_every_published_gold_answer_is_within_reach():
    for split in ("train", "test"):
        for domain in ("biology", "chemistry"):
            source = SciKnowEval(domain, split, source=str(SHARED / "data/sciknoweval" / domain))
            for prompt in source.prompts:
                written = prompt.verifier.written(prompt)
                assert prompt.verifier.verify(prompt, written).reward == 1
    assert len(ToolUse(str(SHARED / "data/tooluse/test_a.json"))) == 34
    assert len(ToolUse(str(SHARED / "data/tooluse/test_a.json"), compatibility="reference")) == 34
