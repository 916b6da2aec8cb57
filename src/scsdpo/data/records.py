"""Prompts from files of rows."""

from collections.abc import Iterable
from pathlib import Path

from scsdpo.data.prompts import PromptList, table_prompts
from scsdpo.data.table import Table
from scsdpo.types import Prompt
from scsdpo.verifiers import ToolCall, Verifier
from scsdpo.verifiers.tool_call import gold_calls


class Records(PromptList):
    """Any file with a question and an answer in each row: JSON lines, a JSON list, or Parquet.

    Args:
        path: the file.
        verifier: judges the responses; it compares them with the answer's text.
        prompt: name of the column with the question.
        answer: name of the column with the gold answer.
        system: name of the column with the system turn; empty: there is none.
        name: name of the task in metrics; empty: the file's name without its extension.
    """

    def __init__(
        self,
        path: str,
        verifier: Verifier,
        *,
        prompt: str = "prompt",
        answer: str = "answer",
        system: str = "",
        name: str = "",
    ) -> None:
        self.path = Path(path).expanduser()
        self.verifier = verifier
        self.columns = {"prompt": prompt, "answer": answer} | ({"system": system} if system else {})
        self._name = name or self.path.stem

    @property
    def name(self) -> str:
        """As given, or the file's name."""
        return self._name

    def load(self) -> Iterable[Prompt]:
        """One prompt a row."""
        table = Table.read(self.path, f"Records(path={str(self.path)!r})")
        for argument, column in self.columns.items():
            table.check(column, f"Records({argument}={column!r})")
        return table_prompts(table, self.name, self.verifier, **self.columns)


class ToolUse(PromptList):
    """Requests to be turned into tool calls, in ToolAlpaca's format; judged by `ToolCall`.

    Args:
        path: a file as in datasets/tooluse of the SDPO authors' repository: rows with `prompt`,
            `answer` (a JSON list of `Action` and `Action_Input`) and, where there is one, `system`.

    Source:
        Tang et al. 2023, arXiv:2306.05301; rows of Hübotter et al. 2026, arXiv:2601.20802.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()

    @property
    def name(self) -> str:
        """Always `tooluse`."""
        return "tooluse"

    def load(self) -> Iterable[Prompt]:
        """One prompt a row; a row whose gold answer cannot be read is an error."""
        table = Table.read(self.path, f"ToolUse(path={str(self.path)!r})")
        system = "system" if "system" in table.columns else ""
        prompts = table_prompts(table, self.name, ToolCall(), system=system)
        for number, prompt in enumerate(prompts, start=1):
            try:
                gold_calls(prompt.answer)
            except ValueError as error:
                raise ValueError(f"`{table.owner}`: row {number}: {error}") from error
        return prompts
