"""Write text to the run's loggers."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from scsdpo.records.outage import PAUSE, Outage


class TextLog:
    """Adds rows of text to TensorBoard and to loggers with tables (W&B); others are skipped.

    Nothing is overwritten: TensorBoard keeps each step's text, and a table is logged again with all
    of its rows. If a logger fails, its text is lost and the run continues.
    """

    def __init__(self) -> None:
        self._rows: dict[str, list[list[str]]] = {}
        self._outage = Outage("writing text to a logger", Exception, PAUSE)

    def write(
        self, trainer: L.Trainer, name: str, row: Sequence[tuple[str, str]], step: int
    ) -> None:
        """Add a row, on rank 0.

        Args:
            trainer: owns the loggers.
            name: name of the text or table.
            row: cells by column.
            step: number of batches asked so far.
        """
        heads, cells = ["batch", *(h for h, _ in row)], [str(step), *(c for _, c in row)]
        rows = self._rows.setdefault(name, [])
        rows.append(cells)
        for logger in trainer.loggers:
            self._outage.attempt(partial(_write, logger, name, heads, rows, step))


def _write(logger: Logger, name: str, heads: list[str], rows: list[list[str]], step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        lines = (f"**{h}**\n\n{_quoted(c)}" for h, c in zip(heads, rows[-1], strict=True))
        logger.experiment.add_text(name, "\n\n".join(lines), step)
    elif hasattr(logger, "log_text"):
        table: Any = logger
        table.log_text(key=name, columns=heads, data=[list(row) for row in rows])


def _quoted(text: str) -> str:
    """The text as a Markdown code block, so that TensorBoard shows it unchanged."""
    return "\n".join(f"    {line}" for line in text.splitlines())
