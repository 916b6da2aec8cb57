"""Between chat messages and token ids, in one place.

A text never becomes a control token, such as one that opens or closes a turn (`Chat.control_ids`):
only the chat template writes these. Where a text spells one, a break is put into the spelling
before the template sees it. The template then renders as always, the tokenizer, which knows the
break as a token of its own, cannot join what stands on its two sides, and the break's id is left
out. A text that spells none goes to the tokenizer as it is: its ids are `apply_chat_template`'s.
"""

import copy
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AddedToken, PreTrainedTokenizerBase

from scsdpo.thinking import without_thinking
from scsdpo.types import Message, Tool

_BREAK = "\ufdd0"
"""Stands in the spelling of a control token; Unicode gives this code point to no character."""
TODAY = "strftime_now"
"""What templates call for the date, in transformers."""
_TAG = re.compile(r"[<\[].*\w.*[>\]]")
_MEDIA = re.compile(rf"(?=.*(?:image|img|vision|video|audio|multimodal)){_TAG.pattern}", re.I)
_ROLE = re.compile(r"[\w .-]+")
_WORD = "scsdpo"
"""What is said in turns that are rendered to see what stands around them."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A tokenizer with its chat template and end-of-sequence ids.

    Args:
        tokenizer: must have a chat template.
        eos_ids: every id that ends a response; several are common (`<|im_end|>`, `<|endoftext|>`).
        template_kwargs: passed to the chat template, e.g. `enable_thinking: false`. A date for
            `strftime_now`, such as 2026-01-31, is today's date for templates that write one.
        rows: of the model's embedding; ids from there on have none.
        positions: tokens of a prompt and its response that the model was made for.

    Raises:
        ValueError: if the tokenizer has no chat template, there is no end-of-sequence id, or
            `strftime_now` is no date.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    rows: int = sys.maxsize
    positions: int = sys.maxsize

    def __post_init__(self) -> None:
        name = self.tokenizer.name_or_path
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {name!r} has no chat template; use an instruction-tuned "
                "checkpoint, or add a `chat_template.jinja` to its folder"
            )
        if not self.eos_ids:
            raise ValueError(
                f"neither the tokenizer nor the generation config of {name!r} names an "
                "end-of-sequence token; set `eos_token_id` in its generation_config.json"
            )
        self._filling  # noqa: B018 - a date that is none is refused here

    @property
    def pad_id(self) -> int:
        """Fills the places that masks leave out; which id it is changes no number."""
        pad = self.tokenizer.pad_token_id
        if pad is not None and pad < self.rows:
            return pad
        return next((end for end in self.eos_ids if end < self.rows), self.eos_ids[0])

    @cached_property
    def _silent(self) -> frozenset[int | None]:
        """Tokens without text."""
        own = self.tokenizer
        return frozenset({*self.eos_ids, own.bos_token_id, own.eos_token_id, own.pad_token_id})

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[int, ...]:
        """Token ids of a conversation, with the header that opens the assistant's turn.

        Whatever a message says gives ordinary tokens; `control_ids` come from the template alone.

        Args:
            messages: the turns.
            tools: functions that the policy may call, for the template's `tools`.

        Raises:
            ValueError: if a role is not a plain word.
        """
        broken = self._each_broken(messages, tools)
        if broken == [list(messages), list(tools)]:
            return tuple(self._filled(self.tokenizer, broken, opened=True, tokenize=True))
        return self._unbroken(self._filled(self._breaking, broken, opened=True, tokenize=True))

    def text(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, opened: bool = True
    ) -> str:
        """What `render` makes ids of; with `opened=False` without the assistant's header."""
        broken = self._each_broken(messages, tools)
        return self._filled(self.tokenizer, broken, opened=opened, tokenize=False).replace(
            _BREAK, ""
        )

    def header(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """What opens the assistant's turn: text that the template adds when asked for it.

        Where the end of the user's turn opens it, as Mistral's [/INST] does, that end.
        """
        opened = self.text(messages, tools)
        closed = self.text(messages, tools, opened=False)
        if opened != closed and opened.startswith(closed):
            return opened[len(closed) :]
        return opened.rpartition(messages[-1]["content"].strip() or opened)[2]

    def continuation(
        self, messages: Sequence[Message], tools: Sequence[Tool] = ()
    ) -> tuple[int, ...]:
        """Ids between what the policy said in a turn and where it says something next.

        The first one ends the policy's turn: it is left out behind a response that has drawn an end
        of its own, whichever, and stands behind one that a stop string has ended. Then come the
        messages, as the template writes them behind a turn of the assistant's, and the header that
        opens the next one. Nothing of what stands before is rendered or tokenised again.

        Args:
            messages: what the world answers, in the roles `tool` (with a `name`) or `user`; what
                they say gives ordinary tokens.
            tools: functions that the policy may call.

        Raises:
            ValueError: if the template cannot be continued with such messages, and why.
        """
        shape = tuple((message["role"], message.get("name", "")) for message in messages)
        form, cut, end = self._joint(shape, tools)
        # What stands before the cut, tools too, stays as it was when the cut was found.
        said, _ = self._each_broken(_answers(messages, form), ())
        text: str = self._filled(
            self.tokenizer, [[*form, *said], list(tools)], opened=True, tokenize=False
        )
        token = self.tokenizer.convert_ids_to_tokens(end)
        # From the end on, which is a token of its own: what stands before it changes no id.
        behind = token + text[cut:]
        if _BREAK in behind:
            ids = list(self._unbroken(self._breaking.encode(behind, add_special_tokens=False)))
        else:
            ids = self.tokenizer.encode(behind, add_special_tokens=False)
        assert ids[0] == end, "the end of a turn is a token"
        return tuple(ids)

    def _joint(
        self, shape: tuple[tuple[str, str], ...], tools: Sequence[Tool]
    ) -> tuple[list[Any], int, int]:
        """How to render messages of so many roles and names: the turns that stand before them, the
        characters up to behind the end of the assistant's turn, and the id of that end.
        """
        known = self._joints
        offered = json.dumps(tools, sort_keys=True, default=str)
        if (shape, offered) not in known:
            known[shape, offered] = self._found_joint(shape, tools)
        return known[shape, offered]

    @cached_property
    def _joints(self) -> dict[Any, tuple[list[Any], int, int]]:
        return {}

    def _found_joint(
        self, shape: tuple[tuple[str, str], ...], tools: Sequence[Tool]
    ) -> tuple[list[Any], int, int]:
        why = ""
        for form in _forms(shape):
            try:
                return (form, *self._end_of_turn(form, shape, tools))
            except ValueError as error:
                why = why or str(error)
            except (TemplateError, TypeError, LookupError, AttributeError) as error:
                why = why or f"it refuses them ({str(error) or type(error).__name__})"
        roles = " and ".join(sorted({role for role, _ in shape}))
        raise ValueError(
            f"the chat template of {self.tokenizer.name_or_path!r} cannot be continued with turns "
            f"of the role {roles}: {why}"
        )

    def _end_of_turn(
        self, form: list[Any], shape: tuple[tuple[str, str], ...], tools: Sequence[Tool]
    ) -> tuple[int, int]:
        """Where the end of the assistant's turn ends, and its id.

        Raises:
            ValueError: if the template does not add messages behind what stands there.
        """

        def text(turns: list[Any], *, opened: bool) -> str:
            said: str = self._filled(
                self.tokenizer, [turns, list(tools)], opened=opened, tokenize=False
            )
            return said

        def answered(content: str, role: str = "") -> list[Any]:
            said = [{"role": role or r, "name": name, "content": content} for r, name in shape]
            said = [{k: v for k, v in each.items() if v} for each in said]
            return [*form, *_answers(said, form)]

        one, other = (text(answered(content), opened=True) for content in ("5", "7"))
        if one == other:
            raise ValueError("it leaves out what they say")
        before = one[: next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)]
        if not one.startswith(text(form[:1], opened=False)):
            raise ValueError("it changes what stands before when a turn is added")
        twice = text([*answered("5"), *form[1:], *answered("5")[len(form) :]], opened=False)
        if not twice.startswith(text(answered("5"), opened=False)):
            raise ValueError("it changes what stands before when a turn is added")
        if shape[0][0] == "tool" and text(answered("5", "assistant"), opened=True) == one:
            raise ValueError("it writes what a tool answers as words of the assistant")
        behind = before.rfind(_WORD) + len(_WORD)
        if behind < len(_WORD):
            raise ValueError("it leaves out the assistant's turn before them")
        ends = {
            before.find(token, behind): (len(token), i)
            for i in self.eos_ids
            if i < min(len(self.tokenizer), self.rows)
            and (token := self.tokenizer.convert_ids_to_tokens(i))
        }
        found = min((place for place in ends if place >= 0), default=-1)
        if found < 0:
            names = self.tokenizer.convert_ids_to_tokens(list(self.eos_ids))
            raise ValueError(
                f"it ends the assistant's turn before them with none of {', '.join(names)}, the "
                "ends of responses in generation_config.json"
            )
        length, end = ends[found]
        return found + length, end

    def encode(self, text: str) -> list[int]:
        """Ids of bare text: none of `control_ids`, and no special tokens added."""
        broken = self._broken(text)
        if broken == text:
            return self.tokenizer.encode(text, add_special_tokens=False)
        return list(self._unbroken(self._breaking.encode(broken, add_special_tokens=False)))

    def _filled(
        self, tokenizer: PreTrainedTokenizerBase, said: list[Any], *, opened: bool, tokenize: bool
    ) -> Any:
        """The template filled with messages and tools: text, or ids."""
        messages, tools = said
        return tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            add_generation_prompt=opened,
            tokenize=tokenize,
            return_dict=False,
            **self._filling,
        )

    @cached_property
    def _filling(self) -> dict[str, Any]:
        """`template_kwargs` with the function that tells templates the date, if it is fixed."""
        if TODAY not in self.template_kwargs:
            return dict(self.template_kwargs)
        given = str(self.template_kwargs[TODAY])
        try:
            today = datetime.fromisoformat(given)
        except ValueError as error:
            raise ValueError(
                f"`chat_template_kwargs: {{{TODAY}: ...}}` must be a date such as 2026-01-31, got "
                f"{given!r}"
            ) from error
        return {**self.template_kwargs, TODAY: today.strftime}

    def writes_date(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> bool:
        """Whether the template writes today's date, so that tomorrow's prompt is another one."""
        days = ("2001-02-03", "2014-12-25T12:13:14")
        if TODAY in self.template_kwargs:
            return False
        others = [
            replace(self, template_kwargs={**self.template_kwargs, TODAY: day}) for day in days
        ]
        return len({chat.text(messages, tools) for chat in others}) > 1

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Tokens that no text becomes.

        They are what the tokenizer calls special (beginnings, ends, padding, turns, images), what
        ends a response, and, where the tokenizer calls them merely added, what the template writes
        around the turns of a conversation (DeepSeek's <｜User｜>) and what is named after images,
        video or audio. Other added tokens are words of the model, which a text may use: <think> and
        <tool_call> where they are not special. An added token for which the embedding has no row is
        none of them.
        """
        own = self.tokenizer
        added = own.added_tokens_decoder.items()
        special = {
            i
            for i, token in added
            if token.special or i >= self.rows or _MEDIA.fullmatch(token.content)
        }
        return frozenset({*special, *own.all_special_ids, *self.eos_ids, *self._turn_ids()})

    def _turn_ids(self) -> set[int]:
        """Added tokens that the template writes around turns; none where it refuses such turns."""

        def turn(role: str, **more: Any) -> dict[str, Any]:
            return {"role": role, "content": "scsdpo", **more}

        def called(arguments: object) -> dict[str, Any]:
            function = {"name": "scsdpo", "arguments": arguments}
            call = {"type": "function", "id": "scsdpo000", "function": function}
            return turn("assistant", tool_calls=[call])

        talk = [turn("user"), turn("assistant"), turn("user")]
        ids = self._tags_around(talk) | self._tags_around([turn("system"), *talk])
        for arguments in ({"scsdpo": "scsdpo"}, '{"scsdpo": "scsdpo"}'):
            call = [turn("user"), called(arguments)]
            result = turn("tool", name="scsdpo", tool_call_id="scsdpo000")
            # Of a call the template writes words of the model; around its result, a turn.
            ids |= self._tags_around([*call, result]) - self._tags_around(call)
        return ids

    def _tags_around(self, messages: list[dict[str, Any]]) -> set[int]:
        """Added tokens in a rendered conversation that are tags, those of thinking left out."""
        try:
            text = self._filled(self.tokenizer, [messages, []], opened=False, tokenize=False)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
            return set()
        added = self.tokenizer.added_tokens_decoder
        written = set(self.tokenizer.encode(text, add_special_tokens=False)) & added.keys()
        return {
            i
            for i in written
            if _TAG.fullmatch(tag := added[i].content) and without_thinking(f"x{tag}") == f"x{tag}"
        }

    def _each_broken(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[Any]:
        """Messages and tools with a break within each spelling of a control token in them."""
        for message in messages:
            if not _ROLE.fullmatch(message["role"]):
                raise ValueError(f"the role of a chat turn must be a word, got {message['role']!r}")
        return [_each_text(said, self._broken) for said in (messages, tools)]

    def _broken(self, text: str) -> str:
        """`text` with a break within each spelling of a control token."""
        cuts = [
            start + 1 + len(said) - len(said.lstrip())
            for start, end in self._spelled(text)
            if len((said := text[start:end]).strip()) > 1
        ]
        if not cuts:
            return text
        # Behind a break another spelling may begin.
        return _BREAK.join(self._broken(text[a:b]) for a, b in pairwise([0, *cuts, len(text)]))

    def _spelled(self, text: str) -> Iterable[tuple[int, int]]:
        """Beginning and end of what the tokenizer would make a control token of."""
        own = self.tokenizer
        if not own.is_fast:
            spellings = sorted((own.convert_ids_to_tokens(i) for i in self.control_ids), key=len)
            pattern = "|".join(map(re.escape, reversed(spellings)))
            return (found.span() for found in re.finditer(pattern, text))
        ids = own.encode(text, add_special_tokens=False, verbose=False)
        if self.control_ids.isdisjoint(ids):
            return ()
        read = own(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        unknown = own.unk_token_id
        return (
            (start, end)
            for token, (start, end) in zip(ids, read["offset_mapping"], strict=True)
            if token in self.control_ids
            # A character that the vocabulary lacks is unknown without spelling that.
            and (token != unknown or text[start:end].strip() == own.unk_token)
        )

    @cached_property
    def _breaking(self) -> PreTrainedTokenizerBase:
        """The tokenizer with the break as a token of its own."""
        own = copy.deepcopy(self.tokenizer)
        own.add_tokens([AddedToken(_BREAK, special=True, normalized=False)], special_tokens=True)
        return own

    def _unbroken(self, ids: Sequence[int]) -> tuple[int, ...]:
        mark = self._breaking.convert_tokens_to_ids(_BREAK)
        return tuple(i for i in ids if i != mark)

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """Text of a response without beginnings, ends and padding; ids beyond the tokenizer give
        nothing. Other special tokens stay, such as <think> and <tool_call>: they say something.
        """
        said = [i for i in map(int, ids) if i < len(self.tokenizer) and i not in self._silent]
        return self.tokenizer.decode(said, skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """A piece of text for each id; together they are all of it, special tokens included.

        Where several tokens make one character the last of them has it, and the others ''.
        """
        pieces: list[str] = []
        start = said = 0  # of what is read; the first id without a piece
        for end in range(1, len(ids) + 1):
            text = self._whole(ids[start:end])
            if text.endswith("\ufffd") and end < len(ids):
                continue  # perhaps the beginning of a character
            given = len(self._whole(ids[start:said]))
            for last in range(said + 1, end):
                until = zip(self._whole(ids[start:last]), text, strict=False)
                known = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], until))
                pieces.append(text[given:known])
                given = max(given, known)
            pieces.append(text[given:])
            # From a token before, for some tokenizers drop a leading space.
            start, said = said, end
        return pieces

    def _whole(self, ids: Sequence[int]) -> str:
        known = [i for i in ids if i < len(self.tokenizer)]
        return self.tokenizer.decode(
            known, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def _forms(shape: tuple[tuple[str, str], ...]) -> Iterable[list[Any]]:
    """Turns that may stand before messages of such roles: tools answer calls, and some templates
    want them as mappings, some as JSON, some one by one, and some write none.
    """
    user = {"role": "user", "content": _WORD}
    names = [name or _WORD for role, name in shape if role == "tool"]
    for called in (names, names[:1]) if names else ():
        for arguments in ({_WORD: _WORD}, json.dumps({_WORD: _WORD})):
            calls = [
                {
                    "type": "function",
                    "id": f"{_WORD}{number:03}",
                    "function": {"name": name, "arguments": arguments},
                }
                for number, name in enumerate(called)
            ]
            yield [user, {"role": "assistant", "content": _WORD, "tool_calls": calls}]
    yield [user, {"role": "assistant", "content": _WORD}]


def _answers(messages: Sequence[Message], form: list[Any]) -> list[Message]:
    """Messages with the ids of the calls that they answer."""
    ids = [call["id"] for call in form[-1].get("tool_calls", [])]
    tools = (number for number in itertools.count())
    return [
        {**message, "tool_call_id": ids[min(next(tools), len(ids) - 1)]}
        if ids and message["role"] == "tool"
        else dict(message)
        for message in messages
    ]


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """`value`, made of lists, mappings and texts, with each text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _each_text(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(one, change) for one in value]
    return value
