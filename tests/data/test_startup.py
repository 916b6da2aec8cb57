"""What does not agree with the tokenizer is found before training, in one line."""

import logging
from dataclasses import dataclass
from datetime import date
from types import SimpleNamespace

import pytest
from transformers import AddedToken

from models import CHATML, TOKENS, tokenizer
from runs import Toys
from scsdpo.data import PromptList, make_prompt
from scsdpo.data.startup import check_context, check_start
from scsdpo.policy import Chat
from scsdpo.teacher import (
    EMA,
    Context,
    Contexts,
    Feedback,
    Frozen,
    NoTeacher,
    PlainPrompt,
    SiblingDemonstration,
)
from scsdpo.types import Sampling, TeacherContexts
from scsdpo.verifiers import ExactMatch


class WithSystem(PromptList):
    name = "asked"

    def load(self):
        yield make_prompt("asked", question="q?", answer="", verifier=ExactMatch(), system="Brief!")


def module(template=CHATML, teacher=NoTeacher(), eos_ids=(2, 0), **kwargs):
    words = tokenizer()
    words.chat_template = template
    chat = Chat(tokenizer=words, eos_ids=eos_ids, template_kwargs=kwargs)
    return around(chat, teacher)


def around(chat, teacher=NoTeacher(), response=8):
    return SimpleNamespace(
        policy=SimpleNamespace(chat=chat),
        teacher=teacher,
        reference=NoTeacher(),
        sampling=Sampling(n=2, max_new_tokens=response),
        val_sampling=Sampling(n=2, max_new_tokens=response),
    )


def test_one_line_says_what_was_found(caplog):
    with caplog.at_level(logging.INFO):
        check_start(module(teacher=EMA(context=Feedback())), [Toys()])
    (line,) = caplog.messages
    assert line.startswith(
        "toys: responses begin after '<|im_start|>assistant\\n' of the chat template and end with "
        "'<|im_end|>' (2), "
        "'<|endoftext|>' (0); padding is '<|endoftext|>' (0); the teacher's prompt is "
    )
    assert line.endswith(" tokens longer than the policy's and has the same end")


def test_a_teacher_that_has_nothing_to_tell_is_noted(caplog):
    with caplog.at_level(logging.INFO):
        check_start(module(teacher=EMA(context=Feedback(max_tokens=5))), [Toys()])
    assert caplog.messages[0].endswith("no prompt for a wrong response in a group with a right one")


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
        ({"template": DEAF}, WithSystem(), "leaves out the text of the role system in the first"),
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

    def render(self, chat, judged):
        ids = tuple(chat.encode("Here it is."))
        return TeacherContexts(ids=((ids, ids),))


def test_a_teacher_whose_prompt_ends_otherwise_is_refused():
    with pytest.raises(
        ValueError, match=r"model.teacher: its prompts must end with the same start"
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
    (line,) = caplog.messages
    assert "responses begin after" in line and "[/INST]' of the chat template and end" in line
    assert line.endswith(" tokens longer than the policy's and has the same end")


def test_an_end_of_turn_behind_white_space_must_end_responses_too():
    template = CHATML.replace("<|im_end|>", " \n<|im_end|>")
    with pytest.raises(ValueError, match=r"ends the assistant's turn with '<\|im_end\|>' \(2\)"):
        check_start(module(template=template, eos_ids=(0,)), [Toys()])
    check_start(module(template=template), [Toys()])


# --- tokenizer and model --------------------------------------------------------------------------


def added(**settings):
    """A chat whose tokenizer has one token more than the embedding's rows."""
    words = tokenizer()
    words.add_tokens([AddedToken("<extra>", special=settings.pop("special", False))])
    return Chat(**({"tokenizer": words, "eos_ids": (2, 0), "rows": TOKENS} | settings))


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_without_a_row_is_read_as_text(special, caplog):
    chat = added(special=special)
    with caplog.at_level(logging.INFO):
        check_start(around(chat), [Toys()])
    (line,) = [line for line in caplog.messages if "rows" in line]
    assert f"({TOKENS} rows) has no row for '<extra>' ({TOKENS}). Texts that contain" in line
    assert "`resize_token_embeddings`" in line
    ids = chat.render([{"role": "user", "content": "a<extra>b"}])
    assert max(ids) < TOKENS and "a<extra>b" in chat.tokenizer.decode(ids)


def test_padding_without_a_row_is_the_first_end_that_has_one():
    words = tokenizer()
    words.add_special_tokens({"pad_token": "[PAD]"})
    assert words.pad_token_id == TOKENS
    chat = Chat(tokenizer=words, eos_ids=(TOKENS + 9, 2), rows=TOKENS)
    assert chat.pad_id == 2


def test_a_template_s_token_without_a_row_is_refused():
    chat = added(special=True)
    chat.tokenizer.chat_template = CHATML + "<extra>"
    with pytest.raises(
        ValueError, match=rf"template of .* writes the token '<extra>' \({TOKENS}\), for which"
    ):
        check_start(around(chat), [Toys()])


def test_a_vocabulary_beyond_the_embedding_is_refused():
    with pytest.raises(ValueError, match=r"has \d tokens, such as .* for which the"):
        check_start(around(added(rows=TOKENS - 3)), [Toys()])


def test_ends_that_the_model_lacks_are_said(caplog):
    with caplog.at_level(logging.INFO):
        check_start(around(Chat(tokenizer=tokenizer(), eos_ids=(2, 999))), [Toys()])
    (line,) = [line for line in caplog.messages if "eos_token_id" in line]
    assert "cannot generate id 999, which `eos_token_id` names" in line
    template = CHATML.replace("<|im_end|>", "")
    words = tokenizer()
    words.chat_template = template
    with pytest.raises(ValueError, match=r"no response of .* can end, .* has no row for id 999"):
        check_start(around(Chat(tokenizer=words, eos_ids=(999,), rows=TOKENS)), [Toys()])


def test_what_is_longer_than_the_model_s_context_is_said_once(caplog):
    def lines(response, teacher=NoTeacher(), longest=100):
        caplog.clear()
        chat = Chat(tokenizer=tokenizer(), eos_ids=(2, 0), positions=200)
        check_context(around(chat, teacher, response), Toys(), longest)
        return caplog.messages

    assert not lines(100)
    (line,) = lines(101)
    assert (
        "has a context of 200 tokens, but the policy's prompts have up to 100 tokens, and a "
        "response up to 101 more: " in line
    )
    assert "lower data.max_prompt_tokens or model.sampling.max_new_tokens" in line
    # The teacher reads a response more than the policy, and the words around it.
    teacher = EMA(context=SiblingDemonstration())
    (line,) = lines(80, teacher, longest=20)
    assert "the teacher's prompts have about" in line
    assert "lower max_tokens of model.teacher.context or" in line
    assert not lines(5, teacher, longest=20)
    assert not lines(80, EMA(context=SiblingDemonstration(max_tokens=5)), longest=20)
    # Each context of a teacher counts, and the reference's, and validation's responses.
    short = SiblingDemonstration(max_tokens=5)
    several = EMA(context=Contexts(parts={"short": short, "long": SiblingDemonstration()}))
    assert "the teacher's prompts have about" in lines(80, several, longest=20)[0]

    def told(**changes):
        caplog.clear()
        chat = Chat(tokenizer=tokenizer(), eos_ids=(2, 0), positions=200)
        made = SimpleNamespace(**vars(around(chat, response=80)) | changes)
        check_context(made, Toys(), 20)
        return caplog.messages

    assert not told()
    (line,) = told(reference=Frozen(context=SiblingDemonstration()))
    assert "the reference's prompts have about" in line and "model.reference.context" in line
    (line,) = told(val_sampling=Sampling(max_new_tokens=181))
    assert "a response up to 181 more" in line and "model.val_sampling.max_new_tokens" in line


DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML


def test_a_template_that_writes_the_date_is_warned_of_and_can_be_fixed(caplog):
    check_start(module(template=DATED), [Toys()])
    (line,) = [line for line in caplog.messages if "date" in line]
    assert (
        "writes today's date" in line and f"{{strftime_now: {date.today()}}} fixes the date" in line
    )
    caplog.clear()
    for fixed in ("2026-01-31", date(2026, 1, 31)):
        dated = module(template=DATED, strftime_now=fixed)
        check_start(dated, [Toys()])
        text = dated.policy.chat.text(Toys()[0].messages)
        assert text.startswith("31 Jan 2026<|im_start|>")
    # A template's own variable does as well.
    template = "{{ day if day is defined else strftime_now('%d %b %Y') }}" + CHATML
    check_start(module(template=template, day="26 Jul 2024"), [Toys()])
    assert "date" not in caplog.text
    with pytest.raises(ValueError, match=r"strftime_now: ...}` must be a date such as 2026-01-31"):
        module(template=DATED, strftime_now="today")
