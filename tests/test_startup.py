"""What does not agree with the tokenizer is found before training, in one line."""

import logging
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from models import CHATML, tokenizer
from runs import Toys
from scsdpo.data import PromptList, make_prompt
from scsdpo.data.startup import check_start
from scsdpo.policy import Chat
from scsdpo.teacher import EMA, Context, Feedback, NoTeacher, PlainPrompt
from scsdpo.types import TeacherContexts
from scsdpo.verifiers import ExactMatch


class WithSystem(PromptList):
    name = "asked"

    def load(self):
        yield make_prompt("asked", question="q?", answer="", verifier=ExactMatch(), system="Brief!")


def module(template=CHATML, teacher=NoTeacher(), eos_ids=(2, 0), **kwargs):
    words = tokenizer()
    words.chat_template = template
    chat = Chat(tokenizer=words, eos_ids=eos_ids, template_kwargs=kwargs)
    return SimpleNamespace(policy=SimpleNamespace(chat=chat), teacher=teacher)


def test_one_line_says_what_was_found(caplog):
    with caplog.at_level(logging.INFO):
        check_start(module(teacher=EMA(context=Feedback())), [Toys()])
    (line,) = caplog.messages
    assert line.startswith(
        "toys: responses begin after '<|im_start|>assistant\\n' and end with '<|im_end|>' (2), "
        "'<|endoftext|>' (0); padding is '<|endoftext|>' (0); the teacher's prompt has "
    )
    assert line.endswith(" tokens more, and the same end")


def test_a_teacher_that_has_nothing_to_tell_is_noted(caplog):
    with caplog.at_level(logging.INFO):
        check_start(module(teacher=EMA(context=Feedback(max_tokens=5))), [Toys()])
    assert caplog.messages[0].endswith("nothing to tell a failure beside a success")


NO_SYSTEM = CHATML.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}",
)
DEAF = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] == 'user' %}")
CLOSED = CHATML.replace("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "")


@pytest.mark.parametrize(
    ("settings", "source", "message"),
    [
        ({"eos_ids": (0,)}, Toys(), r"ends the assistant's turn with '<\|im_end\|>' \(2\), but .*"
         r"'<\|endoftext\|>' \(0\): add it to `eos_token_id` in generation_config.json"),
        ({"template": NO_SYSTEM}, WithSystem(), "refuses the first prompt of 'asked', with the "
         "turns system, user: System role not supported"),
        ({"template": DEAF}, WithSystem(), "leaves out what the system says in the first prompt"),
        ({"template": CLOSED}, Toys(), "does not open the assistant's turn"),
        ({}, Toys(0), "'toys' has no prompts"),
    ],
)  # fmt: skip
def test_what_does_not_agree_is_refused_with_the_remedy(settings, source, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_start(module(**settings), [source])
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Headless(Context):
    """Leaves out the header that opens the assistant's turn."""

    def render(self, chat, rollouts, outcomes):
        ids = tuple(chat.encode("Here it is."))
        return TeacherContexts(ids=((ids, ids),))


def test_a_teacher_whose_prompt_ends_otherwise_is_refused():
    with pytest.raises(
        ValueError, match=r"model.teacher: its prompts do not end as the policy's do"
    ):
        check_start(module(teacher=EMA(context=Headless())), [Toys()])
    check_start(module(teacher=EMA(context=PlainPrompt())), [Toys()])


def test_a_template_argument_that_is_not_read_is_warned_of(caplog):
    check_start(module(enable_thinking=False), [Toys()])
    words = "does not read 'enable_thinking', which therefore changes nothing"
    assert [words in line for line in caplog.messages].count(True) == 1
    template = CHATML + "{% if enable_thinking %}{% endif %}"
    check_start(module(template=template, enable_thinking=False), [Toys()])
    assert [words in line for line in caplog.messages].count(True) == 1


def test_a_template_that_ends_no_turn_is_taken_as_it_is(caplog):
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}Answer: {% endif %}"
    )
    with caplog.at_level(logging.INFO):
        check_start(module(template=template), [Toys()])
    assert "the template itself ends no turn" in caplog.messages[0]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
        " {{ m.content }}<|im_end|>{% endif %}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}"
        "{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
    ],
)
def test_a_user_s_end_may_open_the_assistant_s_turn(template, caplog):
    with caplog.at_level(logging.INFO):
        check_start(module(template=template, teacher=EMA(context=Feedback())), [Toys()])
    assert "responses begin after" in caplog.messages[0] and "[/INST]' and" in caplog.messages[0]
    assert caplog.messages[0].endswith(" tokens more, and the same end")


def test_an_end_of_turn_behind_white_space_must_end_responses_too():
    template = CHATML.replace("<|im_end|>", " \n<|im_end|>")
    with pytest.raises(ValueError, match=r"ends the assistant's turn with '<\|im_end\|>' \(2\)"):
        check_start(module(template=template, eos_ids=(0,)), [Toys()])
    check_start(module(template=template), [Toys()])
