"""An evaluation as a file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from scsdpo.evaluation.figures import LEVEL, figures
from scsdpo.evaluation.question import EvaluatedQuestion
from scsdpo.io.files import write_whole
from scsdpo.records.jsonl import with_nulls

SCHEMA_VERSION = 1
_TUPLES = {"rewards", "successes", "answers", "lengths", "finished"}


@dataclass(frozen=True, kw_only=True)
class Result:
    """An evaluation: its settings, and every question with the scores of its responses."""

    about: Mapping[str, Any]
    """`split`, `policy`, `checkpoint`, `step`, `batch`, `sampling`, ...; see docs/evaluation.md."""
    questions: Sequence[EvaluatedQuestion]
    demonstrations: Mapping[str, Any] | None = None
    """Scores with a demonstration in the prompt, if they were measured."""

    def write(self, path: Path) -> None:
        """Write it as JSON with every figure, atomically."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "kind": "evaluation",
            **self.about,
            "level": LEVEL,
            "figures": {
                category or "all": {name: asdict(one) for name, one in named.items()}
                for category, named in figures(self.questions).items()
            },
            **({"demonstrations": self.demonstrations} if self.demonstrations else {}),
            "questions": [_row(question) for question in self.questions],
        }
        text = json.dumps(with_nulls(content), ensure_ascii=False, indent=1)
        write_whole(path, f"{text}\n")

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Read a file of `write`.

        Raises:
            ValueError: if the file is no evaluation.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kind, version = content["kind"], content["schema_version"]
            rows = [_question(row) for row in content["questions"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no evaluation of `scsdpo validate`: {error}") from error
        if (kind, version) != ("evaluation", SCHEMA_VERSION):
            raise ValueError(f"{path} is {kind} of schema {version}, not evaluation of 1")
        derived = ("schema_version", "kind", "level", "figures", "demonstrations", "questions")
        about = {name: value for name, value in content.items() if name not in derived}
        shown = content.get("demonstrations")
        return cls(about=about, questions=rows, demonstrations=shown)


def _row(question: EvaluatedQuestion) -> dict[str, Any]:
    row = asdict(question)
    del row["right"]  # one response of each question is enough; `predict` writes all
    return row


def _question(row: Mapping[str, Any]) -> EvaluatedQuestion:
    known = {field.name for field in fields(EvaluatedQuestion)}
    values: dict[str, Any] = {name: value for name, value in row.items() if name in known}
    return EvaluatedQuestion(**values | {name: tuple(values[name]) for name in _TUPLES})
