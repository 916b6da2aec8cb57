"""Prompts from rows of questions and answers."""

import logging
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities import rank_zero_only

from scsdpo.data._base import Source, Stream
from scsdpo.data.prompts import PromptList, table_prompts
from scsdpo.data.rows import Rows, good_rows
from scsdpo.data.table import Table
from scsdpo.types import Prompt
from scsdpo.verifiers import MathAnswer, ToolCall, Verifier
from scsdpo.verifiers.tool_call import gold_calls

BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."

_log = logging.getLogger(__name__)


class Records(Stream):
    r"""Anything with a question and an answer in each row.

    At once, every row is checked before training. As a stream, rows are read as they are needed,
    for sets larger than memory or disk: columns are checked before training, and a row without a
    question or an answer is left out, counted and logged.

    Args:
        path: a file of JSON lines, a JSON list or Parquet; a folder that `datasets` saved; or the
            name of a set on the Hugging Face hub.
        verifier: judges the responses; it compares them with the answer's text.
        prompt: name of the column with the question.
        answer: name of the column with the gold answer.
        system: name of the column with the system turn; empty: there is none.
        instruction: what is said after each question.
        name: name of the task in metrics; empty: the path's last part, without its extension.
        split: of a saved folder or a set on the hub.
        subset: of a set on the hub that has several ("configurations"); empty: it has not.
        streaming: read as a stream.
        size: questions of an epoch, and of a validation, of a stream; nominal.
        window: questions of a stream in memory, within which they are shuffled.

    Raises:
        ValueError: if `size` or `window` is below 1.
    """

    def __init__(
        self,
        path: str,
        verifier: Verifier,
        *,
        prompt: str = "prompt",
        answer: str = "answer",
        system: str = "",
        instruction: str = "",
        name: str = "",
        split: str = "train",
        subset: str = "",
        streaming: bool = False,
        size: int = 10_000,
        window: int = 1_000,
    ) -> None:
        super().__init__(size=size, window=window)
        self.path = path
        self.verifier = verifier
        self.columns = {"prompt": prompt, "answer": answer} | ({"system": system} if system else {})
        self.instruction = instruction
        self.streaming = streaming
        self._name = name or Path(path).stem
        kind = type(self).__name__
        self.rows = Rows(path=path, owner=f"{kind}(path={path!r})", split=split, subset=subset)

    @property
    def name(self) -> str:
        """As given, or the path's last part."""
        return self._name

    @property
    def sequential(self) -> bool:
        """Whether rows are read as a stream."""
        return self.streaming

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """All of them."""
        table = self.rows.table()
        self._check_columns(table)
        return tuple(self._prompts(table))

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
        left_out = 0
        tables = good_rows(self.rows.stream(), self.rows.owner, self.path)
        for number, table in enumerate(tables, start=1):
            if number == 1:
                self._check_columns(table)
            try:
                (prompt,) = self._prompts(table)
            except ValueError as error:
                left_out += 1
                if left_out.bit_count() == 1:  # 1, 2, 4, 8, ...: not a line for each
                    _warn_left_out(self.name, left_out, number, str(error))
                continue
            yield prompt

    def _prompts(self, table: Table) -> list[Prompt]:
        return table_prompts(
            table, self.name, self.verifier, instruction=self.instruction, **self.columns
        )

    def _check_columns(self, table: Table) -> None:
        for argument, column in self.columns.items():
            table.check(column, f"{type(self).__name__}({argument}={column!r})")


@rank_zero_only
def _warn_left_out(name: str, count: int, read: int, why: str) -> None:
    _log.warning("%s: %d of %d rows left out, the last because %s", name, count, read, why)


class Math(Records):
    r"""Mathematical questions, judged by `MathAnswer`.

    Of a gold answer that is a worked solution with the result after ####, as in GSM8K, the result
    counts.

    Args:
        path: as in `Records`.
        prompt: as in `Records`.
        answer: as in `Records`.
        system: as in `Records`.
        instruction: as in `Records`; asks for the form that is graded.
        name: as in `Records`.
        split: as in `Records`.
        subset: as in `Records`.
        streaming: as in `Records`.
        size: as in `Records`.
        window: as in `Records`.
    """

    def __init__(
        self,
        path: str,
        *,
        prompt: str = "problem",
        answer: str = "answer",
        system: str = "",
        instruction: str = BOXED,
        name: str = "",
        split: str = "train",
        subset: str = "",
        streaming: bool = False,
        size: int = 10_000,
        window: int = 1_000,
    ) -> None:
        super().__init__(
            path,
            MathAnswer(),
            prompt=prompt,
            answer=answer,
            system=system,
            instruction=instruction,
            name=name,
            split=split,
            subset=subset,
            streaming=streaming,
            size=size,
            window=window,
        )

    def _prompts(self, table: Table) -> list[Prompt]:
        column = self.columns["answer"]
        results = [text.rpartition("####")[2].strip() for text in table.texts(column)]
        rows = [{**row, column: result} for row, result in zip(table.rows, results, strict=True)]
        return super()._prompts(Table(owner=table.owner, place=table.place, rows=rows))


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

    def load(self) -> Iterable[Prompt]:
        """One prompt a row; a row whose gold answer cannot be read is an error."""
        table = Table.read(self.path, f"ToolUse(path={str(self.path)!r})")
        system = "system" if "system" in table.columns else ""
        prompts = table_prompts(table, self.name, self.verifier, system=system)
        for number, prompt in enumerate(prompts, start=1):
            try:
                gold_calls(prompt.answer)
            except ValueError as error:
                raise ValueError(f"`{table.owner}`: row {number}: {error}") from error
        return prompts
