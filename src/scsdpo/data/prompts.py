"""Sources that hold their prompts in memory."""

import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from typing import Any

from scsdpo.data._base import CHECK_AHEAD, Source
from scsdpo.data.golds import refuse_unmet
from scsdpo.data.table import Table, is_missing, whole_text
from scsdpo.environments import Environment
from scsdpo.types import Message, Prompt, ToolSchema, stable_hash


class PromptList(Source):
    """A finite source; its first access reads all prompts with `load`."""

    @abstractmethod
    def load(self) -> Iterable[Prompt]:
        """The prompts, in the same order each time."""

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """All prompts, read by `load` once."""
        return tuple(self.load())

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]


def make_prompt(
    source: str,
    *,
    question: str,
    answer: str,
    verifier: Environment,
    system: str = "",
    row: Mapping[str, Any] | None = None,
) -> Prompt:
    """A question as a prompt of `source`, which is its category too.

    The key hashes the texts and `row`, the further values that the environment reads. So it depends
    on neither order nor file nor process, and copies of a question have the same key.
    """
    extra = (json.dumps(row, sort_keys=True, default=str),) if row else ()
    system_turn: tuple[Message, ...] = ({"role": "system", "content": system},) if system else ()
    return Prompt(
        key=f"{source}/{stable_hash(source, system, question, answer, *extra):016x}",
        messages=(*system_turn, {"role": "user", "content": question}),
        verifier=verifier,
        answer=answer,
        category=source,
        row=row or {},
    )


_PIECES = re.compile(r"\{\{|\}\}|\{\}|\{([^{}]+)\}|[{}]")
_BRACES = {"{{": "{", "}}": "}", "{}": "{}"}


@dataclass(frozen=True, kw_only=True)
class PromptColumns:
    r"""The columns of a row that make a prompt, and the texts around them.

    Args:
        prompt: the question: a text, or a list of turns with `role` and `content`, the last one
            the user's; of a list of parts with `type` and `text`, the texts.
        answer: the gold answer: a text, a number, or a list with the assistant's turn; for a
            verifier that `reads_json`, any list or value with columns of its own, as JSON.
        system: the system turn; empty: there is no such column.
        category: group for which validation figures are reported; empty: there is none.
        tools: functions that the policy may call, for the chat template: a list of JSON schemas, or
            its JSON; empty: there are none.
        template: the question, made of columns whose names stand in braces: "{question}\nA. {A}";
            {{ and }} are braces, and {} stands for itself. Empty: the column `prompt`.
        system_prompt: the system turn of every question; empty: there is none.
        instruction: text after each question; a blank line is put before it if it does not begin
            with white space. Empty: none.
        answer_after: only the part of the gold answer after the last such text counts; empty: all.
        columns: further columns that an environment of several turns reads.

    Raises:
        ValueError: if `template` has a brace too many or names no column, or both `system` and
            `system_prompt` are given.
    """

    prompt: str = "prompt"
    answer: str = "answer"
    system: str = ""
    category: str = ""
    tools: str = ""
    template: str = ""
    system_prompt: str = ""
    instruction: str = ""
    answer_after: str = ""
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for match in _PIECES.finditer(self.template):
            if match[0] in ("{", "}"):
                raise ValueError(
                    f"`template` has a single {match[0]!r} at character {match.start() + 1}; write "
                    f"{match[0] * 2!r} for a brace in the text, and {{column}} for a column"
                )
        if self.template and not self._in_template:
            raise ValueError(f"`template` must name a column in braces, got {self.template!r}")
        if self.system and self.system_prompt:
            raise ValueError(
                f"`system` names a column, {self.system!r}, and `system_prompt` is a text: each "
                "question has one system turn, so leave one of them out"
            )

    @property
    def _in_template(self) -> list[str]:
        return [match[1].strip() for match in _PIECES.finditer(self.template) if match[1]]

    @property
    def arguments(self) -> dict[str, str]:
        """Each column that is read, with the argument that names it for error messages."""
        named = {"answer": self.answer, "system": self.system, "category": self.category}
        named["tools"] = self.tools
        if not self.template:
            named = {"prompt": self.prompt} | named
        found = {column: f"{name}={column!r}" for name, column in named.items() if column}
        found |= dict.fromkeys(self._in_template, "template=...")
        return found | {column: f"columns=[{column!r}]" for column in self.columns}

    def prompts(self, tables: Iterable[Table], name: str, verifier: Environment) -> list[Prompt]:
        """A prompt of source `name` for each row of all tables.

        Raises:
            ValueError: if a row has no question or no answer, or the verifier cannot read the
                answer, with the number of the row; or if no response could meet an answer.
            BrokenRow: if a text cannot be encoded.
        """
        rows = [(table, index) for table in tables for index in range(len(table.rows))]
        made = [self._prompt(table, index, name, verifier) for table, index in rows]
        # A stream's rows come one by one; the first `CHECK_AHEAD` are checked.
        if len(made) > 1 or rows[0][0].number(0) <= CHECK_AHEAD:
            refuse_unmet(name, made, lambda place: rows[place][0].where(rows[place][1]))
        return made

    def _prompt(self, table: Table, index: int, name: str, verifier: Environment) -> Prompt:
        turns, gold = self._turns(table, index), self._gold(table, index, verifier)
        system = turns[0]["content"] if turns[0]["role"] == "system" else ""
        row = {column: _json_value(table.rows[index].get(column)) for column in self.columns}
        try:
            prompt = make_prompt(
                name,
                question=turns[-1]["content"],
                answer=gold,
                verifier=verifier,
                system=system,
                row=row,
            )
        except ValueError as error:  # the environment refuses the row
            raise ValueError(f"{table.where(index)}: {error}") from error
        if len(prompt.messages) < len(turns):
            said = [text for turn in turns for text in (turn["role"], turn["content"])]
            extra = (json.dumps(row, sort_keys=True, default=str),) if row else ()
            key = f"{name}/{stable_hash(name, *said, gold, *extra):016x}"
            prompt = replace(prompt, key=key, messages=tuple(turns))
        if self.category:
            category = table.text(index, self.category, optional=True).strip()
            prompt = replace(prompt, category=category or name)
        given = table.rows[index].get(self.tools) if self.tools else None
        if not is_missing(given) and given != "":
            tools = tools_of(given, table.where(index, self.tools))
            key = f"{name}/{stable_hash(prompt.key, json.dumps(tools)):016x}"
            prompt = replace(prompt, key=key, tools=tools)
        return prompt

    def _turns(self, table: Table, index: int) -> list[Message]:
        value = table.rows[index].get(self.prompt)
        if isinstance(value, list) and not self.template:
            turns = turns_of(value, table.where(index, self.prompt))
        else:
            text = self._filled(table, index) if self.template else table.text(index, self.prompt)
            turns = [{"role": "user", "content": text}]
        glue = "\n\n" if self.instruction[:1].strip() else ""
        turns[-1]["content"] += glue + self.instruction
        system = self.system_prompt
        if self.system:
            system = table.text(index, self.system, optional=True)
        if system and turns[0]["role"] == "system":
            raise ValueError(
                f"{table.where(index, self.prompt)} begins with a system turn of its own; leave "
                f"out `{'system' if self.system else 'system_prompt'}`"
            )
        return [{"role": "system", "content": system}, *turns] if system else turns

    def _filled(self, table: Table, index: int) -> str:
        def piece(match: re.Match[str]) -> str:
            if not match[1]:
                return _BRACES[match[0]]
            column = match[1].strip()
            if is_missing(table.rows[index].get(column)):
                return table.text(index, column)  # raises
            return table.text(index, column, optional=True)  # an empty text is allowed

        return _PIECES.sub(piece, self.template)

    def _gold(self, table: Table, index: int, verifier: Environment) -> str:
        if not self.answer:
            return ""
        value = table.rows[index].get(self.answer)
        if isinstance(value, list) and len(value) == 1 and _is_turn(value[0], "assistant"):
            (turn,) = turns_of(value, table.where(index, self.answer), last="assistant")
            text = turn["content"]
        else:
            text = table.text(index, self.answer, as_json=verifier.reads_json)
        if not self.answer_after:
            return text
        after = text.rpartition(self.answer_after)[2].strip()
        if not after:
            raise ValueError(
                f"{table.where(index, self.answer)} must say something after "
                f"{self.answer_after!r}, got {text[-60:]!r}"
            )
        return after


def turns_of(value: list[Any], where: str, *, last: str = "user") -> list[Message]:
    """The turns of a conversation that a cell holds, with role and text each.

    Args:
        value: what the cell holds.
        where: name of the cell in errors.
        last: role of the last turn.

    Raises:
        ValueError: if they are no such turns.
        BrokenRow: if a turn's text cannot be encoded.
    """
    turns = []
    for number, turn in enumerate(value, start=1):
        if not _is_turn(turn):
            raise ValueError(
                f"{where} must be a text, or a list of turns with `role` and `content`, got "
                f"{str(turn)[:60]!r} as turn {number}"
            )
        more = [name for name, held in turn.items() if held and name not in ("role", "content")]
        if more:
            raise ValueError(
                f"{where}, turn {number} also holds {', '.join(map(repr, more))}, which the policy "
                "would not see; remove it, or write it into the text"
            )
        text = _joined(turn["content"], f"{where}, turn {number}")
        turns.append({"role": turn["role"], "content": text})
    if not turns or turns[-1]["role"] != last or not turns[-1]["content"].strip():
        ends = f"ends with the {turns[-1]['role']}'s" if turns else "has none"
        raise ValueError(
            f"{where} must be turns of which the last is the {last}'s and has text; it {ends}"
        )
    return turns


def tools_of(value: object, where: str) -> tuple[ToolSchema, ...]:
    """The functions that a cell holds, as chat templates take them.

    Keys without a value are dropped: in Parquet each function has the keys of all others.

    Args:
        value: a list, or its JSON; of functions, or of {"type": "function", "function": ...}.
        where: name of the cell in errors.

    Raises:
        ValueError: if it is no such list.
    """
    try:
        listed = json.loads(value) if isinstance(value, str) else value
        if not isinstance(listed, list):
            raise ValueError("it is no list")
        functions = [tool.get("function") or tool for tool in listed]
        if not all(isinstance(function["name"], str) for function in functions):
            raise ValueError("a name is no text")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{where} must be a list of functions with `name` and `parameters`, or its JSON, got "
            f"{str(value)[:60]!r} ({type(error).__name__}: {error})"
        ) from error
    return tuple({"type": "function", "function": _json_value(one)} for one in functions)


def _json_value(value: Any) -> Any:
    """`value` in JSON's types, without null values in mappings."""
    if isinstance(value, Mapping):
        return {key: _json_value(one) for key, one in value.items() if one is not None}
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return [_json_value(one) for one in value] if isinstance(value, list) else value


def _is_turn(value: object, role: str = "") -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        return False
    return isinstance(value.get("content"), str | list) and role in ("", value["role"])


def _joined(content: str | list[Any], where: str) -> str:
    """The text of a turn; a list of parts is joined."""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, Mapping) else part
                raise ValueError(f"{where} has a part of the type {kind!r}; only text is supported")
        content = "".join(part["text"] for part in content)
    return whole_text(content, where)
