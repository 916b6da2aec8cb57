"""The science questions of the SDPO paper."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from scsdpo.data.files import Row
from scsdpo.data.prompts import PromptColumns, PromptList
from scsdpo.data.table import Table
from scsdpo.types import Prompt
from scsdpo.verifiers import MultipleChoice

Domain = Literal["biology", "chemistry", "materials", "physics"]
Split = Literal["train", "test"]

HUB_DOMAINS = {
    "biology": "Biology",
    "chemistry": "Chemistry",
    "materials": "Material",
    "physics": "Physics",
}
HUB_TYPES = ("mcq-4-choices", "mcq-2-choices")
LEVELS = ("L1", "L2", "L3", "L4", "L5")
FILE_LEVEL = "L3"
"""The set's reasoning level, which the paper and its files use."""
TEST_SHARE, SPLIT_SEED = 0.1, 42
_COLUMNS = ("prompt", "answer", "system")

SYSTEM = """
Given a question and four options, please select the right answer. Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

For the answer, only output the letter corresponding to the correct option (A, B, C, or D), \
and nothing else. Do not restate the answer text. For example, if the answer is "A", just output:
<answer>
A
</answer>
"""
"""System turn of every question, two options or four, as published."""


class SciKnowEval(PromptList):
    """Multiple-choice questions of SciKnowEval, as the SDPO authors chose and split them.

    Args:
        domain: the science.
        split: "train", nine questions in ten, or "test".
        source: name of the set on the Hugging Face hub, or a folder with `train.json` and
            `test.json` in the format of the SDPO authors' repository. Both give the same prompts.
        strict: as in `MultipleChoice`.
        strip_thinking: as in `MultipleChoice`.
        level: of the set, L1 to L5; files hold the reasoning level, L3.

    Raises:
        ValueError: if `domain`, `split` or `level` is none of the above.

    Source:
        Feng et al. 2024, arXiv:2406.09098; selection, wording and split of Hübotter et al. 2026,
        arXiv:2601.20802, whose files the split with seed 42 reproduces row for row.
    """

    def __init__(
        self,
        domain: Domain,
        split: Split,
        *,
        source: str = "hicai-zju/SciKnowEval",
        strict: bool = True,
        strip_thinking: bool = True,
        level: str = FILE_LEVEL,
    ) -> None:
        for name, value, choices in (
            ("domain", domain, tuple(HUB_DOMAINS)),
            ("split", split, ("train", "test")),
            ("level", level, LEVELS),
        ):
            if value not in choices:
                raise ValueError(f"`SciKnowEval({name}=...)` must be of {choices}, got {value!r}")
        self.domain, self.split, self.level = domain, split, level
        self.source = source
        self.verifier = MultipleChoice(strict=strict, strip_thinking=strip_thinking)

    @property
    def name(self) -> str:
        """The domain."""
        return self.domain

    @property
    def proves_golds(self) -> bool:
        """Row by row, with its number."""
        return True

    def load(self) -> Iterable[Prompt]:
        """The questions of the split."""
        owner = f"SciKnowEval(source={self.source!r})"
        folder = Path(self.source).expanduser()
        if folder.is_dir():
            if self.level != FILE_LEVEL:
                raise ValueError(
                    f"`SciKnowEval(level={self.level!r})`: the files in {folder} hold level "
                    f"{FILE_LEVEL}; for another one take the set from the hub"
                )
            table = Table.read(folder / f"{self.split}.json", owner, _COLUMNS)
        else:
            rows = hub_split(
                _load_hub(self.source, owner), self.domain, self.split, level=self.level
            )
            table = Table(owner=owner, place=f"{self.source}, {self.domain}", rows=rows)
        for column in _COLUMNS:
            table.check(column, owner)
        return PromptColumns(system="system").prompts([table], self.name, self.verifier)


def hub_split(
    rows: Iterable[Row], domain: Domain, split: Split, *, level: str = FILE_LEVEL
) -> list[Row]:
    """The rows of a domain's split of the hub's set, in the columns of the published files."""
    chosen = [
        _published(row)
        for row in rows
        if row["domain"] == HUB_DOMAINS[domain]
        and row["details"]["level"] == level
        and row["type"] in HUB_TYPES
    ]
    # The order of `datasets.Dataset.train_test_split`: test rows first, then the training rows.
    order = np.random.default_rng(SPLIT_SEED).permutation(len(chosen))
    held_out = math.ceil(TEST_SHARE * len(chosen))
    return [chosen[i] for i in (order[:held_out] if split == "test" else order[held_out:])]


def _published(row: Row) -> Row:
    choices = zip(row["choices"]["label"], row["choices"]["text"], strict=True)
    options = "\n".join(f"{label}: {text}" for label, text in choices)
    return {
        "system": SYSTEM,
        "prompt": f"{row['question']}\n\n{options}\nPlease reason step by step.",
        "answer": row["answerKey"],
    }


def _load_hub(source: str, owner: str) -> Any:
    # Only `owner/name` is looked up on the hub; other paths are folders.
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise FileNotFoundError(
            f"`{owner}`: there is no such folder; it must hold train.json and test.json"
        )
    import datasets  # slow to import

    try:
        return datasets.load_dataset(source, split="test")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{owner}`: neither a folder here nor a set that the Hugging Face hub gives "
            f"({error}); download it, or name a folder that holds train.json and test.json"
        ) from error
