"""Prompts from rows of questions and answers."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import get_worker_info

from scsdpo.data._base import Source, Stream
from scsdpo.data.files import BrokenRow
from scsdpo.data.prompts import PromptList, table_prompts
from scsdpo.data.rows import Rows
from scsdpo.data.table import Table
from scsdpo.types import Prompt
from scsdpo.verifiers import MathAnswer, ToolCall, Verifier

BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."

_log = logging.getLogger(__name__)


class Records(Stream):
    r"""Anything with a question and an answer in each row.

    At once, every row is checked before training. As a stream, rows are read as they are needed,
    for sets larger than memory or disk: columns are checked before training, and a row without a
    question, or without an answer that the verifier can read, is left out, counted and logged. A
    row that cannot be read at all (no JSON, no UTF-8, half a surrogate pair) ends the run, unless
    `max_broken_rows` lets it be left out too. Of gold answers the first 20,000 are checked.

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
        max_broken_rows: rows of a stream that may be broken in each pass; a resumed run meets them
            again, and counts them again. Of what is read at once, none may.

    Raises:
        ValueError: if `size` or `window` is below 1, or `max_broken_rows` below 0.
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
        max_broken_rows: int = 0,
    ) -> None:
        super().__init__(size=size, window=window)
        kind = type(self).__name__
        if max_broken_rows < 0:
            raise ValueError(f"`{kind}(max_broken_rows=...)` must be >= 0, got {max_broken_rows}")
        self.max_broken_rows = max_broken_rows
        self.path = path
        self.verifier = verifier
        self.columns = {"prompt": prompt, "answer": answer} | ({"system": system} if system else {})
        self.instruction = instruction
        self.streaming = streaming
        self._told: Counter[str] = Counter()
        self._name = name or Path(path).stem
        self.rows = Rows(path=path, owner=f"{kind}(path={path!r})", split=split, subset=subset)

    @property
    def name(self) -> str:
        """As given, or the path's last part."""
        return self._name

    @property
    def sequential(self) -> bool:
        """Whether rows are read as a stream."""
        return self.streaming

    @property
    def proves_golds(self) -> bool:
        """Row by row, with its number."""
        return True

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
        broken = left_out = 0
        checked = False
        for number, row in enumerate(self.rows.stream(), start=1):
            if not checked and isinstance(row, Table):
                self._check_columns(row)
                checked = True
            try:
                prompt = self._prompt(row)
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

    def _prompt(self, row: Table | BrokenRow) -> Prompt:
        if isinstance(row, BrokenRow):
            raise row
        # A missing column is an error with the row's number, like one without a value.
        rows = [dict.fromkeys(self.columns.values()) | row.rows[0]]
        (prompt,) = self._prompts(replace(row, rows=rows))
        return prompt

    def _too_many(self, broken: int, error: BrokenRow) -> str:
        count = f", broken row {broken} of this pass" if self.max_broken_rows else ""
        return (
            f"{error}{count}; mend it, or leave broken rows out with `max_broken_rows`, which is "
            f"{self.max_broken_rows}"
        )

    def _tell(self, what: str, count: int, read: int, why: ValueError) -> None:
        """Log the 1st, 2nd, 4th, 8th, ...: not a line for each, nor one in each pass or worker."""
        worker = get_worker_info()
        if count <= self._told[what] or count.bit_count() > 1 or (worker and worker.id > 0):
            return
        self._told[what] = count
        _warn(self.name, count, read, what, str(why))

    def _prompts(self, table: Table) -> list[Prompt]:
        return table_prompts(
            table, self.name, self.verifier, instruction=self.instruction, **self.columns
        )

    def _check_columns(self, table: Table) -> None:
        for argument, column in self.columns.items():
            table.check(column, f"{type(self).__name__}({argument}={column!r})")


@rank_zero_only
def _warn(*said: object) -> None:
    _log.warning("%s: %d of %d %s, the last because %s", *said)


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
        max_broken_rows: as in `Records`.
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
        max_broken_rows: int = 0,
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
            max_broken_rows=max_broken_rows,
        )

    def _prompts(self, table: Table) -> list[Prompt]:
        column = self.columns["answer"]
        results = [text.rpartition("####")[2].strip() for text in table.texts(column)]
        rows = [{**row, column: result} for row, result in zip(table.rows, results, strict=True)]
        return super()._prompts(replace(table, rows=rows))


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
        table = Table.read(self.path, f"ToolUse(path={str(self.path)!r})")
        system = "system" if "system" in table.columns else ""
        return table_prompts(table, self.name, self.verifier, system=system)
