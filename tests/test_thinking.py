"""Thinking: what stands behind its last end is graded and shown, and an open one is no answer."""

import json
import pickle
import time
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import CHATML, tokenizer
from scsdpo.data import make_prompt
from scsdpo.data.rendered import rendered
from scsdpo.policy import Chat
from scsdpo.thinking import behind_thinking, without_thinking
from scsdpo.types import Verdict
from scsdpo.verifiers import (
    Callable,
    ExactMatch,
    MathAnswer,
    MultipleChoice,
    PythonTests,
    Regex,
    ToolCall,
    Verifier,
    verify_all,
)

TAGS = [
    ("<think>", "</think>"),
    ("<Think>", "</THINK>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<think_faster>", "</think_faster>"),
    ("<ifm|think>", "</ifm|think>"),
    ("<think:opensource>", "</think:opensource>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|think|>", "<|end|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final <|constrain|>json<|message|>"),
]
WORKING = [("<reasoning>", "</reasoning>"), ("<scratchpad>", "</scratchpad>")]
CALL = "Action: f\nAction Input: {}"
CODE = "```python\ndef one(): return {}\n```"
JUDGED = [  # verifier, gold, a right answer, a wrong one
    (MathAnswer(), "7", r"The answer is \boxed{7}.", r"It is \boxed{8}."),
    (ExactMatch(), "7", "<answer>7</answer>", "<answer>8</answer>"),
    (MultipleChoice(), "A", "<answer>A</answer>", "<answer>B</answer>"),
    (MultipleChoice(strict=False), "A", "<answer>(A)</answer>", "<answer>(B)</answer>"),
    (Regex(pattern="answer: ([0-9]+)"), "7", "answer: 7", "answer: 8"),
    (ToolCall(), '[{"Action": "f", "Action_Input": "{}"}]', CALL, CALL.replace("f", "g", 1)),
    (PythonTests(), '["assert one() == 1"]', CODE.format(1), CODE.format(2)),
]


def asked(verifier, gold="7"):
    return make_prompt("x", question="?", answer=gold, verifier=verifier)


def reward(verifier, gold, response):
    verdict = verifier.verify(asked(verifier, gold), response)
    assert verdict.error == ""
    return verdict.reward


@pytest.mark.parametrize(("verifier", "gold", "right", "wrong"), JUDGED, ids=lambda v: repr(v)[:20])
def test_every_verifier_judges_what_stands_behind_the_thinking(verifier, gold, right, wrong):
    all_of_it = replace(verifier, strip_thinking=False)
    for response, expected, of_all in [
        (right, 1, 1),
        (f"<think>\n{wrong}\n</think>\n{right}", 1, None),
        (f"<think>\n{right}\n</think>\n{wrong}", 0, None),
        (f"<think>\n{right}\n</think>", 0, 1),
        (f"<think>\n{right}\n", 0, 1),
        (f"{right}\n<think>", 0, 1),
        (f"{right}\n</think>", 0, 1),
    ]:
        assert reward(verifier, gold, response) == expected, response
        if of_all is not None:
            assert reward(all_of_it, gold, response) == of_all, response


@pytest.mark.parametrize(("opens", "closes"), TAGS + WORKING)
def test_the_tags_of_the_common_models_are_known(opens, closes):
    draft, right = r"I guess \boxed{8}", r"So \boxed{7}"
    for response, left in [
        (f"{opens}{draft}{closes}{right}", right),
        (f"{opens}\n{draft}\n{closes}\n\n{right}", right),
        (f"{opens}{draft}{opens}{draft}{closes}{draft}{closes}{right}", right),
        (f"{right} {opens}{draft}{closes}", ""),
        (f"{opens}{right}", ""),
        (f"{right}{opens}{draft}", ""),
    ]:
        assert behind_thinking(response) == left, response


@pytest.mark.parametrize(
    ("response", "left"),
    [
        ("", ""),
        ("7 < 8 and [think] is a word here", ""),  # Magistral's tag, open
        ("7 <thin> </thinner> <rethink> thinking", "7 <thin> </thinner> <rethink> thinking"),
        ("Done.<|end|> 7", "Done.<|end|> 7"),  # ends a turn elsewhere
        ("guess 8</think>7", "7"),  # begun in the prompt
        ("8</think>9</think>7", "7"),
        ("<think>a<thinking>b</think>7", "7"),  # what began within it ends with it
        ("<think>a</thinking>b", ""),
        ("<think>a <think>b</think>7", ""),
        ("<think>\n<think>a</think>7", "7"),  # the tag repeated
        ("<think></think>7", "7"),
        ("8<think>a</think>9<think>b</think>7", "7"),
    ],
)
def test_what_is_graded_of_a_response(response, left):
    assert behind_thinking(response) == left


def test_the_header_of_a_tool_call_ends_the_analysis_and_stays():
    call = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}'
    for response in (
        f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{call}",
        f"<|channel|>analysis<|message|>Hm.<|start|>assistant{call}",
        call,
    ):
        assert behind_thinking(response) == call
    two = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant" * 2
    assert behind_thinking(f"{two}<|channel|>final<|message|>7") == "7"
    assert behind_thinking(f"{call}<|start|>assistant{call}") == f"{call}<|start|>assistant{call}"


PIECES = st.sampled_from([*(tag for pair in TAGS[:12] for tag in pair), "a", " ", "\n", "7", "<"])


@settings(database=None, deadline=None)
@given(st.lists(PIECES).map("".join), st.sampled_from(TAGS))
def test_whatever_was_thought_a_closed_thinking_leaves_the_answer_alone(thought, tags):
    opens, closes = tags
    left = behind_thinking(thought)
    assert behind_thinking(left) == left  # a second pass changes nothing
    if behind_thinking(opens + thought + closes + "The answer."):
        assert behind_thinking(opens + thought + closes + "The answer.") == "The answer."
    assert behind_thinking(thought + opens) == ""
    assert left == "" or without_thinking(thought).endswith(left)


@pytest.mark.parametrize(
    "bit",
    [
        *("<think>", "<think>x", "x</think>", "<think>x</think> ", "<thinking><think>x", "<think:"),
        *("[THINK]x", "<", "<|channel|>analysis", "<|end|> ", "<|end|><|start|>assistant"),
    ],
)
def test_texts_are_split_in_linear_time(bit):
    for split in (behind_thinking, without_thinking):
        begin = time.perf_counter()
        split(bit * (230_000 // len(bit)))  # 32,768 x <think> took 28 s in quadratic time
        assert time.perf_counter() - begin < 2


# --- a verifier of one's own ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Holds(Verifier):
    """Right iff the text that it receives holds the answer."""

    def verify(self, prompt, response):
        return Verdict(reward=float(prompt.answer in response), answer=response)


@dataclass(frozen=True, kw_only=True)
class HoldsTwice(Holds):
    def verify(self, prompt, response):
        return super().verify(prompt, response + response)


@dataclass(frozen=True, kw_only=True)
class Formatted(Verifier):
    """Rewards the form of the thinking."""

    strip_thinking: bool = False

    def verify(self, prompt, response):
        return Verdict(reward=float("</think>" in response))


def holds(prompt, response):
    return "7" in response


def test_a_verifier_of_ones_own_receives_the_same_text():
    texts = [["<think>7</think>8", "<think>8</think>7", "7", "<think>7"]]
    for verifier in (Holds(), HoldsTwice(), Callable(function=f"{__name__}:holds")):
        rewards = [v.reward for v in verify_all([asked(verifier)], texts)[0]]
        assert rewards == [0, 1, 1, 0]
    assert (
        Callable(function=f"{__name__}:holds", strip_thinking=False)
        .verify(asked(Holds()), texts[0][3])
        .reward
    )
    assert [v.reward for v in verify_all([asked(Formatted())], texts)[0]] == [1, 1, 0, 0]


def test_where_the_prompt_opens_the_thinking_an_open_response_is_no_answer():
    for verifier in (Holds(), HoldsTwice()):
        prompt = replace(asked(verifier), thinking="<think>")
        texts = ["7", "8</think>7", "7</think>8", "<think>\n8</think>7", "<think>7"]
        rewards = [verifier.verify(prompt, text).reward for text in texts]
        assert rewards == [0, 1, 0, 1, 0]


# --- prompts --------------------------------------------------------------------------------------

OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
NO_THINKING = OPENED.replace("<think>\n{%", "<think>\n\n</think>\n\n{%")
BY_WORD = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if '/no_think' not in messages[-1]['content'] %}<think>\nOkay,{% endif %}"
    "{% endif %}",
)
CLOSING = OPENED.replace(
    "{% if add", "{% if not add_generation_prompt %}<|endoftext|>{% endif %}{% if add"
)


@pytest.mark.parametrize(
    ("template", "question", "thinking"),
    [
        (CHATML, "Think between <think> and </think>", ""),
        (CHATML, "Begin with <think>", ""),
        (OPENED, "2+2?", "<think>"),
        (OPENED, "Begin with <think>", "<think>"),
        (NO_THINKING, "Begin with <think>", ""),
        (BY_WORD, "2+2?", "<think>"),
        (BY_WORD, "2+2? /no_think", ""),
        (CLOSING, "Begin with <think>", "<think>"),
    ],
)
def test_a_rendered_prompt_knows_whether_its_header_opens_the_thinking(
    template, question, thinking
):
    words = tokenizer()
    words.chat_template = template
    chat = Chat(tokenizer=words, eos_ids=(2, 0))
    prompt = rendered(make_prompt("x", question=question, answer="7", verifier=Holds()), chat)
    assert prompt.thinking == thinking
    assert pickle.loads(pickle.dumps(prompt)).thinking == thinking


def test_special_tokens_are_read_but_for_beginnings_ends_and_padding():
    words = tokenizer()
    names = ["<s>", "<pad>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
    words.add_special_tokens({"additional_special_tokens": names})
    words.bos_token, words.pad_token = "<s>", "<pad>"
    chat = Chat(tokenizer=words, eos_ids=(2, 0))
    said = '<think>hm</think>\n<tool_call>{"name": "f"}</tool_call>'
    ids = words.encode(f"<s>{said}<|im_end|><|endoftext|><pad><pad>", add_special_tokens=False)
    assert set(words.all_special_tokens) >= set(names)
    assert chat.decode(ids) == said
    assert json.loads(behind_thinking(chat.decode(ids))[11:-12]) == {"name": "f"}
