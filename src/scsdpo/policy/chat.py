"""Conversion between chat messages and token ids.

The text of a message never becomes a control token, such as one that opens or closes a turn
(`Chat.control_ids`): only the chat template writes these. If a text spells a control token, a break
character is put into the spelling before the template sees it. The tokenizer knows the break as a
token of its own, so it cannot join the text on both sides. The break's id is then removed. A text
that spells no control token is not changed: its ids are those of `apply_chat_template`.
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
from scsdpo.types import Message, ToolSchema

_BREAK = "\ufdd0"
"""The break: a code point that Unicode assigns to no character."""
TODAY = "strftime_now"
"""Name of the function that templates call for the date in transformers."""
_TAG = re.compile(r"[<\[].*\w.*[>\]]")
_MEDIA = re.compile(rf"(?=.*(?:image|img|vision|video|audio|multimodal)){_TAG.pattern}", re.I)
_ROLE = re.compile(r"[\w .-]+")
_WORD = "scsdpo"
"""Text of made-up turns, which are rendered to find what the template writes around them."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A tokenizer with its chat template and end-of-sequence ids.

    Args:
        tokenizer: must have a chat template.
        eos_ids: every id that ends a response; several are common (`<|im_end|>`, `<|endoftext|>`).
        template_kwargs: passed to the chat template, e.g. `enable_thinking: false`. Templates that
            write today's date write `strftime_now`, such as 2026-01-31, if it is given.
        rows: rows of the model's embedding; higher ids have no row.
        positions: most tokens of a prompt with its response that the model was made for.

    Raises:
        ValueError: if the tokenizer has no chat template, there is no end-of-sequence id, or
            `strftime_now` is not a date.
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
                f"the tokenizer of {name!r} has no chat template: use an instruction-tuned "
                "checkpoint, or add a `chat_template.jinja` to its folder"
            )
        if not self.eos_ids:
            raise ValueError(
                f"neither the tokenizer nor the generation config of {name!r} names an "
                "end-of-sequence token: set `eos_token_id` in its generation_config.json"
            )
        self._filling  # noqa: B018 - raises if `strftime_now` is not a date

    @property
    def pad_id(self) -> int:
        """Id for places that masks leave out; its value changes no result."""
        pad = self.tokenizer.pad_token_id
        if pad is not None and pad < self.rows:
            return pad
        return next((end for end in self.eos_ids if end < self.rows), self.eos_ids[0])

    @cached_property
    def _silent(self) -> frozenset[int | None]:
        """Ids that `decode` leaves out: beginnings, ends and padding."""
        own = self.tokenizer
        return frozenset({*self.eos_ids, own.bos_token_id, own.eos_token_id, own.pad_token_id})

    def render(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()
    ) -> tuple[int, ...]:
        """Token ids of a conversation, with the header that opens the assistant's turn.

        The text of messages gives ordinary tokens; only the template writes `control_ids`.

        Args:
            messages: the turns.
            tools: functions that the policy may call, passed to the template as `tools`.

        Raises:
            ValueError: if a role is not a plain word.
        """
        broken = self._each_broken(messages, tools)
        if broken == [list(messages), list(tools)]:
            return tuple(self._filled(self.tokenizer, broken, opened=True, tokenize=True))
        return self._unbroken(self._filled(self._breaking, broken, opened=True, tokenize=True))

    def text(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema] = (), *, opened: bool = True
    ) -> str:
        """The text of `render`'s ids; `opened=False` leaves out the assistant's header."""
        broken = self._each_broken(messages, tools)
        return self._filled(self.tokenizer, broken, opened=opened, tokenize=False).replace(
            _BREAK, ""
        )

    def header(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> str:
        """The text that opens the assistant's turn (`add_generation_prompt`).

        If a template has no such text, it is the end of the user's turn, such as Mistral's [/INST].
        """
        opened = self.text(messages, tools)
        closed = self.text(messages, tools, opened=False)
        if opened != closed and opened.startswith(closed):
            return opened[len(closed) :]
        return opened.rpartition(messages[-1]["content"].strip() or opened)[2]

    def continuation(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()
    ) -> tuple[int, ...]:
        """Ids between a turn of the policy and its next turn.

        The first id ends the policy's turn. Leave it out if the response ends with an
        end-of-sequence id of its own; keep it if a stop string ended the response. Then come the
        messages, as the template writes them after a turn of the assistant, and the header that
        opens the next turn. Nothing before them is rendered or tokenised again.

        Args:
            messages: the environment's answers, in the roles `tool` (with a `name`) or `user`;
                their text gives ordinary tokens.
            tools: functions that the policy may call.

        Raises:
            ValueError: if the template cannot be continued with such messages; it says why.
        """
        shape = tuple((message["role"], message.get("name", "")) for message in messages)
        form, cut, end = self._joint(shape, tools)
        # The text before the cut, tools included, must be as it was when the cut was found.
        said, _ = self._each_broken(_answers(messages, form), ())
        text: str = self._filled(
            self.tokenizer, [[*form, *said], list(tools)], opened=True, tokenize=False
        )
        token = self.tokenizer.convert_ids_to_tokens(end)
        # The end is a token of its own, so text before it changes no id after it.
        behind = token + text[cut:]
        if _BREAK in behind:
            ids = list(self._unbroken(self._breaking.encode(behind, add_special_tokens=False)))
        else:
            ids = self.tokenizer.encode(behind, add_special_tokens=False)
        assert ids[0] == end, "the end of a turn is a token"
        return tuple(ids)

    def _joint(
        self, shape: tuple[tuple[str, str], ...], tools: Sequence[ToolSchema]
    ) -> tuple[list[Any], int, int]:
        """Find how to render messages with the roles and names of `shape`: (turns to put before,
        number of characters up to the end of the assistant's turn, id of that end).
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
        self, shape: tuple[tuple[str, str], ...], tools: Sequence[ToolSchema]
    ) -> tuple[list[Any], int, int]:
        why = ""
        for form in _forms(shape):
            try:
                return (form, *self._end_of_turn(form, shape, tools))
            except ValueError as error:
                why = why or str(error)
            except (TemplateError, TypeError, LookupError, AttributeError) as error:
                why = why or f"the template raises an error ({str(error) or type(error).__name__})"
        roles = " and ".join(sorted({role for role, _ in shape}))
        raise ValueError(
            f"the chat template of {self.tokenizer.name_or_path!r} cannot be continued with turns "
            f"of the role {roles}: {why}"
        )

    def _end_of_turn(
        self, form: list[Any], shape: tuple[tuple[str, str], ...], tools: Sequence[ToolSchema]
    ) -> tuple[int, int]:
        """(character after the end of the assistant's turn, id of that end).

        Raises:
            ValueError: if the template does more than append messages to the text before them.
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
            raise ValueError("it leaves out their text")
        before = one[: next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)]
        if not one.startswith(text(form[:1], opened=False)):
            raise ValueError("it changes what stands before when a turn is added")
        twice = text([*answered("5"), *form[1:], *answered("5")[len(form) :]], opened=False)
        if not twice.startswith(text(answered("5"), opened=False)):
            raise ValueError("it changes what stands before when a turn is added")
        if shape[0][0] == "tool" and text(answered("5", "assistant"), opened=True) == one:
            raise ValueError("it writes the answer of a tool as text of the assistant")
        behind = before.rfind(_WORD) + len(_WORD)
        if behind < len(_WORD):
            raise ValueError("it leaves out the assistant's turn before them")
        ends = {
            before.find(token, behind): (len(token), i)
            for i in self.eos_ids
            if i < min(self._size, self.rows) and (token := self.tokenizer.convert_ids_to_tokens(i))
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
        """Ids of plain text, without `control_ids` and without added special tokens."""
        broken = self._broken(text)
        if broken == text:
            return self.tokenizer.encode(text, add_special_tokens=False)
        return list(self._unbroken(self._breaking.encode(broken, add_special_tokens=False)))

    def _filled(
        self, tokenizer: PreTrainedTokenizerBase, said: list[Any], *, opened: bool, tokenize: bool
    ) -> Any:
        """Render the template with `said` = [messages, tools], as text or ids."""
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
        """`template_kwargs`, with a date for `strftime_now` turned into a function."""
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

    def writes_date(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> bool:
        """True if the template writes today's date, so that a prompt changes from day to day."""
        days = ("2001-02-03", "2014-12-25T12:13:14")
        if TODAY in self.template_kwargs:
            return False
        others = [
            replace(self, template_kwargs={**self.template_kwargs, TODAY: day}) for day in days
        ]
        return len({chat.text(messages, tools) for chat in others}) > 1

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that the text of a message never becomes.

        These are the tokenizer's special tokens (beginnings, ends, padding, turns, images), ids
        that end a response, and added tokens without a row in the embedding. Added tokens that are
        not special belong to them if the template writes them around turns (DeepSeek's <｜User｜>),
        or if their name says image, video or audio. A text may use the other added tokens, such as
        <think> and <tool_call> where they are not special.
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
        """Added tokens that the template writes around turns; {} if it refuses such turns."""

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
            # Tags around a call are text of the model; only those around its result open a turn.
            ids |= self._tags_around([*call, result]) - self._tags_around(call)
        return ids

    def _tags_around(self, messages: list[dict[str, Any]]) -> set[int]:
        """Added tokens in a rendered conversation that are tags, except tags of thinking."""
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

    def _each_broken(self, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> list[Any]:
        """[messages, tools], with a break in each spelling of a control token."""
        for message in messages:
            if not _ROLE.fullmatch(message["role"]):
                raise ValueError(f"the role of a chat turn must be a word, got {message['role']!r}")
        return [_each_text(said, self._broken) for said in (messages, tools)]

    def _broken(self, text: str) -> str:
        """`text` with a break in each spelling of a control token."""
        cuts = [
            start + 1 + len(said) - len(said.lstrip())
            for start, end in self._spelled(text)
            if len((said := text[start:end]).strip()) > 1
        ]
        if not cuts:
            return text
        # After a break another spelling may begin.
        return _BREAK.join(self._broken(text[a:b]) for a, b in pairwise([0, *cuts, len(text)]))

    def _spelled(self, text: str) -> Iterable[tuple[int, int]]:
        """(start, end) of each part that the tokenizer would turn into a control token."""
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
            # A character that is not in the vocabulary becomes <unk> without spelling it.
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

    @cached_property
    def _size(self) -> int:
        """Tokens that the tokenizer knows, counted once: to count takes half a millisecond."""
        return len(self.tokenizer)

    def decode(self, ids: Sequence[int] | torch.Tensor) -> str:
        """Text of a response, without tokens for beginnings, ends and padding.

        Ids beyond the tokenizer's vocabulary give no text. Other special tokens stay, such as
        <think> and <tool_call>, because they have a meaning.
        """
        said = [i for i in map(int, ids) if i < self._size and i not in self._silent]
        return self.tokenizer.decode(said, skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """A piece of text for each id, special tokens included; joined they are the whole text.

        If several tokens make one character, the last of them gets it and the others get ''.
        """
        pieces: list[str] = []
        start = said = 0  # first id that is decoded; first id that has no piece yet
        for end in range(1, len(ids) + 1):
            text = self._whole(ids[start:end])
            if text.endswith("\ufffd") and end < len(ids):
                continue  # perhaps the first bytes of a character
            given = len(self._whole(ids[start:said]))
            for last in range(said + 1, end):
                until = zip(self._whole(ids[start:last]), text, strict=False)
                known = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], until))
                pieces.append(text[given:known])
                given = max(given, known)
            pieces.append(text[given:])
            # Decode from one token earlier: some tokenizers drop a leading space.
            start, said = said, end
        return pieces

    def _whole(self, ids: Sequence[int]) -> str:
        known = [i for i in ids if i < self._size]
        return self.tokenizer.decode(
            known, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def _forms(shape: tuple[tuple[str, str], ...]) -> Iterable[list[Any]]:
    """Turns to try before messages of `shape`: a turn of the user, then one of the assistant.

    An answer of a tool needs a call. Templates differ: some take a call's arguments as a mapping,
    some as JSON; some take only one call; some write no calls.
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
    """`messages`, each answer of a tool with the id of the call in `form` that it answers."""
    ids = [call["id"] for call in form[-1].get("tool_calls", [])]
    tools = (number for number in itertools.count())
    return [
        {**message, "tool_call_id": ids[min(next(tools), len(ids) - 1)]}
        if ids and message["role"] == "tool"
        else dict(message)
        for message in messages
    ]


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """`value` (nested lists, mappings and strings) with `change` applied to each string."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _each_text(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(one, change) for one in value]
    return value
