"""Sources of prompts from rows of questions and answers."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from glob import has_magic
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import get_worker_info

from scsdpo.data._base import Source, Stream
from scsdpo.data.files import BrokenRow, uncompressed
from scsdpo.data.prompts import PromptColumns, PromptList
from scsdpo.data.rows import RowLocation
from scsdpo.data.table import Table
from scsdpo.environments import Environment
from scsdpo.types import Prompt
from scsdpo.verifiers import MathAnswer, ToolCall

BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."

_warn = rank_zero_only(logging.getLogger(__name__).warning)


class Records(Stream):
    r"""Questions from the rows of files or of a data set; each row has a question and an answer.

    By default all rows are read and checked before training. With `streaming`, rows are read as
    they are needed, for sets larger than memory or disk: columns are checked before training; a row
    without a question, or with an answer that the verifier cannot read, is skipped, counted and
    logged. A row that cannot be parsed (no JSON, no UTF-8, half a surrogate pair) ends the run,
    unless `max_broken_rows` allows it to be skipped too. The first 20,000 gold answers are checked.

    Columns that are not named are not read. A nested column is named by dots
    (`reward_model.ground_truth`), an element of a list by its number (`final_answer.0`). Numbers
    are written in full, and whole ones without a point; null and NaN count as missing.

    Args:
        path: a file of comma- or tab-separated values, JSON lines, a JSON list, Parquet, Arrow or
            Feather, also compressed (.gz, .bz2, .xz, .zst); several by a pattern (`part-*.csv`), or
            a folder of them; a folder that `datasets` saved; or the name of a set on the Hugging
            Face hub.
        verifier: judges responses by comparing them with the answer's text; or an environment of
            several turns, such as `Tools`.
        prompt: name of the column with the question: a text, or a list of chat turns.
        answer: name of the column with the gold answer (empty: there is none, for environments that
            give rewards by themselves): a text, a number, or a list with the
            assistant's turn; for `ToolCall`, `PythonTests` and `Callable`, also what becomes JSON.
        system: name of the column with the system turn; empty: there is none.
        category: name of the column with the group for which validation figures are reported;
            empty: there is none.
        tools: name of the column with the functions that the policy may call, which the chat
            template writes into the prompt: a list of JSON schemas, or its JSON; empty: none.
        template: the question, made of columns whose names stand in braces, such as "{question}\nA.
            {A}\nB. {B}"; {{ and }} are braces. Empty: it is the column `prompt`.
        system_prompt: the system turn of every question; empty: there is none.
        instruction: text after each question; a blank line is put before it if it does not begin
            with white space.
        answer_after: only the part of the gold answer after the last such text counts; empty: all.
        columns: further columns that an environment of several turns reads.
        name: name of the task in metrics; empty: the path's last part, without its extension.
        split: of a folder or a set; the names of a folder's files tell their split.
        subset: of a set on the hub that has several ("configurations"); empty: the set has one.
        streaming: read as a stream.
        size: nominal number of questions of an epoch, and of a validation, of a stream.
        window: number of questions of a stream in memory that are shuffled together.
        max_broken_rows: number of broken rows of a stream that each pass may skip; a resumed run
            reads and counts them again. Without `streaming` no row may be broken.

    Raises:
        ValueError: if `size` or `window` is below 1, or `max_broken_rows` below 0; if `template`
            has a brace too many, or both `system` and `system_prompt` are given; if the verifier
            needs a gold answer and `answer` is empty.
    """

    def __init__(
        self,
        path: str,
        verifier: Environment,
        *,
        prompt: str = "prompt",
        answer: str = "answer",
        system: str = "",
        category: str = "",
        tools: str = "",
        template: str = "",
        system_prompt: str = "",
        instruction: str = "",
        answer_after: str = "",
        columns: tuple[str, ...] = (),
        name: str = "",
        split: str = "train",
        subset: str = "",
        streaming: bool = False,
        size: int = 10_000,
        window: int = 1_000,
        max_broken_rows: int = 0,
    ) -> None:
        super().__init__(size=size, window=window)
        kind = type(self).__name__
        if max_broken_rows < 0:
            raise ValueError(f"`{kind}(max_broken_rows=...)` must be >= 0, got {max_broken_rows}")
        self.max_broken_rows = max_broken_rows
        self.path = path
        self.verifier = verifier
        if not answer and verifier.needs_answer:
            raise ValueError(
                f"`{kind}(answer='')` has no gold answers, and {type(verifier).__name__} compares "
                "with one; name their column"
            )
        try:
            self.columns = PromptColumns(
                prompt=prompt,
                answer=answer,
                system=system,
                category=category,
                tools=tools,
                template=template,
                system_prompt=system_prompt,
                instruction=instruction,
                answer_after=answer_after,
                columns=tuple(columns),
            )
        except ValueError as error:
            raise ValueError(f"`{kind}`: {error}") from error
        self.streaming = streaming
        self._told: Counter[str] = Counter()
        self._name = name or _stem(path)
        self.rows = RowLocation(
            path=path, owner=f"{kind}(path={path!r})", split=split, subset=subset
        )

    @property
    def name(self) -> str:
        """The argument `name`, or the path's last part."""
        return self._name

    @property
    def sequential(self) -> bool:
        """True if rows are read as a stream."""
        return self.streaming

    @property
    def proves_golds(self) -> bool:
        """Row by row, with its number."""
        return True

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """All of them."""
        tables = map(self._checked, self.rows.tables(list(self.columns.arguments)))
        return tuple(self.columns.prompts(tables, self.name, self.verifier))

    def __len__(self) -> int:
        return self.size if self.streaming else len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return super().__getitem__(index) if self.streaming else self.prompts[index]

    def shuffled(self, seed: int) -> Iterator[Prompt]:
        return super().shuffled(seed) if self.streaming else Source.shuffled(self, seed)

    def read(self) -> Iterator[Prompt]:
        if not self.streaming:
            yield from self.prompts
            return
        broken = left_out = 0
        checked = ""
        rows = self.rows.stream(list(self.columns.arguments))
        for number, row in enumerate(rows, start=1):
            if isinstance(row, Table) and row.place != checked:  # the first row of a file
                checked = self._checked(row).place
            try:
                if isinstance(row, BrokenRow):
                    raise row
                (prompt,) = self.columns.prompts([row], self.name, self.verifier)
            except BrokenRow as error:
                broken += 1
                if broken > self.max_broken_rows:
                    raise ValueError(self._too_many(broken, error)) from error
                self._tell("broken rows left out", broken, number, error)
            except ValueError as error:
                left_out += 1
                self._tell("rows left out", left_out, number, error)
            else:
                yield prompt

    def _too_many(self, broken: int, error: BrokenRow) -> str:
        count = f", broken row {broken} of this pass" if self.max_broken_rows else ""
        return (
            f"{error}{count}; fix it, or skip broken rows with `max_broken_rows`, which is "
            f"{self.max_broken_rows}"
        )

    def _tell(self, what: str, count: int, read: int, why: ValueError) -> None:
        """Log the 1st, 2nd, 4th, 8th, ... such row, in one worker and not again in later passes."""
        worker = get_worker_info()
        if count <= self._told[what] or count.bit_count() > 1 or (worker and worker.id > 0):
            return
        self._told[what] = count
        _warn("%s: %d of %d %s, the last because %s", self.name, count, read, what, why)

    def _checked(self, table: Table) -> Table:
        for column, argument in self.columns.arguments.items():
            table.check(column, f"{type(self).__name__}({argument})")
        return table


def _stem(path: str) -> str:
    """The path's last part without its extensions; of `data/train-*.csv`, `train`; of `data/*.csv`,
    `data`.
    """
    last = Path(path)
    while has_magic(last.name):
        if plain := re.split(r"[*?\[]", last.name)[0].rstrip("-_. "):
            return plain
        last = last.parent
    return uncompressed(last).stem or "records"


class Math(Records):
    r"""Mathematical questions: `Records` judged by `MathAnswer`, with other defaults.

    Of a gold answer that is a worked solution with the result after ####, as in GSM8K, the result
    counts.

    Args:
        path: as in `Records`, and so are all others.
        prompt: name of the column with the question.
        instruction: what is said after each question; asks for the form that is graded.
        answer_after: the text before the result in gold answers that are worked solutions.
    """

    def __init__(
        self,
        path: str,
        *,
        prompt: str = "problem",
        instruction: str = BOXED,
        answer_after: str = "####",
        **records: Any,
    ) -> None:
        super().__init__(
            path,
            MathAnswer(),
            prompt=prompt,
            instruction=instruction,
            answer_after=answer_after,
            **records,
        )


class ToolUse(PromptList):
    """Requests to be turned into tool calls, in ToolAlpaca's format; judged by `ToolCall`.

    Args:
        path: a file as in datasets/tooluse of the SDPO authors' repository: rows with `prompt`,
            `answer` (a JSON list of `Action` and `Action_Input`) and, where there is one, `system`.
        reveal: as in `ToolCall`.
        compatibility: as in `ToolCall`.

    Source:
        Tang et al. 2023, arXiv:2306.05301; rows of Hübotter et al. 2026, arXiv:2601.20802.
    """

    def __init__(
        self,
        path: str,
        *,
        reveal: bool = False,
        compatibility: Literal["none", "reference"] = "none",
    ) -> None:
        self.path = Path(path).expanduser()
        self.verifier = ToolCall(reveal=reveal, compatibility=compatibility)

    @property
    def name(self) -> str:
        """Always `tooluse`."""
        return "tooluse"

    @property
    def proves_golds(self) -> bool:
        """Row by row, with its number."""
        return True

    def load(self) -> Iterable[Prompt]:
        """One prompt a row; a row whose gold answer cannot be read is an error."""
        owner, wanted = f"ToolUse(path={str(self.path)!r})", ("prompt", "answer", "system")
        table = Table.read(self.path, owner, wanted)
        for column in wanted[:2]:
            table.check(column, owner)
        return PromptColumns(system="system").prompts([table], self.name, self.verifier)
